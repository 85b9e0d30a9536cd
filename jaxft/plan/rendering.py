"""Renders a plan for a terminal: a memory bar, and tables."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jaxft.utils.backend import PINNED_FRACTION
from jaxft.utils.console import escape_controls
from jaxft.utils.types import Json

GIB = 2**30
BAR_WIDTH = 60  # characters
PADDING = (0, 2, 0, 0)  # around the cells of a table
# Category of memory -> (color on a terminal, meaning). memory.css has the colors of HTML pages.
MEMORY_CATEGORIES = {
  "parameters": ("blue", "weights, float32"),
  "optimizer": ("magenta", "optimizer state"),
  "gradients": ("yellow", "gradient, float32"),
  "activations": ("green", "activations, logits and other temporaries"),
  "batch": ("cyan", "token ids, targets and masks"),
  "other": ("red", "counters and padding of tiles"),
}


def format_bytes(nbytes: float | None) -> str:
  """Return a size such as 1.50 GiB, 20 MiB or 3 KiB; "?" for None."""
  if nbytes is None:
    return "?"
  for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
    if abs(nbytes) >= unit:
      return f"{nbytes / unit:.2f} {name}" if unit == GIB else f"{nbytes / unit:.0f} {name}"
  return f"{nbytes:.0f} B"


def format_seconds(value: float | None) -> str:
  """Return a duration such as 1.25 s or 310 ms; "?" for None."""
  return "?" if value is None else f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def fit_summary(plan: Json) -> str:
  """Return whether the plan fits, and by how much."""
  peak = max(plan["peak_bytes"], plan.get("eval_peak_bytes", 0))
  usable = plan["usable_bytes"]
  needs, has, excess = map(format_bytes, (peak, usable, peak - usable))
  if plan["fits"]:
    return f"fits: {needs} of {has} per device, {100 * peak / usable:.0f} %"
  return f"does not fit: needs {needs} of {has} per device, {excess} too much"


def render_memory(plan: Json) -> RenderableType:
  """Render the bar and the table of a device's memory.

  Args:
    plan: needs only "breakdown", "peak_bytes", "usable_bytes" and "fits".
  """
  table = Table(box=None, show_header=False, padding=PADDING)
  for category, nbytes in plan["breakdown"].items():
    if nbytes:
      colour, meaning = MEMORY_CATEGORIES[category]
      size = Text(format_bytes(nbytes), justify="right")
      table.add_row(Text("■ ", colour) + Text(category), size, meaning)
  peak = Text(format_bytes(plan["peak_bytes"]), "bold", justify="right")
  table.add_row(Text("peak", "bold"), peak, fit_summary(plan))
  return Group(_memory_bar(plan), table)


def _memory_bar(plan: Json) -> Text:
  """Render the parts of the peak as one bar, with a mark at the usable memory."""
  max_bytes = max(plan["peak_bytes"], plan["usable_bytes"])

  def column(nbytes: int) -> int:
    return round(BAR_WIDTH * nbytes / max_bytes)

  bar = Text()
  total = end = 0
  for category, nbytes in plan["breakdown"].items():
    total += nbytes
    bar.append("█" * (column(total) - end), MEMORY_CATEGORIES[category][0])
    end = max(end, column(total))
  bar.append("░" * (BAR_WIDTH - end), "grey50")
  mark = column(plan["usable_bytes"])
  if mark < BAR_WIDTH:
    bar = bar[:mark] + Text("│", "bold red") + bar[mark + 1 :]
  return bar


def render_plan(plan: Json) -> RenderableType:
  """Render a whole plan."""
  parts: list[RenderableType] = [Text(f"\n{plan['model']} on {plan['device']}", "bold")]
  if "refused" in plan:
    parts.append(Text(escape_controls(f"as given: {plan['refused']}")))
  else:
    parts += [render_memory(plan), _render_pairs(detail_rows(plan))]
  if "advice" in plan:
    parts += _render_advice(plan)
  return Group(*parts)


def _pinned_note(nbytes: int | None) -> str:
  if nbytes == 0:
    return ""
  limit = f"{100 * PINNED_FRACTION:.0f} % of the host's memory"
  size = limit if nbytes is None else f"{format_bytes(nbytes)}, at most {limit}"
  return f"; XLA pins up to {size}"


def detail_rows(plan: Json) -> list[tuple[str, str]]:
  """Return the plan without the device memory, as (name, text) pairs."""
  mesh = " x ".join(f"{name}={count}" for name, count in plan["mesh"].items())
  devices = f"{plan['devices']} x {plan['device_kind']}"
  kernel = plan["attention"]["kernel"]
  why = plan["attention"]["why_not_faster"]
  bus = plan["bus_bytes"]
  traffic = f", {format_bytes(bus)} per step over the bus" if bus else ""
  host = f"{format_bytes(plan['host_bytes'])} per device{traffic}"
  ratio = plan["flops"] / plan["model_flops"]
  pairs = [
    ("devices", f"{devices}, mesh {mesh}, computing in {plan['compute_dtype']}"),
    ("step", f"{plan['tokens']:,} tokens in {plan['accumulation_steps']} accumulation step(s)"),
    ("attention", kernel + (f" ({why})" if why else "")),
    ("logits", f"{format_bytes(plan['logits_bytes'])} in float32, part of the activations"),
    ("disk", f"{format_bytes(plan['checkpoint_bytes'])} per checkpoint"),
    ("host memory", host + _pinned_note(plan["pinned_bytes"])),
    (
      "operations",
      f"{plan['flops']:.3g} FLOPs of matrix products per step, {ratio:.2f} x the model FLOPs",
    ),
  ]
  if "eval_peak_bytes" in plan:
    peak = format_bytes(plan["eval_peak_bytes"])
    pairs.insert(2, ("evaluation", f"{peak} per device at its peak"))
  if plan["moved_bytes"] is not None:
    collectives = {kind: n for kind, n in plan["collective_bytes"].items() if n}
    sent = ", ".join(f"{kind} {format_bytes(n)}" for kind, n in collectives.items()) or "none"
    pairs.append(("memory traffic", f"{format_bytes(plan['moved_bytes'])} per device and step"))
    pairs.append(("collectives", f"{sent} per device and step"))
  if plan["estimate"]:
    pairs += _estimate_rows(plan["estimate"], plan)
  if cost := plan["cost"]:
    per_million = cost.get("per_million_tokens")
    tokens = "" if per_million is None else f", {per_million:.2f} per million tokens"
    pairs.append(("cost", f"{cost['per_hour']:.2f} per hour{tokens}, from --prices"))
  versions = ", ".join(f"{name} {version}" for name, version in plan["versions"].items())
  took = "" if plan["compile_seconds"] is None else f"in {plan['compile_seconds']:.1f} s "
  return [*pairs, ("compiled", f"{took}with {versions}")]


def _estimate_rows(estimate: Json, plan: Json) -> list[tuple[str, str]]:
  share = estimate["efficiency"]
  peak = estimate["peak"]
  speeds = {
    "compute": f"{peak['flops'] / 1e12:.0f} TFLOP/s",
    "memory": f"{peak['memory_bytes_per_second'] / 1e9:.0f} GB/s",
    "network": f"{peak['link_bytes_per_second'] / 1e9:.0f} GB/s",
    "bus": f"{peak['bus_bytes_per_second'] / 1e9:.0f} GB/s",
  }
  terms = (
    f"{name} {format_seconds(estimate[f'{name}_seconds'])} at {100 * share[name]:.0f} % of {speed}"
    for name, speed in speeds.items()
  )
  step = f"{format_seconds(plan['step_seconds_estimate'])} per step"
  speed = f"{estimate['tokens_per_second']:,.0f} tokens/s, MFU {100 * estimate['mfu']:.0f} %"
  rows = [
    ("estimate", f"{step}, {speed}; bound by {estimate['bound_by']}"),
    ("", ", ".join(terms)),
    ("", f"source of these shares: {share['source']}"),
    ("", f"step time = {estimate['step_formula']}; MFU = {estimate['mfu_formula']}"),
  ]
  if plan["bus_bytes"]:
    count = f"{plan['rows_to_hide_the_bus']:,}"
    note = f"with {count} rows or more it is at most a fifth of a step"
    rows.append(("", f"the time of the bus does not depend on the batch: {note}"))
  return rows


def advice_rows(advice: Json) -> list[tuple[str, str, str, str]]:
  """Return (step, peak, host, flags) of the plans that fit, fastest first."""
  return [
    (
      format_seconds(it["step_seconds_estimate"]),
      format_bytes(it["peak_bytes"]),
      format_bytes(it["host_bytes"]),
      " ".join(it["overrides"]) or "as given",
    )
    for it in advice["best"]
  ]


def rejection_lines(plan: Json) -> list[str]:
  """Return lines about rejected settings and, if none fits, the missing memory."""
  advice = plan["advice"]
  lines = [f"{' '.join(it['overrides']) or 'as given'}: {it['why']}" for it in advice["lost"]]
  counts = {why: count for why, count in advice["not_compiled"].items() if count}
  lines += [f"{count} not compiled: {why}" for why, count in counts.items()]
  if not advice["best"]:
    least = advice["least_state_bytes"] or 0
    budget = f"{format_bytes(advice['room_bytes'])} (5 % of the usable memory stays free)"
    if early := advice["ended_early"]:
      lines.append(f"no settings within {budget} were found, but {early}: others may fit")
    else:
      state = f"weights, gradient and optimizer state alone take {format_bytes(least)} per device"
      reason = f": {state}" if least > advice["room_bytes"] else ""
      lines.append(f"no settings fit {budget}{reason}")
  return lines


def _render_advice(plan: Json) -> list[RenderableType]:
  rows = advice_rows(plan["advice"])
  head = "other settings:" if rows else "no settings that fit were found:"
  rest = Text("\n".join([head, *rejection_lines(plan)]), "grey50")
  if not rows:
    return [rest]
  table = Table("step", "peak", "host", "flags", box=None, padding=PADDING)
  table.title, table.title_justify = "fits, fastest first", "left"
  for row in rows:
    table.add_row(*row)
  return [table, rest]


def _render_pairs(pairs: list[tuple[str, str]]) -> Table:
  grid = Table(box=None, show_header=False, padding=PADDING)
  for name, value in pairs:
    grid.add_row(name, Text(escape_controls(value)))
  return grid
