"""Initial parameters and train state, and the merged model for export."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.checkpoint.manager import CheckpointState
from jaxft.config import Config
from jaxft.hf import load_weights
from jaxft.hf.repo import HFCheckpoint
from jaxft.model import lora
from jaxft.model.config import ModelConfig
from jaxft.model.decoder import init_model
from jaxft.training import offload, trainable
from jaxft.training.build import TrainProgram
from jaxft.training.train_state import TrainState, shardings_of
from jaxft.utils.types import Params


def init_params(program: TrainProgram, cfg: ModelConfig, seed: int, shapes: Params) -> Params:
  """Draw random weights.

  Args:
    program: the programs of the run.
    cfg: config of the model.
    seed: of the run.
    shapes: shapes with shardings of the result: those of the program, or some of them.
  """

  def init() -> Params:
    params = nnx.to_pure_dict(nnx.state(init_model(cfg, program.compute, seed)))
    params = trainable.select_like(params, shapes)
    return jax.tree.map(lambda p, shape: p.astype(shape.dtype), params, shapes)

  if program.offload == "none":
    return jax.jit(init, out_shardings=shardings_of(shapes))()
  # Offloaded weights are drawn leaf by leaf on the CPU and stay in its memory: all of them may be
  # too large for the device.
  leaves, tree = jax.tree.flatten(shapes)
  arrays = []
  has_cpu = "cpu" in (jax.config.read("jax_platforms") or "cpu").split(",")
  with jax.default_device(jax.local_devices(backend="cpu")[0] if has_cpu else None):
    for i, leaf in enumerate(leaves):
      x = np.asarray(jax.jit(lambda i=i: jax.tree.leaves(init())[i])())
      arrays.append(jax.make_array_from_callback(leaf.shape, leaf.sharding, x.__getitem__))
  return jax.tree.unflatten(tree, arrays)


def init_train_state(program: TrainProgram, params: Params, frozen: Params) -> TrainState:
  """Initialize the state from sharded parameters; donates `params`."""
  if program.offload == "none":

    def init(params):
      return CheckpointState(jnp.int32(0), params, program.tx.init(params))

    shardings = shardings_of(program.state.checkpointable)
    saved = jax.jit(init, out_shardings=shardings, donate_argnums=0)(params)
    return TrainState.from_checkpoint(saved, frozen)

  # The state of every optimizer starts as zeros, so it is made on the host directly.
  def zeros(leaf):
    def shard(index):
      return np.zeros(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, shard)

  step = jax.device_put(jnp.int32(0), program.state.step.sharding)
  opt_state = jax.tree.map(zeros, program.state.opt_state)
  return TrainState(step=step, params=params, opt_state=opt_state, frozen=frozen)


def load_or_init_params(
  program: TrainProgram, cfg: ModelConfig, source: HFCheckpoint, config: Config
) -> tuple[Params, Params]:
  """Return trained and frozen weights, loaded or random; adapters are random."""
  shapes = program.state.all_params
  if config.model.init == "scratch":
    return init_params(program, cfg, config.train.seed, shapes), {}
  base = lora.without_adapters(shapes)
  params = load_weights.load_params(source, base, shardings_of(base))
  if cfg.lora_rank:
    adapters = lora.select_adapters(program.state.params)
    params = trainable.combine(params, init_params(program, cfg, config.train.seed, adapters))
  return trainable.partition(params, cfg.trained)


def merge_params(trained: Params, cfg: ModelConfig, source: HFCheckpoint, shapes: Params) -> Params:
  """Merge trained weights into the base model.

  Args:
    trained: `TrainState.params`.
    cfg: config of the model that was trained.
    source: the base model, from which frozen weights are loaded again.
    shapes: shapes with shardings of the result (`merged_shapes`).

  Returns:
    All weights of the model in float32, without adapters.
  """
  if not cfg.trained:
    return trained
  params = load_weights.load_params(source, shapes, shardings_of(shapes))
  frozen = trainable.partition(params, cfg.trained)[1]
  return lora.merge(trainable.combine(trained, frozen), cfg)


def merged_shapes(program: TrainProgram) -> Params:
  """Return the shapes of the result of `merge_params`, with shardings.

  If some weights are frozen, all are in host memory: in float32 they may not fit on the device.
  """
  shapes = lora.without_adapters(program.state.all_params)
  shapes = jax.tree.map(lambda leaf: leaf.update(dtype="float32"), shapes)
  return offload.with_host_memory(shapes) if program.state.frozen else shapes
