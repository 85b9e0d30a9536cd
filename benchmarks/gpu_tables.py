"""Tables of docs/benchmarks.md from what a run on a GPU left.

  python benchmarks/gpu_tables.py FOLDER [FOLDER ...]

FOLDER is the $OUT of benchmarks/gpu_short.sh; of several the contenders of a batch come into one
table. Beside each part's own section one tells the plan's error: planned against measured peaks, of
every part that has both. The line "Expect" of a config that a part stands for gets what was
measured, where it says that nothing is yet; what was decided otherwise is printed alone.

Figures of a CPU, such as those of GPU_TINY=1, are left out; where there are no others nothing is
written, and the code is 1.
"""

import argparse
import datetime
import re
import shutil
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any

from children import ROOT

sys.path.insert(0, str(ROOT))  # where jaxft is not installed
import page
import train_tables

from jaxft.plan import rendering

Line = dict[str, Any]
# Of parts of benchmarks/gpu_parts.py that take a step of a config's own model, offload and remat.
STANDS_FOR = {"gptj": "gptj_6b_8gb.py", "neo": "gptneo_2b7_16gb.py"}
UNMEASURED = re.compile(
  r"^Expect     not measured yet: it needs the weights and a GPU\.$", re.MULTILINE
)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
  parser.add_argument(
    "--root",
    type=Path,
    default=ROOT,
    help="whose docs/ and configs/ are written (default: this checkout's)",
  )
  args = parser.parse_args()
  lines = [
    line | {"folder": folder}
    for folder in args.folders
    for line in page.read(folder / "results.jsonl")
  ]
  measured = [line for line in lines if line.get("device") != "cpu"]
  if not any("device" in line for line in measured):
    names = ", ".join(map(str, args.folders))
    sys.exit(f"error: nothing in {names} was measured on a GPU; nothing is written")
  if left_out := len(lines) - len(measured):
    print(f"{left_out} lines are of a CPU, and left out")
  write_page(args.root / "docs" / "benchmarks.md", measured)
  copy_pictures(measured, args.root / "docs")
  newest = {line.get("part"): line for line in measured if line["benchmark"] == "offload"}
  for part in STANDS_FOR.keys() & newest.keys():
    write_config(args.root / "configs" / STANDS_FOR[part], expectation(newest[part]))


def write_page(file: Path, lines: list[Line]) -> None:
  text = page.with_sections(file.read_text(encoding="utf-8"), lines)
  for what, (_, table) in train_tables.sections(
    [line for line in lines if line["benchmark"] == "train"]
  ).items():
    text = page.with_section(text, what, "benchmarks/train.py", table)
  if planned := plan_errors(lines):
    print(planned)
    text = page.with_section(
      text, "the plan's peak and the measured one, by part", "benchmarks/gpu_tables.py", planned
    )
  file.write_text(text, encoding="utf-8")
  print(f"wrote {file}")
  if "**Not measured yet:** GPUs" in text:
    print(f"{file} says in its head that GPUs are not measured: that is to be changed by hand")


def plan_errors(lines: list[Line]) -> str:
  """A table of all lines that have both peaks; nothing where none has."""
  both = [
    line
    for line in lines
    if line.get("planned_peak_bytes") and line.get("peak_bytes") and "device" in line
  ]
  rows, errors = [], []
  for line in both:
    planned, peak = line["planned_peak_bytes"], line["peak_bytes"]
    errors.append(planned / peak - 1)
    name = f"{line.get('part', line['benchmark'])}, {model_of(line)}"
    rows.append(
      f"| {name} | {line['device']} | {rendering.format_bytes(planned)} | "
      f"{rendering.format_bytes(peak)} | {100 * errors[-1]:+.1f} % |"
    )
  if not both:
    return ""
  median, largest = statistics.median(map(abs, errors)), max(map(abs, errors))
  head = f"{len(both)} runs: median error {100 * median:.1f} %, largest {100 * largest:.1f} %."
  return "\n".join(
    [head, "", "| part | device | planned | measured | error |", f"|{'---|' * 5}", *rows]
  )


def model_of(line: Line) -> str:
  """What was run, in a few words."""
  settings = line.get("settings") or line
  batch = f", {settings['rows']} x {settings['length']}" if "rows" in settings else ""
  how = [f"{key}={settings[key]}" for key in ("offload", "remat") if key in settings]
  return f"{settings['model']}{batch}, {', '.join(how)}"


def copy_pictures(lines: list[Line], docs: Path) -> None:
  for line in lines:
    if line["benchmark"] == "gaps" and (file := line["folder"] / line["picture"]).exists():
      shutil.copy(file, docs / line["shown_as"])


def expectation(line: Line) -> str:
  """What the docstring of a config tells of a part's steps."""
  it, day = line["settings"], datetime.date.fromtimestamp(line["at"])
  pool = f", of which XLA had {it['pool']:g} GiB" if it["pool"] else ""
  return (
    "losses are not measured yet: they need the weights. With random ones on a "
    f"{line['device']}{pool}, {it['rows']} x {it['length']} tokens a step ({day}, jax "
    f"{line['jax']}): a peak of {rendering.format_bytes(line['peak_bytes'])}, "
    f"{line['step_seconds']:.2f} s a step, {line['tokens_per_second']:,.0f} tokens/s"
  )


def write_config(file: Path, result: str) -> None:
  """Into the docstring, where it says that nothing is measured; else it is printed alone."""
  text = file.read_text(encoding="utf-8")
  if not UNMEASURED.search(text):
    return print(f"{file} says something else already; this was measured: {result}")
  wrapped = textwrap.fill(
    f"Expect     {result}.", 100, subsequent_indent=" " * 11, break_on_hyphens=False
  )
  file.write_text(UNMEASURED.sub(lambda _: wrapped, text, count=1), encoding="utf-8")
  print(f"wrote {file}: {result}")


if __name__ == "__main__":
  main()
