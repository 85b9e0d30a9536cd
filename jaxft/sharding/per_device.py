"""Functions that run once on each device, on its own shard of an array."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxft.sharding.rules import COMPUTE, partition_spec


class LocalShard(NamedTuple):
  """What a device has of an array."""

  values: jax.Array
  offsets: tuple[Any, ...]  # where it begins along each axis
  shape: tuple[int, ...]  # of the whole array
  is_primary: Any  # false on a device whose part another one, which counts, has too


def map_shards(
  shardings: list[Sharding], of_part: Callable[[LocalShard], jax.Array]
) -> Callable[[list[jax.Array]], jax.Array]:
  """leaves -> `of_part` of what each device has of each leaf, (devices, leaves, ...).

  Each device looks at what it holds, and one collective tells all: one for each leaf would be dozens that wait for nothing, and
  XLA's CPU devices that have several under way can wait for each other without end (jax 0.10.2, eight devices on two cores).

  Args:
    shardings: of the leaves, in order; all of one mesh, or else the leaves are looked at whole.
  """
  meshes = {
    sharding.mesh if isinstance(sharding, NamedSharding) else None for sharding in shardings
  }
  if len(meshes) != 1 or None in meshes:
    return lambda leaves: jnp.stack(
      [of_part(LocalShard(leaf, (0,) * leaf.ndim, leaf.shape, True)) for leaf in leaves]
    )[None]
  (mesh,) = meshes

  def part_of(local: jax.Array, sharding: NamedSharding) -> LocalShard:
    axes = [sharding.spec[i] if i < len(sharding.spec) else None for i in range(local.ndim)]
    places = [jax.lax.axis_index(names) if names else 0 for names in axes]
    shape = tuple(size * _axis_size(mesh, names) for size, names in zip(local.shape, axes))
    cut_by = {
      name for names in axes if names for name in (names if isinstance(names, tuple) else (names,))
    }
    copies = [name for name in mesh.axis_names if name not in cut_by]
    counts = (jax.lax.axis_index(tuple(copies)) == 0) if copies else True
    return LocalShard(
      local, tuple(place * size for place, size in zip(places, local.shape)), shape, counts
    )

  def look(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack(
      [of_part(part_of(leaf, sharding)) for leaf, sharding in zip(leaves, shardings, strict=True)]
    )[None]

  specs = [sharding.spec for sharding in shardings]
  return jax.shard_map(
    look, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(mesh.axis_names), check_vma=False
  )


def _axis_size(mesh: Mesh, names: str | tuple[str, ...] | None) -> int:
  return math.prod(
    mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ())
  )


def make_nonfinite_check(shardings: Any) -> Callable:
  """tree -> for each leaf, in order, whether it holds a NaN or an infinity.

  The tree is placed as `shardings`, a tree like it, says.
  """
  # A NaN is the maximum wherever it is; isfinite(leaf).all() takes four times as long and 500 MB (GPT-2 124M on a CPU).
  everyone = map_shards(
    jax.tree.leaves(shardings), lambda part: ~jnp.isfinite(jnp.max(jnp.abs(part.values)))
  )
  return lambda tree: everyone(jax.tree.leaves(tree)).any(axis=0)


def make_shard_map(mesh: Mesh) -> Callable:
  """For what no device needs another for: (function, axes of each array argument, of the result) -> the function, sharded.

  A compiler that is left to split a kernel would gather its arguments first. An argument may be None.
  """

  def on_each_device(f: Callable, axes_in: Any, axes_out: Any) -> Callable:
    if mesh.size == 1:
      return f

    def sharded(*arguments: jax.Array | None) -> jax.Array:
      of = lambda x, axes: None if x is None else partition_spec(axes, x.shape, mesh, COMPUTE)
      specs = tuple(map(of, arguments, axes_in))
      out = partition_spec(axes_out, arguments[0].shape, mesh, COMPUTE)
      return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(*arguments)

    return sharded

  return on_each_device
