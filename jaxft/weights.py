"""The weights of a run: read or drawn before its first step, and as a plain model after its last."""

from typing import Any

import jax
from ml_collections import ConfigDict

from jaxft import lora, offload, parts
from jaxft import program as programs
from jaxft.hf import load
from jaxft.hf.repo import HFCheckpoint
from jaxft.model import ModelConfig
from jaxft.program import TrainProgram


def load_or_init_params(
  program: TrainProgram, cfg: ModelConfig, source: HFCheckpoint, config: ConfigDict
) -> tuple[Any, Any]:
  """The weights that are trained and the frozen ones: of the checkpoint, or drawn; adapters are drawn in any case."""
  shapes = program.state.all_params
  if config.model.init == "scratch":
    return programs.init_params(program, cfg, config.train.seed, shapes), {}
  plain = lora.without_adapters(shapes)
  weights = load.load_params(source, plain, _shardings(plain))
  if cfg.lora_rank:
    adapters = lora.select_adapters(program.state.params)
    weights = parts.combine(weights, programs.init_params(program, cfg, config.train.seed, adapters))
  return parts.partition(weights, cfg.trained)


def merge_params(trained: Any, cfg: ModelConfig, source: HFCheckpoint, shapes: Any) -> Any:
  """The weights of a model without adapters, in float32: what was trained, and the rest as the checkpoint has it.

  Args:
    trained: `State.params`.
    shapes: of the result, with shardings.
  """
  if not cfg.trained:
    return trained
  weights = load.load_params(source, shapes, _shardings(shapes))
  frozen = parts.partition(weights, cfg.trained)[1]
  return lora.merge(parts.combine(trained, frozen), cfg)


def merged_shapes(program: TrainProgram) -> Any:
  """`merge_params`'s shapes for a program's weights; where some are frozen, in the host's memory: in float32 they may be too many."""
  shapes = jax.tree.map(lambda leaf: leaf.update(dtype="float32"), lora.without_adapters(program.state.all_params))
  return offload.with_host_memory(shapes) if program.state.frozen else shapes


def _shardings(shapes: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf.sharding, shapes)
