"""Sharding rules: one table from logical axes to mesh axes, and the shardings that follow from it."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxft.errors import RequestError

# Logical axis -> mesh axes, for arrays cut as far as they can be and as the maths uses them. A weight is stored in slices along
# "embed" and whole where it is used (FSDP, or ZeRO-3): inside the layer scan, so that one layer is whole at a time.
# D is the axis to cut: 768 ... 4096 divide by 8 ... 256. Heads, feed-forward and vocabulary are what tensor parallelism cuts
# (Megatron, arXiv:1909.08053): there each device computes with its own part.
RULES = {
  #             cut                 used
  "batch": (("data", "fsdp"), ("data", "fsdp")),
  "embed": (("fsdp",), ()),
  "act_embed": ((), ()),
  "heads": (("tensor",), ("tensor",)),
  "mlp": (("tensor",), ("tensor",)),
  "vocab": (("tensor",), ("tensor",)),
  "layers": ((), ()),
  None: ((), ()),
}
STORED, COMPUTE = 0, 1
# What ZeRO (arXiv:1910.02054) cuts over the fsdp axis, and from which stage on; below it each device has a copy.
MIN_ZERO_STAGE = {"optimizer": 1, "gradients": 2, "parameters": 3}
# Tables of the vocabulary are padded to a multiple of this many rows: every power of two up to it divides them, matrix units
# are full, and the padding is the same on every mesh, so that a checkpoint fits them all.
VOCAB_MULTIPLE = 128


def partition_spec(
  axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, use: int
) -> PartitionSpec:
  """The partition of one array. An axis that its mesh axes do not divide stays whole."""
  entries, taken = [], set()
  for name, size in zip(axes, shape, strict=True):
    mesh_axes = RULES[name][use]
    if taken & set(mesh_axes):
      raise ValueError(
        f"{axes}: two axes of one array map to the mesh axis {taken & set(mesh_axes)}"
      )
    taken |= set(mesh_axes)
    divides = size % math.prod(mesh.shape[axis] for axis in mesh_axes) == 0
    entries.append(mesh_axes if mesh_axes and divides else None)
  return PartitionSpec(*entries)


def tree_shardings(what: str, shapes: Any, axes: Any, mesh: Mesh, zero_stage: int = 3) -> Any:
  """A NamedSharding for every leaf of the parameters, or of the "gradients" or "optimizer" moments that are shaped like them.

  Args:
    what: of `MIN_ZERO_STAGE`.
    shapes, axes: the trees of `model.abstract_model`.
  """
  use = STORED if zero_stage >= MIN_ZERO_STAGE[what] else COMPUTE
  return jax.tree.map(
    lambda shape, names: NamedSharding(mesh, partition_spec(names, shape.shape, mesh, use)),
    shapes,
    axes,
  )


def opt_state_shardings(
  tx: optax.GradientTransformation, shapes: Any, moments: Any, mesh: Mesh
) -> Any:
  """Moments have the shardings `moments`; what has another shape than its parameter (counts) is replicated."""

  def of_leaf(shape, sharding, states):
    return jax.tree.map(
      lambda leaf: sharding if leaf.shape == shape.shape else replicated(mesh), states
    )

  return jax.tree.map(of_leaf, shapes, moments, jax.eval_shape(tx.init, shapes))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def with_shardings(shapes: Any, shardings: Any) -> Any:
  """The shapes with their shardings in them."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    shapes,
    shardings,
  )


def abstract_state(
  tx: optax.GradientTransformation, shapes: Any, axes: Any, mesh: Mesh, zero_stage: int
) -> tuple[Any, Any, Any]:
  """Shapes and shardings of (step, parameters, optimizer state): what to compile for, and what to restore into."""
  parameters, moments = (
    tree_shardings(what, shapes, axes, mesh, zero_stage) for what in ("parameters", "optimizer")
  )
  opt = with_shardings(
    jax.eval_shape(tx.init, shapes), opt_state_shardings(tx, shapes, moments, mesh)
  )
  return (
    jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh)),
    with_shardings(shapes, parameters),
    opt,
  )


def data_parallel_size(mesh: Mesh) -> int:
  """How many ways rows of a batch are split: over all devices but those that share rows for tensor parallelism."""
  return math.prod(mesh.shape[axis] for axis in RULES["batch"][STORED])


def accumulation_steps(train: ConfigDict, mesh: Mesh) -> int:
  """Accumulation steps that a batch is cut into; raises RequestError when rows do not come out whole."""
  parts = data_parallel_size(mesh)
  at_once = min(train.micro_batch_size * parts or train.batch_size, train.batch_size)
  if train.batch_size % at_once or at_once % parts:
    raise RequestError(
      f"config.train.batch_size={train.batch_size}: must be a multiple of {train.micro_batch_size or 1} rows "
      f"(config.train.micro_batch_size) x {parts} devices (config.mesh.data x config.mesh.fsdp)"
    )
  return train.batch_size // at_once


def eval_batch_size(train: ConfigDict, mesh: Mesh) -> int:
  """Rows that an evaluation takes at once; raises RequestError when they cannot be split over the devices."""
  parts = data_parallel_size(mesh)
  if train.eval_batch_size % parts:
    raise RequestError(
      f"config.train.eval_batch_size={train.eval_batch_size}: must be a multiple of {parts} devices "
      "(config.mesh.data x config.mesh.fsdp)"
    )
  return train.eval_batch_size or train.batch_size // accumulation_steps(train, mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Of a batch (accumulation step, row, column): rows are split over `data_parallel_size`."""
  return NamedSharding(mesh, PartitionSpec(None, RULES["batch"][STORED], None))


def make_constrain(mesh: Mesh) -> Callable:
  """For the activations of a model on this mesh: (array, its logical axes) -> the array, placed."""

  def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    return jax.lax.with_sharding_constraint(
      x, NamedSharding(mesh, partition_spec(axes, x.shape, mesh, COMPUTE))
    )

  return constrain


def make_shard_rows(mesh: Mesh, zero_stage: int, what: str) -> Callable:
  """For rows (..., T, D) of a table of the vocabulary: rows -> the rows, cut as the table, or its gradient, is.

  Each device then looks up its slice of every row, or adds it up. B T D numbers travel instead of V D: for GPT-J a tenth.

  Args:
    what: "parameters" or "gradients".
  """
  if zero_stage < MIN_ZERO_STAGE[what]:
    return lambda rows: rows

  def cut(rows: jax.Array) -> jax.Array:
    places = [*[None] * (rows.ndim - 3), "data", None, "fsdp"]
    sizes = [mesh.shape[axis] if axis else 1 for axis in places]
    whole = [
      axis if size % parts == 0 else None for axis, size, parts in zip(places, rows.shape, sizes)
    ]
    return jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, PartitionSpec(*whole)))

  return cut


def make_gather(mesh: Mesh, zero_stage: int = 3) -> Callable:
  """For the weights of a model on this mesh: (array, its logical axes) -> the array as the maths uses it.

  The gradient comes back cut where gradients are: a constraint alone would have it whole on every device first.
  """
  back, stored = (
    STORED if zero_stage >= MIN_ZERO_STAGE[what] else COMPUTE
    for what in ("gradients", "parameters")
  )

  def gather(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    def placed(x: jax.Array, use: int) -> jax.Array:
      return jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, partition_spec(axes, x.shape, mesh, use))
      )

    def used(x: jax.Array) -> jax.Array:
      # As it is stored first: XLA would else gather the float32 weight that a cast one comes from, twice the bytes.
      return placed(placed(x, stored), COMPUTE)

    whole = jax.custom_vjp(used)
    # Not `whole` again inside: to a policy of rematerialisation that is a call, and its result would be kept for each layer.
    whole.defvjp(lambda x: (used(x), None), lambda _, gradient: (placed(gradient, back),))
    return whole(x)

  return gather
