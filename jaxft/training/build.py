"""The programs of a run: shapes, shardings and jitted steps.

This module allocates no arrays. A run therefore knows its memory use before it allocates, and
`jaxft.plan` can compile a run for devices that are not present.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxft.config import Config
from jaxft.data import loader
from jaxft.errors import RequestError
from jaxft.model import attention, loss
from jaxft.model.compute import ComputeConfig, resolve_dtype
from jaxft.model.config import ModelConfig
from jaxft.model.decoder import Decoder, abstract_model
from jaxft.sharding import per_device, rules
from jaxft.sharding.mesh import validate_mesh
from jaxft.training import offload, optimizer, train_step
from jaxft.training.eval_step import make_eval_step
from jaxft.training.train_state import TrainState, shardings_of
from jaxft.training.train_step import GradFn, TrainStepFn
from jaxft.training.trainable import partition
from jaxft.utils.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainProgram:
  """The train and eval steps of a run, with shapes and shardings of their inputs."""

  graph: nnx.GraphDef[Decoder]
  compute: ComputeConfig
  tx: optax.GradientTransformation
  state: TrainState  # shapes with their shardings
  batch: dict[str, jax.ShapeDtypeStruct]  # of one optimizer step: shapes with their shardings
  compute_params: Params  # with offload "optimizer": shapes of the device's copy of the weights
  grad_shapes: Params  # shapes with their shardings
  grad_fn: jax.stages.Wrapped  # jitted: a `train_step.GradFn`
  train_step: jax.stages.Wrapped  # a `train_step.TrainStepFn`; the state is donated
  eval_step: jax.stages.Wrapped  # an `eval_step.EvalStepFn`
  eval_rows: int  # rows of an eval step
  offload: str  # `memory.offload`: "none", "optimizer" or "all"
  loss_chunk: int  # positions of a row whose logits are computed at a time; 0: all

  @property
  def eval_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of the eval step, with their shardings."""
    row = {name: np.empty(x.shape[2:], x.dtype) for name, x in self.batch.items()}
    return loader.batch_shapes(row, 1, self.eval_rows, self.batch_sharding)

  @property
  def host_mask(self) -> TrainState:
    """For each leaf of the state, whether it is in host memory."""
    return offload.host_mask(self.state, self.offload)

  @property
  def batch_sharding(self) -> NamedSharding:
    """The sharding of every array of a batch."""
    return self.batch["ids"].sharding


def build_train_program(
  config: Config, cfg: ModelConfig, mesh: Mesh, total_steps: int, row: dict[str, np.ndarray]
) -> TrainProgram:
  """Build the programs of a run.

  Args:
    config: the config of the run.
    cfg: the config of the model that is trained.
    mesh: the devices.
    total_steps: of the run, for the learning-rate schedule.
    row: a row of the data, or arrays of the same shapes and dtypes.

  Raises:
    RequestError: the batch or the model cannot be split over the mesh.
  """
  if lines := validate_mesh(mesh, D=cfg.D, N=cfg.N, F=cfg.F):
    raise RequestError("\n".join(lines))
  A = rules.accumulation_steps(config.train, mesh)
  B = config.train.batch_size // A
  compute = make_compute_config(config, cfg, mesh, packed="segments" in row)
  graph, resident, grads_f32 = abstract_train_state(config, cfg, compute, mesh)
  mode = config.memory.offload
  stored = (resident.params, resident.opt_state, resident.frozen)
  if lines := offload.validate_offload(mesh.devices.flat[0].platform, stored, mode):
    raise RequestError("\n".join(lines))
  eval_rows = rules.eval_batch_size(config.train, mesh)
  chunk, eval_chunk = (
    choose_loss_chunk(config, cfg, compute, mesh, rows) for rows in (B, eval_rows)
  )
  grad_fn, grad_shapes, compute_params = build_grad_fn(
    config, cfg, compute, graph, resident.params, grads_f32, A=A, loss_chunk=chunk
  )
  state = offload.state_with_host_memory(resident, mode)
  step = build_train_step(config, cfg, state, grad_fn, grad_shapes, total_steps)
  eval_step = make_eval_step(graph, loss_chunk=eval_chunk)
  host_mask = offload.host_mask(state, mode)
  # out_shardings fixes the state's shardings. If the compiler chose them, they could change from
  # one step to the next, and the next step would be compiled again. Input shardings need no
  # argument: jit takes them from `state` and `batch`. The state is donated, so that old and new
  # weights never exist at the same time; the eval step only reads it.
  replicated = rules.replicated(mesh)
  return TrainProgram(
    graph=graph,
    compute=compute,
    tx=optimizer.make_optimizer(config.optim),
    state=state,
    batch=loader.batch_shapes(row, A, B, rules.batch_sharding(mesh)),
    compute_params=compute_params,
    grad_shapes=grad_shapes,
    grad_fn=jax.jit(grad_fn, out_shardings=(replicated, shardings_of(grad_shapes), replicated)),
    train_step=jax.jit(
      offload.mark_host_inputs(step, host_mask),
      donate_argnums=0,
      out_shardings=(shardings_of(state), replicated),
    ),
    eval_step=jax.jit(offload.mark_host_inputs(eval_step, host_mask.all_params)),
    eval_rows=eval_rows,
    offload=mode,
    loss_chunk=chunk,
  )


def make_compute_config(
  config: Config, cfg: ModelConfig, mesh: Mesh, packed: bool
) -> ComputeConfig:
  """Make the compute config of the model: dtype, remat, attention kernel and mesh.

  Args:
    config: the config of the run.
    cfg: the config of the model.
    mesh: the devices.
    packed: whether rows have segments.
  """
  device = mesh.devices.flat[0]
  dtype = resolve_dtype(config.model.compute_dtype, device)
  return ComputeConfig(
    dtype=dtype,
    remat=config.memory.remat,
    mesh=mesh,
    zero_stage=config.mesh.zero_stage,
    attention=select_kernel(config, cfg, device, dtype, packed),
    vocab_multiple=rules.VOCAB_MULTIPLE,
    to_device=offload.to_device if config.memory.offload != "none" else lambda x: x,
  )


def select_kernel(
  config: Config, cfg: ModelConfig, device: jax.Device, dtype: jnp.dtype, packed: bool
) -> str:
  """Select one of `attention.KERNELS`.

  Raises:
    RequestError: the configured kernel cannot be used.
  """
  name = config.model.attention
  if name == "auto":
    return attention.fastest_kernel(device, dtype, cfg.H)
  has_dropout = cfg.attention_dropout > 0
  if reason := attention.unsupported_reason(name, device, dtype, cfg.H, packed, has_dropout):
    raise RequestError(f"config.model.attention={name}: {reason}; use auto or chunked")
  return name


def abstract_train_state(
  config: Config, cfg: ModelConfig, compute: ComputeConfig, mesh: Mesh
) -> tuple[nnx.GraphDef[Decoder], TrainState, Params]:
  """Return the model's graph, and shapes of the state and of a float32 gradient.

  The shardings are in device memory; `offload.state_with_host_memory` moves some of them. Only
  shapes are made, so that this also runs for devices that are not present (`jaxft.plan`).
  """
  graph, shapes, axes = abstract_model(cfg, compute)
  shapes_f32, frozen = partition(shapes, cfg.trained)
  trained_axes, frozen_axes = partition(axes, cfg.trained)
  tx = optimizer.make_optimizer(config.optim)
  zero_stage = config.mesh.zero_stage

  # Frozen weights are stored in the compute dtype. This gives the same result as a cast in every
  # step, and with bfloat16 takes half the bytes.
  def cast_frozen(path, leaf):
    return leaf.update(dtype=compute.dtype) if optimizer.has_weight_decay(path) else leaf

  def with_shardings(tree, shapes, axes):
    shardings = rules.tree_shardings(tree, shapes, axes, mesh, zero_stage)
    return rules.with_shardings(shapes, shardings)

  stored = optimizer.with_param_dtype(config.model.param_dtype, shapes_f32, cfg.trained)
  moments = rules.tree_shardings("optimizer", stored, trained_axes, mesh, zero_stage)
  opt_shardings = rules.opt_state_shardings(tx, stored, moments, mesh)
  frozen_cast = jax.tree_util.tree_map_with_path(cast_frozen, frozen)
  state = TrainState(
    step=jax.ShapeDtypeStruct((), jnp.int32, sharding=rules.replicated(mesh)),
    params=with_shardings("parameters", stored, trained_axes),
    opt_state=rules.with_shardings(jax.eval_shape(tx.init, stored), opt_shardings),
    frozen=with_shardings("parameters", frozen_cast, frozen_axes),
  )
  return graph, state, with_shardings("gradients", shapes_f32, trained_axes)


def choose_loss_chunk(
  config: Config, cfg: ModelConfig, compute: ComputeConfig, mesh: Mesh, rows: int
) -> int:
  """Choose how many positions of each row have logits at a time; 0: all."""
  return loss.choose_chunk(
    config.memory.loss_chunk,
    B=rows // rules.data_parallel_size(mesh),
    T=config.data.sequence_length,
    V=1 if cfg.classes else compute.padded_vocab(cfg) // mesh.shape["tensor"],
    max_bytes=loss.max_logits_bytes(mesh.devices.flat[0].platform, config.memory.remat),
  )


def build_grad_fn(
  config: Config,
  cfg: ModelConfig,
  compute: ComputeConfig,
  graph: nnx.GraphDef[Decoder],
  params: Params,
  grads_f32: Params,
  *,
  A: int,
  loss_chunk: int,
) -> tuple[GradFn, Params, Params]:
  """Build the gradient function for the run's `memory.offload`.

  Args:
    config: the config of the run.
    cfg: the config of the model.
    compute: the compute config of the model.
    graph: the model's graph definition.
    params: shapes of the trained weights, on the device.
    grads_f32: shapes of a float32 gradient, on the device.
    A: accumulation steps.
    loss_chunk: positions of a row whose logits are computed at a time; 0: all.

  Returns:
    The function, the shapes of its gradient, and the shapes of its copy of the weights ({} if it
    makes none).
  """
  shared = {"loss_chunk": loss_chunk, "seed": config.train.seed, "trained": cfg.trained}
  shardings = shardings_of(grads_f32)
  if config.memory.offload == "all":
    # A hand-written backward pass, layer by layer: jax.grad through weights in host memory would
    # keep the gradients of all layers on the device.
    grad_fn = offload.make_streamed_grad_fn(graph, remat=config.memory.remat, **shared)
    return grad_fn, offload.with_host_memory(rules.with_shardings(params, shardings)), {}
  if config.memory.offload == "optimizer":
    # The float32 weights stay on the host; the device has a copy in the compute dtype.
    copy = optimizer.with_param_dtype(compute.dtype, params)
    fetch_params = offload.make_fetch_params(compute.dtype, shardings_of(params))
  else:
    copy, fetch_params = {}, lambda params: params
  grad_fn = train_step.make_grad_fn(
    graph, grad_shardings=shardings, fetch_params=fetch_params, **shared
  )
  # The gradients of several accumulation steps are added up in float32. A single one has the
  # dtype of the weights.
  grads = grads_f32 if A > 1 else rules.with_shardings(copy or params, shardings)
  return grad_fn, grads, copy


def build_train_step(
  config: Config,
  cfg: ModelConfig,
  state: TrainState,
  grad_fn: GradFn,
  grad_shapes: Params,
  total_steps: int,
) -> TrainStepFn:
  """Build the train step for the run's `memory.offload`."""
  grad_shardings = shardings_of(grad_shapes)
  if config.memory.offload == "none":
    checked = (grad_shardings, shardings_of(state.checkpointable))
    grad_stats = train_step.make_grad_stats(per_device.make_nonfinite_check(checked))
    tx = optimizer.make_optimizer(config.optim)
    update_fn = train_step.make_update_fn(tx, cfg.trained)
  else:
    # Only gradients are checked: to check the state, it would have to be read from the host once
    # more. A NaN in a weight reaches the loss; a NaN in a moment reaches a weight, and the loss one
    # step later.
    grad_stats = offload.make_streamed_stats(grad_shardings)
    param_shardings = shardings_of(state.params)
    update_fn = offload.make_streamed_update_fn(config.optim, param_shardings, cfg.trained)
  return train_step.make_train_step(
    grad_fn,
    grad_stats,
    update_fn,
    optimizer.make_schedule(config.optim, total_steps),
    clip_norm=config.optim.clip_norm,
    seed=config.train.seed,
  )
