"""The HTML page of plans: no scripts, no network; for light and dark screens."""

from collections.abc import Sequence

from jaxft.plan import rendering
from jaxft.plan.rendering import MEMORY_CATEGORIES, format_bytes
from jaxft.report_page.markup import Child, Html, element, escape, join, read_asset
from jaxft.utils.types import Json


def render(plans: list[Json]) -> str:
  """Return the HTML of one or more plans, in this order."""
  title = f"{plans[0]['model']} on {', '.join(plan['device'] for plan in plans)}"
  style = read_asset("plan.css", "memory.css")
  body = "\n".join(join(part) for plan in plans for part in _parts(plan))
  return (
    f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
    f'<meta name="viewport" content="width=device-width"><style>{style}</style></head>\n'
    f"<body>\n{body}\n</body></html>\n"
  )


def _parts(plan: Json) -> list[Child]:
  parts: list[Child] = [element("h1", f"{plan['model']} on {plan['device']}")]
  if "refused" in plan:
    parts.append(element("p", f"as given: {plan['refused']}", class_="no"))
  else:
    summary = rendering.fit_summary(plan)
    parts.append(element("p", summary, class_=None if plan["fits"] else "no"))
    parts += [_memory(plan), _table(rendering.detail_rows(plan))]
  if "advice" in plan:
    rows = [[*cells, element("code", it)] for *cells, it in rendering.advice_rows(plan["advice"])]
    head = [["step", "peak", "host", "flags"]] if rows else []
    parts += [element("h2", "Settings that fit"), _table([*head, *rows])]
    parts += [element("p", line) for line in rendering.rejection_lines(plan)]
  return parts


def _memory(plan: Json) -> list[Html]:
  """Render the bar and the table of a device's memory."""
  total = max(plan["peak_bytes"], plan["usable_bytes"])
  blocks, rows = [], []
  for name, nbytes in plan["breakdown"].items():
    if nbytes:
      size = format_bytes(nbytes)
      width = f"width:{nbytes / total:.2%}"
      blocks.append(element("div", class_=name, style=width, title=f"{name} {size}"))
      label = [element("span", class_=f"dot {name}"), name]
      rows.append([label, size, MEMORY_CATEGORIES[name][1]])
  left = f"left:{plan['usable_bytes'] / total:.2%}"
  limit = element("div", class_="limit", style=left, title="usable")
  return [element("div", blocks, limit, class_="bar"), _table(rows)]


def _table(rows: Sequence[Sequence[Child]]) -> Html:
  return element("table", [element("tr", [element("td", it) for it in row]) for row in rows])
