"""The programs of a run, for devices that exist or not: shapes, shardings and jitted steps.

Allocates nothing: what a step needs is known before any memory is taken.
"""

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
from jaxft.training import offload, optimizer, train_step
from jaxft.training.eval_step import make_eval_step
from jaxft.training.train_state import TrainState, shardings_of
from jaxft.training.trainable import partition
from jaxft.utils import backend


class TrainProgram(NamedTuple):
  """The train step and the eval step of a run, with the shapes and shardings of what they take."""

  graph: nnx.GraphDef
  compute: ComputeConfig
  tx: optax.GradientTransformation
  state: TrainState  # shapes with their shardings
  batch: dict[str, jax.ShapeDtypeStruct]  # of an optimizer step, likewise
  compute_params: Any  # of the copy of the weights on the device, with offload "optimizer"; else ()
  grad_shapes: Any  # shapes with their shardings
  grad_fn: Any  # (state, batch) -> (loss, gradient, tokens)
  train_step: Any  # (state, batch) -> (state, metrics); the state is donated
  eval_step: Any  # (parameters, batch) -> (sum of the loss, tokens)
  eval_rows: int  # that an eval step takes
  offload: str  # on the host: "none", "optimizer" state and weights, or "all", gradients too
  loss_chunk: int  # positions a row whose logits exist at once; 0: all

  @property
  def eval_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the batch of an eval step."""

    def resize(leaf):
      shape = (1, self.eval_rows, *leaf.shape[2:])
      return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)

    return {name: resize(leaf) for name, leaf in self.batch.items()}

  @property
  def host_mask(self) -> TrainState:
    """Says for each leaf of the state whether it is in host memory."""
    return offload.host_mask(self.state, self.offload)

  @property
  def batch_sharding(self) -> NamedSharding:
    return self.batch["ids"].sharding


def bytes_per_device(tree: Any) -> int:
  """Bytes of these shapes with shardings on a device, or in its share of the host's memory."""

  def nbytes(leaf):
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

  return sum(map(nbytes, jax.tree.leaves(tree)))


def check_fits(program: TrainProgram, config: ConfigDict) -> None:
  """Raises RequestError when device or host cannot hold the state and a batch.

  Activations and other temporaries come on top.
  """
  devices = program.batch_sharding.mesh.local_devices
  device = devices[0]
  on_host = host_bytes(program) * len(devices)
  fewer = (
    "config.model.param_dtype=bfloat16, config.optim.name=adafactor or "
    "config.optim.state_dtype=bfloat16 needs fewer (docs/memory.md)"
  )
  needs = f"config.memory.offload={program.offload}: the host is to keep {on_host:,} bytes and"
  if on_host > (limit := backend.host_memory_bytes()):
    raise RequestError(f"{needs} has {limit:,}; {fewer}")
  if device.platform == "gpu" and on_host > (limit := backend.pinned_limit()):
    raise RequestError(
      f"{needs} XLA may pin {limit:,} in this process; set {backend.PINNED_LIMIT_ENV} (GiB) before "
      f"it starts or, where the machine has more memory than it shows, {backend.HOST_MEMORY_ENV}; "
      f"{fewer}"
    )
  limit = backend.device_memory_bytes(device)
  state = bytes_per_device(program.state) if program.offload == "none" else 0
  batch = bytes_per_device(program.batch)
  if state + batch > limit:
    raise RequestError(
      f"config.train.batch_size={config.train.batch_size}, "
      f"config.data.sequence_length={config.data.sequence_length}, "
      f"config.model.path={config.model.path!r}: weights and optimizer take {state:,} bytes of a "
      f"device and a batch {batch:,}; a {device.device_kind} here has {limit:,}"
    )


def pinned_memory_warning(program: TrainProgram) -> str:
  """Returns a warning where XLA's pool of pinned memory may be too small for the state; else ""."""
  devices = program.batch_sharding.mesh.local_devices
  on_host = host_bytes(program)
  limit = backend.pinned_limit()
  blocks = [bytes_per_device(leaf) for leaf in _host_leaves(program)]
  blocks.append(on_host - sum(blocks))  # the gradient is one
  if devices[0].platform != "gpu" or backend.pool_fits(blocks * len(devices), limit):
    return ""
  return (
    f"warning: the host is to keep {on_host * len(devices):,} bytes; with the gaps between them "
    f"that may be more than the {limit:,} that XLA may pin. If it runs out of host memory, set "
    f"{backend.PINNED_LIMIT_ENV} (GiB) before the run starts (docs/memory.md)"
  )


def host_bytes(program: TrainProgram) -> int:
  """Host memory for each device: weights and optimizer state, and with "all" the gradient."""
  grads = jax.tree.leaves(program.grad_shapes) if program.offload == "all" else []
  return host_state_bytes(program) + bytes_per_device(list(filter(offload.is_offloaded, grads)))


def max_host_bytes(config: ConfigDict, cfg: ModelConfig) -> int | None:
  """Most bytes in one host's memory, before JAX has looked for devices; None if they decide it."""
  if config.memory.offload == "none":
    return 0
  if config.mesh.data == -1 or config.mesh.zero_stage < max(rules.MIN_ZERO_STAGE.values()):
    return None  # each device has a copy
  if cfg.trained:
    return None  # the export has all weights there, frozen ones too, in float32
  shapes = abstract_model(cfg, ComputeConfig(vocab_multiple=rules.VOCAB_MULTIPLE))[1]
  moments = jax.eval_shape(optimizer.make_optimizer(config.optim).init, shapes)
  weights = optimizer.with_param_dtype(config.model.param_dtype, shapes, cfg.trained)
  grads = weights if config.memory.offload == "all" else ()
  leaves = filter(offload.is_offloaded, jax.tree.leaves((weights, moments, grads)))
  return config.mesh.data * sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def host_state_bytes(program: TrainProgram) -> int:
  """`host_bytes` without the gradient."""
  return bytes_per_device(_host_leaves(program))


def _host_leaves(program: TrainProgram) -> list[Any]:
  """The leaves of the state that are in host memory."""
  leaves, mask = map(jax.tree.leaves, (program.state, program.host_mask))
  return [leaf for leaf, on_host in zip(leaves, mask, strict=True) if on_host]


def select_kernel(
  config: ConfigDict, cfg: ModelConfig, device: jax.Device, dtype: Any, packed: bool
) -> str:
  """Selects one of `attention.KERNELS`; RequestError where the configured one cannot do it."""
  name = config.model.attention
  if name == "auto":
    return attention.fastest_kernel(device, dtype, cfg.H)
  has_dropout = cfg.attention_dropout > 0
  if reason := attention.unsupported_reason(name, device, dtype, cfg.H, packed, has_dropout):
    raise RequestError(f"config.model.attention={name}: {reason}; take auto, or chunked")
  return name


def build_train_program(
  config: ConfigDict, cfg: ModelConfig, mesh: Mesh, total_steps: int, row: dict[str, Any]
) -> TrainProgram:
  """Builds the programs of a run of `config` with this model on this mesh.

  Args:
    row: a row of the data, or one that is shaped like it.

  Raises RequestError when the batch or the model cannot be split as the mesh asks.
  """
  if lines := validate_mesh(mesh, D=cfg.D, N=cfg.N, F=cfg.F):
    raise RequestError("\n".join(lines))
  device = mesh.devices.flat[0]
  A = rules.accumulation_steps(config.train, mesh)
  mode = config.memory.offload
  zero_stage = config.mesh.zero_stage
  dtype = resolve_dtype(config.model.compute_dtype, device)
  compute = ComputeConfig(
    dtype=dtype,
    remat=config.memory.remat,
    mesh=mesh,
    zero_stage=zero_stage,
    attention=select_kernel(config, cfg, device, dtype, packed="segments" in row),
    vocab_multiple=rules.VOCAB_MULTIPLE,
    to_device=offload.to_device if mode != "none" else lambda x: x,
  )
  # ---- Shapes and shardings of the state. Shapes only, so that this also runs for devices that do
  # not exist (jaxft.plan), and memory is known before any is taken.
  graph, all_shapes, all_axes = abstract_model(cfg, compute)
  shapes_f32, frozen = partition(all_shapes, cfg.trained)
  axes, frozen_axes = partition(all_axes, cfg.trained)
  shapes = optimizer.with_param_dtype(config.model.param_dtype, shapes_f32, cfg.trained)

  # Frozen weights are stored in the dtype they are computed with: half the bytes, the same result.
  def cast_frozen(path, leaf):
    return leaf.update(dtype=compute.dtype) if optimizer.has_weight_decay(path) else leaf

  frozen = jax.tree_util.tree_map_with_path(cast_frozen, frozen)
  frozen_shardings = rules.tree_shardings("parameters", frozen, frozen_axes, mesh, zero_stage)
  frozen = rules.with_shardings(frozen, frozen_shardings)
  tx = optimizer.make_optimizer(config.optim)
  state = TrainState(*rules.abstract_state(tx, shapes, axes, mesh, zero_stage), frozen)
  stored = (state.params, state.opt_state, state.frozen)
  if lines := offload.validate_offload(device.platform, stored, mode):
    raise RequestError("\n".join(lines))
  grad_shardings = rules.tree_shardings("gradients", shapes, axes, mesh, zero_stage)

  # ---- Chunks of the loss: logits of at most so many bytes exist at once
  vocab_rows = 1 if cfg.classes else compute.padded_vocab(cfg) // mesh.shape["tensor"]
  max_logits = loss.max_logits_bytes(device.platform, config.memory.remat)

  def loss_chunk(rows: int) -> int:
    rows //= rules.data_parallel_size(mesh)
    T = config.data.sequence_length
    return loss.choose_chunk(config.memory.loss_chunk, rows, T, vocab_rows, max_logits)

  eval_rows = rules.eval_batch_size(config.train, mesh)
  chunk = loss_chunk(config.train.batch_size // A)

  # ---- The functions of a step, one set for each kind of offload
  grad_args = {"loss_chunk": chunk, "seed": config.train.seed, "trained": cfg.trained}
  compute_params = ()
  grad_shapes = shapes
  if mode == "all":
    # By hand, layer after layer: jax.grad would need the weights of all layers on the device.
    grad_fn = offload.make_streamed_grad_fn(graph, remat=config.memory.remat, **grad_args)
    pinned = offload.with_host_memory(rules.with_shardings(shapes, grad_shardings))
    grad_shardings = shardings_of(pinned)
  else:
    grad_fn = train_step.make_grad_fn(graph, grad_shardings=grad_shardings, **grad_args)
  if mode == "optimizer":
    # The float32 weights stay on the host; the device has a copy in the compute dtype.
    compute_params = optimizer.with_param_dtype(compute.dtype, state.params)
    grad_shapes = compute_params
    grad_fn = offload.make_copy_grad_fn(grad_fn, compute.dtype, shardings_of(state.params))
  if A > 1 and mode != "all":  # several are added up in float32
    grad_shapes = shapes_f32
  if mode == "none":
    checked = (grad_shardings, shardings_of(state.checkpointable))
    grad_stats = train_step.make_grad_stats(per_device.make_nonfinite_check(checked))
    update_fn = train_step.make_update_fn(tx, cfg.trained)
  else:
    state = state._replace(
      params=offload.with_host_memory(state.params),
      opt_state=offload.with_host_memory(state.opt_state),
      frozen=offload.with_host_memory(state.frozen) if mode == "all" else state.frozen,
    )
    # Gradients alone: reading the state for NaNs would bring it over from the host once more. A NaN
    # in a weight reaches the loss, one in a moment reaches a weight and the loss a step later.
    grad_stats = offload.make_streamed_stats(grad_shardings)
    param_shardings = shardings_of(state.params)
    update_fn = offload.make_streamed_update_fn(config.optim, param_shardings, cfg.trained)
  step = train_step.make_train_step(
    grad_fn,
    grad_stats,
    update_fn,
    optimizer.make_schedule(config.optim, total_steps),
    clip_norm=config.optim.clip_norm,
    seed=config.train.seed,
  )
  eval_step = make_eval_step(graph, loss_chunk=loss_chunk(eval_rows))
  if mode != "none":
    mask = offload.host_mask(state, mode)
    step = offload.mark_host_inputs(step, mask)
    eval_step = offload.mark_host_inputs(eval_step, mask.all_params)

  # ---- Jitted. The state leaves a step with the shardings that it came with: left to the compiler
  # they could change, and the next step would be another program. It is donated, so old and new
  # weights never exist together; the eval step only reads it.
  replicated = rules.replicated(mesh)
  batch_sharding = rules.batch_sharding(mesh)
  return TrainProgram(
    graph=graph,
    compute=compute,
    tx=tx,
    state=state,
    batch=loader.batch_shapes(row, A, config.train.batch_size // A, batch_sharding),
    compute_params=compute_params,
    grad_shapes=rules.with_shardings(grad_shapes, grad_shardings),
    grad_fn=jax.jit(grad_fn, out_shardings=(replicated, grad_shardings, replicated)),
    train_step=jax.jit(step, donate_argnums=0, out_shardings=(shardings_of(state), replicated)),
    eval_step=jax.jit(eval_step),
    eval_rows=eval_rows,
    offload=mode,
    loss_chunk=chunk,
  )
