"""Masked cross-entropy in chunks of positions.

Chunks save memory. Logits are the largest array of a small model: (B, T, V) in float32 is 1.5 GiB
for 8 x 1024 tokens of GPT-2.

Two functions have a custom gradient. `_loss_sum` computes the loss of one chunk.
`cross_entropy_sum` loops over chunks and already computes the gradient in its forward pass, so that
no chunk's logits are computed twice.

B batch, T length, V vocabulary, D model
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

SMALL_LOGITS_BYTES = 2**27  # of one chunk's float32 logits: 667 tokens of GPT-2
# Each chunk casts the table, reads it and adds to its gradient. That moves about 20 bytes per
# weight, against 6 operations per weight and token. While it moves one byte, an H100 does
# 180 to 300 operations, a TPU v5e 240, a CPU 10. With 667 tokens per chunk, GPUs and TPUs would
# spend as long on the table as on the products, so they get larger chunks.
LARGE_LOGITS_BYTES = 2**29


class Head(NamedTuple):
  """The output layer, which maps hidden states to logits."""

  table_VD: jax.Array
  bias_V: jax.Array | None = None
  # Casts and gathers the table in every chunk. So the table's gradient is summed in float32, and
  # as a shard, never whole.
  gather: Callable[[jax.Array], jax.Array] = lambda table_VD: table_VD


def cross_entropy_sum(
  h_BTD: jax.Array, head: Head, targets_BT: jax.Array, mask_BT: jax.Array, chunk: int = 0
) -> jax.Array:
  """Sum -log p(target) over unmasked targets, in nats and float32.

  The caller divides by the count. With `chunk`, only (B, chunk, V) logits are in memory at a time.
  The forward pass then computes the gradient too: the gradient of a sum does not depend on later
  operations, except for a factor. So logits are computed once, as in Liger-Kernel
  (arXiv:2410.10989). The residuals are the gradients of the hidden states and of the table. `chunk`
  affects only the order of the sum.

  Args:
    h_BTD: hidden states after the last norm.
    head: the output layer.
    targets_BT: token ids to predict.
    mask_BT: which targets count.
    chunk: positions per chunk; 0 for all at the same time.
  """
  T = h_BTD.shape[1]
  if not chunk or chunk >= T:
    return _chunk_loss(h_BTD, head, targets_BT, mask_BT)

  def split(x):  # (B, T, ...) -> (T / chunk, B, chunk, ...); the mask of padding is False
    x = jnp.pad(x, [(0, 0), (0, -T % chunk)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

  @jax.custom_vjp
  def loss_sum(arrays, h, targets, mask):
    chunk_head = head._replace(table_VD=arrays[0], bias_V=arrays[1])

    def body(total, xs):
      return total + _chunk_loss(xs[0], chunk_head, *xs[1:]), None

    return jax.lax.scan(body, jnp.float32(0), (h, targets, mask))[0]

  def forward(arrays, h, targets, mask):
    table_shard, bias_V = arrays

    def body(total, xs):
      # Each chunk's gradient passes back through `gather`, so the running sum is only a shard.
      table_VD, gather_vjp = jax.vjp(head.gather, table_shard)
      loss, residuals = _forward(xs[0], table_VD, bias_V, *xs[1:])
      d_h, d_table_VD, d_bias_V = _grads(residuals)
      d_bias_V = None if d_bias_V is None else d_bias_V.astype(bias_V.dtype)
      d_arrays = *gather_vjp(d_table_VD.astype(table_VD.dtype)), d_bias_V
      return jax.tree.map(jnp.add, total, (loss, d_arrays)), d_h

    zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, arrays)
    (loss, d_arrays), d_h = jax.lax.scan(body, zeros, (h, targets, mask))
    return loss, (d_arrays, d_h, h[:0])  # an empty slice carries the dtype of h

  def backward(residuals, d_loss):
    # The residuals are gradients of the sum. d_loss is the factor of all later operations.
    d_arrays, d_h, h = residuals

    def scale(x, dtype):
      return (x.astype(jnp.float32) * d_loss).astype(dtype)

    return jax.tree.map(lambda x: scale(x, x.dtype), d_arrays), scale(d_h, h.dtype), None, None

  loss_sum.defvjp(forward, backward)
  return loss_sum((head.table_VD, head.bias_V), split(h_BTD), split(targets_BT), split(mask_BT))


def choose_chunk(setting: int, B: int, T: int, V: int, max_bytes: int) -> int:
  """Resolve `loss_chunk` to a number of positions per chunk; 0 for one chunk.

  -1 considers chunks whose logits take between half of `max_bytes` and all of it. It selects the
  one with the least padding in the last chunk, because padding is computed too.

  Args:
    setting: `loss_chunk`.
    B: rows per device.
    T: positions of a row.
    V: rows of the table.
    max_bytes: from `max_logits_bytes`.
  """
  if setting >= 0:
    return setting
  max_chunk = max(1, max_bytes // (4 * B * V))
  if max_chunk >= T:
    return 0
  unit = 64 if max_chunk >= 64 else 1
  chunks = range(unit * math.ceil(max_chunk / 2 / unit), max_chunk + 1, unit)
  return min(chunks, key=lambda chunk: (-T % chunk, -chunk))


def max_logits_bytes(platform: str, remat: str) -> int:
  """Return the bytes of logits that `loss_chunk=-1` allows.

  It is the smaller limit on CPUs, and with remat "full", which a user chooses to save memory.
  """
  return SMALL_LOGITS_BYTES if platform == "cpu" or remat == "full" else LARGE_LOGITS_BYTES


def compute_logits(h: jax.Array, head: Head) -> jax.Array:
  """Map hidden states (..., D) to logits (..., V) in float32."""
  y = jnp.einsum("...D,VD->...V", h, head.gather(head.table_VD), preferred_element_type=jnp.float32)
  return y if head.bias_V is None else y + head.bias_V


def _chunk_loss(h_BTD, head, targets_BT, mask_BT):
  return _loss_sum(h_BTD, head.gather(head.table_VD), head.bias_V, targets_BT, mask_BT)


@jax.custom_vjp
def _loss_sum(h_BTD, table_VD, bias_V, targets_BT, mask_BT):
  return _forward(h_BTD, table_VD, bias_V, targets_BT, mask_BT)[0]


def _forward(h_BTD, table_VD, bias_V, targets_BT, mask_BT):
  logits_BTV = compute_logits(h_BTD, Head(table_VD, bias_V))
  target_logits_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0]
  row_max_BT = jnp.max(logits_BTV, -1)
  # A residual: apart from the matrix products, the exponential takes most of the time.
  exp_BTV = jnp.exp(logits_BTV - row_max_BT[..., None])
  row_sum_BT = jnp.sum(exp_BTV, -1)
  loss = jnp.sum(jnp.where(mask_BT, jnp.log(row_sum_BT) + row_max_BT - target_logits_BT, 0))
  return loss, (h_BTD, table_VD, bias_V, targets_BT, mask_BT, exp_BTV, row_sum_BT)


def _grads(residuals):
  """Return the gradients of the hidden states, the table and the bias, in float32.

  The gradient of the logits is softmax - one_hot(target). Two details differ from the gradient that
  JAX derives:

  - It is written once, in the dtype of the two products that read it. In float32, GPUs would
    compute these at half the speed.
  - The target is found by comparison. JAX would add to one entry of each row, which reads and
    writes all of them.

  The caller scales by 1 / tokens. In bfloat16 that factor is up to 0.4 % off, the same for all
  targets.
  """
  h_BTD, table_VD, bias_V, targets_BT, mask_BT, exp_BTV, row_sum_BT = residuals
  ids_BTV = jax.lax.broadcasted_iota(targets_BT.dtype, exp_BTV.shape, 2)
  is_target_BTV = ids_BTV == targets_BT[..., None]
  mask_BT1 = mask_BT.astype(jnp.float32)[..., None]
  d_BTV = exp_BTV * (mask_BT1 / row_sum_BT[..., None]) - jnp.where(is_target_BTV, mask_BT1, 0)
  d_bias_V = None if bias_V is None else jnp.sum(d_BTV, (0, 1))
  d_BTV = d_BTV.astype(h_BTD.dtype)
  d_h_BTD = jnp.einsum("BTV,VD->BTD", d_BTV, table_VD, preferred_element_type=jnp.float32)
  d_table_VD = jnp.einsum("BTV,BTD->VD", d_BTV, h_BTD, preferred_element_type=jnp.float32)
  return d_h_BTD, d_table_VD, d_bias_V


def _backward(residuals, d_loss):
  def scale(grad, x):
    return (grad * d_loss).astype(x.dtype)

  return *jax.tree.map(scale, _grads(residuals), tuple(residuals[:3])), None, None


_loss_sum.defvjp(_forward, _backward)
