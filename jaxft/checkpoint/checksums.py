"""Checksums and finiteness of every leaf of a state, computed on its devices."""

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
KNUTH_MULTIPLIER = 2654435761  # from Knuth's multiplicative hash


def nonfinite_leaves(state: PyTree) -> list[str]:
  """Return the paths of the leaves with a NaN or an infinity."""
  is_finite = _reduce_over_shards(state, _shard_is_finite, jnp.all)
  return [path.lstrip(".") for path, finite in is_finite.items() if not finite]


def checksums(state: PyTree) -> dict[str, int]:
  """Return a 32-bit checksum of each leaf, by path.

  It is the sum over elements of (bits of the element) x (an odd number made from its index), modulo
  2^32. Any flipped bit changes it, because multiplication by an odd factor loses no bit. It is the
  same on every mesh, because a sum of integers does not depend on the order.
  """
  values = _reduce_over_shards(state, _shard_checksum, jnp.sum)
  return {path: int(value) for path, value in values.items()}


def _reduce_over_shards(state: PyTree, f: ShardFn, reduce: ReduceFn) -> dict[str, np.ndarray]:
  """Reduce `f` over the shards of each leaf, and over the rows of host leaves."""
  paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(state))
  values = _compile(tuple(leaf.sharding for leaf in leaves), f, reduce)(list(leaves))
  return dict(zip(map(jax.tree_util.keystr, paths), np.asarray(values), strict=True))


@functools.cache
def _compile(
  shardings: tuple[Sharding, ...], f: ShardFn, reduce: ReduceFn
) -> Callable[[list[jax.Array]], jax.Array]:
  """Compile the reduction for these shardings; cached for the next save."""

  def by_rows(shard: per_device.LocalShard) -> jax.Array:
    x = shard.values
    if jax.typeof(x).memory_space == jax.memory.Space.Device or not x.ndim:
      return f(shard._replace(values=jax.device_put(x, jax.memory.Space.Device)))

    # Copy a row at a time: a leaf on the host may not fit on the device.
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
  # Replicas must not count twice.
  return jnp.where(shard.is_primary, jnp.sum(bits * factor, dtype=jnp.uint32), jnp.uint32(0))


def chunk_checksum(x: np.ndarray, offsets: tuple[int, ...], shape: tuple[int, ...]) -> int:
  """Return the share of a chunk in its leaf's checksum, modulo 2^32.

  This is `_shard_checksum` in numpy, for chunks on disk.

  Args:
    x: the values of the chunk.
    offsets: start of the chunk along each axis of the leaf.
    shape: shape of the leaf.
  """
  index = np.zeros(x.shape, np.uint32)
  stride = 1
  for axis in reversed(range(x.ndim)):
    along = (np.arange(x.shape[axis], dtype=np.uint64) + offsets[axis]) * stride
    index += along.astype(np.uint32).reshape(-1, *[1] * (x.ndim - 1 - axis))
    stride *= shape[axis]
  # In place: each temporary would be as large as the chunk.
  factor = index * np.uint32(KNUTH_MULTIPLIER)
  index >>= np.uint32(16)
  factor ^= index
  factor |= np.uint32(1)
  factor *= x.view(f"uint{8 * x.dtype.itemsize}")
  return int(factor.sum(dtype=np.uint32))
