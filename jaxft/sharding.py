"""Where arrays live: the mesh, one table from logical axes to mesh axes, and the shardings that follow from it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxft.errors import RequestError

# Logical axis -> mesh axes, for arrays as they are stored and as the maths uses them. A weight is stored in slices
# along "embed" and whole where it is used (FSDP, or ZeRO-3): inside the layer scan, so that one layer is whole at a time.
# D is the axis to cut: 768 ... 4096 divide by 8 ... 256; the vocabulary (50257) and GPT-2 XL's 25 heads divide by nothing.
RULES = {
  #             stored              used
  "batch": (("data", "fsdp"), ("data", "fsdp")),
  "embed": (("fsdp",), ()),
  "act_embed": ((), ()),
  "heads": ((), ()),
  "mlp": ((), ()),
  "vocab": ((), ()),
  "layers": ((), ()),
  None: ((), ()),
}
STORED, USED = 0, 1
# Tables of the vocabulary are padded to a multiple of this many rows: every power of two up to it divides them, matrix units
# are full, and the padding is the same on every mesh, so that a checkpoint fits them all.
VOCAB_MULTIPLE = 128


def make_mesh(sizes: ConfigDict, devices: list[jax.Device] | None = None) -> Mesh:
  """A (data, fsdp) mesh over the devices; -1 takes what the other axis leaves.

  Sizes that need fewer devices than there are use the first ones; raises RequestError when they need more or -1 does not
  come out whole.
  """
  devices = jax.devices() if devices is None else devices
  shape = {"data": sizes.data, "fsdp": sizes.fsdp}
  fixed = math.prod(size for size in shape.values() if size != -1)
  shape = {name: len(devices) // fixed if size == -1 else size for name, size in shape.items()}
  needed = math.prod(shape.values())
  if needed > len(devices) or needed == 0 or (-1 in (sizes.data, sizes.fsdp) and needed != len(devices)):
    raise RequestError(
      f"config.mesh.data={sizes.data}, config.mesh.fsdp={sizes.fsdp}: does not fit {len(devices)} "
      f"devices; the product must be at most {len(devices)}, and with -1 it must divide it"
    )
  # Auto: the compiler chooses collectives from the constraints. jax.make_mesh would default to Explicit (jax 0.10).
  return Mesh(
    np.array(devices[:needed]).reshape(tuple(shape.values())), tuple(shape), axis_types=(AxisType.Auto,) * len(shape)
  )


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, use: int) -> PartitionSpec:
  """The partition of one array. An axis that its mesh axes do not divide stays whole."""
  entries, taken = [], set()
  for name, size in zip(axes, shape, strict=True):
    mesh_axes = RULES[name][use]
    if taken & set(mesh_axes):
      raise ValueError(f"{axes}: two axes of one array map to the mesh axis {taken & set(mesh_axes)}")
    taken |= set(mesh_axes)
    divides = size % math.prod(mesh.shape[axis] for axis in mesh_axes) == 0
    entries.append(mesh_axes if mesh_axes and divides else None)
  return PartitionSpec(*entries)


def parameter_shardings(shapes: Any, axes: Any, mesh: Mesh) -> Any:
  """A NamedSharding for every parameter; the trees are those of `model.abstract`."""
  return jax.tree.map(lambda shape, names: NamedSharding(mesh, spec(names, shape.shape, mesh, STORED)), shapes, axes)


def optimizer_shardings(tx: optax.GradientTransformation, shapes: Any, shardings: Any, mesh: Mesh) -> Any:
  """Moments live where their parameter lives; what has another shape than its parameter (counts) is replicated."""
  return optax.tree_utils.tree_map_params(
    tx,
    lambda leaf, shape, sharding: sharding if leaf.shape == shape.shape else replicated(mesh),
    jax.eval_shape(tx.init, shapes),
    shapes,
    shardings,
    transform_non_params=lambda _: replicated(mesh),
  )


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def place(shapes: Any, shardings: Any) -> Any:
  """The shapes with their shardings in them."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
  )


def state_like(tx: optax.GradientTransformation, shapes: Any, shardings: Any, mesh: Mesh) -> tuple[Any, Any, Any]:
  """Shapes and shardings of (step, parameters, optimizer state): what to compile for, and what to restore into."""
  opt = place(jax.eval_shape(tx.init, shapes), optimizer_shardings(tx, shapes, shardings, mesh))
  return jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh)), place(shapes, shardings), opt


def accumulation_steps(train: ConfigDict, mesh: Mesh) -> int:
  """Accumulation steps that a batch is cut into; raises RequestError when rows do not come out whole."""
  at_once = min(train.micro_batch_size * mesh.size or train.batch_size, train.batch_size)
  if train.batch_size % at_once or at_once % mesh.size:
    raise RequestError(
      f"config.train.batch_size={train.batch_size}: must be a multiple of {train.micro_batch_size or 1} rows "
      f"(config.train.micro_batch_size) x {mesh.size} devices"
    )
  return train.batch_size // at_once


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Of a batch (accumulation step, row, column): rows are split over all devices."""
  return NamedSharding(mesh, PartitionSpec(None, RULES["batch"][STORED], None))


def constrain_on(mesh: Mesh):
  """The `Constrain` of a model that runs on this mesh."""

  def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, x.shape, mesh, USED)))

  return constrain
