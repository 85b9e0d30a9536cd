"""The pages' style, and the script that shows values under the pointer; pages work without it."""

from jaxft.plan.rendering import MEMORY_COLOURS

# Distinguishable colours: blue, vermilion, green, purple, ochre, sky (after Okabe and Ito), for
# light and dark screens.
LIGHT_COLOURS = ("#0b62a4", "#c1440e", "#00795a", "#8e4585", "#8a6a00", "#2a7fa8")
DARK_COLOURS = ("#6cb6f0", "#f0885a", "#4fc3a1", "#d59ad0", "#dcb84c", "#8fd0ee")

STYLE = (
  """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #fff; --text: #1b1c1e; --soft: #5d6166;
  --line: #e3e3e0; --grid: #ececea; --shade: #0003; --bad: #b3261e; --good: #00795a; """
  + " ".join(f"--c{i}: {colour};" for i, colour in enumerate(LIGHT_COLOURS))
  + """ }
@media (prefers-color-scheme: dark) { :root { --ground: #131416; --card: #1a1c1f; --text: #e7e7e4;
  --soft: #a0a4a9; --line: #303338; --grid: #26292d; --shade: #000c; --bad: #ff8a80;
  --good: #4fc3a1; """
  + " ".join(f"--c{i}: {colour};" for i, colour in enumerate(DARK_COLOURS))
  + """ } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); font: 16px/1.55 system-ui,
  -apple-system, "Segoe UI", Roboto, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.6rem, 1.2rem + 1.9vw, 2.4rem); line-height: 1.15; font-weight: 650;
  letter-spacing: -.02em; margin: .35rem 0 .7rem; text-wrap: balance; }
h2 { font-size: 1.2rem; font-weight: 650; letter-spacing: -.01em; margin: 0 0 1rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 1.5rem 0 .6rem; overflow-wrap: anywhere; }
p { margin: 0 0 .8rem; max-width: 46rem; }
section { margin-top: 3rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }
.over, .note, figcaption span, small { color: var(--soft); font-size: .875rem; }
.over { margin: 0; overflow-wrap: anywhere; }
.lead { font-size: 1.075rem; }
.bad { color: var(--bad); } .good { color: var(--good); }
.state { border-left: 3px solid var(--soft); padding: .5rem .9rem; background: var(--card);
  max-width: none; overflow-wrap: anywhere; white-space: pre-line; }
.state.bad { border-color: var(--bad); color: inherit; }
dl.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(11rem, 45%), 1fr));
  margin: 1.5rem 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  overflow: hidden; }
.tiles div { padding: .75rem 1rem; margin: 0 -1px -1px 0; border: solid var(--line); border-width: 0
  1px 1px 0; }
.tiles dt { color: var(--soft); font-size: .8125rem; }
.tiles dd { margin: .1rem 0 0; font-size: 1.15rem; font-weight: 600; font-variant-numeric:
  tabular-nums; letter-spacing: -.01em; }
.tiles small { display: block; font-weight: 400; font-size: .8125rem; letter-spacing: 0; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 14rem), 1fr)); gap:
  .75rem; margin: 0 0 1rem; align-items: start; }
.text { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem
  .95rem; margin: 0; }
.text b { display: block; color: var(--soft); font-size: .8125rem; font-weight: 600; margin-bottom:
  .25rem; }
.text.after { border-color: var(--c0); } .text.after b { color: var(--c0); }
.text div { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .9375rem; }
.text i { font-style: normal; color: var(--soft); }
/* A shadow at the side to which a table goes on: the ground's own colour covers it where the table
  ends. */
.scroll { overflow-x: auto; margin: 0 0 1rem; background:
  linear-gradient(to right, var(--ground) 2rem, transparent) local 0 0 / 4rem 100% no-repeat,
  linear-gradient(to left, var(--ground) 2rem, transparent) local 100% 0 / 4rem 100% no-repeat,
  linear-gradient(to right, var(--shade), transparent) scroll 0 0 / 1rem 100% no-repeat,
  linear-gradient(to left, var(--shade), transparent) scroll 100% 0 / 1rem 100% no-repeat; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9375rem; }
th, td { text-align: left; vertical-align: top; padding: .34rem 1.4rem .34rem 0; border-bottom: 1px
  solid var(--grid); }
th { font-weight: 400; color: var(--soft); } thead th { font-size: .8125rem; }
.numbers td, .numbers thead th:not(:first-child) { text-align: right; white-space: nowrap; }
.numbers thead th { white-space: normal; vertical-align: bottom; }
.runs tbody th { min-width: 10rem; max-width: 16rem; color: var(--text); overflow-wrap: anywhere; }
.runs small { display: block; font-size: .8125rem; }
.facts { width: 100%; } .facts th { white-space: nowrap; } .facts td { width: 100%; overflow-wrap:
  anywhere; }
.facts th, .facts td { max-width: 70vw; }
pre, code { font: .84rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem
  1rem; margin: 0 0 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .5rem 0 1rem; } summary { cursor: pointer; color: var(--soft); margin-bottom:
  .6rem; }
.pair { display: flex; flex-wrap: wrap; gap: 0 2.5rem; } .pair > section { flex: 1 1 auto;
  min-width: min(100%, 26rem); max-width: 100%; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1.75rem 2rem; }
.once { margin-top: 1.75rem; }
.charts > .wide { grid-column: 1 / -1; }
figure { margin: 0; min-width: 0; }
figcaption { margin-bottom: .85rem; line-height: 1.4; } figcaption b { font-weight: 600;
  margin-right: .4rem; }
.keys { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .8125rem; color: var(--soft);
  margin-top: .15rem; }
.key { display: inline-flex; align-items: center; gap: .4rem; overflow-wrap: anywhere; }
.key svg { flex: none; width: 1.3rem; height: .7rem; }
.plot { position: relative; margin: 0 0 1.6rem 3.3rem; height: 11rem; touch-action: pan-y; }
.wide .plot { height: 19rem; }
.plot > svg { position: absolute; width: 100%; height: 100%; overflow: visible; }
.plot span { position: absolute; font-size: .75rem; line-height: 1; color: var(--soft); white-space:
  nowrap; font-variant-numeric: tabular-nums; pointer-events: none; }
.plot .y { right: 100%; margin-right: .5rem; transform: translateY(-50%); }
.plot .x { top: 100%; margin-top: .5rem; transform: translateX(-50%); }
.plot .last { left: auto; right: 0; transform: none; }
.plot .at { right: .2rem; transform: translateY(-125%); }
.plot .tip { top: -.2rem; padding: .4rem .55rem; line-height: 1.45; background: var(--card); color:
  var(--text); border: 1px solid var(--line); border-radius: 6px; white-space: pre; z-index: 1; }
.plot .rule { top: 0; bottom: 0; border-left: 1px solid var(--soft); }
path, line, polyline { fill: none; vector-effect: non-scaling-stroke; }
.grid { stroke: var(--grid); } .axis { stroke: var(--line); }
.line { stroke-width: 1.75; stroke-linejoin: round; } .faint { stroke-width: 1; opacity: .32; }
.dots { stroke-width: 7; stroke-linecap: round; } .floor { stroke: var(--soft); stroke-dasharray: 5
  4; }
.fault { stroke: var(--bad); stroke-width: 2; }
"""
  + "".join(f".s{i} {{ stroke: var(--c{i}); }}\n" for i in range(len(LIGHT_COLOURS)))
  + "".join(f".{name} {{ background: {it[1]}; }}\n" for name, it in MEMORY_COLOURS.items())
  + "@media (prefers-color-scheme: dark) {\n"
  + "".join(f".{name} {{ background: {it[2]}; }}\n" for name, it in MEMORY_COLOURS.items())
  + "}\n"
  + """.bar { display: flex; height: 1.4rem; margin: .3rem 0 .8rem; background: var(--grid);
  border-radius: 4px; overflow: hidden; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .45em; }
footer { margin-top: 3rem; color: var(--soft); font-size: .8125rem; }
@media (max-width: 30rem) { main { padding: 1.5rem 1rem 3rem; } section { margin-top: 2.2rem; }
  .wide .plot { height: 15rem; } .plot { margin-left: 2.8rem; }
  .tiles div { min-width: 8rem; padding: .6rem .8rem; } .tiles dd { font-size: 1.05rem; }
  .facts tr { display: block; padding: .3rem 0; border-bottom: 1px solid var(--grid); }
  .facts th, .facts td { display: block; border: 0; padding: 0; max-width: none; } }
"""
)

# Lines are in a box of 1000 x 1000: data-x and data-y have the ends of the axes.
SCRIPT = """
"use strict";
for (const plot of document.querySelectorAll(".plot")) {
  const [x0, x1] = plot.dataset.x.split(" ").map(Number);
  const [y0, y1] = plot.dataset.y.split(" ").map(Number);
  const pairs = text => text.split(" ").filter(Boolean).map(pair => pair.split(",").map(Number));
  const lines = [...plot.querySelectorAll("polyline[data-name]")].map(line => (
    { name: line.dataset.name, points: pairs(line.getAttribute("points")) }));
  const linear = y => y1 - y / 1000 * (y1 - y0);
  const value = y => plot.dataset.log ? 10 ** linear(y) : linear(y);
  const format = v => Math.abs(v) >= 1000
    ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(4));
  const rule = plot.appendChild(document.createElement("span"));
  const tip = plot.appendChild(document.createElement("span"));
  rule.className = "rule"; tip.className = "tip"; rule.hidden = tip.hidden = true;
  plot.addEventListener("pointerleave", () => { rule.hidden = tip.hidden = true; });
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * 1000;
    if (at < 0 || at > 1000) return;
    const nearer = (best, p) => Math.abs(p[0] - at) < Math.abs(best[0] - at) ? p : best;
    const step = x => Math.round(x0 + x / 1000 * (x1 - x0)).toLocaleString("en");
    tip.textContent = lines.map(({ name, points }) => {
      const [x, y] = points.reduce(nearer, points[0]);
      return `step ${step(x)}  ${name} ${format(value(y))}`;
    }).join("\\n");
    rule.hidden = tip.hidden = false;
    rule.style.left = at / 10 + "%";
    tip.style.left = at < 500 ? `calc(${at / 10}% + 10px)` : "auto";
    tip.style.right = at < 500 ? "auto" : `calc(${100 - at / 10}% + 10px)`;
  });
}
"""
