"""How long devices wait between the programs of a run: python benchmarks/gaps.py WORKDIR [--picture gaps.svg]

WORKDIR is that of a run with `--config.train.profile_steps=N`; what JAX's profiler wrote there is read. Prints the traced
time of each device, how much of it programs ran, and the longest wait as a share of a step; draws the time line.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from jax.profiler import ProfileData


class Busy(NamedTuple):
  """When a device ran programs, in nanoseconds: [(begin, end), ...] in order, not overlapping."""

  device: str
  spans: list[tuple[float, float]]

  @property
  def gaps(self) -> list[float]:
    return [after[0] - before[1] for before, after in zip(self.spans, self.spans[1:])]

  @property
  def total(self) -> float:
    return self.spans[-1][1] - self.spans[0][0]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("workdir", type=Path)
  parser.add_argument("--steps", type=int, required=True, help="that were traced")
  parser.add_argument("--picture", type=Path)
  asked = parser.parse_args()
  found = [busy for file in sorted(asked.workdir.rglob("*.xplane.pb")) for busy in of_file(file)]
  for it in found:
    step = it.total / asked.steps
    print(
      f"{it.device}: {it.total / 1e6:,.1f} ms, {step / 1e6:,.1f} ms a step; programs ran "
      f"{1 - sum(it.gaps) / it.total:.2%} of it; longest wait {max(it.gaps, default=0) / 1e6:.2f} ms, "
      f"{max(it.gaps, default=0) / step:.2%} of a step"
    )
  if asked.picture:
    asked.picture.write_text(drawn(found), encoding="utf-8")


def of_file(file: Path) -> list[Busy]:
  """Of every device of a trace: kernels of a GPU's streams, operations of a TPU, whole programs on a CPU."""
  found = []
  for plane in ProfileData.from_file(str(file)).planes:
    if plane.name.startswith("/device:"):
      wanted = lambda line, event: line.name.startswith(("Stream", "XLA Ops"))
    elif plane.name == "/host:CPU":
      wanted = lambda line, event: event.name == "ThunkExecutor::Execute (wait for completion)"
    else:
      continue
    spans = [
      (it.start_ns, it.start_ns + it.duration_ns) for line in plane.lines for it in line.events if wanted(line, it)
    ]
    if spans:
      found.append(Busy(plane.name, union(sorted(spans))))
  on_devices = [it for it in found if it.device.startswith("/device:")]
  return on_devices or found


def union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
  joined = [spans[0]]
  for begin, end in spans[1:]:
    if begin <= joined[-1][1]:
      joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
    else:
      joined.append((begin, end))
  return joined


def drawn(found: list[Busy]) -> str:
  """A time line as SVG, a row for each device."""
  width, height = 900, 30 * len(found) + 10
  rows = []
  for row, it in enumerate(found):
    begin, scale = it.spans[0][0], (width - 160) / it.total
    rows.append(
      f'<text x="4" y="{30 * row + 25}" font-family="sans-serif" font-size="12" fill="#808080">{it.device}</text>'
    )
    rows += [
      f'<rect x="{150 + (b - begin) * scale:.2f}" y="{30 * row + 10}" width="{(e - b) * scale:.2f}" height="22" '
      'fill="#3465a4"/>'
      for b, e in it.spans
    ]
  return f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">{"".join(rows)}</svg>\n'


if __name__ == "__main__":
  main()
