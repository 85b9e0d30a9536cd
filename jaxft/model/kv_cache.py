"""KVCache: keys and values of the tokens that a decoder has read.

B batch, T new tokens, S tokens that the cache can hold, L layers, N heads, H head size
"""

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxft.model.config import ModelConfig

Layers: TypeAlias = jax.Array | tuple[jax.Array, ...]  # (L, B, N, S, H), or (B, N, S, H) of each


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of the columns read so far; updated without a copy where it is donated."""

  k: Layers
  v: Layers
  segments_BS: jax.Array  # 0: padding or not written yet
  length: jax.Array  # columns written, the same for every row

  @classmethod
  def empty(cls, cfg: ModelConfig, B: int, S: int, dtype: jax.typing.DTypeLike) -> "KVCache":
    kv = jnp.zeros((cfg.L, B, cfg.N, S, cfg.H), dtype)
    return cls(k=kv, v=kv, segments_BS=jnp.zeros((B, S), jnp.int32), length=jnp.int32(0))

  def unstack(self) -> "KVCache":
    """Give each layer arrays of its own."""
    return dataclasses.replace(self, k=tuple(self.k), v=tuple(self.v))

  def take_rows(self, rows: jax.Array) -> "KVCache":
    k, v = jax.tree.map(lambda x: jnp.take(x, rows, x.ndim - 4), (self.k, self.v))
    return dataclasses.replace(self, k=k, v=v, segments_BS=self.segments_BS[rows])

  def write_segments(self, segments_BT: jax.Array) -> "KVCache":
    """Write the segments of T new columns, whose keys and values each layer writes after it."""
    start = (0, self.length)
    segments_BS = jax.lax.dynamic_update_slice(self.segments_BS, segments_BT, start)
    return dataclasses.replace(self, segments_BS=segments_BS)

  def write_layer(
    self, layer: jax.Array | int, k_BTNH: jax.Array, v_BTNH: jax.Array
  ) -> tuple[jax.Array, jax.Array, "KVCache"]:
    """Write T new columns of a layer; returns all keys and values of it, (B, S, N, H), and both.

    `layer` is a Python number where the cache is `unstack`ed.
    """
    start = (0, 0, self.length, 0)

    def write(kv: Layers, new_BTNH: jax.Array) -> tuple[jax.Array, Layers]:
      new_BNTH = jnp.moveaxis(new_BTNH, 2, 1)
      if isinstance(kv, tuple):
        index = int(layer)
        all_BNSH = jax.lax.dynamic_update_slice(kv[index], new_BNTH, start)
        kv = (*kv[:index], all_BNSH, *kv[index + 1 :])
      else:
        kv = jax.lax.dynamic_update_slice(kv, new_BNTH[None], (layer, *start))
        all_BNSH = jax.lax.dynamic_index_in_dim(kv, layer, keepdims=False)
      return jnp.moveaxis(all_BNSH, 1, 2), kv

    k_BSNH, k = write(self.k, k_BTNH)
    v_BSNH, v = write(self.v, v_BTNH)
    return k_BSNH, v_BSNH, dataclasses.replace(self, k=k, v=v)
