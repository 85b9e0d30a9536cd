"""Sharding rules: a table from logical axes to mesh axes, and its shardings."""

import math
from typing import TypeAlias

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxft.config import TrainSection
from jaxft.errors import RequestError
from jaxft.utils.types import PyTree

Axes: TypeAlias = tuple[str | None, ...]  # the logical axes of an array

# Logical axis -> mesh axes, in two layouts. STORED arrays are split as far as possible; COMPUTE is
# the layout in which the program uses them.
#
# FSDP (ZeRO-3): a weight is stored in slices along "embed" and gathered inside the layer scan, so
# that only one layer is whole at a time. We split D, because 768 ... 4096 divide by 8 ... 256.
#
# Tensor parallelism splits heads, feed-forward and vocabulary (Megatron, arXiv:1909.08053). Each
# device computes with its own shard, so both layouts are the same.
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
# The lowest ZeRO stage (arXiv:1910.02054) at which a tree is split over the fsdp axis. Below it
# each device has a copy.
MIN_ZERO_STAGE = {"optimizer": 1, "gradients": 2, "parameters": 3}
# Vocabulary tables are padded to a multiple of this many rows. Then every power of two up to 128
# divides them, and matrix units are full. The padding is the same on every mesh, so that a
# checkpoint can be restored on another one.
VOCAB_MULTIPLE = 128


def partition_spec(axes: Axes, shape: tuple[int, ...], mesh: Mesh, use: int) -> PartitionSpec:
  """Return the PartitionSpec of one array.

  An axis whose size its mesh axes do not divide stays whole, because JAX rejects uneven splits.

  Args:
    axes: logical axes of the array, one per dimension.
    shape: shape of the array.
    mesh: the mesh.
    use: STORED or COMPUTE.
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
  """Return a NamedSharding for every leaf of a tree like the parameters.

  Args:
    tree: "parameters", "gradients" or "optimizer" (its moments).
    shapes: tree of shapes, from `decoder.abstract_model`.
    axes: tree of logical axes, from `decoder.abstract_model`; `model/layers.py` names them.
    mesh: the mesh.
    zero_stage: `config.mesh.zero_stage`; decides whether `tree` is split over fsdp.
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
  """Return the shardings of the optimizer state.

  A leaf shaped like its parameter (a moment) is sharded as in `moments`; others, such as counts,
  are replicated.

  Args:
    tx: the optimizer.
    shapes: tree of the parameters' shapes.
    moments: tree of shardings, from `tree_shardings`.
    mesh: the mesh.
  """

  def of_param(param, sharding, states):
    is_moment = lambda leaf: leaf.shape == param.shape
    return jax.tree.map(lambda leaf: sharding if is_moment(leaf) else replicated(mesh), states)

  return jax.tree.map(of_param, shapes, moments, jax.eval_shape(tx.init, shapes))


def replicated(mesh: Mesh) -> NamedSharding:
  """Return the sharding of an array that is whole on every device."""
  return NamedSharding(mesh, PartitionSpec())


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
  """Return the tree of shapes with these shardings."""
  struct = jax.ShapeDtypeStruct
  return jax.tree.map(lambda x, s: struct(x.shape, x.dtype, sharding=s), shapes, shardings)


def data_parallel_size(mesh: Mesh) -> int:
  """Return the number of parts of a batch; tensor-parallel devices share a part."""
  return math.prod(mesh.shape[axis] for axis in RULES["batch"][STORED])


def accumulation_steps(train: TrainSection, mesh: Mesh) -> int:
  """Return the number of gradient accumulation steps of a batch.

  Raises:
    RequestError: the sequences do not divide evenly.
  """
  dp_size = data_parallel_size(mesh)
  micro_batch = min(train.micro_batch_size * dp_size or train.batch_size, train.batch_size)
  if train.batch_size % micro_batch or micro_batch % dp_size:
    raise RequestError(
      f"config.train.batch_size={train.batch_size}: must be a multiple of "
      f"{train.micro_batch_size or 1} sequences (config.train.micro_batch_size) x {dp_size} "
      "devices (config.mesh.data x config.mesh.fsdp)"
    )
  return train.batch_size // micro_batch


def eval_batch_size(train: TrainSection, mesh: Mesh) -> int:
  """Return the number of sequences of an evaluation batch.

  Raises:
    RequestError: the devices cannot share them evenly.
  """
  dp_size = data_parallel_size(mesh)
  if train.eval_batch_size % dp_size:
    raise RequestError(
      f"config.train.eval_batch_size={train.eval_batch_size}: must be a multiple of {dp_size} "
      "devices (config.mesh.data x config.mesh.fsdp)"
    )
  return train.eval_batch_size or train.batch_size // accumulation_steps(train, mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Return the sharding of a batch (A, B, T) along B."""
  return NamedSharding(mesh, PartitionSpec(None, RULES["batch"][STORED], None))


def constrain(x: jax.Array, axes: Axes, mesh: Mesh | None, use: int = COMPUTE) -> jax.Array:
  """Constrain the sharding of an array inside a program; without a mesh return it."""
  if mesh is None:
    return x
  sharding = NamedSharding(mesh, partition_spec(axes, x.shape, mesh, use))
  return jax.lax.with_sharding_constraint(x, sharding)


def shard_rows(rows: jax.Array, tree: str, mesh: Mesh | None, zero_stage: int) -> jax.Array:
  """Shard rows of a vocabulary table, or their gradient, as the table is stored.

  Each device then looks up, or sums, its slice of every row. The devices exchange B T D numbers
  instead of V D: a tenth, for GPT-J.

  Args:
    rows: (..., B, T, D).
    tree: "parameters" or "gradients": the tree of the table.
    mesh: the mesh, or None.
    zero_stage: `config.mesh.zero_stage`.
  """
  if mesh is None or _use(tree, zero_stage) == COMPUTE:
    return rows
  # RULES would split B over data and fsdp. Here fsdp splits D instead, as in the stored table.
  axes = [*[None] * (rows.ndim - 3), "data", None, "fsdp"]
  spec = [
    axis if axis and size % mesh.shape[axis] == 0 else None
    for axis, size in zip(axes, rows.shape, strict=True)
  ]
  return jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, PartitionSpec(*spec)))


def gather(x: jax.Array, axes: Axes, mesh: Mesh | None, zero_stage: int) -> jax.Array:
  """Gather a weight from its stored layout to its compute layout.

  A custom VJP shards the gradient as gradients are stored. With a constraint alone, each device
  would first hold the whole gradient.

  Args:
    x: the weight.
    axes: its logical axes.
    mesh: the mesh, or None.
    zero_stage: `config.mesh.zero_stage`.
  """
  if mesh is None:
    return x
  param_use, grad_use = (_use(tree, zero_stage) for tree in ("parameters", "gradients"))

  def forward(x: jax.Array) -> jax.Array:
    # First constrain `x`, usually a bfloat16 copy, to the stored layout. Otherwise XLA gathers the
    # float32 weight and casts it afterwards, which sends twice the bytes.
    return constrain(constrain(x, axes, mesh, param_use), axes, mesh)

  gather_vjp = jax.custom_vjp(forward)
  # The forward rule calls `forward`, not `gather_vjp`. A remat policy would treat a nested call of
  # `gather_vjp` as one operation, and save its result for each layer.
  gather_vjp.defvjp(
    lambda x: (forward(x), None), lambda _, grad: (constrain(grad, axes, mesh, grad_use),)
  )
  return gather_vjp(x)
