"""The table of `make torture`, written into docs/reliability.md by the run itself."""

import datetime
import importlib.metadata
import platform
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- made by make torture -->", "<!-- end -->"


def write_table(reports) -> str:
  """The table of what the tests have recorded as "torture": {"what", "tried", "figures", "sums"}.

  Figures are {name: number} of which the worst counts, sums are added up.

  A part that failed has recorded nothing, and is counted apart. Returns the text, which is put into
  the page too.
  """
  rows, failed = {}, sum(1 for report in reports if report.failed)
  for report in reports:
    for name, value in report.user_properties:
      if name == "torture" and report.when == "call":
        row = rows.setdefault(value["what"], {"tried": 0, "figures": {}})
        row["tried"] += value["tried"]
        for figure, number in value.get("figures", {}).items():
          row["figures"][figure] = max(number, row["figures"].get(figure, number))
        for figure, number in value.get("sums", {}).items():
          row["figures"][figure] = number + row["figures"].get(figure, 0)
  lines = ["| fault | tried, all as required | of them, or worst seen |", "|---|---|---|"]
  for what, row in sorted(rows.items()):
    worst = ", ".join(f"{figure}: {number:,}" for figure, number in row["figures"].items())
    lines.append(f"| {what} | {row['tried']:,} | {worst} |")
  versions = ", ".join(
    f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "orbax-checkpoint")
  )
  lines += [
    "",
    f"{datetime.date.today()}, Python {platform.python_version()}, {versions}; "
    f"tests that failed: {failed}.",
  ]
  text = "\n".join(lines)
  page = PAGE.read_text(encoding="utf-8")
  before, _, rest = page.partition(BEGIN)
  PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
  return text
