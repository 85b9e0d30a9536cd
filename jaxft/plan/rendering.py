"""A plan for people: a table with a bar of the memory, and a page."""

import html
from collections.abc import Iterable
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jaxft.utils.backend import PINNED_FRACTION
from jaxft.utils.console import escape_controls

GIB = 2**30
BAR_WIDTH = 60  # characters
# Parts of the memory, with their colours: for a terminal, and for a page on light and on dark ground.
MEMORY_COLOURS = {
  "parameters": ("blue", "#3b6fb6", "#79a8e8"),
  "optimizer": ("magenta", "#8a4fa3", "#c492da"),
  "gradients": ("yellow", "#b8860b", "#e5c04b"),
  "activations": ("green", "#3c8d4f", "#7fd194"),
  "batch": ("cyan", "#2f8f9d", "#73cfdc"),
  "other": ("red", "#a35a4f", "#e09a8f"),
}
MEMORY_MEANING = {
  "parameters": "weights, float32",
  "optimizer": "optimizer state",
  "gradients": "gradient, float32",
  "activations": "activations, logits and other temporaries",
  "batch": "token ids, targets and masks",
  "other": "counters, and what tiles fill up",
}


def format_bytes(nbytes: float | None) -> str:
  """1.5 GiB, 20 MiB, 3 KiB; "?" for None."""
  if nbytes is None:
    return "?"
  for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
    if abs(nbytes) >= unit:
      return f"{nbytes / unit:.2f} {name}" if unit == GIB else f"{nbytes / unit:.0f} {name}"
  return f"{nbytes:.0f} B"


def format_seconds(value: float | None) -> str:
  return "?" if value is None else f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def fit_summary(plan: dict[str, Any]) -> str:
  peak, usable = max(plan["peak_bytes"], plan.get("eval_peak_bytes", 0)), plan["usable_bytes"]
  if plan["fits"]:
    return (
      f"fits: {format_bytes(peak)} of {format_bytes(usable)} a device, {100 * peak / usable:.0f} %"
    )
  return f"does not fit: needs {format_bytes(peak)} a device, of which there are {format_bytes(usable)}; {format_bytes(peak - usable)} too much"


def render_memory(plan: dict[str, Any]) -> RenderableType:
  """The bar and the table of a device's memory. Of `plan` it needs "breakdown", "peak_bytes", "usable_bytes" and "fits"."""
  table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
  for part, nbytes in plan["breakdown"].items():
    if nbytes:
      table.add_row(
        Text("■ ", MEMORY_COLOURS[part][0]) + Text(part),
        Text(format_bytes(nbytes), justify="right"),
        MEMORY_MEANING[part],
      )
  table.add_row(
    Text("peak", "bold"),
    Text(format_bytes(plan["peak_bytes"]), "bold", justify="right"),
    fit_summary(plan),
  )
  return Group(_memory_bar(plan), table)


def _memory_bar(plan: dict[str, Any]) -> Text:
  """The parts of the peak, side by side, up to the usable memory or, where the peak is higher, with a mark at that."""
  whole, bar, at = max(plan["peak_bytes"], plan["usable_bytes"]), Text(), 0
  ends, total = [], 0
  for part, nbytes in plan["breakdown"].items():
    total += nbytes
    ends.append((part, round(BAR_WIDTH * total / whole)))
  for part, end in ends:
    bar.append("█" * (end - at), MEMORY_COLOURS[part][0])
    at = max(at, end)
  bar.append("░" * (BAR_WIDTH - at), "grey50")
  mark = round(BAR_WIDTH * plan["usable_bytes"] / whole)
  if mark < BAR_WIDTH:
    bar = bar[:mark] + Text("│", "bold red") + bar[mark + 1 :]
  return bar


def render_plan(plan: dict[str, Any]) -> RenderableType:
  """All of a plan."""
  parts = [Text(f"\n{plan['model']} on {plan['device']}", "bold")]
  if "refused" in plan:
    parts.append(Text(escape_controls(f"as it is: {plan['refused']}")))
  else:
    parts += [render_memory(plan), _render_pairs(detail_rows(plan))]
  if "advice" in plan:
    parts += _render_advice(plan)
  return Group(*parts)


def _pinned_note(nbytes: int | None) -> str:
  if nbytes == 0:
    return ""
  most = f"{100 * PINNED_FRACTION:.0f} % of what the host has"
  return f"; XLA pins up to {most if nbytes is None else f'{format_bytes(nbytes)}, at most {most}'}"


def detail_rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
  """Everything but the memory of a device, as pairs of a name and what is said of it."""
  mesh = " x ".join(f"{name}={count}" for name, count in plan["mesh"].items())
  sent = (
    ", ".join(
      f"{kind} {format_bytes(nbytes)}"
      for kind, nbytes in plan["collective_bytes"].items()
      if nbytes
    )
    or "none"
  )
  kernel, why = plan["attention"]["kernel"], plan["attention"]["why_not_faster"]
  pairs = [
    (
      "devices",
      f"{plan['devices']} x {plan['device_kind']}, mesh {mesh}, computing in {plan['compute_dtype']}",
    ),
    ("step", f"{plan['tokens']:,} tokens in {plan['accumulation_steps']} accumulation step(s)"),
    ("attention", kernel + (f" ({why})" if why else "")),
    ("logits", f"{format_bytes(plan['logits_bytes'])} at once, float32, among the activations"),
    ("disk", f"{format_bytes(plan['checkpoint_bytes'])} for a checkpoint"),
    (
      "host memory",
      f"{format_bytes(plan['host_bytes'])} for each device"
      + (f", {format_bytes(plan['bus_bytes'])} a step over the bus" if plan["bus_bytes"] else "")
      + _pinned_note(plan["pinned_bytes"]),
    ),
    (
      "operations",
      f"{plan['flops']:.3g} in matrix products a step, {plan['flops'] / plan['model_flops']:.2f} x those of the model",
    ),
  ]
  estimate = plan["estimate"]
  if "eval_peak_bytes" in plan:
    pairs.insert(2, ("evaluation", f"{format_bytes(plan['eval_peak_bytes'])} a device at its peak"))
  if plan["moved_bytes"] is not None:
    pairs += [
      ("memory traffic", f"{format_bytes(plan['moved_bytes'])} a device and step"),
      ("collectives", f"{sent} a device and step"),
    ]
  if estimate:
    share = estimate["efficiency"]
    pairs += [
      (
        "estimate",
        f"{format_seconds(plan['step_seconds_estimate'])} a step, {estimate['tokens_per_second']:,.0f} tokens/s, MFU "
        f"{100 * estimate['mfu']:.0f} %; bound by {estimate['bound_by']}",
      ),
      (
        "",
        f"compute {format_seconds(estimate['compute_seconds'])} at {100 * share['compute']:.0f} % of "
        f"{estimate['peak']['flops'] / 1e12:.0f} TFLOP/s, "
        f"memory {format_seconds(estimate['memory_seconds'])} at {100 * share['memory']:.0f} % of "
        f"{estimate['peak']['memory_bytes_per_second'] / 1e9:.0f} GB/s, "
        f"network {format_seconds(estimate['network_seconds'])} at {100 * share['network']:.0f} % of "
        f"{estimate['peak']['link_bytes_per_second'] / 1e9:.0f} GB/s, "
        f"bus {format_seconds(estimate['bus_seconds'])} at {100 * share['bus']:.0f} % of "
        f"{estimate['peak']['bus_bytes_per_second'] / 1e9:.0f} GB/s",
      ),
      ("", f"these shares: {share['source']}"),
      ("", f"a step is {estimate['step_formula']}; MFU = {estimate['mfu_formula']}"),
    ]
    if plan["bus_bytes"]:
      rows = plan["rows_to_hide_the_bus"]
      pairs.append(
        (
          "",
          f"the bus takes as long for any batch: from {rows:,} rows on it is a fifth of a step, or less",
        )
      )
  if cost := plan["cost"]:
    tokens = (
      f", {cost['per_million_tokens']:.2f} a million tokens" if "per_million_tokens" in cost else ""
    )
    pairs.append(("cost", f"{cost['per_hour']:.2f} an hour{tokens}, by --prices"))
  versions = ", ".join(f"{name} {version}" for name, version in plan["versions"].items())
  took = "" if plan["compile_seconds"] is None else f"in {plan['compile_seconds']:.1f} s "
  return [*pairs, ("compiled", f"{took}with {versions}")]


def advice_rows(advice: dict[str, Any]) -> list[tuple[str, str, str, str]]:
  """(step, peak, host, flags) of the plans that fit, fastest first."""
  return [
    (
      format_seconds(it["step_seconds_estimate"]),
      format_bytes(it["peak_bytes"]),
      format_bytes(it["host_bytes"]),
      " ".join(it["overrides"]) or "as it is",
    )
    for it in advice["best"]
  ]


def rejection_lines(plan: dict[str, Any]) -> list[str]:
  """Lines on what the search left out, and, where nothing fits, on how much is missing."""
  advice = plan["advice"]
  lines = [f"{' '.join(it['overrides']) or 'as it is'}: {it['why']}" for it in advice["lost"]]
  lines += [
    f"{count} not compiled: {why}" for why, count in advice["not_compiled"].items() if count
  ]
  if not advice["best"]:
    least = advice["least_state_bytes"] or 0
    room = f"{format_bytes(advice['room_bytes'])} (5 % of the usable memory is to stay free)"
    if advice["ended_early"]:
      lines.append(
        f"none that fits {room} was found before {advice['ended_early']}; there may be one"
      )
    elif least > advice["room_bytes"]:
      state = f"weights, gradient and optimizer state alone take {format_bytes(least)} a device"
      lines.append(f"nothing of what was tried fits {room}: {state}")
    else:
      lines.append(f"nothing of what was tried fits {room}")
  return lines


def _render_advice(plan: dict[str, Any]) -> Iterable[RenderableType]:
  rows = advice_rows(plan["advice"])
  if rows:
    found = Table(
      "a step",
      "peak",
      "host",
      "flags",
      box=None,
      padding=(0, 2, 0, 0),
      title="fits, fastest first",
      title_justify="left",
    )
    for row in rows:
      found.add_row(*row)
    yield found
  yield Text(
    "\n".join(
      ["the rest:" if rows else "no settings that fit were found:", *rejection_lines(plan)]
    ),
    "grey50",
  )


def _render_pairs(pairs: list[tuple[str, str]]) -> Table:
  grid = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
  for name, value in pairs:
    grid.add_row(name, Text(escape_controls(value)))
  return grid


STYLE = "\n".join(
  [
    ":root { color-scheme: light dark; --ground: #fff; --text: #1d1d1f; --faint: #777; --line: #ddd; }",
    "@media (prefers-color-scheme: dark) { :root { --ground: #16181c; --text: #e8e8ea; --faint: #999; --line: #333; } }",
    "body { background: var(--ground); color: var(--text); font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; "
    "margin: 2rem auto; padding: 0 1rem; }",
    ".bar { display: flex; height: 2rem; border: 1px solid var(--line); position: relative; }",
    ".limit { position: absolute; top: -4px; bottom: -4px; border-left: 3px solid #d33; }",
    "td, th { padding: .2rem 1rem .2rem 0; vertical-align: top; text-align: left; }",
    "td:first-child { color: var(--faint); } code { overflow-wrap: anywhere; } .no { color: #d33; }",
    ".dot { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }",
    *(f".{part} {{ background: {light}; }}" for part, (_, light, _) in MEMORY_COLOURS.items()),
    "@media (prefers-color-scheme: dark) { "
    + " ".join(
      f".{part} {{ background: {dark}; }}" for part, (_, _, dark) in MEMORY_COLOURS.items()
    )
    + " }",
  ]
)


def html_page(plans: list[dict[str, Any]]) -> str:
  """One HTML page of all plans that needs nothing else: no script, no network; for light and dark screens."""
  title = html.escape(f"{plans[0]['model']} on {', '.join(plan['device'] for plan in plans)}")
  body = "\n".join(map(_html_section, plans))
  return (
    f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
    f'<meta name="viewport" content="width=device-width"><style>\n{STYLE}\n</style></head>\n<body>\n{body}\n</body></html>\n'
  )


def _html_section(plan: dict[str, Any]) -> str:
  e = lambda text: html.escape(escape_controls(str(text)))
  out = [f"<h1>{e(plan['model'])} on {e(plan['device'])}</h1>"]
  if "refused" in plan:
    out.append(f'<p class="no">as it is: {e(plan["refused"])}</p>')
  else:
    whole = max(plan["peak_bytes"], plan["usable_bytes"])
    parts = {part: nbytes for part, nbytes in plan["breakdown"].items() if nbytes}
    blocks = "".join(
      f'<div class="{part}" style="width:{100 * n / whole:.2f}%" title="{part} {format_bytes(n)}"></div>'
      for part, n in parts.items()
    )
    limit = f'<div class="limit" style="left:{100 * plan["usable_bytes"] / whole:.2f}%" title="usable"></div>'
    out += [
      f"<p{'' if plan['fits'] else ' class=no'}>{e(fit_summary(plan))}</p>",
      f'<div class="bar">{blocks}{limit}</div>',
      _html_table(
        [
          (f'<span class="dot {part}"></span>{part}', format_bytes(n), MEMORY_MEANING[part])
          for part, n in parts.items()
        ]
      ),
      _html_table([(e(name), e(value)) for name, value in detail_rows(plan)]),
    ]
  if "advice" in plan:
    rows = [
      (*map(e, told), f"<code>{e(flags)}</code>") for *told, flags in advice_rows(plan["advice"])
    ]
    out += [
      "<h2>What fits</h2>",
      _html_table([("a step", "peak", "host", "flags"), *rows] if rows else []),
    ]
    out += [f"<p>{e(line)}</p>" for line in rejection_lines(plan)]
  return "\n".join(out)


def _html_table(rows: list[tuple[str, ...]]) -> str:
  cells = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
  return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"
