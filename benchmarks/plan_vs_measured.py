"""The plan's peak against the measured one, on one GPU.

  python benchmarks/plan_vs_measured.py

Each point is planned with `jaxft.plan`, for the card that is here and as if it were not, then
trained for three steps in a process of its own (`benchmarks/offload.py`), whose allocator tells the
most bytes it had in use. A table, the median and the largest error go into docs/benchmarks.md; some
twenty minutes on one 80 GB card, less what does not fit. Without a GPU it prints the points alone,
with their numbers; `--points 0 3` takes these.

Plans need no card: `--plans FILE --device h100` makes those of the points, anywhere, and ends;
`--plans FILE` on the machine with the card takes what is in the file.

A plan is made without autotuning, which needs the card, and has no workspace of cuDNN's, which only
the library on the card tells; what is measured has both.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import children
import offload
import page

# model, rows, rows at once, tokens a row, remat, offload
POINTS = (
  ("gpt2", 8, 8, 1024, "none", "none"),
  ("gpt2", 8, 8, 1024, "dots", "none"),
  ("gpt2", 32, 32, 1024, "full", "none"),
  ("gpt2", 32, 8, 1024, "none", "none"),
  ("gpt2-medium", 8, 8, 1024, "none", "none"),
  ("gpt2-large", 8, 4, 1024, "full", "none"),
  ("gpt2-xl", 4, 4, 1024, "full", "none"),
  ("gpt2-xl", 8, 4, 1024, "full", "all"),
  ("gpt2-xl", 4, 4, 1024, "full", "optimizer"),
  ("EleutherAI/gpt-neo-1.3B", 4, 4, 2048, "full", "none"),
  ("EleutherAI/gpt-neo-2.7B", 2, 2, 2048, "full", "none"),
  ("EleutherAI/gpt-neo-2.7B", 4, 2, 2048, "full", "all"),
  ("EleutherAI/gpt-j-6b", 1, 1, 2048, "full", "all"),
  ("EleutherAI/gpt-j-6b", 4, 1, 2048, "full", "all"),
)
FLAGS = ("model", "rows", "micro", "length", "remat", "offload")


def parsed() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  numbers = range(len(POINTS))
  parser.add_argument(
    "--points", type=int, nargs="+", choices=numbers, default=list(numbers), metavar="N"
  )
  parser.add_argument(
    "--plans", type=Path, help="JSON file of plans: read, and written where one was not there"
  )
  parser.add_argument("--device", help="plan for it, and measure nothing; needs --plans")
  args = parser.parse_args()
  if args.device and not args.plans:
    parser.error("--device needs --plans, where the plans are saved")
  return args


def planned(point: tuple, kind: str, file: Path | None) -> int:
  """The peak of a point's plan, in bytes; out of `file`, where it is there."""
  import jaxft

  key = f"{kind}: {line_of(point)}"
  plans = json.loads(file.read_text()) if file and file.exists() else {}
  if key not in plans:
    how = argparse.Namespace(**dict(zip(FLAGS, point, strict=True)), optimizer="adamw", steps=3)
    plans[key] = jaxft.plan_for(offload.config_of(how), kind)["peak_bytes"]
    if file:
      file.write_text(json.dumps(plans, indent=2) + "\n")
  return plans[key]


def measured(point: tuple) -> dict:
  """What three steps of the point take, or {"error": ...}."""
  flags = [f"--{name}={value}" for name, value in zip(FLAGS, point, strict=True)]
  return children.answer(
    [sys.executable, offload.__file__, *flags, "--steps=3", "--pool=0", "--json"]
  )


def line_of(point: tuple) -> str:
  """The beginning of its line in the table."""
  model, rows, micro, length, remat, offload = point
  return f"| {model} | {rows} x {length}, {micro} | {remat} | {offload}"


def kind_of_this_gpu() -> str:
  """As `jaxft.plan` calls it, or nothing; in its own process: this one holds no card memory."""
  code = (
    "import sys; sys.path.append(sys.argv[1]); import json, children; from jaxft.hardware import "
    "specs; print(json.dumps({'kind': specs.local_target(children.jax_device(), 1).kind}))"
  )
  found = children.answer([sys.executable, "-c", code, str(Path(__file__).parent)])
  return found["kind"] if "kind" in found else sys.exit(f"error: no device: {found['error']}")


def main() -> None:
  from jaxft.plan import rendering

  args = parsed()
  points = [POINTS[i] for i in args.points]
  if args.device:
    for point in points:
      print(
        f"{line_of(point)} | {rendering.format_bytes(planned(point, args.device, args.plans))} |",
        flush=True,
      )
    return
  if not (kind := kind_of_this_gpu()):
    for i, point in zip(args.points, points, strict=True):
      print(f"{i:2} {line_of(point)} |")
    return print(
      "no GPU here that jaxft.plan knows: on one this fills a table, and tells the median and the "
      "largest error"
    )
  found, text = [], "no point could be measured"
  for point in points:
    found.append((point, planned(point, kind, args.plans), noted(point, kind)))
    if any("error" not in taken for _, _, taken in found):
      text = put(found)
  print(text)
  if failed := sum("error" in taken for _, _, taken in found):
    sys.exit(f"{failed} points failed, see above")


def noted(point: tuple, kind: str) -> dict:
  """`measured`, printed and noted."""
  now = measured(point)
  print(f"{line_of(point)} | {now.get('error') or now['peak_bytes']} |", flush=True)
  return page.note("plan_vs_measured", point=point, kind=kind, **now)


def put(found: list[tuple[tuple, int, dict]]) -> str:
  """The table, into the page."""
  from jaxft.plan import rendering

  errors, device, lines = [], None, []
  for point, plan, taken in found:
    if "error" in taken:
      lines.append(f"{line_of(point)} | {rendering.format_bytes(plan)} | {taken['error']} | | |")
      continue
    device, error = taken["device"], plan / taken["peak_bytes"] - 1
    errors.append(abs(error))
    cells = [
      rendering.format_bytes(plan),
      rendering.format_bytes(taken["peak_bytes"]),
      f"{100 * error:+.1f} %",
      f"{taken['step_seconds']:.2f} s",
    ]
    lines.append(f"{line_of(point)} | {' | '.join(cells)} |")
  head = (
    "| model | rows x tokens, at once | remat | offload | planned | measured | error | a step |"
  )
  about = (
    f"{page.machine(device, 'jax')}: {len(errors)} of {len(found)} points ran, median error "
    f"{100 * statistics.median(errors):.1f} %, largest {100 * max(errors):.1f} %."
  )
  text = "\n".join([about, "", head, f"|{'---|' * 8}", *lines])
  page.put(
    "the plan's peak against the measured one", "benchmarks/plan_vs_measured.py", text, device
  )
  return text


if __name__ == "__main__":
  main()
