// Shows values at the pointer; a page also works without this script. Lines are drawn in a box of
// 1000 x 1000; data-x and data-y are the ends of the axes.
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
    }).join("\n");
    rule.hidden = tip.hidden = false;
    rule.style.left = at / 10 + "%";
    tip.style.left = at < 500 ? `calc(${at / 10}% + 10px)` : "auto";
    tip.style.right = at < 500 ? "auto" : `calc(${100 - at / 10}% + 10px)`;
  });
}
