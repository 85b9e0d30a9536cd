"""Initial parameters and train state of a run, and the whole model after its last step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from jaxft.hf import load_weights
from jaxft.hf.repo import HFCheckpoint
from jaxft.model import lora
from jaxft.model.config import ModelConfig
from jaxft.model.decoder import init_model
from jaxft.training import offload, trainable
from jaxft.training.build import TrainProgram
from jaxft.training.train_state import CheckpointState, TrainState


def init_params(program: TrainProgram, cfg: ModelConfig, seed: int, shapes: Any) -> Any:
  """New weights: those of `shapes`, which may be some of the program's, and as they are placed."""

  def new() -> Any:
    drawn = nnx.to_pure_dict(nnx.state(init_model(cfg, program.compute, seed)))
    return jax.tree.map(
      lambda leaf, like: leaf.astype(like.dtype), trainable.select_like(drawn, shapes), shapes
    )

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


def init_train_state(program: TrainProgram, params: Any, frozen: Any) -> TrainState:
  """The state before the first step, of parameters that are placed as the program's; those that are trained are donated."""
  if program.offload == "none":
    new = lambda params: CheckpointState(jnp.int32(0), params, program.tx.init(params))
    places = jax.tree.map(lambda leaf: leaf.sharding, program.state.checkpointable)
    return TrainState(*jax.jit(new, out_shardings=places, donate_argnums=0)(params), frozen)
  # On the host every optimizer begins with zeros, without a detour over the device.
  zeros = lambda leaf: jax.make_array_from_callback(
    leaf.shape,
    leaf.sharding,
    lambda index: np.zeros(leaf.sharding.shard_shape(leaf.shape), leaf.dtype),
  )
  step = jax.device_put(jnp.int32(0), program.state.step.sharding)
  return TrainState(step, params, jax.tree.map(zeros, program.state.opt_state), frozen)


def load_or_init_params(
  program: TrainProgram, cfg: ModelConfig, source: HFCheckpoint, config: ConfigDict
) -> tuple[Any, Any]:
  """The weights that are trained and the frozen ones: of the checkpoint, or drawn; adapters are drawn in any case."""
  shapes = program.state.all_params
  if config.model.init == "scratch":
    return init_params(program, cfg, config.train.seed, shapes), {}
  plain = lora.without_adapters(shapes)
  weights = load_weights.load_params(source, plain, _shardings(plain))
  if cfg.lora_rank:
    adapters = lora.select_adapters(program.state.params)
    weights = trainable.combine(weights, init_params(program, cfg, config.train.seed, adapters))
  return trainable.partition(weights, cfg.trained)


def merge_params(trained: Any, cfg: ModelConfig, source: HFCheckpoint, shapes: Any) -> Any:
  """The weights of a model without adapters, in float32: what was trained, and the rest as the checkpoint has it.

  Args:
    trained: `State.params`.
    shapes: of the result, with shardings.
  """
  if not cfg.trained:
    return trained
  weights = load_weights.load_params(source, shapes, _shardings(shapes))
  frozen = trainable.partition(weights, cfg.trained)[1]
  return lora.merge(trainable.combine(trained, frozen), cfg)


def merged_shapes(program: TrainProgram) -> Any:
  """`merge_params`'s shapes for a program's weights; where some are frozen, in the host's memory: in float32 they may be too many."""
  shapes = jax.tree.map(
    lambda leaf: leaf.update(dtype="float32"), lora.without_adapters(program.state.all_params)
  )
  return offload.with_host_memory(shapes) if program.state.frozen else shapes


def _shardings(shapes: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf.sharding, shapes)
