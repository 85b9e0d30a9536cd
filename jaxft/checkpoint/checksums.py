"""A checksum of every leaf of a state, and whether it is finite: read where the leaves are, a part of a device at a time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.sharding import per_device

KNUTH_MULTIPLIER = 2654435761  # his multiplier


def nonfinite_leaves(state: Any) -> list[str]:
  """The paths of leaves that hold a NaN or an infinity."""
  leaves = jax.tree_util.tree_flatten_with_path(state)[0]
  fine = _reduce_over_shards([leaf for _, leaf in leaves], _shard_is_finite, jnp.all)
  return [
    jax.tree_util.keystr(path).lstrip(".")
    for (path, _), it in zip(leaves, fine, strict=True)
    if not it
  ]


def checksums(state: Any) -> dict[str, int]:
  """A 32-bit checksum of each leaf, by path: the same on every mesh, different after any single flipped bit.

  The sum over elements of (bits of the element) x (an odd number made from its index), modulo 2^32: an odd factor loses no
  bit, and sums of integers do not depend on their order.
  """
  leaves = jax.tree_util.tree_flatten_with_path(state)[0]
  values = _reduce_over_shards([leaf for _, leaf in leaves], _shard_checksum, jnp.sum)
  return {
    jax.tree_util.keystr(path): int(value) for (path, _), value in zip(leaves, values, strict=True)
  }


def _reduce_over_shards(
  leaves: list[jax.Array], of_part: Callable, together: Callable
) -> np.ndarray:
  """`of_part` of each leaf, put together over its devices, and over its rows where it is on the host."""
  return np.asarray(_compiled(tuple(leaf.sharding for leaf in leaves), of_part, together)(leaves))


@functools.cache
def _compiled(shardings: tuple[Any, ...], of_part: Callable, together: Callable) -> Callable:
  def in_rows(part: per_device.LocalShard) -> jax.Array:
    x = part.values
    if jax.typeof(x).memory_space == jax.memory.Space.Device or not x.ndim:
      return of_part(part._replace(values=jax.device_put(x, jax.memory.Space.Device)))

    def row(i: jax.Array) -> jax.Array:
      values = jax.device_put(jax.lax.dynamic_slice_in_dim(x, i, 1), jax.memory.Space.Device)
      return of_part(part._replace(values=values, offsets=(part.offsets[0] + i, *part.offsets[1:])))

    two = lambda i, found: together(jnp.stack([found, row(i)])).astype(found.dtype)
    return jax.lax.fori_loop(1, x.shape[0], two, row(0))

  everyone = per_device.map_shards(list(shardings), in_rows)
  return jax.jit(lambda leaves: together(everyone(leaves), axis=0))


def _shard_is_finite(part: per_device.LocalShard) -> jax.Array:
  return jnp.isfinite(jnp.max(jnp.abs(part.values)))


def _shard_checksum(part: per_device.LocalShard) -> jax.Array:
  x = part.values
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(
    jnp.uint32
  )
  index, stride = jnp.zeros(x.shape, jnp.uint32), 1
  for axis in reversed(range(x.ndim)):
    along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) + jnp.asarray(
      part.offsets[axis]
    ).astype(jnp.uint32)
    index = index + along * jnp.uint32(stride % 2**32)
    stride *= part.shape[axis]
  factor = (index * jnp.uint32(KNUTH_MULTIPLIER)) ^ (index >> 16) | jnp.uint32(1)
  return jnp.where(part.is_primary, jnp.sum(bits * factor, dtype=jnp.uint32), jnp.uint32(0))


def chunk_checksum(x: np.ndarray, starts: tuple[int, ...], shape: tuple[int, ...]) -> int:
  """What a box of a leaf adds to its checksum, modulo 2^32.

  Args:
    x: the values of the box.
    starts: where it begins along each axis of the leaf.
    shape: of the leaf.
  """
  index, stride = np.zeros(x.shape, np.uint32), 1
  for axis in reversed(range(x.ndim)):
    along = (np.arange(x.shape[axis], dtype=np.uint64) + starts[axis]) * stride
    index += along.astype(np.uint32).reshape(-1, *[1] * (x.ndim - 1 - axis))
    stride *= shape[axis]
  factor = index * np.uint32(KNUTH_MULTIPLIER)
  index >>= np.uint32(16)
  factor ^= index
  factor |= np.uint32(1)
  factor *= x.view(f"uint{8 * x.dtype.itemsize}")
  return int(factor.sum(dtype=np.uint32))
