"""The plan's peak against the measured one, on one GPU: python benchmarks/plan_vs_measured.py

Each point is planned with `jaxft.plan`, for the card that is here and as if it were not, then trained for three steps in a
process of its own (`benchmarks/offload.py`), whose allocator tells the most bytes it had in use. A table, the median and the
largest error go into docs/benchmarks.md; some twenty minutes on one 80 GB card, less what does not fit. Without a GPU it prints
the points alone.

A plan is made without autotuning, which needs the card, and has no workspace of cuDNN's, which only the library on the card
tells; what is measured has both.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

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


def measured(point: tuple) -> dict:
  """What three steps of the point take, or {"error": the last line that it said}."""
  flags = [f"--{name}={value}" for name, value in zip(FLAGS, point, strict=True)]
  command = [sys.executable, str(Path(offload.__file__)), *flags, "--steps=3", "--pool=0", "--json"]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    return {"error": f"code {done.returncode}: {(done.stderr.strip() or 'it said nothing').splitlines()[-1][:200]}"}
  return json.loads(done.stdout.splitlines()[-1])


def line_of(point: tuple) -> str:
  """The beginning of its line in the table."""
  model, rows, micro, length, remat, kept = point
  return f"| {model} | {rows} x {length}, {micro} | {remat} | {kept}"


def kind_of_this_gpu() -> str:
  """As `jaxft.plan` calls it; in a process of its own, so that this one holds no memory of the card."""
  code = "import jax; from jaxft.plan import targets; print(targets.here(jax.devices()[0], 1).kind)"
  return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
  kind = kind_of_this_gpu()
  lines = [
    "| model | rows x tokens, at once | remat | offload | planned | measured | error | a step |",
    f"|{'---|' * 8}",
  ]
  print("\n".join(lines))
  if not kind:
    for point in POINTS:
      print(f"{line_of(point)} | | | |")
    print(
      "\nno GPU here that jaxft.plan knows: on one this fills the table, and tells the median and the largest error"
    )
    return
  import jaxft
  from jaxft.plan import show

  errors, found, failed = [], None, 0
  for point in POINTS:
    asked = argparse.Namespace(**dict(zip(FLAGS, point, strict=True)), optimizer="adamw", steps=3)
    planned = jaxft.plan_for(offload.config_of(asked), kind)["peak_bytes"]
    if "error" in (taken := measured(point)):
      failed += 1
      lines.append(f"| {' | '.join([line_of(point)[2:], show.size(planned), taken['error']])} | | |")
      print(lines[-1], flush=True)
      continue
    found = taken
    error = planned / found["measured_bytes"] - 1
    errors.append(abs(error))
    lines.append(
      f"{line_of(point)} | {show.size(planned)} | {show.size(found['measured_bytes'])} | {100 * error:+.1f} % | "
      f"{found['seconds']:.2f} s |"
    )
    print(lines[-1], flush=True)
  if found is None:
    sys.exit("no point could be measured")
  about = (
    f"{page.machine(found['device_kind'], 'jax')}: {len(errors)} of {len(POINTS)} points ran, median error "
    f"{100 * statistics.median(errors):.1f} %, largest {100 * max(errors):.1f} %."
  )
  print(f"\n{about}")
  page.put("the plan's peak against the measured one", "benchmarks/plan_vs_measured.py", "\n".join([about, "", *lines]))
  if failed:
    sys.exit(f"{failed} points failed, see above")


if __name__ == "__main__":
  main()
