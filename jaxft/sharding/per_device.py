"""Functions that run once per device, on the device's shard of an array."""

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
  offsets: tuple[jax.Array | int, ...]  # start of the shard in the array, along each axis
  shape: tuple[int, ...]  # shape of the whole array
  is_primary: jax.Array | bool  # true on exactly one of the devices with a copy of this shard


def map_shards(
  shardings: list[Sharding], fn: Callable[[LocalShard], jax.Array]
) -> Callable[[list[jax.Array]], jax.Array]:
  """Make a function that applies `fn` to each device's shard of each leaf.

  Each device reads its own shards, and one collective shares all results. One collective per leaf
  would be dozens that do not depend on each other. XLA's CPU devices can deadlock with several
  collectives in flight (jax 0.10.2, eight devices on two cores).

  Args:
    shardings: shardings of the leaves, in order. Unless all belong to one mesh, `fn` gets whole
      leaves.
    fn: returns an array of the same shape for every shard.

  Returns:
    A function from the leaves to an array of shape (devices, leaves, ...).
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
  # check_vma would reject results that differ between devices, which is intended here.
  return jax.shard_map(
    map_local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )


def _local_shard(values: jax.Array, sharding: NamedSharding) -> LocalShard:
  """Describe this device's shard, inside `shard_map`."""
  mesh = sharding.mesh
  # Mesh axes of each array axis. A PartitionSpec may be shorter than the array's rank, and an entry
  # may be a name, a tuple of names or None.
  spec = (*sharding.spec, *[None] * values.ndim)[: values.ndim]
  axes = [names if isinstance(names, tuple) else (names,) if names else () for names in spec]
  index = [jax.lax.axis_index(names) if names else 0 for names in axes]
  sizes = [math.prod(mesh.shape[name] for name in names) for names in axes]
  # Devices that differ only along the other mesh axes hold copies; the first of them is primary.
  copy_axes = tuple(name for name in mesh.axis_names if name not in sum(axes, ()))
  return LocalShard(
    values=values,
    offsets=tuple(i * n for i, n in zip(index, values.shape)),
    shape=tuple(n * size for n, size in zip(values.shape, sizes)),
    is_primary=jax.lax.axis_index(copy_axes) == 0 if copy_axes else True,
  )


def make_nonfinite_check(shardings: PyTree) -> Callable[[PyTree], jax.Array]:
  """Make a function that finds NaN and infinity in a tree.

  Returns:
    A function from a tree sharded as `shardings` to one bool per leaf: true if it has a non-finite
    number.
  """

  # The maximum of numbers with a NaN is NaN. isfinite(leaf).all() would take four times as long,
  # and 500 MB (GPT-2 124M on a CPU).
  def has_nonfinite(shard):
    return ~jnp.isfinite(jnp.max(jnp.abs(shard.values)))

  check = map_shards(jax.tree.leaves(shardings), has_nonfinite)
  return lambda tree: check(jax.tree.leaves(tree)).any(axis=0)


def shard_map(
  fn: Callable[..., jax.Array], in_axes: Sequence[Axes], out_axes: Axes, mesh: Mesh | None
) -> Callable[..., jax.Array]:
  """Run `fn` on local shards; it must not need data of other devices.

  Without this, the compiler gathers a kernel's arguments, because it cannot split the kernel.

  Args:
    fn: takes arrays or None, and returns an array shaped as its first argument.
    in_axes: logical axes of each argument.
    out_axes: logical axes of the result.
    mesh: None, or a mesh of one device: returns `fn` unchanged.
  """
  if mesh is None or mesh.size == 1:
    return fn

  def sharded_fn(*args: jax.Array | None) -> jax.Array:
    def spec(x, axes):
      return None if x is None else partition_spec(axes, x.shape, mesh, COMPUTE)

    specs = {"in_specs": tuple(map(spec, args, in_axes)), "out_specs": spec(args[0], out_axes)}
    return jax.shard_map(fn, mesh=mesh, check_vma=False, **specs)(*args)

  return sharded_fn
