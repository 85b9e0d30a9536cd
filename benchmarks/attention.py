"""Attention's kernels on the device that is here, against the formula in float32.

  python benchmarks/attention.py

Outputs and all three gradients, over lengths, windows, packed rows and heads of every family, in
bfloat16; in float32 on a CPU. The error is the largest difference over the largest number; that of
the formula itself in the same dtype is beside it. Ends with an error where a kernel's is more than
twice the formula's and more than 1e-5. Then the time of forward and backward of `--rows` of
`--length`, unless `--rows 0`. The table goes into docs/benchmarks.md.
"""

import argparse
import functools
import itertools
import statistics
import sys
import time

import children
import jax
import jax.numpy as jnp
import numpy as np
import page

from jaxft.model.attention import KERNELS, attention, unsupported_reason

HEADS = {
  "gpt2": (12, 64, None),
  "EleutherAI/gpt-neo-2.7B": (20, 128, 256),
  "EleutherAI/gpt-j-6b": (16, 256, None),
}
LENGTHS = 127, 512, 1031


@functools.partial(jax.jit, static_argnames=("kernel", "scale", "window"))
def both(q, k, v, cotangent, segments, *, kernel: str, scale: float, window: int | None):
  """The output and three gradients."""
  pair = None if segments is None else (segments, segments)
  how = {"segments": pair, "scale": scale, "window": window}
  out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, kernel=kernel, **how), q, k, v)
  return out, *vjp(cotangent)


def inputs(T: int, N: int, H: int, dtype, packed: bool, B: int = 2) -> tuple:
  arrays = [
    jax.random.normal(key, (B, T, N, H), dtype) for key in jax.random.split(jax.random.key(T), 4)
  ]
  cuts = np.sort(np.random.default_rng(T).integers(0, T, (B, 3)), 1)
  examples = (np.arange(T)[None, :, None] >= cuts[:, None]).sum(-1).astype(np.int32) + 1
  return *arrays, jnp.asarray(examples) if packed else None


def errors(found: tuple, exact: tuple) -> list[float]:
  as_numbers = lambda x: np.asarray(x, np.float32)
  return [
    float(np.abs(as_numbers(a) - as_numbers(b)).max() / np.abs(as_numbers(b)).max())
    for a, b in zip(found, exact)
  ]


def compared(
  kernel: str, T: int, N: int, H: int, dtype, packed: bool, window: int | None
) -> tuple[float, float]:
  """The kernel's worst error and the formula's."""
  data, how = inputs(T, N, H, dtype, packed), {"scale": H**-0.5, "window": window}
  wide = [x.astype(jnp.float32) for x in data[:4]]
  with jax.default_matmul_precision("highest"):
    exact = both(*wide, data[4], kernel="reference", **how)
  return tuple(
    float(np.max(errors(both(*data, kernel=it, **how), exact))) for it in (kernel, "reference")
  )  # NaN stays


def timed(
  kernel: str, B: int, T: int, N: int, H: int, dtype, packed: bool, window: int | None
) -> float:
  """Milliseconds of forward and backward."""
  data = inputs(T, N, H, dtype, packed, B)
  call = lambda: jax.block_until_ready(both(*data, kernel=kernel, scale=H**-0.5, window=window))
  call()
  taken = []
  for _ in range(9):
    began = time.monotonic()
    call()
    taken.append(time.monotonic() - began)
  return 1000 * statistics.median(taken)


def parsed() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--heads", nargs="+", choices=HEADS, default=list(HEADS), help="of these models"
  )
  parser.add_argument("--kernels", nargs="+", choices=KERNELS[:-1], default=KERNELS[:-1])
  parser.add_argument(
    "--lengths", type=int, nargs="+", default=LENGTHS, help="tokens a row, for the errors"
  )
  parser.add_argument("--rows", type=int, default=2, help="of the batch that is timed; 0: none is")
  parser.add_argument("--length", type=int, default=1024, help="tokens a row of it")
  return parser.parse_args()


def main() -> None:
  args = parsed()
  device = children.jax_device()
  dtype, cpu = (jnp.float32, True) if device.platform == "cpu" else (jnp.bfloat16, False)
  lines, faults = [], []
  for family, packed, kernel in itertools.product(args.heads, (False, True), args.kernels):
    N, H, local = HEADS[family]
    if unsupported_reason(kernel, device, dtype, H, packed, False):
      continue
    for window in dict.fromkeys((None, local)):
      how = (N, H, dtype, packed, window)
      worst, formula = np.max([compared(kernel, T, *how) for T in args.lengths], 0)
      times = [timed(it, args.rows, args.length, *how) for it in (kernel, "reference") if args.rows]
      rows = ("packed" if packed else "plain") + (f", window {window}" if window else "")
      cells = [
        family,
        f"{N} x {H}",
        rows,
        kernel,
        f"{worst:.1e}",
        f"{formula:.1e}",
        *(f"{it:,.2f} ms" for it in times),
      ]
      lines.append(f"| {' | '.join(cells)} |")
      print(lines[-1], flush=True)
      found = {
        "heads": family,
        "kernel": kernel,
        "rows": rows,
        "error": worst,
        "formula_error": formula,
      }
      page.note("attention", device=device.device_kind, **found, milliseconds=times)
      if not worst <= max(2 * formula, 1e-5):
        faults.append(lines[-1])
  if not lines:
    sys.exit(f"none of {', '.join(args.kernels)} is for a {device.device_kind}")
  put(args, "cpu" if cpu else device.device_kind, dtype, lines)
  if faults:
    sys.exit("further from float32 than the formula is:\n" + "\n".join(faults))


def put(args: argparse.Namespace, device: str, dtype, lines: list[str]) -> None:
  """The table, into the page; one of errors only is a section of its own."""
  head = ["heads of", "", "rows", "kernel", "its error", "the formula's error"]
  about = (
    f"{page.machine(device, 'jax')}. {jnp.dtype(dtype)}; errors over lengths of "
    f"{', '.join(map(str, args.lengths))} (output and gradients, the worst)"
  )
  if args.rows:
    head += ["its time", "the formula's time"]
    about += (
      f"; times of forward and backward of {args.rows} x {args.length} tokens, medians of nine"
    )
  table = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines]
  what = "attention on" if args.rows else "attention's errors on"
  page.put(
    f"{what} {page.where(device)}",
    "benchmarks/attention.py",
    "\n".join([f"{about}.", "", *table]),
    device,
  )


if __name__ == "__main__":
  main()
