"""The programs of a run, for devices that are there or not: shapes, shardings and jitted steps. No memory is taken here."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from jaxft import attention, backend, loss, model, offload, optim, parts, sharding
from jaxft.data import loader
from jaxft.errors import RequestError
from jaxft.step import Changing, State, make_eval_step, make_gradient, make_look, make_train_step, make_update


class Program(NamedTuple):
  graph: nnx.GraphDef
  compute: model.Compute
  tx: optax.GradientTransformation
  state: State  # shapes with their shardings
  batch: dict[str, jax.ShapeDtypeStruct]  # of an optimizer step, likewise
  compute_params: Any  # of the weights on the device, where `offload` is "optimizer"; else ()
  grad_shapes: Any  # shapes with their shardings of what `gradient` gives
  grad_fn: Any  # (state, batch) -> (loss, gradient, tokens)
  train_step: Any  # (state, batch) -> (state, metrics); the state is donated
  eval_step: Any  # (parameters, batch) -> (sum of the loss, tokens)
  eval_rows: int  # that an eval step takes
  offload: str  # what is in the host's memory: nothing, "optimizer" state and weights, or "all", gradients too
  loss_chunk: int  # positions a row whose logits exist at once; 0: all

  @property
  def eval_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Of an eval step."""
    return {
      name: jax.ShapeDtypeStruct((1, self.eval_rows, *leaf.shape[2:]), leaf.dtype, sharding=leaf.sharding)
      for name, leaf in self.batch.items()
    }

  @property
  def host_mask(self) -> State:
    """Of each leaf of the state whether the host keeps it."""
    return offload.kept_of(self.state, self.offload)

  @property
  def batch_sharding(self) -> NamedSharding:
    return self.batch["ids"].sharding


def bytes_a_device(tree: Any) -> int:
  """Bytes that a device holds of these shapes with shardings, or its part of the host's memory."""
  shard = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  return sum(map(shard, jax.tree.leaves(tree)))


def must_hold(program: Program, config: ConfigDict) -> None:
  """Raises RequestError when a device cannot hold its part of the state and of one batch, or the host what is kept there; what
  is computed comes on top."""
  mesh = program.batch_sharding.mesh
  device, on_host = mesh.local_devices[0], bytes_on_host(program) * len(mesh.local_devices)
  fewer = (
    "config.model.param_dtype=bfloat16, config.optim.name=adafactor or config.optim.state_dtype=bfloat16 needs fewer "
    "(docs/memory.md)"
  )
  what = f"config.memory.offload={program.offload}: the host is to keep {on_host:,} bytes and"
  if on_host > (has := backend.memory_of_host()):
    raise RequestError(f"{what} has {has:,}; {fewer}")
  if device.platform == "gpu" and on_host > (limit := backend.pinned_limit()):
    raise RequestError(
      f"{what} XLA may pin {limit:,} in this process; set {backend.PINNED_LIMIT} (GiB) before it starts or, where the machine "
      f"has more memory than it shows, {backend.HOST_MEMORY}; {fewer}"
    )
  held = program.state if program.offload == "none" else ()
  limit, state, batch = backend.memory_of(device), bytes_a_device(held), bytes_a_device(program.batch)
  if state + batch > limit:
    raise RequestError(
      f"config.train.batch_size={config.train.batch_size}, config.data.sequence_length={config.data.sequence_length}, "
      f"config.model.path={config.model.path!r}: weights and optimizer take {state:,} bytes of a device and a batch {batch:,}; "
      f"a {device.device_kind} here has {limit:,}"
    )


def may_not_be_pinned(program: Program) -> str:
  """A line to warn with where XLA's pool of pinned memory may be too small for what the host keeps; else ""."""
  devices = program.batch_sharding.mesh.local_devices
  on_host, limit = bytes_on_host(program), backend.pinned_limit()
  kept = zip(*map(jax.tree.leaves, (program.state, program.host_mask)), strict=True)
  blocks = [bytes_a_device(leaf) for leaf, there in kept if there]
  blocks.append(on_host - sum(blocks))  # the gradient is one
  if devices[0].platform != "gpu" or backend.pool_holds(blocks * len(devices), limit):
    return ""
  return (
    f"warning: the host is to keep {on_host * len(devices):,} bytes; with the gaps between them that may be more than the "
    f"{limit:,} that XLA may pin. If it runs out of host memory, set {backend.PINNED_LIMIT} (GiB) before the run starts "
    "(docs/memory.md)"
  )


def bytes_on_host(program: Program) -> int:
  """A device's part of what the host keeps: weights and optimizer state, and with "all" the gradient too."""
  gradient = [leaf for leaf in jax.tree.leaves(program.grad_shapes) if program.offload == "all" and offload.is_kept(leaf)]
  return state_on_host(program) + bytes_a_device(gradient)


def bytes_on_every_host(config: ConfigDict, cfg: model.ModelConfig) -> int | None:
  """Most bytes that one host keeps for `memory.offload`, before JAX has looked for devices; None where it depends on them."""
  if config.memory.offload == "none":
    return 0
  if config.mesh.data == -1 or config.mesh.zero_stage < max(sharding.ZERO.values()):
    return None  # each device has a copy
  if cfg.trained:
    return None  # the export has all weights there, frozen ones too, in float32
  shapes = model.abstract(cfg, model.Compute(vocab_multiple=sharding.VOCAB_MULTIPLE))[1]
  moments = jax.eval_shape(optim.optimizer(config.optim).init, shapes)
  weights = optim.kept_in(config.model.param_dtype, shapes, cfg.trained)
  gradient = weights if config.memory.offload == "all" else ()
  there = weights, moments, gradient
  nbytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(there) if offload.is_kept(leaf))
  return config.mesh.data * nbytes


def state_on_host(program: Program) -> int:
  """`bytes_on_host` without the gradient."""
  leaves = zip(*map(jax.tree.leaves, (program.state, program.host_mask)), strict=True)
  return bytes_a_device([leaf for leaf, there in leaves if there])


def draw(program: Program, cfg: model.ModelConfig, seed: int, shapes: Any) -> Any:
  """New weights: those of `shapes`, which may be some of the program's, and as they are placed."""

  def new() -> Any:
    drawn = nnx.to_pure_dict(nnx.state(model.build(cfg, program.compute, seed)))
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), parts.like(drawn, shapes), shapes)

  if program.offload == "none":
    return jax.jit(new, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes))()
  # A leaf after the other by the CPU, in whose memory they stay: together they may be too large for the device.
  leaves, tree = jax.tree.flatten(shapes)
  placed = []
  has_cpu = "cpu" in (jax.config.jax_platforms or "cpu").split(",")
  with jax.default_device(jax.local_devices(backend="cpu")[0] if has_cpu else None):
    for i, leaf in enumerate(leaves):
      drawn = np.asarray(jax.jit(lambda i=i: jax.tree.leaves(new())[i])())
      placed.append(jax.make_array_from_callback(leaf.shape, leaf.sharding, drawn.__getitem__))
  return jax.tree.unflatten(tree, placed)


def begin(program: Program, params: Any, frozen: Any) -> State:
  """The state before the first step, of parameters that are placed as the program's; those that are trained are donated."""
  if program.offload == "none":
    new = lambda params: Changing(jnp.int32(0), params, program.tx.init(params))
    places = jax.tree.map(lambda leaf: leaf.sharding, program.state.checkpointable)
    return State(*jax.jit(new, out_shardings=places, donate_argnums=0)(params), frozen)
  # On the host every optimizer begins with zeros, without a detour over the device.
  zeros = lambda leaf: jax.make_array_from_callback(
    leaf.shape, leaf.sharding, lambda index: np.zeros(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
  )
  step = jax.device_put(jnp.int32(0), program.state.step.sharding)
  return State(step, params, jax.tree.map(zeros, program.state.opt_state), frozen)


def kernel(config: ConfigDict, cfg: model.ModelConfig, device: jax.Device, dtype: Any, packed: bool) -> str:
  """Which of `attention.KERNELS` a run takes; raises RequestError when the one it asks for cannot do it."""
  asked = config.model.attention
  if asked == "auto":
    return attention.kernel_for(device, dtype, cfg.H)
  if reason := attention.why_not(asked, device, dtype, cfg.H, packed, cfg.attention_dropout > 0):
    raise RequestError(f"config.model.attention={asked}: {reason}; take auto, or chunked")
  return asked


def build(config: ConfigDict, cfg: model.ModelConfig, mesh: Mesh, total_steps: int, row: dict[str, Any]) -> Program:
  """The programs of a run of `config` with this model on this mesh.

  Args:
    row: a row of the data, or one that is shaped like it.

  Raises RequestError when the batch or the model cannot be split as the mesh asks.
  """
  device, tensor = mesh.devices.flat[0], mesh.shape["tensor"]
  if lines := sharding.faults(cfg, mesh):
    raise RequestError("\n".join(lines))
  A = sharding.accumulation_steps(config.train, mesh)
  zero_stage, whole = config.mesh.zero_stage, sharding.replicated(mesh)
  dtype = model.compute_dtype(config.model.compute_dtype, device)
  compute = model.Compute(
    dtype,
    config.memory.remat,
    sharding.constrain_on(mesh),
    sharding.gather_on(mesh, zero_stage),
    sharding.rows_on(mesh, zero_stage, "parameters"),
    sharding.rows_on(mesh, zero_stage, "gradients"),
    attention=kernel(config, cfg, device, dtype, packed="segments" in row),
    shard_map=sharding.on_each_device_of(mesh),
    vocab_multiple=sharding.VOCAB_MULTIPLE,
    to_device=offload.fetch if config.memory.offload != "none" else lambda x: x,
  )
  graph, whole_shapes, whole_axes = model.abstract(cfg, compute)
  (shapes, frozen), (axes, frozen_axes) = (parts.split(tree, cfg.trained) for tree in (whole_shapes, whole_axes))
  tx = optim.optimizer(config.optim)
  precise, shapes = shapes, optim.kept_in(config.model.param_dtype, shapes, cfg.trained)
  # What is frozen is kept as it is computed with: that is half the bytes, and no other result.
  frozen = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf.update(dtype=compute.dtype) if optim.decays(path) else leaf, frozen
  )
  frozen = sharding.place(frozen, sharding.shardings_of("parameters", frozen, frozen_axes, mesh, zero_stage))
  state = State(*sharding.state_like(tx, shapes, axes, mesh, zero_stage), frozen)
  if lines := offload.faults(device.platform, (state.params, state.opt_state, state.frozen), config.memory.offload):
    raise RequestError("\n".join(lines))
  gradients = sharding.shardings_of("gradients", shapes, axes, mesh, zero_stage)
  rows = 1 if cfg.classes else compute.padded_vocab(cfg) // tensor
  at_once = config.train.batch_size // A // sharding.batch_parts(mesh)
  most = loss.most_logits(device.platform, config.memory.remat)
  eval_rows = sharding.eval_rows(config.train, mesh)
  chunk, eval_chunk = (
    loss.chunk_of(config.memory.loss_chunk, of_a_device, config.data.sequence_length, rows, most)
    for of_a_device in (at_once, eval_rows // sharding.batch_parts(mesh))
  )
  how = {"loss_chunk": chunk, "seed": config.train.seed, "trained": cfg.trained}
  copy, kept = (), config.memory.offload
  if kept == "none":
    gradient = make_gradient(graph, gradients=gradients, **how)
    changing = jax.tree.map(lambda leaf: leaf.sharding, state.checkpointable)
    look, update = make_look(sharding.not_finite_on((gradients, changing))), make_update(tx, cfg.trained)
  else:
    if kept == "optimizer":
      on_device = jax.tree.map(lambda leaf: leaf.sharding, state.params)
      copy = optim.kept_in(compute.dtype, state.params)
      shapes = copy
      gradient = offload.make_gradient_of_copy(
        make_gradient(graph, gradients=gradients, **how), compute.dtype, on_device
      )
    else:
      gradient = offload.make_gradient(graph, remat=config.memory.remat, **how)
      gradients = jax.tree.map(lambda leaf: leaf.sharding, offload.on_host(sharding.place(shapes, gradients)))
    state = state._replace(params=offload.on_host(state.params), opt_state=offload.on_host(state.opt_state))
    if kept == "all":
      state = state._replace(frozen=offload.on_host(state.frozen))
    places = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    look, update = offload.make_look(gradients), offload.make_update(config.optim, places, cfg.trained)
  step = make_train_step(
    gradient,
    look,
    update,
    optim.schedule(config.optim, total_steps),
    clip_norm=config.optim.clip_norm,
    seed=config.train.seed,
  )
  eval_step = make_eval_step(graph, loss_chunk=eval_chunk)
  if A > 1 and kept != "all":  # several are added up in float32
    shapes = precise
  if kept != "none":
    on_host = offload.kept_of(state, kept)
    step, eval_step = offload.told(step, on_host), offload.told(eval_step, on_host.all_params)
  places = jax.tree.map(lambda leaf: leaf.sharding, state)
  return Program(
    graph,
    compute,
    tx,
    state,
    loader.like(row, A, config.train.batch_size // A, sharding.batch_sharding(mesh)),
    copy,
    sharding.place(shapes, gradients),
    jax.jit(gradient, out_shardings=(whole, gradients, whole)),
    jax.jit(step, donate_argnums=0, out_shardings=(places, whole)),
    jax.jit(eval_step),
    eval_rows,
    kept,
    chunk,
  )
