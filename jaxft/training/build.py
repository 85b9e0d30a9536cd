"""The programs of a run, for devices that exist or not: shapes, shardings and jitted steps.

Allocates nothing: what a step needs is known before any memory is taken.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

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
from jaxft.training.train_step import GradFn
from jaxft.training.trainable import partition
from jaxft.utils.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainProgram:
  """The train step and the eval step of a run, with the shapes and shardings of what they take."""

  graph: nnx.GraphDef[Decoder]
  compute: ComputeConfig
  tx: optax.GradientTransformation
  state: TrainState  # shapes with their shardings
  batch: dict[str, jax.ShapeDtypeStruct]  # of an optimizer step, likewise
  compute_params: Params  # of the copy of the weights on the device, with offload "optimizer"
  grad_shapes: Params  # shapes with their shardings
  grad_fn: jax.stages.Wrapped  # jitted: a `train_step.GradFn`
  train_step: jax.stages.Wrapped  # a `train_step.TrainStepFn`, to which the state is donated
  eval_step: jax.stages.Wrapped  # an `eval_step.EvalStepFn`
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradProgram:
  """The gradient function of a `memory.offload`, and shapes with their shardings."""

  fn: GradFn
  shapes: Params  # of the gradient
  compute_params: Params = dataclasses.field(default_factory=dict)  # as in `TrainProgram`


def build_train_program(
  config: ConfigDict, cfg: ModelConfig, mesh: Mesh, total_steps: int, row: dict[str, np.ndarray]
) -> TrainProgram:
  """Builds the programs of a run of `config` with this model on this mesh.

  Args:
    row: a row of the data, or one that is shaped like it.

  Raises RequestError when the batch or the model cannot be split as the mesh asks.
  """
  if lines := validate_mesh(cfg, mesh):
    raise RequestError("\n".join(lines))
  A = rules.accumulation_steps(config.train, mesh)
  B = config.train.batch_size // A
  compute = make_compute_config(config, cfg, mesh, packed="segments" in row)
  tx = optimizer.make_optimizer(config.optim)
  graph, resident, grads_f32 = abstract_train_state(config, cfg, compute, tx, mesh)
  mode = config.memory.offload
  stored = (resident.params, resident.opt_state, resident.frozen)
  if lines := offload.validate_offload(mesh.devices.flat[0].platform, stored, mode):
    raise RequestError("\n".join(lines))
  state = offload.state_with_host_memory(resident, mode)
  eval_rows = rules.eval_batch_size(config.train, mesh)
  chunk, eval_chunk = (loss_chunk(config, cfg, compute, mesh, rows) for rows in (B, eval_rows))
  grad = make_grad_program(
    config, cfg, graph, resident.params, grads_f32, A=A, loss_chunk=chunk, dtype=compute.dtype
  )
  eval_step = make_eval_step(graph, loss_chunk=eval_chunk)
  replicated = rules.replicated(mesh)
  return TrainProgram(
    graph=graph,
    compute=compute,
    tx=tx,
    state=state,
    batch=loader.batch_shapes(row, A, B, rules.batch_sharding(mesh)),
    compute_params=grad.compute_params,
    grad_shapes=grad.shapes,
    grad_fn=jax.jit(grad.fn, out_shardings=(replicated, shardings_of(grad.shapes), replicated)),
    train_step=jit_train_step(config, cfg, tx, state, grad, total_steps),
    eval_step=jax.jit(
      offload.mark_host_inputs(eval_step, offload.host_mask(state, mode).all_params)
    ),
    eval_rows=eval_rows,
    offload=mode,
    loss_chunk=chunk,
  )


def make_compute_config(
  config: ConfigDict, cfg: ModelConfig, mesh: Mesh, packed: bool
) -> ComputeConfig:
  """Makes how the model of a run is computed on this mesh; `packed`: rows have segments."""
  device = mesh.devices.flat[0]
  zero_stage = config.mesh.zero_stage
  dtype = resolve_dtype(config.model.compute_dtype, device)
  return ComputeConfig(
    dtype=dtype,
    remat=config.memory.remat,
    constrain=rules.make_constrain(mesh),
    gather=rules.make_gather(mesh, zero_stage),
    shard_rows=rules.make_shard_rows(mesh, zero_stage, "parameters"),
    shard_row_grads=rules.make_shard_rows(mesh, zero_stage, "gradients"),
    attention=select_kernel(config, cfg, device, dtype, packed),
    shard_map=per_device.make_shard_map(mesh),
    vocab_multiple=rules.VOCAB_MULTIPLE,
    to_device=offload.to_device if config.memory.offload != "none" else lambda x: x,
  )


def select_kernel(
  config: ConfigDict, cfg: ModelConfig, device: jax.Device, dtype: jnp.dtype, packed: bool
) -> str:
  """Selects one of `attention.KERNELS`; RequestError where the configured one cannot do it."""
  name = config.model.attention
  if name == "auto":
    return attention.fastest_kernel(device, dtype, cfg.H)
  has_dropout = cfg.attention_dropout > 0
  if reason := attention.unsupported_reason(name, device, dtype, cfg.H, packed, has_dropout):
    raise RequestError(f"config.model.attention={name}: {reason}; take auto, or chunked")
  return name


def abstract_train_state(
  config: ConfigDict,
  cfg: ModelConfig,
  compute: ComputeConfig,
  tx: optax.GradientTransformation,
  mesh: Mesh,
) -> tuple[nnx.GraphDef[Decoder], TrainState, Params]:
  """Returns the model's graph, and shapes with shardings of its state and of a float32 gradient.

  All of it is on the device. Shapes only, so that this also runs for devices that do not exist
  (jaxft.plan), and memory is known before any is taken.
  """
  graph, shapes, axes = abstract_model(cfg, compute)
  shapes_f32, frozen = partition(shapes, cfg.trained)
  trained_axes, frozen_axes = partition(axes, cfg.trained)
  zero_stage = config.mesh.zero_stage

  # Frozen weights are stored in the dtype they are computed with: half the bytes, the same result.
  def cast_frozen(path, leaf):
    return leaf.update(dtype=compute.dtype) if optimizer.has_weight_decay(path) else leaf

  def with_shardings(tree, shapes, axes):
    shardings = rules.tree_shardings(tree, shapes, axes, mesh, zero_stage)
    return rules.with_shardings(shapes, shardings)

  stored = optimizer.with_param_dtype(config.model.param_dtype, shapes_f32, cfg.trained)
  step, params, opt_state = rules.abstract_state(tx, stored, trained_axes, mesh, zero_stage)
  frozen_cast = jax.tree_util.tree_map_with_path(cast_frozen, frozen)
  state = TrainState(
    step=step,
    params=params,
    opt_state=opt_state,
    frozen=with_shardings("parameters", frozen_cast, frozen_axes),
  )
  return graph, state, with_shardings("gradients", shapes_f32, trained_axes)


def loss_chunk(
  config: ConfigDict, cfg: ModelConfig, compute: ComputeConfig, mesh: Mesh, rows: int
) -> int:
  """Positions of `rows` rows whose logits exist at once: at most so many bytes of them; 0: all."""
  return loss.choose_chunk(
    config.memory.loss_chunk,
    B=rows // rules.data_parallel_size(mesh),
    T=config.data.sequence_length,
    V=1 if cfg.classes else compute.padded_vocab(cfg) // mesh.shape["tensor"],
    max_bytes=loss.max_logits_bytes(mesh.devices.flat[0].platform, config.memory.remat),
  )


def make_grad_program(
  config: ConfigDict,
  cfg: ModelConfig,
  graph: nnx.GraphDef[Decoder],
  params: Params,
  grads_f32: Params,
  *,
  A: int,
  loss_chunk: int,
  dtype: jnp.dtype,
) -> GradProgram:
  """Makes the gradient function, one for each `memory.offload`.

  Args:
    params, grads_f32: shapes of the trained weights and of their gradient, with shardings on the
      device.
    A: accumulation steps.
    dtype: the compute dtype.
  """
  shared = {"loss_chunk": loss_chunk, "seed": config.train.seed, "trained": cfg.trained}
  grad_shardings = shardings_of(grads_f32)
  if config.memory.offload == "all":
    # By hand, layer after layer: jax.grad would need the weights of all layers on the device.
    grad_fn = offload.make_streamed_grad_fn(graph, remat=config.memory.remat, **shared)
    grads = offload.with_host_memory(rules.with_shardings(params, grad_shardings))
    return GradProgram(fn=grad_fn, shapes=grads)

  def grads_of(params):  # several are added up in float32
    return grads_f32 if A > 1 else rules.with_shardings(params, grad_shardings)

  make_grad_fn = functools.partial(
    train_step.make_grad_fn, graph, grad_shardings=grad_shardings, **shared
  )
  if config.memory.offload == "none":
    return GradProgram(fn=make_grad_fn(), shapes=grads_of(params))
  # The float32 weights stay on the host; the device has a copy in the compute dtype.
  fetch_params = offload.make_fetch_params(dtype, shardings_of(params))
  copy = optimizer.with_param_dtype(dtype, params)
  return GradProgram(
    fn=make_grad_fn(fetch_params=fetch_params), shapes=grads_of(copy), compute_params=copy
  )


def jit_train_step(
  config: ConfigDict,
  cfg: ModelConfig,
  tx: optax.GradientTransformation,
  state: TrainState,
  grad: GradProgram,
  total_steps: int,
) -> jax.stages.Wrapped:
  """Makes the train step, a `train_step.TrainStepFn`, and jits it.

  The state leaves a step with the shardings that it came with: left to the compiler they could
  change, and the next step would be another program. It is donated, so old and new weights never
  exist together; the eval step only reads it.
  """
  grad_shardings = shardings_of(grad.shapes)
  if config.memory.offload == "none":
    checked = (grad_shardings, shardings_of(state.checkpointable))
    grad_stats = train_step.make_grad_stats(per_device.make_nonfinite_check(checked))
    update_fn = train_step.make_update_fn(tx, cfg.trained)
  else:
    # Gradients alone: reading the state for NaNs would bring it over from the host once more. A NaN
    # in a weight reaches the loss, one in a moment reaches a weight and the loss a step later.
    grad_stats = offload.make_streamed_stats(grad_shardings)
    param_shardings = shardings_of(state.params)
    update_fn = offload.make_streamed_update_fn(config.optim, param_shardings, cfg.trained)
  step = train_step.make_train_step(
    grad.fn,
    grad_stats,
    update_fn,
    optimizer.make_schedule(config.optim, total_steps),
    clip_norm=config.optim.clip_norm,
    seed=config.train.seed,
  )
  return jax.jit(
    offload.mark_host_inputs(step, offload.host_mask(state, config.memory.offload)),
    donate_argnums=0,
    out_shardings=(shardings_of(state), state.step.sharding),
  )
