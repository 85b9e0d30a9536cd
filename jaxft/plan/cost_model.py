"""Cost model: formulas for memory and time that rank settings.

The formulas are rough. `search` corrects the bytes with those of compiled programs.

B batch, T length, V vocabulary, D model, F feed-forward, L layers, N heads, H head size
"""

import math
from typing import NamedTuple

import jax

from jaxft.config import Config
from jaxft.hardware import roofline, specs
from jaxft.model import loss
from jaxft.model.attention_chunked import MAX_UNROLLED
from jaxft.model.compute import ComputeConfig
from jaxft.model.config import ModelConfig
from jaxft.model.decoder import abstract_model
from jaxft.sharding import rules
from jaxft.training import offload, optimizer, trainable
from jaxft.utils.types import Json, PyTree

# Speeds of a device without a data sheet, in the ratios of a GPU: FLOPs, bytes moved in memory,
# sent over the network, and fetched over the bus.
UNKNOWN_SPEEDS = (200, 10, 1, 0.2)
# Remat policy -> forward passes of (layers, attention) that a step costs: 1 forward, 2 backward,
# and 1 if remat recomputes it.
COMPUTE_PASSES = {"none": (3, 3), "dots": (3, 4), "full": (4, 4)}


class CostModel(NamedTuple):
  """Formulas for one model, config and target.

  Bytes and seconds are those of one device and one step.
  """

  config: Config
  cfg: ModelConfig
  target: specs.Target
  trained: PyTree  # shapes of the trainable parameters
  opt_state: PyTree  # shapes of all optimizer state
  frozen: PyTree  # shapes of the frozen parameters

  @classmethod
  def from_config(cls, config: Config, cfg: ModelConfig, target: specs.Target) -> "CostModel":
    """Make the model from a config; allocates no arrays."""
    all_params = abstract_model(cfg, ComputeConfig(vocab_multiple=rules.VOCAB_MULTIPLE))[1]
    trained, frozen = trainable.partition(all_params, cfg.trained)
    opt_state = jax.eval_shape(optimizer.make_optimizer(config.optim).init, trained)
    trained = optimizer.with_param_dtype(config.model.param_dtype, trained, cfg.trained)
    return cls(
      config=config, cfg=cfg, target=target, trained=trained, opt_state=opt_state, frozen=frozen
    )

  @property
  def param_bytes(self) -> int:
    """Bytes of all parameters in float32."""
    return self.trained_bytes + _nbytes(self.frozen)

  @property
  def trained_bytes(self) -> int:
    """Bytes of the trainable parameters; the same for their gradient."""
    return _nbytes(self.trained)

  @property
  def itemsize(self) -> int:
    """Bytes of a number in the compute dtype."""
    bfloat16 = self.target.spec and self.target.spec.bfloat16
    return 4 if not bfloat16 or self.config.model.compute_dtype == "float32" else 2

  def shard_bytes(self, settings: Json, what: str, nbytes: int) -> int:
    """Return the bytes on one device of parameters, gradients or optimizer state.

    Args:
      settings: values by dotted name.
      what: "parameters", "gradients" or "optimizer".
      nbytes: bytes of the whole tree.
    """
    is_sharded = settings["mesh.zero_stage"] >= rules.MIN_ZERO_STAGE[what]
    return nbytes // settings["mesh.tensor"] // (settings["mesh.fsdp"] if is_sharded else 1)

  def state_bytes(self, settings: Json) -> int:
    """Estimate the bytes of weights, gradient and optimizer state on a device."""
    if settings["memory.offload"] == "all":
      return 0
    compressed = self.itemsize / 4
    scale = compressed if settings["memory.offload"] == "optimizer" else 1
    weights = scale * self.shard_bytes(settings, "parameters", self.trained_bytes)
    gradient = scale * self.shard_bytes(settings, "gradients", self.trained_bytes)
    weights += compressed * self.shard_bytes(settings, "parameters", _nbytes(self.frozen))
    moments = 0
    if settings["memory.offload"] == "none":
      moments = self.shard_bytes(settings, "optimizer", _nbytes(self.opt_state))
    return int(weights + gradient + moments)

  def other_bytes(self, settings: Json, B: int) -> float:
    """Estimate the bytes of activations, logits and gathered or fetched weights.

    Args:
      settings: values by dotted name.
      B: sequences of a micro-batch on a device.
    """
    cfg = self.cfg
    T = self.config.data.sequence_length
    itemsize = self.itemsize
    remat = settings["memory.remat"]
    tensor = settings["mesh.tensor"]
    layer, scores = self._layer_bytes()
    saved = {"none": layer, "dots": (6 * cfg.D + cfg.F) * itemsize, "full": cfg.D * itemsize}
    layers = cfg.L * saved[remat] + 2 * (layer + 2 * scores)
    vocab = self._vocab_per_device(settings)
    max_bytes = loss.max_logits_bytes("cpu" if self.target.kind == "cpu" else "gpu", remat)
    chunk = loss.choose_chunk(settings["memory.loss_chunk"], B, T, int(vocab), max_bytes)
    logits = B * (min(chunk, T) or T) * vocab * (8 + itemsize)
    gathered = itemsize * self.param_bytes / cfg.L / tensor + (itemsize + 4) * cfg.D * vocab
    if settings["memory.offload"] == "all":
      # Offloading stores the inputs of all layers for every accumulation step, and one layer with
      # its gradient.
      steps = self._accumulation_steps(settings, B)
      layers += (steps - 1) * cfg.L * cfg.D * itemsize
      layers -= (cfg.L - 1) * (saved[remat] - saved["full"])
      gathered += (8 + itemsize) * self.param_bytes / cfg.L / tensor
    return B * T / tensor * layers + logits + gathered

  def seconds(self, settings: Json, B: int) -> float:
    """Estimate the time of a step.

    Compute, memory and network overlap only in part: the longest counts fully, and all of them by a
    tenth. The bus does not overlap.
    """
    spec = self.target.spec
    efficiency = roofline.EFFICIENCY
    speeds = UNKNOWN_SPEEDS
    if spec:
      dtype = "float32" if self.itemsize == 4 else "bfloat16"
      speeds = (spec.peak_flops(dtype), spec.bandwidth, self.target.link, spec.bus)
    work = (self._flops(settings, B), self._moved(settings, B), self._sent(settings, B))
    times = [n / (share * speed) for n, share, speed in zip(work, efficiency[:3], speeds[:3])]
    # Each device fetches its own shard of the state that is on the host.
    num_shards = settings["mesh.fsdp"] * settings["mesh.tensor"]
    traffic = offload.host_traffic(
      settings["memory.offload"],
      *(self.trained, self.opt_state, self.frozen, self.cfg.tied),
      lambda tree: _nbytes(tree) // num_shards,
    )
    return max(times) + 0.1 * sum(times) + sum(traffic) / (efficiency.bus * speeds[3])

  def _flops(self, settings: Json, B: int) -> float:
    """Return the FLOPs of all matrix products of a step."""
    cfg = self.cfg
    T = self.config.data.sequence_length
    tensor = settings["mesh.tensor"]
    layer_passes, attention_passes = COMPUTE_PASSES[settings["memory.remat"]]
    products = layer_passes * cfg.L * (8 * cfg.D * cfg.N * cfg.H + 4 * cfg.D * cfg.F)
    products += attention_passes * cfg.L * 4 * cfg.N * cfg.H * T
    products += 3 * 2 * self._vocab_per_device(settings) * tensor * cfg.D
    return products * self._tokens(settings, B) / tensor

  def _moved(self, settings: Json, B: int) -> float:
    """Return the bytes that move between memory and cores."""
    steps = self._accumulation_steps(settings, B)
    _, attention_passes = COMPUTE_PASSES[settings["memory.remat"]]
    layer, _ = self._layer_bytes()
    moved = attention_passes * self.cfg.L * 2 * layer / settings["mesh.tensor"]
    moved += 3 * self._vocab_per_device(settings) * (4 + self.itemsize)
    grad_shard = self.shard_bytes(settings, "gradients", self.trained_bytes)
    state = steps * 4 * grad_shard + 3 * self.state_bytes(settings)
    return self._tokens(settings, B) * moved + state

  def _sent(self, settings: Json, B: int) -> float:
    """Return the bytes sent to other devices."""
    cfg = self.cfg
    itemsize = self.itemsize
    tensor = settings["mesh.tensor"]
    stage = settings["mesh.zero_stage"]
    steps = self._accumulation_steps(settings, B)
    layer_passes, _ = COMPUTE_PASSES[settings["memory.remat"]]

    def ring(size: int) -> float:  # share of its bytes that a device sends in a ring
      return (size - 1) / size

    # Stage 3 gathers the weights twice, forward and backward. From stage 2 on, gradients are
    # reduce-scattered in the compute dtype. Stage 1 all-reduces them in float32, which sends every
    # byte twice.
    gather = steps * itemsize / 4 * (2 if stage == 3 else 1)
    scatter = steps * (itemsize / 4 if stage > 1 else 2)
    sent = gather * self.param_bytes + scatter * self.trained_bytes
    sent *= ring(settings["mesh.fsdp"]) / tensor
    grad_shard = self.shard_bytes(settings, "gradients", self.trained_bytes)
    sent += ring(settings["mesh.data"]) * 2 * steps * grad_shard
    tokens = self._tokens(settings, B)
    return sent + ring(tensor) * 2 * (layer_passes + 1) * cfg.L * tokens * cfg.D * itemsize

  def _tokens(self, settings: Json, B: int) -> int:
    return B * self.config.data.sequence_length * self._accumulation_steps(settings, B)

  def _accumulation_steps(self, settings: Json, B: int) -> int:
    return self.config.train.batch_size // (settings["mesh.data"] * settings["mesh.fsdp"]) // B

  def _layer_bytes(self) -> tuple[int, int]:
    """Return the bytes of a token in a layer: (matrix products, attention scores)."""
    cfg = self.cfg
    T = self.config.data.sequence_length
    products = (8 * cfg.D + 3 * cfg.F) * self.itemsize + 8 * cfg.D
    # Scores exist only for the queries of one chunk (model/attention_chunked.py).
    scores = cfg.N * T * (4 + self.itemsize) // MAX_UNROLLED
    return products, scores

  def _vocab_per_device(self, settings: Json) -> float:
    return self.cfg.classes or self.cfg.V / settings["mesh.tensor"]


def _nbytes(tree: PyTree) -> int:
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
