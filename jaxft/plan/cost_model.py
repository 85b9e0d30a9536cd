"""What settings need, by formulas: rough, and good for an order only. What is compiled corrects the bytes (`fit.find_settings`).

B batch, T length, V vocabulary, D model, F feed-forward, L layers, N heads, H head size
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jaxft.hardware import roofline, specs
from jaxft.model import loss
from jaxft.model.attention_chunked import MAX_UNROLLED
from jaxft.model.compute import ComputeConfig
from jaxft.model.config import ModelConfig
from jaxft.model.decoder import abstract_model
from jaxft.sharding import rules
from jaxft.training import offload, optimizer, trainable

UNKNOWN_SPEEDS = (
  200,
  10,
  1,
  0.2,
)  # operations, bytes moved, sent and fetched a second of a device without facts: a GPU's ratios
# How often layers and attention are computed in a step: forward, twice that backward, and once more what is not kept.
COMPUTE_PASSES = {"none": (3, 3), "dots": (3, 4), "full": (4, 4)}


class CostModel(NamedTuple):
  """Formulas for one model, config and target; bytes and seconds are of one device and one step."""

  config: ConfigDict
  cfg: ModelConfig
  target: specs.Target
  shapes: Any  # of the parameters that are trained
  states: Any  # of all optimizer state
  frozen: Any  # of the other parameters

  @classmethod
  def of(cls, config: ConfigDict, cfg: ModelConfig, target: specs.Target) -> "CostModel":
    whole = abstract_model(cfg, ComputeConfig(vocab_multiple=rules.VOCAB_MULTIPLE))[1]
    shapes, frozen = trainable.partition(whole, cfg.trained)
    states = jax.eval_shape(optimizer.make_optimizer(config.optim).init, shapes)
    return cls(
      config,
      cfg,
      target,
      optimizer.with_param_dtype(config.model.param_dtype, shapes, cfg.trained),
      states,
      frozen,
    )

  @property
  def weights(self) -> int:
    """Bytes of all parameters in float32."""
    return self.trained + _nbytes(self.frozen)

  @property
  def trained(self) -> int:
    """Bytes of those that are trained."""
    return _nbytes(self.shapes)

  @property
  def moments(self) -> int:
    """Bytes of all optimizer state."""
    return _nbytes(self.states)

  @property
  def width(self) -> int:
    """Bytes of a number as it is computed with."""
    facts = self.target.spec
    return (
      4 if not (facts and facts.bfloat16) or self.config.model.compute_dtype == "float32" else 2
    )

  def cut(self, settings: dict[str, Any], what: str, nbytes: int) -> int:
    """What a device holds of parameters, gradients or optimizer state."""
    over = settings["mesh.fsdp"] if settings["mesh.zero_stage"] >= rules.MIN_ZERO_STAGE[what] else 1
    return nbytes // settings["mesh.tensor"] // over

  def state_bytes(self, settings: dict[str, Any]) -> int:
    """Weights, gradient and optimizer state on the device."""
    if settings["memory.offload"] == "all":
      return 0
    copy = self.width / 4 if settings["memory.offload"] == "optimizer" else 1
    weights, gradient = (
      copy * self.cut(settings, what, self.trained) for what in ("parameters", "gradients")
    )
    weights += self.width / 4 * self.cut(settings, "parameters", _nbytes(self.frozen))
    moments = (
      self.cut(settings, "optimizer", self.moments) if settings["memory.offload"] == "none" else 0
    )
    return int(weights + gradient + moments)

  def other_bytes(self, settings: dict[str, Any], B: int) -> float:
    """Activations, logits and what is gathered or fetched, of B rows at once."""
    cfg, T = self.cfg, self.config.data.sequence_length
    inside, scores = self._layer_bytes()
    kept = {"none": inside, "dots": (6 * cfg.D + cfg.F) * self.width, "full": cfg.D * self.width}
    layers = cfg.L * kept[settings["memory.remat"]] + 2 * (inside + 2 * scores)
    rows, tensor = self._output_rows(settings), settings["mesh.tensor"]
    most = loss.max_logits_bytes(
      "cpu" if self.target.kind == "cpu" else "gpu", settings["memory.remat"]
    )
    chunk = loss.choose_chunk(settings["memory.loss_chunk"], B, T, int(rows), most)
    logits = B * (min(chunk, T) or T) * rows * (8 + self.width)
    gathered = self.width * self.weights / cfg.L / tensor + (self.width + 4) * cfg.D * rows
    if (
      settings["memory.offload"] == "all"
    ):  # the inputs of all layers and accumulation steps; a layer and its gradient
      steps = self.config.train.batch_size // (settings["mesh.data"] * settings["mesh.fsdp"]) // B
      layers += (steps - 1) * cfg.L * cfg.D * self.width
      layers -= (cfg.L - 1) * (kept[settings["memory.remat"]] - kept["full"])
      gathered += (8 + self.width) * self.weights / cfg.L / tensor
    return B * T / tensor * layers + logits + gathered

  def seconds(self, settings: dict[str, Any], B: int) -> float:
    """A step: operations, bytes moved and bytes sent, of which nothing overlaps wholly."""
    config, cfg, target = self.config, self.cfg, self.target
    data, fsdp, tensor, stage = (
      settings[f"mesh.{name}"] for name in ("data", "fsdp", "tensor", "zero_stage")
    )
    T, rows, facts = config.data.sequence_length, self._output_rows(settings), target.spec
    steps = config.train.batch_size // (data * fsdp) // B  # of accumulation
    tokens = B * T * steps
    layers, attention = COMPUTE_PASSES[settings["memory.remat"]]
    layer = cfg.L * (8 * cfg.D * cfg.N * cfg.H + 4 * cfg.D * cfg.F)
    products = (
      layers * layer + attention * cfg.L * 4 * cfg.N * cfg.H * T + 3 * 2 * rows * tensor * cfg.D
    )
    inside, _ = self._layer_bytes()
    moved = tokens * (attention * cfg.L * 2 * inside / tensor + 3 * rows * (4 + self.width))
    moved += steps * 4 * self.cut(settings, "gradients", self.trained) + 3 * self.state_bytes(
      settings
    )
    ring = lambda size: (size - 1) / size
    gather = steps * self.width / 4 * (2 if stage == 3 else 1)
    scatter = steps * (self.width / 4 if stage > 1 else 2)
    sent = ring(fsdp) / tensor * (gather * self.weights + scatter * self.trained)
    sent += ring(data) * 2 * steps * self.cut(settings, "gradients", self.trained)
    sent += ring(tensor) * 2 * (layers + 1) * cfg.L * tokens * cfg.D * self.width
    share, dtype = roofline.EFFICIENCY, "float32" if self.width == 4 else "bfloat16"
    speeds = (
      (facts.peak_flops(dtype), facts.bandwidth, target.link) if facts else UNKNOWN_SPEEDS[:3]
    )
    work = (products * tokens / tensor, moved, sent)
    parts = [n / (part * speed) for n, part, speed in zip(work, share[:3], speeds, strict=True)]
    bus = sum(
      offload.host_traffic(
        settings["memory.offload"],
        *(self.shapes, self.states, self.frozen),
        cfg.tied,
        self._held(settings),
      )
    )
    return (
      max(parts)
      + 0.1 * sum(parts)
      + bus / (share.bus * (facts.bus if facts else UNKNOWN_SPEEDS[-1]))
    )

  def _held(self, settings: dict[str, Any]) -> Callable[[Any], int]:
    """Bytes of a tree on one device, where all of it is cut."""
    parts = settings["mesh.fsdp"] * settings["mesh.tensor"]
    return lambda tree: _nbytes(tree) // parts

  def _layer_bytes(self) -> tuple[int, int]:
    """Of a token and layer: what products make and take, and attention's scores of an eighth of the queries."""
    cfg, T = self.cfg, self.config.data.sequence_length
    return (8 * cfg.D + 3 * cfg.F) * self.width + 8 * cfg.D, cfg.N * T * (
      4 + self.width
    ) // MAX_UNROLLED

  def _output_rows(self, settings: dict[str, Any]) -> float:
    return self.cfg.classes or self.cfg.V / settings["mesh.tensor"]


def _nbytes(tree: Any) -> int:
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
