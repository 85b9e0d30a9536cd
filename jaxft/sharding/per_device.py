"""Functions that run once on each device, on its own shard of an array."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxft.sharding.rules import COMPUTE, Axes, partition_spec
from jaxft.utils.types import PyTree


class LocalShard(NamedTuple):
  """A device's shard of an array."""

  values: jax.Array
  offsets: tuple[jax.Array | int, ...]  # of the shard in the array, along each axis
  shape: tuple[int, ...]  # of the array
  is_primary: jax.Array | bool  # true on one of the devices that hold copies of this shard


def map_shards(
  shardings: list[Sharding], fn: Callable[[LocalShard], jax.Array]
) -> Callable[[list[jax.Array]], jax.Array]:
  """Make a function: leaves -> `fn` of each device's shard of each leaf, (devices, leaves, ...).

  Each device reads what it holds, and one collective shares all results: one for each leaf would be
  dozens that wait for nothing, and XLA's CPU devices that have several under way can wait for each
  other without end (jax 0.10.2, eight devices on two cores).

  Args:
    shardings: of the leaves, in order; unless all are of one mesh, `fn` gets whole leaves.
  """
  named = [sharding for sharding in shardings if isinstance(sharding, NamedSharding)]
  meshes = {sharding.mesh for sharding in named}
  if len(meshes) != 1 or len(named) < len(shardings):

    def map_whole(leaves: list[jax.Array]) -> jax.Array:
      shards = [
        LocalShard(values=leaf, offsets=(0,) * leaf.ndim, shape=leaf.shape, is_primary=True)
        for leaf in leaves
      ]
      return jnp.stack(list(map(fn, shards)))[None]

    return map_whole
  (mesh,) = meshes

  def map_local(leaves: list[jax.Array]) -> jax.Array:
    pairs = zip(leaves, named, strict=True)
    return jnp.stack([fn(_local_shard(leaf, sharding)) for leaf, sharding in pairs])[None]

  in_specs = ([sharding.spec for sharding in named],)
  out_specs = PartitionSpec(mesh.axis_names)
  # Without check_vma, as results differ from device to device by design.
  return jax.shard_map(
    map_local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )


def _local_shard(values: jax.Array, sharding: NamedSharding) -> LocalShard:
  """Describe this device's shard, inside `shard_map`."""
  mesh = sharding.mesh
  # Mesh axes of each array axis; a PartitionSpec may end early, and may have a name for a tuple.
  spec = (*sharding.spec, *[None] * values.ndim)[: values.ndim]
  axes = [names if isinstance(names, tuple) else (names,) if names else () for names in spec]
  index = [jax.lax.axis_index(names) if names else 0 for names in axes]
  sizes = [math.prod(mesh.shape[name] for name in names) for names in axes]
  # Devices that differ only along the other mesh axes hold copies: the first of them is primary.
  copy_axes = tuple(name for name in mesh.axis_names if name not in sum(axes, ()))
  return LocalShard(
    values=values,
    offsets=tuple(i * n for i, n in zip(index, values.shape)),
    shape=tuple(n * size for n, size in zip(values.shape, sizes)),
    is_primary=jax.lax.axis_index(copy_axes) == 0 if copy_axes else True,
  )


def make_nonfinite_check(shardings: PyTree) -> Callable[[PyTree], jax.Array]:
  """Make a function: tree sharded as `shardings` -> per leaf, whether it has a NaN or infinity."""

  # A NaN is the maximum wherever it is; isfinite(leaf).all() takes four times as long and 500 MB
  # (GPT-2 124M on a CPU).
  def has_nonfinite(shard):
    return ~jnp.isfinite(jnp.max(jnp.abs(shard.values)))

  check = map_shards(jax.tree.leaves(shardings), has_nonfinite)
  return lambda tree: check(jax.tree.leaves(tree)).any(axis=0)


def shard_map(
  fn: Callable[..., jax.Array], in_axes: Sequence[Axes], out_axes: Axes, mesh: Mesh | None
) -> Callable[..., jax.Array]:
  """Make `fn` run on local shards of its arguments, for one in which no device needs another.

  Left to split a kernel itself, the compiler would gather its arguments first. Arguments may be
  None; the result, with the logical axes `out_axes`, is shaped as the first of them.
  """
  if mesh is None or mesh.size == 1:
    return fn

  def sharded_fn(*args: jax.Array | None) -> jax.Array:
    def spec(x, axes):
      return None if x is None else partition_spec(axes, x.shape, mesh, COMPUTE)

    specs = {"in_specs": tuple(map(spec, args, in_axes)), "out_specs": spec(args[0], out_axes)}
    return jax.shard_map(fn, mesh=mesh, check_vma=False, **specs)(*args)

  return sharded_fn
