"""A checksum of every leaf of a state, and whether it is finite, computed on the leaf's devices."""

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxft.sharding import per_device
from jaxft.utils.types import PyTree

ShardFn: TypeAlias = Callable[[per_device.LocalShard], jax.Array]
ReduceFn: TypeAlias = Callable[..., jax.Array]  # jnp.all, jnp.sum
KNUTH_MULTIPLIER = 2654435761  # of his multiplicative hash


def nonfinite_leaves(state: PyTree) -> list[str]:
  """The paths of leaves that hold a NaN or an infinity."""
  is_finite = _reduce_over_shards(state, _shard_is_finite, jnp.all)
  return [path.lstrip(".") for path, finite in is_finite.items() if not finite]


def checksums(state: PyTree) -> dict[str, int]:
  """A 32-bit checksum of each leaf, by path: the same on every mesh, another after any flipped bit.

  The sum over elements of (bits of the element) x (an odd number made from its index), modulo 2^32:
  an odd factor loses no bit, and sums of integers do not depend on their order.
  """
  values = _reduce_over_shards(state, _shard_checksum, jnp.sum)
  return {path: int(value) for path, value in values.items()}


def _reduce_over_shards(state: PyTree, f: ShardFn, reduce: ReduceFn) -> dict[str, np.ndarray]:
  """Reduce `f` over the shards of each leaf, and over its rows where it is on the host."""
  paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(state))
  values = _compile(tuple(leaf.sharding for leaf in leaves), f, reduce)(list(leaves))
  return dict(zip(map(jax.tree_util.keystr, paths), np.asarray(values), strict=True))


@functools.cache
def _compile(
  shardings: tuple[Sharding, ...], f: ShardFn, reduce: ReduceFn
) -> Callable[[list[jax.Array]], jax.Array]:
  def by_rows(shard: per_device.LocalShard) -> jax.Array:
    x = shard.values
    if jax.typeof(x).memory_space == jax.memory.Space.Device or not x.ndim:
      return f(shard._replace(values=jax.device_put(x, jax.memory.Space.Device)))

    # Row by row: the device may have no room for a leaf that is on the host.
    def row(i: jax.Array | int) -> jax.Array:
      values = jax.device_put(jax.lax.dynamic_slice_in_dim(x, i, 1), jax.memory.Space.Device)
      first, *other = shard.offsets
      return f(shard._replace(values=values, offsets=(first + i, *other)))

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
      return reduce(jnp.stack([total, row(i)])).astype(total.dtype)

    return jax.lax.fori_loop(1, x.shape[0], add, row(0))

  map_shards = per_device.map_shards(list(shardings), by_rows)
  return jax.jit(lambda leaves: reduce(map_shards(leaves), axis=0))


def _shard_is_finite(shard: per_device.LocalShard) -> jax.Array:
  return jnp.isfinite(jnp.max(jnp.abs(shard.values)))


def _shard_checksum(shard: per_device.LocalShard) -> jax.Array:
  x = shard.values
  as_uint = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
  bits = jax.lax.bitcast_convert_type(x, as_uint).astype(jnp.uint32)
  index = jnp.zeros(x.shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(x.ndim)):
    along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    along += jnp.asarray(shard.offsets[axis]).astype(jnp.uint32)
    index = index + along * jnp.uint32(stride % 2**32)
    stride *= shard.shape[axis]
  factor = (index * jnp.uint32(KNUTH_MULTIPLIER)) ^ (index >> 16) | jnp.uint32(1)
  # A replica adds nothing.
  return jnp.where(shard.is_primary, jnp.sum(bits * factor, dtype=jnp.uint32), jnp.uint32(0))


def chunk_checksum(x: np.ndarray, offsets: tuple[int, ...], shape: tuple[int, ...]) -> int:
  """What a chunk of a leaf adds to its checksum, modulo 2^32: `_shard_checksum` in numpy.

  Args:
    x: the values of the chunk.
    offsets: where it begins along each axis of the leaf.
    shape: of the leaf.
  """
  index = np.zeros(x.shape, np.uint32)
  stride = 1
  for axis in reversed(range(x.ndim)):
    along = (np.arange(x.shape[axis], dtype=np.uint64) + offsets[axis]) * stride
    index += along.astype(np.uint32).reshape(-1, *[1] * (x.ndim - 1 - axis))
    stride *= shape[axis]
  # In place: a temporary of its own would be as large as the chunk.
  factor = index * np.uint32(KNUTH_MULTIPLIER)
  index >>= np.uint32(16)
  factor ^= index
  factor |= np.uint32(1)
  factor *= x.view(f"uint{8 * x.dtype.itemsize}")
  return int(factor.sum(dtype=np.uint32))
