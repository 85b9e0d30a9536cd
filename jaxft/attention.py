"""Scaled dot-product attention, causal, with optional windows and segments.

B batch, T query length, S key length, N heads, H head size
"""

import jax
import jax.numpy as jnp

from jaxft.dropout import dropout


def attention(
  q_BTNH: jax.Array,
  k_BSNH: jax.Array,
  v_BSNH: jax.Array,
  *,
  scale: float,
  offset: jax.Array | int = 0,
  window: jax.Array | int | None = None,
  q_segments_BT: jax.Array | None = None,
  k_segments_BS: jax.Array | None = None,
  dropout_rate: float = 0.0,
  keys_B: jax.Array | None = None,
) -> jax.Array:
  """Attention of each query to the keys at or before it, in its own segment; returns (B, T, N, H).

  Causality goes by column, not by position id: query t stands in column `offset + t`, key s in column s. So padding,
  packing and a key/value cache longer than what is filled need nothing but segments: a query sees only keys of its own.
  With `window`, only the last `window` columns up to the query's own are visible.
  Softmax is in float32 whatever the inputs are. `dropout_rate` acts on the probabilities when keys are given, one for each row.
  """
  T, S = q_BTNH.shape[1], k_BSNH.shape[1]
  logits_BNTS = scale * jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=jnp.float32)
  distance_TS = offset + jnp.arange(T)[:, None] - jnp.arange(S)[None, :]
  visible = distance_TS >= 0
  if window is not None:
    visible = visible & (distance_TS < window)
  if q_segments_BT is not None:
    visible = visible & (q_segments_BT[:, None, :, None] == k_segments_BS[:, None, None, :])
  # The lowest finite number, not -inf: a row with no visible key stays finite (and is masked from the loss anyway).
  logits_BNTS = jnp.where(visible, logits_BNTS, jnp.finfo(jnp.float32).min)
  p_BNTS = dropout(jax.nn.softmax(logits_BNTS), dropout_rate, keys_B)
  return jnp.einsum("BNTS,BSNH->BTNH", p_BNTS.astype(v_BSNH.dtype), v_BSNH)
