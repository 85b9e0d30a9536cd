"""Where arrays live: the mesh, one table from logical axes to mesh axes, and the shardings that follow from it."""

import collections
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from ml_collections import ConfigDict

from jaxft import backend
from jaxft.errors import RequestError, first_line

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
MESH_AXES = ("data", "fsdp", "tensor")  # of a mesh


def make_mesh(sizes: ConfigDict, devices: list[jax.Device] | None = None) -> Mesh:
  """A (data, fsdp, tensor) mesh over the devices; -1 takes what the other axes leave.

  Sizes that need fewer devices than there are use the first ones, but with several processes each must have some. Neighbours
  in the last axes are neighbours in the network: tensor parallelism talks most, copies of the data least. Raises RequestError
  when sizes need more devices than there are, or -1 does not come out whole.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = mesh_shape(sizes, len(devices))
  needed = math.prod(shape.values())
  if needed > 1 and devices[0].platform == "cpu" and backend.has_cpu_mesh_bug():
    raise RequestError(
      f"{_describe(sizes)}: the CPU compiler of jax {jax.__version__} crashes on several devices; install another jax, or use one"
    )
  of_process = collections.Counter(device.process_index for device in devices)
  if len(set(of_process.values())) > 1:
    told = ", ".join(f"process {process} has {count}" for process, count in sorted(of_process.items()))
    raise RequestError(f"{told} devices: all processes must have as many; one may have lost a device (jaxft.doctor)")
  if len({device.process_index for device in devices[:needed]}) < len({device.process_index for device in devices}):
    raise RequestError(f"{_describe(sizes)}: leaves processes without a device; use all {len(devices)} devices")
  # Auto: the compiler chooses collectives from the constraints. jax.make_mesh would default to Explicit (jax 0.10).
  return Mesh(
    _arrange_devices(devices[:needed], tuple(shape.values())), tuple(shape), axis_types=(AxisType.Auto,) * len(shape)
  )


def mesh_shape(sizes: ConfigDict, devices: int) -> dict[str, int]:
  """The sizes of the mesh's axes over so many devices, with what -1 stands for; raises RequestError as `make_mesh` does."""
  asked = {name: sizes[name] for name in MESH_AXES}
  fixed = math.prod(size for size in asked.values() if size != -1)
  shape = {name: devices // fixed if size == -1 else size for name, size in asked.items()}
  needed = math.prod(shape.values())
  if needed > devices or needed == 0 or (-1 in asked.values() and needed != devices):
    raise RequestError(
      f"{_describe(sizes)}: does not fit {devices} devices; the product must be at most {devices}, "
      "and with -1 it must divide it"
    )
  return shape


def _describe(sizes: ConfigDict) -> str:
  return ", ".join(f"config.mesh.{name}={sizes[name]}" for name in MESH_AXES)


def _arrange_devices(devices: list[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
  """The devices in the order in which a slice or a cluster is fast; several slices share the first axes, `tensor` none."""
  if devices[0].platform == "cpu":  # the order is of no account, and the rows of a process are next to each other
    return np.array(devices).reshape(shape)
  slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
  split = {"allow_split_physical_axes": True}  # of a torus, where no whole ones multiply to the size of an axis
  try:
    if slices == 1:
      return mesh_utils.create_device_mesh(shape, devices, **split)
    across, left = [1] * len(shape), slices
    for axis, size in enumerate(shape[:-1]):
      across[axis] = math.gcd(size, left)
      left //= across[axis]
    if left == 1:
      within = tuple(size // parts for size, parts in zip(shape, across, strict=True))
      return mesh_utils.create_hybrid_device_mesh(within, tuple(across), devices, **split)
  except (NotImplementedError, ValueError, AssertionError) as error:
    raise RequestError(
      f"a mesh of {shape} (data, fsdp, tensor): {len(devices)} of these devices cannot be laid out so ({first_line(error)}); "
      "use all of them, with sizes that are powers of two"
    ) from error
  raise RequestError(
    f"a mesh of {shape} (data, fsdp, tensor) over {slices} slices: config.mesh.data x config.mesh.fsdp must be a multiple, so "
    "that tensor parallelism stays within one"
  )


def validate_mesh(cfg: Any, mesh: Mesh) -> list[str]:
  """One line for each size of the model (a `model.ModelConfig`) that the mesh cannot cut."""
  fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
  lines = [
    f"config.mesh.fsdp={fsdp}: the model is {cfg.D} wide, which {fsdp} devices cannot share, so each would hold all of it; "
    f"take one of {', '.join(str(n) for n in range(1, 1025) if cfg.D % n == 0)}, and config.mesh.data=-1 for the rest"
  ] * bool(cfg.D % fsdp)
  return lines + [
    f"config.mesh.tensor={tensor}: the model has {size} {what}, which {tensor} devices cannot share; "
    f"take one of {', '.join(str(n) for n in range(1, 65) if cfg.N % n == cfg.F % n == 0)}"
    for what, size in (("heads", cfg.N), ("columns of the feed-forward layer", cfg.F))
    if size % tensor
  ]


def partition_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, use: int) -> PartitionSpec:
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


def tree_shardings(what: str, shapes: Any, axes: Any, mesh: Mesh, zero_stage: int = 3) -> Any:
  """A NamedSharding for every leaf of the parameters, or of the "gradients" or "optimizer" moments that are shaped like them.

  Args:
    what: of `MIN_ZERO_STAGE`.
    shapes, axes: the trees of `model.abstract_model`.
  """
  use = STORED if zero_stage >= MIN_ZERO_STAGE[what] else COMPUTE
  return jax.tree.map(
    lambda shape, names: NamedSharding(mesh, partition_spec(names, shape.shape, mesh, use)), shapes, axes
  )


def opt_state_shardings(tx: optax.GradientTransformation, shapes: Any, moments: Any, mesh: Mesh) -> Any:
  """Moments have the shardings `moments`; what has another shape than its parameter (counts) is replicated."""

  def of_leaf(shape, sharding, states):
    return jax.tree.map(lambda leaf: sharding if leaf.shape == shape.shape else replicated(mesh), states)

  return jax.tree.map(of_leaf, shapes, moments, jax.eval_shape(tx.init, shapes))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def with_shardings(shapes: Any, shardings: Any) -> Any:
  """The shapes with their shardings in them."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
  )


def abstract_state(
  tx: optax.GradientTransformation, shapes: Any, axes: Any, mesh: Mesh, zero_stage: int
) -> tuple[Any, Any, Any]:
  """Shapes and shardings of (step, parameters, optimizer state): what to compile for, and what to restore into."""
  parameters, moments = (tree_shardings(what, shapes, axes, mesh, zero_stage) for what in ("parameters", "optimizer"))
  opt = with_shardings(jax.eval_shape(tx.init, shapes), opt_state_shardings(tx, shapes, moments, mesh))
  return jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh)), with_shardings(shapes, parameters), opt


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
  meshes = {sharding.mesh if isinstance(sharding, NamedSharding) else None for sharding in shardings}
  if len(meshes) != 1 or None in meshes:
    return lambda leaves: jnp.stack([of_part(LocalShard(leaf, (0,) * leaf.ndim, leaf.shape, True)) for leaf in leaves])[
      None
    ]
  (mesh,) = meshes

  def part_of(local: jax.Array, sharding: NamedSharding) -> LocalShard:
    axes = [sharding.spec[i] if i < len(sharding.spec) else None for i in range(local.ndim)]
    places = [jax.lax.axis_index(names) if names else 0 for names in axes]
    shape = tuple(size * _axis_size(mesh, names) for size, names in zip(local.shape, axes))
    cut_by = {name for names in axes if names for name in (names if isinstance(names, tuple) else (names,))}
    copies = [name for name in mesh.axis_names if name not in cut_by]
    counts = (jax.lax.axis_index(tuple(copies)) == 0) if copies else True
    return LocalShard(local, tuple(place * size for place, size in zip(places, local.shape)), shape, counts)

  def look(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([of_part(part_of(leaf, sharding)) for leaf, sharding in zip(leaves, shardings, strict=True)])[None]

  specs = [sharding.spec for sharding in shardings]
  return jax.shard_map(look, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(mesh.axis_names), check_vma=False)


def _axis_size(mesh: Mesh, names: str | tuple[str, ...] | None) -> int:
  return math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ()))


def make_nonfinite_check(shardings: Any) -> Callable:
  """tree -> for each leaf, in order, whether it holds a NaN or an infinity.

  The tree is placed as `shardings`, a tree like it, says.
  """
  # A NaN is the maximum wherever it is; isfinite(leaf).all() takes four times as long and 500 MB (GPT-2 124M on a CPU).
  everyone = map_shards(jax.tree.leaves(shardings), lambda part: ~jnp.isfinite(jnp.max(jnp.abs(part.values))))
  return lambda tree: everyone(jax.tree.leaves(tree)).any(axis=0)


def make_constrain(mesh: Mesh) -> Callable:
  """For the activations of a model on this mesh: (array, its logical axes) -> the array, placed."""

  def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition_spec(axes, x.shape, mesh, COMPUTE)))

  return constrain


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
    whole = [axis if size % parts == 0 else None for axis, size, parts in zip(places, rows.shape, sizes)]
    return jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, PartitionSpec(*whole)))

  return cut


def make_gather(mesh: Mesh, zero_stage: int = 3) -> Callable:
  """For the weights of a model on this mesh: (array, its logical axes) -> the array as the maths uses it.

  The gradient comes back cut where gradients are: a constraint alone would have it whole on every device first.
  """
  back, stored = (STORED if zero_stage >= MIN_ZERO_STAGE[what] else COMPUTE for what in ("gradients", "parameters"))

  def gather(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    def placed(x: jax.Array, use: int) -> jax.Array:
      return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition_spec(axes, x.shape, mesh, use)))

    def used(x: jax.Array) -> jax.Array:
      # As it is stored first: XLA would else gather the float32 weight that a cast one comes from, twice the bytes.
      return placed(placed(x, stored), COMPUTE)

    whole = jax.custom_vjp(used)
    # Not `whole` again inside: to a policy of rematerialisation that is a call, and its result would be kept for each layer.
    whole.defvjp(lambda x: (used(x), None), lambda _, gradient: (placed(gradient, back),))
    return whole(x)

  return gather
