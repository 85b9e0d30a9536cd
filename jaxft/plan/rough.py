"""What settings need, by formulas: rough, and good for an order only. What is compiled corrects the bytes (`fit.search`).

B batch, T length, V vocabulary, D model, F feed-forward, L layers, N heads, H head size
"""

import math
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jaxft import model, optim, sharding
from jaxft.model import ModelConfig
from jaxft.plan import estimate, targets

UNKNOWN = (200, 10, 1)  # operations, bytes moved and bytes sent a second of a device without facts: near a GPU's ratios
# How often layers and attention are computed in a step: forward, twice that backward, and once more what is not kept.
TIMES = {"none": (3, 3), "dots": (3, 4), "full": (4, 4)}


class Rough(NamedTuple):
  """Formulas for one model, config and target; bytes and seconds are of one device and one step."""

  config: ConfigDict
  cfg: ModelConfig
  target: targets.Target
  weights: int  # bytes of all parameters
  moments: int  # of all optimizer state

  @classmethod
  def of(cls, config: ConfigDict, cfg: ModelConfig, target: targets.Target) -> "Rough":
    shapes = model.abstract(cfg, model.Compute(vocab_multiple=sharding.VOCAB_MULTIPLE))[1]
    nbytes = lambda tree: sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    moments = nbytes(jax.eval_shape(optim.optimizer(config.optim).init, shapes))
    return cls(config, cfg, target, nbytes(shapes), moments)

  @property
  def width(self) -> int:
    """Bytes of a number as it is computed with."""
    facts = self.target.facts
    return 4 if not (facts and facts.bfloat16) or self.config.model.compute_dtype == "float32" else 2

  def cut(self, settings: dict[str, Any], what: str, nbytes: int) -> int:
    """What a device holds of parameters, gradients or optimizer state."""
    over = settings["mesh.fsdp"] if settings["mesh.zero_stage"] >= sharding.ZERO[what] else 1
    return nbytes // settings["mesh.tensor"] // over

  def state_bytes(self, settings: dict[str, Any]) -> int:
    """Weights, gradient and optimizer state."""
    parts = {"parameters": self.weights, "gradients": self.weights, "optimizer": self.moments}
    return sum(self.cut(settings, what, nbytes) for what, nbytes in parts.items())

  def other_bytes(self, settings: dict[str, Any], B: int) -> float:
    """Activations, logits and what is gathered, of B rows at once."""
    cfg, T, chunk = self.cfg, self.config.data.sequence_length, settings["memory.loss_chunk"]
    inside, scores = self._layer_bytes()
    kept = {"none": inside + scores, "dots": (6 * cfg.D + cfg.F) * self.width, "full": cfg.D * self.width}
    layers = cfg.L * kept[settings["memory.remat"]] + 2 * (inside + 2 * scores)
    rows, tensor = self._output_rows(settings), settings["mesh.tensor"]
    logits = B * (min(chunk, T) or T) * rows * (8 + self.width)
    gathered = self.width * self.weights / cfg.L / tensor + (self.width + 4) * cfg.D * rows
    return B * T / tensor * layers + logits + gathered

  def seconds(self, settings: dict[str, Any], B: int) -> float:
    """A step: operations, bytes moved and bytes sent, of which nothing overlaps wholly."""
    config, cfg, target = self.config, self.cfg, self.target
    data, fsdp, tensor, stage = (settings[f"mesh.{name}"] for name in ("data", "fsdp", "tensor", "zero_stage"))
    T, rows, facts = config.data.sequence_length, self._output_rows(settings), target.facts
    steps = config.train.batch_size // (data * fsdp) // B  # of accumulation
    tokens = B * T * steps
    heads = 4 if settings["memory.loss_chunk"] else 3
    layers, attention = TIMES[settings["memory.remat"]]
    layer = cfg.L * (8 * cfg.D * cfg.N * cfg.H + 4 * cfg.D * cfg.F)
    products = layers * layer + attention * cfg.L * 4 * cfg.N * cfg.H * T + heads * 2 * rows * tensor * cfg.D
    inside, scores = self._layer_bytes()
    moved = tokens * (attention * cfg.L * (2 * inside + 8 * scores) / tensor + heads * rows * (4 + self.width))
    moved += steps * 4 * self.cut(settings, "gradients", self.weights) + 3 * self.state_bytes(settings)
    ring = lambda size: (size - 1) / size
    gather = steps * self.width / 4 * (2 if stage == 3 else 1)
    scatter = steps * (self.width / 4 if stage > 1 else 2)
    sent = ring(fsdp) * self.weights / tensor * (gather + scatter)
    sent += ring(data) * 2 * steps * self.cut(settings, "gradients", self.weights)
    sent += ring(tensor) * 2 * (layers + 1) * cfg.L * tokens * cfg.D * self.width
    share, dtype = estimate.EFFICIENCY, "float32" if self.width == 4 else "bfloat16"
    speeds = (facts.rate(dtype), facts.bandwidth, target.link) if facts else UNKNOWN
    work = (products * tokens / tensor, moved, sent)
    parts = [n / (part * speed) for n, part, speed in zip(work, share[:3], speeds, strict=True)]
    return max(parts) + 0.1 * sum(parts)

  def _layer_bytes(self) -> tuple[int, int]:
    """Of a token and layer: what products make and take, and attention's scores."""
    cfg, T = self.cfg, self.config.data.sequence_length
    return (8 * cfg.D + 3 * cfg.F) * self.width + 8 * cfg.D, cfg.N * T * (4 + self.width)

  def _output_rows(self, settings: dict[str, Any]) -> float:
    return self.cfg.classes or self.cfg.V / settings["mesh.tensor"]
