"""Process logits before sampling.

Results equal those of transformers' logits processors.

Shapes: B rows, V vocabulary, S columns of the text so far.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class History(NamedTuple):
  """The tokens so far. All rows end in the same column."""

  ids_BS: jax.Array | np.ndarray
  valid_BS: jax.Array | np.ndarray  # false: padding, or not yet written
  end: jax.Array | np.integer  # the next column


def penalize_repeats(logits_BV: jax.Array, history: History, penalty: float) -> jax.Array:
  """Penalize tokens that the text already has: CTRL's repetition penalty.

  Divides positive logits of these tokens by `penalty`, and multiplies negative ones
  (arXiv:1909.05858).
  """
  seen_BV = _token_mask(history.ids_BS, history.valid_BS, logits_BV.shape[-1])
  penalized_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
  return jnp.where(seen_BV, penalized_BV, logits_BV)


def ban_repeated_ngrams(logits_BV: jax.Array, history: History, n: int) -> jax.Array:
  """Set to -inf each token that would complete an n-gram of the text so far."""
  ids_BS, valid_BS, end = history
  num_starts = ids_BS.shape[1] - n + 1
  if num_starts < 1:
    return logits_BV
  # True at a column if the n-gram that starts there begins with the last n - 1 tokens of the text.
  matches_BS = jnp.ones((len(ids_BS), num_starts), bool)
  for k in range(n - 1):
    columns = slice(k, k + num_starts)
    # An invalid column is before the text. A text of fewer than n - 1 tokens repeats no n-gram.
    last_B1 = jax.lax.dynamic_slice_in_dim(ids_BS, jnp.maximum(end - (n - 1) + k, 0), 1, 1)
    last_valid_B1 = jax.lax.dynamic_slice_in_dim(valid_BS, jnp.maximum(end - (n - 1) + k, 0), 1, 1)
    is_same = (ids_BS[:, columns] == last_B1) & valid_BS[:, columns]
    matches_BS &= is_same & last_valid_B1 & (end >= n - 1)
  V = logits_BV.shape[-1]
  banned_BV = _token_mask(ids_BS[:, n - 1 :], matches_BS & valid_BS[:, n - 1 :], V)
  return jnp.where(banned_BV, -jnp.inf, logits_BV)


def filter_logits(logits_BV: jax.Array, top_k: int, top_p: float, min_p: float) -> jax.Array:
  """Set to -inf the tokens that top_k, then top_p, then min_p rule out.

  The filters keep the same tokens as transformers' TopKLogitsWarper, TopPLogitsWarper (Holtzman et
  al., arXiv:1904.09751) and MinPLogitsWarper (arXiv:2407.01082). Filter `top_k` keeps the k
  likeliest tokens. Of these, `top_p` keeps the smallest set that holds a probability of top_p. Then
  `min_p` keeps tokens with at least min_p times the probability of the likeliest one.
  """
  V = logits_BV.shape[-1]
  if 0 < top_k < V:
    kth_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
  if top_p < 1:
    # Sort ascending, so that the cumulative sum is the mass of the tail, which is cut at 1 - top_p.
    # The likeliest token always stays.
    order_BV = jnp.argsort(logits_BV, -1)
    tail_BV = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, -1)), -1)
    cut_BV = (tail_BV <= 1 - top_p) & (jnp.arange(V) < V - 1)
    ranks_BV = jnp.argsort(order_BV, -1)
    logits_BV = jnp.where(jnp.take_along_axis(cut_BV, ranks_BV, -1), -jnp.inf, logits_BV)
  if min_p > 0:
    p_BV = jax.nn.softmax(logits_BV)
    logits_BV = jnp.where(p_BV < min_p * p_BV.max(-1, keepdims=True), -jnp.inf, logits_BV)
  return logits_BV


def _token_mask(
  ids_BS: jax.Array | np.ndarray, valid_BS: jax.Array | np.ndarray, V: int
) -> jax.Array:
  """Return a mask (B, V), true for the valid ids of each row."""
  rows = jnp.arange(len(ids_BS))[:, None]
  return jnp.zeros((len(ids_BS), V), bool).at[rows, ids_BS].max(valid_BS)
