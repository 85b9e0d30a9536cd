"""Masked cross-entropy that need not hold all logits.

B batch, T length, V vocabulary, D model
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


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

  With `chunk`, only (B, chunk, V) logits exist at once, in the forward and in the backward pass (which computes them
  again). The result does not depend on `chunk` but for the order of the sum.
  """
  T = h_BTD.shape[1]
  if not chunk or chunk >= T:
    return _sum(h_BTD, head, targets_BT, mask_BT)

  def split(x):  # (B, T, ...) -> (T / chunk, B, chunk, ...); what the padding adds is masked
    x = jnp.pad(x, [(0, 0), (0, -T % chunk)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

  @jax.checkpoint
  def of_part(table_VD, bias_V, h_BTD, targets_BT, mask_BT):
    return _sum(h_BTD, Head(table_VD, bias_V, head.gather), targets_BT, mask_BT)

  def add(total, part):
    return total + of_part(head.table_VD, head.bias_V, *part), None

  return jax.lax.scan(add, jnp.float32(0), (split(h_BTD), split(targets_BT), split(mask_BT)))[0]


def logits(h: jax.Array, head: Head) -> jax.Array:
  """(..., D) -> (..., V) in float32."""
  y = jnp.einsum("...D,VD->...V", h, head.gather(head.table_VD), preferred_element_type=jnp.float32)
  return y if head.bias_V is None else y + head.bias_V


def _sum(h_BTD, head, targets_BT, mask_BT):
  logits_BTV = logits(h_BTD, head)
  gold_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0]
  return jnp.sum(jnp.where(mask_BT, jax.nn.logsumexp(logits_BTV, -1) - gold_BT, 0))
