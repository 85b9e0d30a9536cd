"""Masked cross-entropy that need not hold all logits.

B batch, T length, V vocabulary, D model
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

SMALL_LOGITS_BYTES = 2**27  # of float32 at once: 667 tokens of GPT-2
# Each chunk casts the table, reads it, adds to its gradient: some 20 bytes a weight, against 6 operations a weight and token.
# An H100 makes 180 to 300 operations in the time of a byte, a TPU v5e 240, a CPU 10: of 667 tokens a chunk GPUs and TPUs would
# spend as long on the table as on the products.
LARGE_LOGITS_BYTES = 2**29


class Head(NamedTuple):
  """What makes logits of hidden states."""

  table_VD: jax.Array
  bias_V: jax.Array | None = None
  # Casts and gathers the table where it is used, chunk by chunk: so its gradient is added up in float32, and never whole.
  gather: Callable[[jax.Array], jax.Array] = lambda table_VD: table_VD


def cross_entropy_sum(
  h_BTD: jax.Array, head: Head, targets_BT: jax.Array, mask_BT: jax.Array, chunk: int = 0
) -> jax.Array:
  """Sum over unmasked targets of -log p(target), in nats and float32; divide by the count where the count is known.

  With `chunk`, only (B, chunk, V) logits exist at once. Their gradient is made with them, as that of a sum needs nothing that
  comes after: logits are computed once (Liger-Kernel, arXiv:2410.10989, has it so), and what stays for the backward pass is the
  gradient of the hidden states and of the table. The result does not depend on `chunk` but for the order of the sum.
  """
  T = h_BTD.shape[1]
  if not chunk or chunk >= T:
    return _sum(h_BTD, head, targets_BT, mask_BT)

  def parts(x):  # (B, T, ...) -> (T / chunk, B, chunk, ...); what the padding adds is masked
    x = jnp.pad(x, [(0, 0), (0, -T % chunk)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

  @jax.custom_vjp
  def total(arrays, h, targets, mask):
    add = lambda total, xs: (total + _sum(xs[0], Head(*arrays, head.gather), *xs[1:]), None)
    return jax.lax.scan(add, jnp.float32(0), (h, targets, mask))[0]

  def forward(arrays, h, targets, mask):
    def add(total, xs):
      table_VD, to_shards = jax.vjp(head.gather, arrays[0])
      loss, kept = _forward(xs[0], table_VD, arrays[1], *xs[1:])
      d_h, d_table_VD, d_bias_V = _gradients(kept)
      d_bias_V = None if d_bias_V is None else d_bias_V.astype(arrays[1].dtype)
      d_arrays = *to_shards(d_table_VD.astype(table_VD.dtype)), d_bias_V
      return jax.tree.map(jnp.add, total, (loss, d_arrays)), d_h

    zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, arrays)
    (loss, d_arrays), d_h = jax.lax.scan(add, zeros, (h, targets, mask))
    return loss, (d_arrays, d_h, h[:0])  # nothing of h but its dtype

  def backward(kept, d_loss):
    d_arrays, d_h, h = kept
    scaled = lambda x, dtype: (x.astype(jnp.float32) * d_loss).astype(dtype)
    return jax.tree.map(lambda x: scaled(x, x.dtype), d_arrays), scaled(d_h, h.dtype), None, None

  total.defvjp(forward, backward)
  return total((head.table_VD, head.bias_V), parts(h_BTD), parts(targets_BT), parts(mask_BT))


def choose_chunk(asked: int, B: int, T: int, V: int, most_bytes: int) -> int:
  """The `chunk` for B rows of T positions of a device and its V rows of the table: asked for; with -1 what takes between half
  of `most_bytes` and all of it, so that the last chunk lacks least: what it lacks is computed too."""
  if asked >= 0:
    return asked
  most = max(1, most_bytes // (4 * B * V))
  if most >= T:
    return 0
  unit = 64 if most >= 64 else 1
  chunks = range(unit * math.ceil(most / 2 / unit), most + 1, unit)
  return min(chunks, key=lambda chunk: (-T % chunk, -chunk))


def max_logits_bytes(platform: str, remat: str) -> int:
  """Bytes of logits that the choice of -1 may take on a "cpu", "gpu" or "tpu"; little where memory comes first."""
  return SMALL_LOGITS_BYTES if platform == "cpu" or remat == "full" else LARGE_LOGITS_BYTES


def compute_logits(h: jax.Array, head: Head) -> jax.Array:
  """(..., D) -> (..., V) in float32."""
  y = jnp.einsum("...D,VD->...V", h, head.gather(head.table_VD), preferred_element_type=jnp.float32)
  return y if head.bias_V is None else y + head.bias_V


def _sum(h_BTD, head, targets_BT, mask_BT):
  return _of_table(h_BTD, head.gather(head.table_VD), head.bias_V, targets_BT, mask_BT)


@jax.custom_vjp
def _of_table(h_BTD, table_VD, bias_V, targets_BT, mask_BT):
  return _forward(h_BTD, table_VD, bias_V, targets_BT, mask_BT)[0]


def _forward(h_BTD, table_VD, bias_V, targets_BT, mask_BT):
  logits_BTV = compute_logits(h_BTD, Head(table_VD, bias_V))
  gold_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0]
  largest_BT = jnp.max(logits_BTV, -1)
  odds_BTV = jnp.exp(
    logits_BTV - largest_BT[..., None]
  )  # kept, for the exponential is most of what is not a product
  total_BT = jnp.sum(odds_BTV, -1)
  loss = jnp.sum(jnp.where(mask_BT, jnp.log(total_BT) + largest_BT - gold_BT, 0))
  return loss, (h_BTD, table_VD, bias_V, targets_BT, mask_BT, odds_BTV, total_BT)


def _gradients(kept):
  """As JAX derives them, but for two things. The gradient of the logits is written once, in the dtype of the two products that
  read it: in float32 GPUs would compute these at half the speed. And the target is found by comparing, not by adding to one
  entry of each row, which reads and writes all of them.

  In float32 and not yet scaled by 1 / tokens, which in bfloat16 is up to 0.4 % off, for all targets alike.
  """
  h_BTD, table_VD, bias_V, targets_BT, mask_BT, odds_BTV, total_BT = kept
  is_target_BTV = (
    jax.lax.broadcasted_iota(targets_BT.dtype, odds_BTV.shape, 2) == targets_BT[..., None]
  )
  counts_BT1 = mask_BT.astype(jnp.float32)[..., None]
  d_BTV = odds_BTV * (counts_BT1 / total_BT[..., None]) - jnp.where(is_target_BTV, counts_BT1, 0)
  d_bias_V = None if bias_V is None else jnp.sum(d_BTV, (0, 1))
  d_BTV = d_BTV.astype(h_BTD.dtype)
  d_h_BTD = jnp.einsum("BTV,VD->BTD", d_BTV, table_VD, preferred_element_type=jnp.float32)
  d_table_VD = jnp.einsum("BTV,BTD->VD", d_BTV, h_BTD, preferred_element_type=jnp.float32)
  return d_h_BTD, d_table_VD, d_bias_V


def _backward(kept, d_loss):
  gradients = jax.tree.map(
    lambda x, like: (x * d_loss).astype(like.dtype), _gradients(kept), tuple(kept[:3])
  )
  return *gradients, None, None


_of_table.defvjp(_forward, _backward)
