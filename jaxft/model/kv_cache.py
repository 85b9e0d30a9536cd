"""KVCache: keys and values of the tokens that a decoder has read.

B batch, T new tokens, S tokens that the cache can hold, L layers, N heads, H head size
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.model.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of the columns read so far; updated without a copy where it is donated."""

  k: Any  # (L, B, N, S, H), or a tuple: of each layer (B, N, S, H)
  v: Any
  segments_BS: jax.Array  # 0: padding or not written yet
  length: jax.Array  # columns written, the same for every row

  @classmethod
  def empty(cls, cfg: ModelConfig, B: int, S: int, dtype: Any) -> "KVCache":
    kv = jnp.zeros((cfg.L, B, cfg.N, S, cfg.H), dtype)
    return cls(k=kv, v=kv, segments_BS=jnp.zeros((B, S), jnp.int32), length=jnp.int32(0))

  def unstack(self) -> "KVCache":
    """Give each layer arrays of its own."""
    return dataclasses.replace(self, k=tuple(jnp.unstack(self.k)), v=tuple(jnp.unstack(self.v)))

  def take_rows(self, rows: jax.Array) -> "KVCache":
    k, v = jax.tree.map(lambda x: jnp.take(x, rows, x.ndim - 4), (self.k, self.v))
    return dataclasses.replace(self, k=k, v=v, segments_BS=self.segments_BS[rows])

  def update(self, kv: Any, layer: Any, new_BTNH: jax.Array) -> tuple[Any, jax.Array]:
    """Write new columns to a layer of `kv` (k or v); returns it and that layer, (B, S, N, H)."""
    new_BNTH = jnp.moveaxis(new_BTNH, 2, 1)
    start = (0, 0, self.length, 0)
    if isinstance(kv, tuple):
      all_BNSH = jax.lax.dynamic_update_slice(kv[layer], new_BNTH, start)
      kv = (*kv[:layer], all_BNSH, *kv[layer + 1 :])
    else:
      kv = jax.lax.dynamic_update_slice(kv, new_BNTH[None], (layer, *start))
      all_BNSH = jax.lax.dynamic_index_in_dim(kv, layer, keepdims=False)
    return kv, jnp.moveaxis(all_BNSH, 1, 2)
