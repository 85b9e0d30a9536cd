"""KVCache: keys and values of the tokens that a decoder has read.

A cache has a fixed size S, because a new shape would mean a new compilation. All rows write the
same columns [length, length + T). Rows of different lengths are padded, and segment 0 hides the
padding.

B batch, T new tokens, S tokens that the cache can hold, L layers, N heads, H head size
"""

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxft.model.config import ModelConfig

Layers: TypeAlias = jax.Array | tuple[jax.Array, ...]  # (L, B, N, S, H), or (B, N, S, H) per layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of the columns read so far.

  A jitted step that donates the cache updates it without a copy.
  """

  k: Layers
  v: Layers
  segments_BS: jax.Array  # 0: padding or not yet written
  length: jax.Array  # number of columns written, the same for every row

  @classmethod
  def empty(cls, cfg: ModelConfig, B: int, S: int, dtype: jax.typing.DTypeLike) -> "KVCache":
    """Create a cache for B rows of up to S tokens."""
    kv = jnp.zeros((cfg.L, B, cfg.N, S, cfg.H), dtype)
    return cls(k=kv, v=kv, segments_BS=jnp.zeros((B, S), jnp.int32), length=jnp.int32(0))

  def unstack(self) -> "KVCache":
    """Split the layer axis into arrays, for a decoder that unrolls its layers."""
    return dataclasses.replace(self, k=tuple(self.k), v=tuple(self.v))

  def take_rows(self, rows: jax.Array) -> "KVCache":
    """Select rows of the batch by index; a row may be taken several times."""
    # The batch axis is the fourth from the end, with and without a layer axis.
    k, v = jax.tree.map(lambda x: jnp.take(x, rows, x.ndim - 4), (self.k, self.v))
    return dataclasses.replace(self, k=k, v=v, segments_BS=self.segments_BS[rows])

  def write_segments(self, segments_BT: jax.Array) -> "KVCache":
    """Write the segment ids of T new columns.

    The layers write their keys and values afterwards. `length` stays the same until all layers have
    written.
    """
    start = (0, self.length)
    segments_BS = jax.lax.dynamic_update_slice(self.segments_BS, segments_BT, start)
    return dataclasses.replace(self, segments_BS=segments_BS)

  def write_layer(
    self, layer: jax.Array | int, k_BTNH: jax.Array, v_BTNH: jax.Array
  ) -> tuple[jax.Array, jax.Array, "KVCache"]:
    """Write T new columns of one layer.

    Args:
      layer: index of the layer; must be a Python int if the cache is `unstack`ed.
      k_BTNH: new keys.
      v_BTNH: new values.

    Returns:
      All keys (B, S, N, H) and values (B, S, N, H) of the layer, and the updated cache.
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
