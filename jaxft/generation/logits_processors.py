"""What sampling does to logits before a token is drawn; names and meanings are transformers' own.

B rows, V vocabulary, S columns of the text so far
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class History(NamedTuple):
  """The text so far; all rows end in the same column."""

  ids_BS: jax.Array
  there_BS: jax.Array  # false: padding, or not written yet
  end: jax.Array  # the column that comes next


def penalize_repeats(logits_BV: jax.Array, history: History, penalty: float) -> jax.Array:
  """Makes each token of the text less likely: its logit divided by `penalty`, or multiplied where it is negative (CTRL,
  arXiv:1909.05858)."""
  seen_BV = _token_mask(history.ids_BS, history.there_BS, logits_BV.shape[-1])
  return jnp.where(
    seen_BV, jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV
  )


def ban_repeated_ngrams(logits_BV: jax.Array, history: History, n: int) -> jax.Array:
  """-inf for each token that would end a run of n tokens which the text has already."""
  ids_BS, there_BS, end = history
  starts = ids_BS.shape[1] - n + 1
  if starts < 1:
    return logits_BV
  same_BS = jnp.ones((len(ids_BS), starts), bool)
  for k in range(n - 1):
    # A column that is not there begins before the text: with fewer than n - 1 tokens nothing is repeated.
    last_B1 = jax.lax.dynamic_slice_in_dim(ids_BS, jnp.maximum(end - (n - 1) + k, 0), 1, 1)
    last_there_B1 = jax.lax.dynamic_slice_in_dim(there_BS, jnp.maximum(end - (n - 1) + k, 0), 1, 1)
    same_BS &= (
      (ids_BS[:, k : k + starts] == last_B1)
      & there_BS[:, k : k + starts]
      & last_there_B1
      & (end >= n - 1)
    )
  banned_BV = _token_mask(ids_BS[:, n - 1 :], same_BS & there_BS[:, n - 1 :], logits_BV.shape[-1])
  return jnp.where(banned_BV, -jnp.inf, logits_BV)


def filter_logits(logits_BV: jax.Array, top_k: int, top_p: float, min_p: float) -> jax.Array:
  """-inf for every token outside the k likeliest, then outside the smallest set that holds top_p of the rest, then below
  min_p times the likeliest one's probability.

  The same tokens stay as with transformers' TopKLogitsWarper, TopPLogitsWarper (Holtzman et al., arXiv:1904.09751) and
  MinPLogitsWarper (arXiv:2407.01082).
  """
  V = logits_BV.shape[-1]
  if 0 < top_k < V:
    kth_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
  if top_p < 1:
    order_BV = jnp.argsort(
      logits_BV, -1
    )  # rising, so that the tail is cut where its own mass reaches 1 - top_p
    tail_BV = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, -1)), -1)
    cut_BV = (tail_BV <= 1 - top_p) & (jnp.arange(V) < V - 1)
    ranks_BV = jnp.argsort(order_BV, -1)
    logits_BV = jnp.where(jnp.take_along_axis(cut_BV, ranks_BV, -1), -jnp.inf, logits_BV)
  if min_p > 0:
    p_BV = jax.nn.softmax(logits_BV)
    logits_BV = jnp.where(p_BV < min_p * p_BV.max(-1, keepdims=True), -jnp.inf, logits_BV)
  return logits_BV


def _token_mask(ids_BS: jax.Array, there_BS: jax.Array, V: int) -> jax.Array:
  """(B, V), true for the ids of a row that are there."""
  rows = jnp.arange(len(ids_BS))[:, None]
  return jnp.zeros((len(ids_BS), V), bool).at[rows, ids_BS].max(there_BS)
