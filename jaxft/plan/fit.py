"""The fastest settings that fit: candidates by a rough formula, and the compiler's word on the few that it puts first.

B batch, T length, V vocabulary, D model, F feed-forward, L layers, N heads, H head size
"""

import copy
import itertools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jaxft import model, optim, sharding
from jaxft.errors import RequestError
from jaxft.model import ModelConfig
from jaxft.plan import targets

MARGIN = 0.05  # of the usable memory stays free: what the plan says is to be within this of what a device takes
SHOWN = 3  # plans to find
MOST_COMPILES, MOST_SECONDS = 10, 150
# What is tried, with every mesh and every micro-batch that goes into the batch; nothing that changes what is learned.
CHOICES = {
  "memory.remat": ("none", "dots", "full"),
  "memory.loss_chunk": (0, 256),
}


class Candidate(NamedTuple):
  """Settings to try, with what the rough formulas say of them."""

  settings: dict[str, Any]
  seconds: float  # a step; good for the order only
  state_bytes: int  # weights, gradient and optimizer state of a device
  other_bytes: float  # activations, logits and what is gathered


def search(
  config: ConfigDict,
  cfg: ModelConfig,
  target: targets.Target,
  plan_of: Callable[[ConfigDict], dict[str, Any]],
  tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """{"best": plans that fit with a margin, fastest first; "lost": what was compiled and why it lost; "not_compiled": why not}.

  Formulas put candidates in order and leave out what is far too large; each compiled plan corrects the formula for the next.
  The search ends with enough plans that fit, as all others are slower by the formula, or with nothing left that could fit.

  Args:
    plan_of: compiles one config.
  """
  room = int(target.usable_bytes * (1 - MARGIN))
  untried = sorted(candidates(config, cfg, target), key=lambda it: it.seconds)
  count, correction, fitting, lost = len(untried), dict.fromkeys(CHOICES["memory.remat"], 1.0), [], []
  size = lambda it: it.state_bytes + correction[it.settings["memory.remat"]] * it.other_bytes
  started, frugal = time.monotonic(), 0
  while untried and len(fitting) < SHOWN and len(fitting) + len(lost) < MOST_COMPILES:
    candidate = next((it for it in untried if size(it) <= room), None)
    if candidate is None:  # by the formula nothing fits: the smallest decides
      candidate, frugal = min(untried, key=size), frugal + 1
      if candidate.state_bytes > room or frugal > 2 or fitting:
        break
    if time.monotonic() - started > MOST_SECONDS:
      break
    untried.remove(candidate)
    flags = overrides(config, candidate.settings)
    try:
      plan = plan_of(changed(config, candidate.settings))
    except RequestError as error:
      lost.append({"overrides": flags, "why": str(error)})
      continue
    short = plan["peak_bytes"] - room
    found = {
      "overrides": flags,
      "settings": candidate.settings,
      **{name: plan[name] for name in ("peak_bytes", "step_seconds_estimate", "accumulation_steps")},
    }
    tell(f"{' '.join(flags) or 'as it is'}: {'fits' if short <= 0 else f'{short / 2**30:.1f} GiB too large'}")
    if short <= 0:
      fitting.append(found | {"rough_seconds": candidate.seconds})
    else:
      lost.append(
        {"overrides": flags, "why": f"does not fit, by {short / 2**30:.2f} GiB", "peak_bytes": plan["peak_bytes"]}
      )
    other = max(plan["peak_bytes"] - candidate.state_bytes, 1)
    correction[candidate.settings["memory.remat"]] = other / candidate.other_bytes
  fitting.sort(key=lambda it: (it["step_seconds_estimate"] or it["rough_seconds"], it["peak_bytes"]))
  too_large = [it for it in untried if size(it) > room]
  over = [it for it in too_large if it.state_bytes > room]
  return {
    "room_bytes": room,
    "candidates": count,
    "best": fitting,
    "lost": lost,
    "not_compiled": {
      "weights, gradient and optimizer state alone are too large": len(over),
      "estimated not to fit": len(too_large) - len(over),
      "estimated to be slower": len(untried) - len(too_large),
    },
    "least_state_bytes": min((it.state_bytes for it in candidates(config, cfg, target)), default=None),
  }


def changed(config: ConfigDict, settings: dict[str, Any]) -> ConfigDict:
  """A copy of the config with these settings."""
  config = copy.deepcopy(config)
  for name, value in settings.items():
    section, key = name.split(".")
    config[section][key] = value
  return config


def overrides(config: ConfigDict, settings: dict[str, Any]) -> list[str]:
  """The flags that make these settings of the config, without those that it has already."""
  flags = []
  for name, value in settings.items():
    section, key = name.split(".")
    if config[section][key] != value:
      flags.append(f"--config.{name}={value}")
  return flags


def candidates(config: ConfigDict, cfg: ModelConfig, target: targets.Target) -> list[Candidate]:
  """Every mesh of all the target's devices, with every micro-batch and choice, that divides model and batch."""
  compute = model.Compute(vocab_multiple=sharding.VOCAB_MULTIPLE)
  shapes = model.abstract(cfg, compute)[1]
  nbytes = lambda tree: sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  weights, moments = nbytes(shapes), nbytes(jax.eval_shape(optim.optimizer(config.optim).init, shapes))
  found = []
  for data, fsdp, tensor in meshes(cfg, target):
    parts = data * fsdp
    if config.train.batch_size % parts:
      continue
    stages = (3, 2, 1) if fsdp > 1 else (config.mesh.zero_stage,)  # with nothing to cut over, stages are all the same
    rows = config.train.batch_size // parts
    micro_batches = [2**i for i in range(rows.bit_length()) if rows % 2**i == 0 and 2**i < rows] + [0]
    for stage, micro, *choice in itertools.product(stages, micro_batches, *CHOICES.values()):
      settings = dict(zip(CHOICES, choice, strict=True)) | {
        "mesh.data": data,
        "mesh.fsdp": fsdp,
        "mesh.tensor": tensor,
        "mesh.zero_stage": stage,
        "train.micro_batch_size": micro,
      }
      if settings["memory.loss_chunk"] < config.data.sequence_length:
        found.append(_candidate(settings, config, cfg, target, weights, moments, micro or rows))
  return found


def meshes(cfg: ModelConfig, target: targets.Target) -> list[tuple[int, int, int]]:
  """(data, fsdp, tensor) over all devices: weights over all of them, over those of a node, or copies; tensor within a node."""
  n, facts = target.count, target.facts
  node = min(n, facts.node if isinstance(facts, targets.Gpu) else n)
  found = []
  for tensor in (1, 2, 4, 8):
    if node % tensor == 0 and cfg.N % tensor == 0 and cfg.F % tensor == 0:
      found += [
        (n // tensor // fsdp, fsdp, tensor)
        for fsdp in sorted({n // tensor, node // tensor, 1}, reverse=True)
        if cfg.D % fsdp == 0
      ]
  return found


def _candidate(
  settings: dict[str, Any],
  config: ConfigDict,
  cfg: ModelConfig,
  target: targets.Target,
  weights: int,
  moments: int,
  B: int,
) -> Candidate:
  """Rough seconds and bytes, good for the order only: what is compiled corrects the bytes."""
  data, fsdp, tensor, stage = (settings[f"mesh.{name}"] for name in ("data", "fsdp", "tensor", "zero_stage"))
  remat, chunk = settings["memory.remat"], settings["memory.loss_chunk"]
  T, facts = config.data.sequence_length, target.facts
  width = 4 if not (facts and facts.bfloat16) or config.model.compute_dtype == "float32" else 2  # bytes of a number
  cut = lambda what, nbytes: nbytes // tensor // (fsdp if stage >= sharding.ZERO[what] else 1)
  state = cut("parameters", weights) + cut("gradients", weights) + cut("optimizer", moments)

  # Bytes kept for the backward pass, a token and layer: what products make and take, and attention's probabilities.
  inside, scores = (8 * cfg.D + 3 * cfg.F) * width + 8 * cfg.D, cfg.N * T * (4 + width)
  kept = {"none": inside + scores, "dots": (6 * cfg.D + cfg.F) * width, "full": cfg.D * width}[remat]
  rows = cfg.V / tensor if not cfg.classes else cfg.classes
  tokens, logits = B * T, B * (min(chunk, T) or T) * rows * (8 + width)
  gathered = width * weights / cfg.L / tensor + (width + 4) * cfg.D * rows
  other = tokens / tensor * (cfg.L * kept + 2 * (inside + 2 * scores)) + logits + gathered

  # A step's operations, bytes moved and bytes sent, of one device. A CPU has no facts: its ratio of the two is near a GPU's.
  speed, bandwidth, link = (
    (facts.rate("float32" if width == 4 else "bfloat16"), facts.bandwidth, target.link) if facts else (200, 10, 1)
  )
  steps = config.train.batch_size // (data * fsdp) // B
  layer = cfg.L * (8 * cfg.D * cfg.N * cfg.H + 4 * cfg.D * cfg.F)
  attention = cfg.L * 4 * cfg.N * cfg.H * T
  times = {"none": (3, 3), "dots": (3, 4), "full": (4, 4)}[remat]
  flops = times[0] * layer + times[1] * attention + (4 if chunk else 3) * 2 * rows * tensor * cfg.D
  moved = times[1] * cfg.L * (2 * inside + 8 * scores) / tensor + (4 if chunk else 3) * rows * (4 + width)
  moved = tokens * steps * moved + steps * 4 * cut("gradients", weights) + 3 * state
  ring = lambda size: (size - 1) / size
  sent = (
    ring(fsdp)
    * weights
    / tensor
    * (steps * width * (2 if stage == 3 else 1) / 4 + steps * (width / 4 if stage > 1 else 2))
  )
  sent += ring(data) * 2 * steps * cut("gradients", weights)
  sent += ring(tensor) * 2 * (times[0] + 1) * cfg.L * tokens * steps * cfg.D * width
  parts = flops * tokens * steps / tensor / (0.5 * speed), moved / (0.8 * bandwidth), sent / (0.7 * link)
  return Candidate(settings, max(parts) + 0.1 * sum(parts), state, other)  # nothing overlaps wholly
