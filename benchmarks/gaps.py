"""How long devices wait between the programs of a run: python benchmarks/gaps.py [WORKDIR] [--steps 5] [--picture gaps.svg]

WORKDIR is that of a run with `--config.train.profile_steps=N`; what JAX's profiler wrote there is read, and the traced time of
each device is printed, how much of it programs ran, and the longest wait as a share of a step. Without WORKDIR a run is made:
`--model` with random weights; the figures and their picture go into docs/benchmarks.md.
"""

import argparse
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import page
import scratch
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
  parser.add_argument("workdir", type=Path, nargs="?")
  parser.add_argument("--steps", type=int, default=5, help="that are, or were, traced")
  parser.add_argument("--picture", type=Path, help="file for the time line, as SVG")
  parser.add_argument("--model", default="gpt2", help="one of the published sizes (jaxft.hf.published)")
  parser.add_argument("--rows", type=int, default=2, help="of a batch")
  parser.add_argument("--length", type=int, default=512, help="tokens a row")
  parser.add_argument("--dropout", type=float, default=0.1)
  asked = parser.parse_args()
  if asked.workdir:
    found = spans_of(asked.workdir)
    if not found:
      raise SystemExit(f"error: no trace of a device under {asked.workdir}; train with --config.train.profile_steps=5")
    if asked.picture:
      asked.picture.write_text(drawn(found), encoding="utf-8")
    return print(told(found, asked.steps))
  with tempfile.TemporaryDirectory() as folder:
    device = train(asked, Path(folder))
    found = spans_of(Path(folder))
  if not found or (device != "cpu" and not found[0].device.startswith("/device:")):
    raise SystemExit(f"error: the trace tells nothing of {device}: can JAX's profiler read its counters here?")
  where = "a CPU" if device == "cpu" else device
  picture = (
    asked.picture or page.PAGE.parent / f"gaps-{re.sub('[^a-z0-9]+', '-', f'{asked.model} {device}'.lower())}.svg"
  )
  picture.write_text(drawn(found), encoding="utf-8")
  about = (
    f"{page.machine(device, 'jax')}: {asked.steps} steps of {asked.model}, {asked.rows} x {asked.length} tokens, dropout "
    f"{asked.dropout:g}, random weights, traced by `config.train.profile_steps`. {told(found, asked.steps)}"
  )
  print(about)
  picture_of = f"![{asked.steps} steps one after the other, with the waits between them]({picture.name})"
  page.put(f"between programs, {asked.model} on {where}", "benchmarks/gaps.py", f"{about}\n\n{picture_of}")


def train(asked: argparse.Namespace, folder: Path) -> str:
  """Traces a run; returns the device that it was on."""
  import jax

  import jaxft

  config = scratch.config_of(folder, asked.model, asked.rows, asked.length, asked.steps + 5, asked.dropout)
  config.train.profile_steps = asked.steps
  jaxft.finetune(config, folder / "run")
  return jax.devices()[0].device_kind


def spans_of(folder: Path) -> list[Busy]:
  return [busy for file in sorted(folder.rglob("*.xplane.pb")) for busy in of_file(file)]


def told(found: list[Busy], steps: int) -> str:
  lines = []
  for it in found:
    longest, step = max(it.gaps, default=0), it.total / steps
    lines.append(
      f"{it.device}: {it.total / 1e6:,.1f} ms, {step / 1e6:,.1f} ms a step; programs ran "
      f"{1 - sum(it.gaps) / it.total:.2%} of it; the longest wait was {longest / 1e6:.2f} ms, {longest / step:.2%} of a step."
    )
  return "\n".join(lines)


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


def union(spans: list[tuple[float, float]], apart: float = 0.0) -> list[tuple[float, float]]:
  """In order, and one where there is no more than `apart` between two."""
  joined = [spans[0]]
  for begin, end in spans[1:]:
    if begin <= joined[-1][1] + apart:
      joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
    else:
      joined.append((begin, end))
  return joined


def drawn(found: list[Busy]) -> str:
  """A time line as SVG, a row for each device."""
  width, height = (
    900,
    30 * len(found) + 10,
  )  # a GPU runs thousands of kernels: those with less than 0.1 between them are one
  rows = []
  for row, it in enumerate(found):
    begin, scale = it.spans[0][0], (width - 160) / it.total
    rows.append(
      f'<text x="4" y="{30 * row + 25}" font-family="sans-serif" font-size="12" fill="#808080">{it.device}</text>'
    )
    rows += [
      f'<rect x="{150 + (b - begin) * scale:.2f}" y="{30 * row + 10}" width="{(e - b) * scale:.2f}" height="22" '
      'fill="#3465a4"/>'
      for b, e in union(it.spans, 0.1 / scale)
    ]
  return f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">{"".join(rows)}</svg>\n'


if __name__ == "__main__":
  main()
