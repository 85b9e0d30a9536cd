"""The weights of a run: read or drawn before its first step, and as a plain model after its last."""

from typing import Any

import jax
from ml_collections import ConfigDict

from jaxft import lora, offload, parts
from jaxft import program as programs
from jaxft.hf import load
from jaxft.hf.repo import Checkpoint
from jaxft.model import ModelConfig
from jaxft.program import Program


def first(program: Program, cfg: ModelConfig, source: Checkpoint, config: ConfigDict) -> tuple[Any, Any]:
  """The weights that are trained and the frozen ones: of the checkpoint, or drawn; adapters are drawn in any case."""
  shapes = program.state.all_params
  if config.model.init == "scratch":
    return programs.draw(program, cfg, config.train.seed, shapes), {}
  plain = lora.without_adapters(shapes)
  weights = load.load(source, plain, _places(plain))
  if cfg.lora_rank:
    adapters = lora.adapters(program.state.params)
    weights = parts.join(weights, programs.draw(program, cfg, config.train.seed, adapters))
  return parts.split(weights, cfg.trained)


def plain(trained: Any, cfg: ModelConfig, source: Checkpoint, shapes: Any) -> Any:
  """The weights of a model without adapters, in float32: what was trained, and the rest as the checkpoint has it.

  Args:
    trained: `State.params`.
    shapes: of the result, with shardings.
  """
  if not cfg.trained:
    return trained
  weights = load.load(source, shapes, _places(shapes))
  frozen = parts.split(weights, cfg.trained)[1]
  return lora.merge(parts.join(trained, frozen), cfg)


def plain_shapes(program: Program) -> Any:
  """`plain`'s shapes for a program's weights; where some are frozen, in the host's memory: in float32 they may be too many."""
  shapes = jax.tree.map(lambda leaf: leaf.update(dtype="float32"), lora.without_adapters(program.state.all_params))
  return offload.on_host(shapes) if program.state.frozen else shapes


def _places(shapes: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf.sharding, shapes)
