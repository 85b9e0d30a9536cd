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
  """Keys and values of the columns seen so far; written in place inside a jitted function."""

  k: Any  # (L, B, N, S, H), or a tuple: of each layer (B, N, S, H)
  v: Any
  segments_BS: jax.Array  # 0: padding or not written yet
  used: jax.Array  # columns written, the same for every row

  @classmethod
  def empty(cls, cfg: ModelConfig, B: int, S: int, dtype: Any) -> "KVCache":
    kv = jnp.zeros((cfg.L, B, cfg.N, S, cfg.H), dtype)
    return cls(kv, kv, jnp.zeros((B, S), jnp.int32), jnp.int32(0))

  def apart(self) -> "KVCache":
    """With arrays of its own for each layer."""
    return dataclasses.replace(self, k=tuple(jnp.unstack(self.k)), v=tuple(jnp.unstack(self.v)))

  def take(self, rows: jax.Array) -> "KVCache":
    """Of these rows."""
    k, v = jax.tree.map(lambda x: jnp.take(x, rows, x.ndim - 4), (self.k, self.v))
    return KVCache(k, v, self.segments_BS[rows], self.used)

  def write(self, kv: Any, layer: Any, new_BTNH: jax.Array) -> tuple[Any, jax.Array]:
    """`kv`, which is k or v, with more columns in a layer, and all columns of that layer, (B, S, N, H)."""
    new_BNTH, start = jnp.moveaxis(new_BTNH, 2, 1), (0, 0, self.used, 0)
    if isinstance(kv, tuple):
      all_BNSH = jax.lax.dynamic_update_slice(kv[layer], new_BNTH, start)
      kv = (*kv[:layer], all_BNSH, *kv[layer + 1 :])
    else:
      kv = jax.lax.dynamic_update_slice(kv, new_BNTH[None], (layer, *start))
      all_BNSH = jax.lax.dynamic_index_in_dim(kv, layer, keepdims=False)
    return kv, jnp.moveaxis(all_BNSH, 1, 2)
