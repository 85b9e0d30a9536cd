"""How long devices wait between the programs of a run.

  python benchmarks/gaps.py [WORKDIR] [--steps 5] [--picture gaps.svg]

WORKDIR is that of a run with `--config.train.profile_steps=N`; what JAX's profiler wrote there is
read, and the traced time of each device is printed, how much of it programs ran, the longest wait
as a share of a step, and the kernels that took longest. Without WORKDIR a run is made: `--model`
with random weights, which ends after the traced steps, without a checkpoint or an export; the
figures and their picture go into docs/benchmarks.md, and the trace into `--trace FILE.tar.gz`.
"""

import argparse
import collections
import re
import tarfile
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

  @property
  def share(self) -> float:
    """Of the time, that programs ran."""
    return 1 - sum(self.gaps) / self.total


def parsed() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("workdir", type=Path, nargs="?")
  parser.add_argument("--steps", type=int, default=5, help="that are, or were, traced")
  parser.add_argument("--picture", type=Path, help="file for the time line, as SVG")
  parser.add_argument(
    "--model", default="gpt2", help="one of the published sizes (jaxft.hf.known_models)"
  )
  parser.add_argument("--rows", type=int, default=2, help="of a batch")
  parser.add_argument("--length", type=int, default=512, help="tokens a row")
  parser.add_argument("--dropout", type=float, default=0.1)
  parser.add_argument("--remat", default="none", choices=("none", "dots", "full"))
  parser.add_argument(
    "--trace", type=Path, help="file for the trace, as .tar.gz: without it none is saved"
  )
  return parser.parse_args()


def main() -> None:
  args = parsed()
  if args.workdir:
    found = spans_of(args.workdir)
    if not found:
      raise SystemExit(
        f"error: no trace of a device under {args.workdir}; train with "
        "--config.train.profile_steps=5"
      )
    if args.picture:
      args.picture.write_text(drawn(found), encoding="utf-8")
    kernels = describe_kernels(args.workdir, args.steps)
    return print(f"{describe_gaps(found, args.steps)}\n{kernels}".strip())
  with tempfile.TemporaryDirectory() as folder:
    device = train(args, Path(folder))
    if args.trace:
      with tarfile.open(args.trace, "w:gz") as file:
        file.add(Path(folder) / "run" / "profile", "profile")
    found = spans_of(Path(folder))
    kernels = describe_kernels(Path(folder), args.steps)
  if not found or (device != "cpu" and not found[0].device.startswith("/device:")):
    raise SystemExit(
      f"error: the trace tells nothing of {device}: can JAX's profiler read its counters here?"
    )
  print(kernels)
  put(args, found, device)


def put(args: argparse.Namespace, found: list[Busy], device: str) -> None:
  """The figures and their picture, into the page."""
  name = f"gaps-{re.sub('[^a-z0-9]+', '-', f'{args.model} {device}'.lower())}.svg"
  picture = args.picture or page.pictures() / name
  picture.write_text(drawn(found), encoding="utf-8")
  text = describe_gaps(found, args.steps)
  about = (
    f"{page.machine(device, 'jax')}: {args.steps} steps of {args.model}, {args.rows} x "
    f"{args.length} tokens, dropout {args.dropout:g}, `memory.remat={args.remat}`, random "
    f"weights, traced by `config.train.profile_steps`. {text}"
  )
  print(about)
  page.note(
    "gaps",
    device=device,
    picture=picture.name,
    shown_as=name,
    busy=[it.share for it in found],
    told=text,
  )
  picture_of = f"![{args.steps} consecutive steps, and the waits between them]({name})"
  what = f"between programs, {args.model} on {page.where(device)}"
  page.put(what, "benchmarks/gaps.py", f"{about}\n\n{picture_of}", device)


def train(args: argparse.Namespace, folder: Path) -> str:
  """Traces a run; returns the device that it was on."""
  import jax

  # Two steps are not traced, and the trace is written after the last traced one.
  last = args.steps + 4
  config = scratch.config_of(folder, args.model, args.rows, args.length, last + 1, args.dropout)
  config.train.profile_steps, config.memory.remat = args.steps, args.remat
  scratch.finetune_until(last, config, folder / "run")
  return jax.devices()[0].device_kind


def longest_kernels(folder: Path, most: int = 25) -> dict[str, list[tuple[str, float]]]:
  """{device: [(kernel, milliseconds of all its calls), ...]}, the longest first; of GPUs."""
  found = {}
  for file in sorted(folder.rglob("*.xplane.pb")):
    for plane in ProfileData.from_file(str(file)).planes:
      total = collections.Counter()
      for line in plane.lines:
        if plane.name.startswith("/device:") and line.name.startswith("Stream"):
          for event in line.events:
            total[event.name] += event.duration_ns / 1e6
      if total:
        found[plane.name] = total.most_common(most)
  return found


def describe_kernels(folder: Path, steps: int) -> str:
  lines = []
  for device, kernels in longest_kernels(folder).items():
    lines += [f"{device}: the kernels that took longest"]
    lines += [
      f"  {milliseconds / steps:8.3f} ms a step  {name[:140]}" for name, milliseconds in kernels
    ]
  return "\n".join(lines)


def spans_of(folder: Path) -> list[Busy]:
  return [busy for file in sorted(folder.rglob("*.xplane.pb")) for busy in of_file(file)]


def describe_gaps(found: list[Busy], steps: int) -> str:
  lines = []
  for it in found:
    longest, step = max(it.gaps, default=0), it.total / steps
    lines.append(
      f"{it.device}: {it.total / 1e6:,.1f} ms, {step / 1e6:,.1f} ms a step; programs ran "
      f"{it.share:.2%} of it; the longest wait was {longest / 1e6:.2f} ms, {longest / step:.2%} of "
      "a step."
    )
  return "\n".join(lines)


def of_file(file: Path) -> list[Busy]:
  """For each traced device: kernels of a GPU's streams, operations of a TPU, programs of a CPU."""
  found = []
  for plane in ProfileData.from_file(str(file)).planes:
    if plane.name.startswith("/device:"):
      wanted = lambda line, event: line.name.startswith(("Stream", "XLA Ops"))
    elif plane.name == "/host:CPU":
      wanted = lambda line, event: event.name == "ThunkExecutor::Execute (wait for completion)"
    else:
      continue
    spans = [
      (it.start_ns, it.start_ns + it.duration_ns)
      for line in plane.lines
      for it in line.events
      if wanted(line, it)
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
  # A GPU runs thousands of kernels: those with less than 0.1 between them are one.
  width, height = 900, 30 * len(found) + 10
  rows = []
  for row, it in enumerate(found):
    begin, scale = it.spans[0][0], (width - 160) / it.total
    rows.append(
      f'<text x="4" y="{30 * row + 25}" font-family="sans-serif" font-size="12" fill="#808080">'
      f"{it.device}</text>"
    )
    rows += [
      f'<rect x="{150 + (b - begin) * scale:.2f}" y="{30 * row + 10}" '
      f'width="{(e - b) * scale:.2f}" height="22" fill="#3465a4"/>'
      for b, e in union(it.spans, 0.1 / scale)
    ]
  size = f'width="{width}" height="{height}"'
  return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(rows)}</svg>\n'


if __name__ == "__main__":
  main()
