"""The programs of a run, for devices that exist or not: shapes, shardings and jitted steps. Allocates nothing."""

import math
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from jaxft.data import loader
from jaxft.errors import RequestError
from jaxft.model import attention, loss
from jaxft.model.compute import ComputeConfig, resolve_dtype
from jaxft.model.config import ModelConfig
from jaxft.model.decoder import abstract_model
from jaxft.sharding import per_device, rules
from jaxft.sharding.mesh import validate_mesh
from jaxft.training import optimizer, trainable
from jaxft.training.eval_step import make_eval_step
from jaxft.training.offload import (
  host_mask,
  is_offloaded,
  make_copy_grad_fn,
  make_streamed_grad_fn,
  make_streamed_stats,
  make_streamed_update_fn,
  mark_host_inputs,
  to_device,
  validate_offload,
  with_host_memory,
)
from jaxft.training.train_state import TrainState
from jaxft.training.train_step import make_grad_fn, make_grad_stats, make_train_step, make_update_fn
from jaxft.utils import backend


class TrainProgram(NamedTuple):
  graph: nnx.GraphDef
  compute: ComputeConfig
  tx: optax.GradientTransformation
  state: TrainState  # shapes with their shardings
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
      name: jax.ShapeDtypeStruct(
        (1, self.eval_rows, *leaf.shape[2:]), leaf.dtype, sharding=leaf.sharding
      )
      for name, leaf in self.batch.items()
    }

  @property
  def host_mask(self) -> TrainState:
    """Of each leaf of the state whether the host keeps it."""
    return host_mask(self.state, self.offload)

  @property
  def batch_sharding(self) -> NamedSharding:
    return self.batch["ids"].sharding


def bytes_per_device(tree: Any) -> int:
  """Bytes that a device holds of these shapes with shardings, or its part of the host's memory."""
  shard = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  return sum(map(shard, jax.tree.leaves(tree)))


def check_fits(program: TrainProgram, config: ConfigDict) -> None:
  """Raises RequestError when a device cannot hold its part of the state and of one batch, or the host what is kept there; what
  is computed comes on top."""
  mesh = program.batch_sharding.mesh
  device, on_host = mesh.local_devices[0], host_bytes(program) * len(mesh.local_devices)
  fewer = (
    "config.model.param_dtype=bfloat16, config.optim.name=adafactor or config.optim.state_dtype=bfloat16 needs fewer "
    "(docs/memory.md)"
  )
  what = f"config.memory.offload={program.offload}: the host is to keep {on_host:,} bytes and"
  if on_host > (has := backend.host_memory_bytes()):
    raise RequestError(f"{what} has {has:,}; {fewer}")
  if device.platform == "gpu" and on_host > (limit := backend.pinned_limit()):
    raise RequestError(
      f"{what} XLA may pin {limit:,} in this process; set {backend.PINNED_LIMIT_ENV} (GiB) before it starts or, where the machine "
      f"has more memory than it shows, {backend.HOST_MEMORY_ENV}; {fewer}"
    )
  held = program.state if program.offload == "none" else ()
  limit, state, batch = (
    backend.device_memory_bytes(device),
    bytes_per_device(held),
    bytes_per_device(program.batch),
  )
  if state + batch > limit:
    raise RequestError(
      f"config.train.batch_size={config.train.batch_size}, config.data.sequence_length={config.data.sequence_length}, "
      f"config.model.path={config.model.path!r}: weights and optimizer take {state:,} bytes of a device and a batch {batch:,}; "
      f"a {device.device_kind} here has {limit:,}"
    )


def pinned_memory_warning(program: TrainProgram) -> str:
  """A line to warn with where XLA's pool of pinned memory may be too small for what the host keeps; else ""."""
  devices = program.batch_sharding.mesh.local_devices
  on_host, limit = host_bytes(program), backend.pinned_limit()
  kept = zip(*map(jax.tree.leaves, (program.state, program.host_mask)), strict=True)
  blocks = [bytes_per_device(leaf) for leaf, there in kept if there]
  blocks.append(on_host - sum(blocks))  # the gradient is one
  if devices[0].platform != "gpu" or backend.pool_fits(blocks * len(devices), limit):
    return ""
  return (
    f"warning: the host is to keep {on_host * len(devices):,} bytes; with the gaps between them that may be more than the "
    f"{limit:,} that XLA may pin. If it runs out of host memory, set {backend.PINNED_LIMIT_ENV} (GiB) before the run starts "
    "(docs/memory.md)"
  )


def host_bytes(program: TrainProgram) -> int:
  """A device's part of what the host keeps: weights and optimizer state, and with "all" the gradient too."""
  gradient = [
    leaf
    for leaf in jax.tree.leaves(program.grad_shapes)
    if program.offload == "all" and is_offloaded(leaf)
  ]
  return host_state_bytes(program) + bytes_per_device(gradient)


def max_host_bytes(config: ConfigDict, cfg: ModelConfig) -> int | None:
  """Most bytes that one host keeps for `memory.offload`, before JAX has looked for devices; None where it depends on them."""
  if config.memory.offload == "none":
    return 0
  if config.mesh.data == -1 or config.mesh.zero_stage < max(rules.MIN_ZERO_STAGE.values()):
    return None  # each device has a copy
  if cfg.trained:
    return None  # the export has all weights there, frozen ones too, in float32
  shapes = abstract_model(cfg, ComputeConfig(vocab_multiple=rules.VOCAB_MULTIPLE))[1]
  moments = jax.eval_shape(optimizer.make_optimizer(config.optim).init, shapes)
  weights = optimizer.with_param_dtype(config.model.param_dtype, shapes, cfg.trained)
  gradient = weights if config.memory.offload == "all" else ()
  there = weights, moments, gradient
  nbytes = sum(
    math.prod(leaf.shape) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(there)
    if is_offloaded(leaf)
  )
  return config.mesh.data * nbytes


def host_state_bytes(program: TrainProgram) -> int:
  """`host_bytes` without the gradient."""
  leaves = zip(*map(jax.tree.leaves, (program.state, program.host_mask)), strict=True)
  return bytes_per_device([leaf for leaf, there in leaves if there])


def select_kernel(
  config: ConfigDict, cfg: ModelConfig, device: jax.Device, dtype: Any, packed: bool
) -> str:
  """Which of `attention.KERNELS` a run takes; raises RequestError when the one it asks for cannot do it."""
  asked = config.model.attention
  if asked == "auto":
    return attention.fastest_kernel(device, dtype, cfg.H)
  if reason := attention.unsupported_reason(
    asked, device, dtype, cfg.H, packed, cfg.attention_dropout > 0
  ):
    raise RequestError(f"config.model.attention={asked}: {reason}; take auto, or chunked")
  return asked


def build_train_program(
  config: ConfigDict, cfg: ModelConfig, mesh: Mesh, total_steps: int, row: dict[str, Any]
) -> TrainProgram:
  """The programs of a run of `config` with this model on this mesh.

  Args:
    row: a row of the data, or one that is shaped like it.

  Raises RequestError when the batch or the model cannot be split as the mesh asks.
  """
  device, tensor = mesh.devices.flat[0], mesh.shape["tensor"]
  if lines := validate_mesh(cfg, mesh):
    raise RequestError("\n".join(lines))
  A = rules.accumulation_steps(config.train, mesh)
  zero_stage, whole = config.mesh.zero_stage, rules.replicated(mesh)
  dtype = resolve_dtype(config.model.compute_dtype, device)
  compute = ComputeConfig(
    dtype,
    config.memory.remat,
    rules.make_constrain(mesh),
    rules.make_gather(mesh, zero_stage),
    rules.make_shard_rows(mesh, zero_stage, "parameters"),
    rules.make_shard_rows(mesh, zero_stage, "gradients"),
    attention=select_kernel(config, cfg, device, dtype, packed="segments" in row),
    shard_map=per_device.make_shard_map(mesh),
    vocab_multiple=rules.VOCAB_MULTIPLE,
    to_device=to_device if config.memory.offload != "none" else lambda x: x,
  )
  graph, whole_shapes, whole_axes = abstract_model(cfg, compute)
  (shapes, frozen), (axes, frozen_axes) = (
    trainable.partition(tree, cfg.trained) for tree in (whole_shapes, whole_axes)
  )
  tx = optimizer.make_optimizer(config.optim)
  precise, shapes = (
    shapes,
    optimizer.with_param_dtype(config.model.param_dtype, shapes, cfg.trained),
  )
  # What is frozen is kept as it is computed with: that is half the bytes, and no other result.
  frozen = jax.tree_util.tree_map_with_path(
    lambda path, leaf: (
      leaf.update(dtype=compute.dtype) if optimizer.has_weight_decay(path) else leaf
    ),
    frozen,
  )
  frozen = rules.with_shardings(
    frozen, rules.tree_shardings("parameters", frozen, frozen_axes, mesh, zero_stage)
  )
  state = TrainState(*rules.abstract_state(tx, shapes, axes, mesh, zero_stage), frozen)
  if lines := validate_offload(
    device.platform, (state.params, state.opt_state, state.frozen), config.memory.offload
  ):
    raise RequestError("\n".join(lines))
  gradients = rules.tree_shardings("gradients", shapes, axes, mesh, zero_stage)
  rows = 1 if cfg.classes else compute.padded_vocab(cfg) // tensor
  at_once = config.train.batch_size // A // rules.data_parallel_size(mesh)
  most = loss.max_logits_bytes(device.platform, config.memory.remat)
  eval_rows = rules.eval_batch_size(config.train, mesh)
  chunk, eval_chunk = (
    loss.choose_chunk(
      config.memory.loss_chunk, of_a_device, config.data.sequence_length, rows, most
    )
    for of_a_device in (at_once, eval_rows // rules.data_parallel_size(mesh))
  )
  how = {"loss_chunk": chunk, "seed": config.train.seed, "trained": cfg.trained}
  copy, kept = (), config.memory.offload
  if kept == "none":
    gradient = make_grad_fn(graph, gradients=gradients, **how)
    changing = jax.tree.map(lambda leaf: leaf.sharding, state.checkpointable)
    look, update = (
      make_grad_stats(per_device.make_nonfinite_check((gradients, changing))),
      make_update_fn(tx, cfg.trained),
    )
  else:
    if kept == "optimizer":
      on_device = jax.tree.map(lambda leaf: leaf.sharding, state.params)
      copy = optimizer.with_param_dtype(compute.dtype, state.params)
      shapes = copy
      gradient = make_copy_grad_fn(
        make_grad_fn(graph, gradients=gradients, **how), compute.dtype, on_device
      )
    else:
      gradient = make_streamed_grad_fn(graph, remat=config.memory.remat, **how)
      gradients = jax.tree.map(
        lambda leaf: leaf.sharding, with_host_memory(rules.with_shardings(shapes, gradients))
      )
    state = state._replace(
      params=with_host_memory(state.params), opt_state=with_host_memory(state.opt_state)
    )
    if kept == "all":
      state = state._replace(frozen=with_host_memory(state.frozen))
    places = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    look, update = (
      make_streamed_stats(gradients),
      make_streamed_update_fn(config.optim, places, cfg.trained),
    )
  step = make_train_step(
    gradient,
    look,
    update,
    optimizer.make_schedule(config.optim, total_steps),
    clip_norm=config.optim.clip_norm,
    seed=config.train.seed,
  )
  eval_step = make_eval_step(graph, loss_chunk=eval_chunk)
  if A > 1 and kept != "all":  # several are added up in float32
    shapes = precise
  if kept != "none":
    on_host = host_mask(state, kept)
    step, eval_step = (
      mark_host_inputs(step, on_host),
      mark_host_inputs(eval_step, on_host.all_params),
    )
  places = jax.tree.map(lambda leaf: leaf.sharding, state)
  return TrainProgram(
    graph,
    compute,
    tx,
    state,
    loader.batch_shapes(row, A, config.train.batch_size // A, rules.batch_sharding(mesh)),
    copy,
    rules.with_shardings(shapes, gradients),
    jax.jit(gradient, out_shardings=(whole, gradients, whole)),
    jax.jit(step, donate_argnums=0, out_shardings=(places, whole)),
    jax.jit(eval_step),
    eval_rows,
    kept,
    chunk,
  )
