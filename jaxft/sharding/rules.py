"""Sharding rules: a table from logical axes to mesh axes, and the shardings that follow."""

import math
from typing import TypeAlias

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxft.config import TrainSection
from jaxft.errors import RequestError
from jaxft.utils.types import PyTree

Axes: TypeAlias = tuple[str | None, ...]  # the logical axes of an array

# Logical axis -> mesh axes, of arrays as they are stored, split as far as they can be, and as the
# maths uses them. A weight is stored in slices along "embed" and gathered where it is used (FSDP,
# or ZeRO-3): inside the layer scan, so that one layer is whole at a time. D is the axis to split:
# 768 ... 4096 divide by 8 ... 256. Tensor parallelism splits heads, feed-forward and vocabulary
# (Megatron, arXiv:1909.08053): there each device computes with its own shard.
RULES = {
  #             stored              compute
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
# The ZeRO stage (arXiv:1910.02054) from which on a tree is split over the fsdp axis; below it each
# device has a copy.
MIN_ZERO_STAGE = {"optimizer": 1, "gradients": 2, "parameters": 3}
# Vocabulary tables are padded to a multiple of this many rows: every power of two up to it divides
# them, matrix units are full, and the padding is the same on every mesh, so that a checkpoint fits
# them all.
VOCAB_MULTIPLE = 128


def partition_spec(axes: Axes, shape: tuple[int, ...], mesh: Mesh, use: int) -> PartitionSpec:
  """Partition one array; `use` is STORED or COMPUTE.

  An axis that its mesh axes do not divide stays whole: JAX would refuse an uneven split.
  """
  entries = []
  used = set()
  for name, size in zip(axes, shape, strict=True):
    mesh_axes = RULES[name][use]
    if overlap := used & set(mesh_axes):
      raise ValueError(f"{axes}: two axes of one array map to the mesh axis {overlap}")
    used |= set(mesh_axes)
    divides = size % math.prod(mesh.shape[axis] for axis in mesh_axes) == 0
    entries.append(mesh_axes if mesh_axes and divides else None)
  return PartitionSpec(*entries)


def tree_shardings(
  tree: str, shapes: PyTree, axes: PyTree, mesh: Mesh, zero_stage: int = 3
) -> PyTree:
  """Make a NamedSharding for every leaf of a tree that is shaped like the parameters.

  Args:
    tree: "parameters", "gradients" or "optimizer" (its moments).
    shapes, axes: the trees of `decoder.abstract_model`; `model/layers.py` names the axes.
  """
  use = _use(tree, zero_stage)

  def sharding(leaf, names):
    return NamedSharding(mesh, partition_spec(names, leaf.shape, mesh, use))

  return jax.tree.map(sharding, shapes, axes)


def _use(tree: str, zero_stage: int) -> int:
  return STORED if zero_stage >= MIN_ZERO_STAGE[tree] else COMPUTE


def opt_state_shardings(
  tx: optax.GradientTransformation, shapes: PyTree, moments: PyTree, mesh: Mesh
) -> PyTree:
  """Shard optimizer state: moments as `moments`; what has another shape (counts) is replicated."""

  def of_param(param, sharding, states):
    is_moment = lambda leaf: leaf.shape == param.shape
    return jax.tree.map(lambda leaf: sharding if is_moment(leaf) else replicated(mesh), states)

  return jax.tree.map(of_param, shapes, moments, jax.eval_shape(tx.init, shapes))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
  """Put the shardings into the shapes."""
  struct = jax.ShapeDtypeStruct
  return jax.tree.map(lambda x, s: struct(x.shape, x.dtype, sharding=s), shapes, shardings)


def data_parallel_size(mesh: Mesh) -> int:
  """How many ways rows of a batch are split: tensor parallelism shares rows."""
  return math.prod(mesh.shape[axis] for axis in RULES["batch"][STORED])


def accumulation_steps(train: TrainSection, mesh: Mesh) -> int:
  """Gradient accumulation steps of a batch; raises RequestError when rows do not divide evenly."""
  dp_size = data_parallel_size(mesh)
  micro_batch = min(train.micro_batch_size * dp_size or train.batch_size, train.batch_size)
  if train.batch_size % micro_batch or micro_batch % dp_size:
    raise RequestError(
      f"config.train.batch_size={train.batch_size}: must be a multiple of "
      f"{train.micro_batch_size or 1} rows (config.train.micro_batch_size) x {dp_size} devices "
      "(config.mesh.data x config.mesh.fsdp)"
    )
  return train.batch_size // micro_batch


def eval_batch_size(train: TrainSection, mesh: Mesh) -> int:
  """Rows of an evaluation batch; raises RequestError when the devices cannot share them evenly."""
  dp_size = data_parallel_size(mesh)
  if train.eval_batch_size % dp_size:
    raise RequestError(
      f"config.train.eval_batch_size={train.eval_batch_size}: must be a multiple of {dp_size} "
      "devices (config.mesh.data x config.mesh.fsdp)"
    )
  return train.eval_batch_size or train.batch_size // accumulation_steps(train, mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Shard a batch (accumulation step, row, column) along its rows."""
  return NamedSharding(mesh, PartitionSpec(None, RULES["batch"][STORED], None))


def constrain(x: jax.Array, axes: Axes, mesh: Mesh | None, use: int = COMPUTE) -> jax.Array:
  """Shard an array of a program by its logical axes; without a mesh it stays as it is."""
  if mesh is None:
    return x
  sharding = NamedSharding(mesh, partition_spec(axes, x.shape, mesh, use))
  return jax.lax.with_sharding_constraint(x, sharding)


def shard_rows(rows: jax.Array, tree: str, mesh: Mesh | None, zero_stage: int) -> jax.Array:
  """Shard rows (..., B, T, D) of a vocabulary table, or their gradient, as the table is stored.

  Each device then looks up its slice of every row, or adds it up. B T D numbers travel instead of
  V D: for GPT-J a tenth.

  Args:
    tree: "parameters" or "gradients", whose table it is.
  """
  if mesh is None or _use(tree, zero_stage) == COMPUTE:
    return rows
  # Not RULES: they split B over data and fsdp, but here fsdp splits D, as it does in the table.
  axes = [*[None] * (rows.ndim - 3), "data", None, "fsdp"]
  spec = [
    axis if axis and size % mesh.shape[axis] == 0 else None
    for axis, size in zip(axes, rows.shape, strict=True)
  ]
  return jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, PartitionSpec(*spec)))


def gather(x: jax.Array, axes: Axes, mesh: Mesh | None, zero_stage: int) -> jax.Array:
  """Gather a weight, from how it is stored to how the maths uses it.

  A custom VJP shards the gradient as gradients are stored: with a constraint alone each device
  would have all of it first.
  """
  if mesh is None:
    return x
  param_use, grad_use = (_use(tree, zero_stage) for tree in ("parameters", "gradients"))

  def forward(x: jax.Array) -> jax.Array:
    # As it is stored first: XLA would else gather the float32 weight that a cast one comes from,
    # twice the bytes.
    return constrain(constrain(x, axes, mesh, param_use), axes, mesh)

  gather_vjp = jax.custom_vjp(forward)
  # `forward` and not `gather_vjp` inside: to a remat policy that would be a call, whose result
  # would be saved for each layer.
  gather_vjp.defvjp(
    lambda x: (forward(x), None), lambda _, grad: (constrain(grad, axes, mesh, grad_use),)
  )
  return gather_vjp(x)
