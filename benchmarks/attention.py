"""Attention's kernels on the device that is here, against the formula in float32: python benchmarks/attention.py

Outputs and all three gradients, over lengths, windows, packed rows and heads of every family, in bfloat16; in float32 on a CPU.
The error is the largest difference over the largest number; that of the formula itself in the same dtype is beside it. Ends
with an error where a kernel's is more than twice the formula's and more than 1e-5. Then the time of forward and backward of
`--rows` of `--length`. The table goes into docs/benchmarks.md.
"""

import argparse
import functools
import itertools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import page

from jaxft.attention import KERNELS, attention, why_not

HEADS = {"gpt2": (12, 64, None), "EleutherAI/gpt-neo-2.7B": (20, 128, 256), "EleutherAI/gpt-j-6b": (16, 256, None)}
LENGTHS = 127, 512, 1031


@functools.partial(jax.jit, static_argnames=("kernel", "scale", "window"))
def both(q, k, v, cotangent, segments, *, kernel: str, scale: float, window: int | None):
  """The output and three gradients."""
  how = {"q_segments_BT": segments, "k_segments_BS": segments, "scale": scale, "window": window}
  out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, kernel=kernel, **how), q, k, v)
  return out, *vjp(cotangent)


def inputs(T: int, N: int, H: int, dtype, packed: bool, B: int = 2) -> tuple:
  arrays = [jax.random.normal(key, (B, T, N, H), dtype) for key in jax.random.split(jax.random.key(T), 4)]
  cuts = np.sort(np.random.default_rng(T).integers(0, T, (B, 3)), 1)
  examples = (np.arange(T)[None, :, None] >= cuts[:, None]).sum(-1).astype(np.int32) + 1
  return *arrays, jnp.asarray(examples) if packed else None


def errors(found: tuple, exact: tuple) -> list[float]:
  as_numbers = lambda x: np.asarray(x, np.float32)
  return [
    float(np.abs(as_numbers(a) - as_numbers(b)).max() / np.abs(as_numbers(b)).max()) for a, b in zip(found, exact)
  ]


def compared(kernel: str, T: int, N: int, H: int, dtype, packed: bool, window: int | None) -> tuple[float, float]:
  """The kernel's worst error and the formula's."""
  data, how = inputs(T, N, H, dtype, packed), {"scale": H**-0.5, "window": window}
  wide = [x.astype(jnp.float32) for x in data[:4]]
  with jax.default_matmul_precision("highest"):
    exact = both(*wide, data[4], kernel="reference", **how)
  return tuple(
    float(np.max(errors(both(*data, kernel=it, **how), exact))) for it in (kernel, "reference")
  )  # NaN is kept


def timed(kernel: str, B: int, T: int, N: int, H: int, dtype, packed: bool, window: int | None) -> float:
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


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rows", type=int, default=2, help="of the batch that is timed")
  parser.add_argument("--length", type=int, default=1024, help="tokens a row of it")
  asked = parser.parse_args()
  device = jax.devices()[0]
  dtype, where = (jnp.float32, "a CPU") if device.platform == "cpu" else (jnp.bfloat16, device.device_kind)
  lines, faults = [], []
  for (family, (N, H, local)), packed, kernel in itertools.product(HEADS.items(), (False, True), KERNELS[:-1]):
    if why_not(kernel, device, dtype, H, packed):
      continue
    for window in dict.fromkeys((None, local)):
      what = (N, H, dtype, packed, window)
      worst, formula = np.max([compared(kernel, T, *what) for T in LENGTHS], 0)
      times = [timed(it, asked.rows, asked.length, *what) for it in (kernel, "reference")]
      rows = ("packed" if packed else "plain") + (f", window {window}" if window else "")
      lines.append(
        f"| {family} | {N} x {H} | {rows} | {kernel} | {worst:.1e} | {formula:.1e} | {times[0]:,.2f} ms | {times[1]:,.2f} ms |"
      )
      print(lines[-1], flush=True)
      if not worst <= max(2 * formula, 1e-5):
        faults.append(lines[-1])
  about = (
    f"{page.machine('cpu' if where == 'a CPU' else where, 'jax')}. {jnp.dtype(dtype)}; errors over lengths of "
    f"{', '.join(map(str, LENGTHS))} (output and gradients, the worst); times of forward and backward of {asked.rows} x "
    f"{asked.length} tokens, medians of nine."
  )
  head = [
    "| heads of | | rows | kernel | its error | the formula's error | its time | the formula's time |",
    f"|{'---|' * 8}",
  ]
  page.put(f"attention on {where}", "benchmarks/attention.py", "\n".join([about, "", *head, *lines]))
  if faults:
    sys.exit("further from float32 than the formula is:\n" + "\n".join(faults))


if __name__ == "__main__":
  main()
