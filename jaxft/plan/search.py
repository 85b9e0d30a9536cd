"""The fastest settings that fit: candidates in the order of `rough`'s formulas, and the compiler's word on the first few."""

import copy
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxft.errors import RequestError
from jaxft.hardware import specs
from jaxft.model.config import ModelConfig
from jaxft.plan.cost_model import CostModel
from jaxft.sharding.mesh import mesh_shape
from jaxft.training import offload

MEMORY_MARGIN = 0.05  # of the usable memory stays free: what the plan says is to be within this of what a device takes
NUM_PLANS = 3  # plans to find, where they are asked for; one is enough to show a way out
MAX_COMPILES, MAX_SECONDS = 10, 150
# What is tried, with every mesh and every micro-batch that goes into the batch; nothing that changes what is learned.
SEARCH_SPACE = {
  "memory.offload": ("none", "optimizer", "all"),
  "memory.remat": ("none", "dots", "full"),
  "memory.loss_chunk": (-1, 64),
}


class Candidate(NamedTuple):
  """Settings to try, with what the rough formulas say of them: a step's seconds, and a device's bytes."""

  settings: dict[str, Any]
  seconds: float
  state_bytes: int
  other_bytes: float


def find_settings(
  config: ConfigDict,
  cfg: ModelConfig,
  target: specs.Target,
  plan_of: Callable[[ConfigDict], dict[str, Any]],
  tell: Callable[[str], None] = lambda line: None,
  *,
  shown: int = NUM_PLANS,
) -> dict[str, Any]:
  """{"best": plans that fit with a margin, fastest first; "lost": what was compiled and why it lost; "not_compiled": why not}.

  Formulas put candidates in order and leave out what is far too large; each compiled plan corrects the formula for the next.
  The search ends with enough plans that fit, as all others are slower by the formula, or with nothing left that could fit; or,
  before that, after so many compiles or seconds, which "ended_early" then says.

  Args:
    plan_of: compiles one config.
    shown: how many plans that fit are enough.
  """
  room = int(target.usable_bytes * (1 - MEMORY_MARGIN))
  untried = sorted(candidates(config, cfg, target), key=lambda it: it.seconds)
  least = min((it.state_bytes for it in untried), default=None)
  count, correction, fitting, lost = (
    len(untried),
    dict.fromkeys(SEARCH_SPACE["memory.remat"], 1.0),
    [],
    [],
  )
  size = lambda it: it.state_bytes + correction[it.settings["memory.remat"]] * it.other_bytes
  started, frugal, ended_early = time.monotonic(), 0, None
  while untried and len(fitting) < shown:
    candidate = next((it for it in untried if size(it) <= room), None)
    if candidate is None:  # by the formula nothing fits: the smallest decides
      candidate, frugal = min(untried, key=size), frugal + 1
      if candidate.state_bytes > room or frugal > 2 or fitting:
        break
    if ended_early := _budget_exhausted(len(fitting) + len(lost), time.monotonic() - started):
      break
    untried.remove(candidate)
    flags = overrides(config, candidate.settings, target.count)
    try:
      plan = plan_of(with_settings(config, candidate.settings))
    except RequestError as error:
      lost.append({"overrides": flags, "why": str(error)})
      continue
    short = max(plan["peak_bytes"], plan.get("eval_peak_bytes", 0)) - room
    found = {
      "overrides": flags,
      "settings": candidate.settings,
      **{
        name: plan[name]
        for name in ("peak_bytes", "host_bytes", "step_seconds_estimate", "accumulation_steps")
      },
    }
    tell(
      f"{' '.join(flags) or 'as it is'}: {'fits' if short <= 0 else f'{short / 2**30:.1f} GiB too large'}"
    )
    if short <= 0:
      fitting.append(found | {"rough_seconds": candidate.seconds})
    else:
      lost.append(
        {
          "overrides": flags,
          "why": f"does not fit, by {short / 2**30:.2f} GiB",
          "peak_bytes": plan["peak_bytes"],
        }
      )
    other = max(plan["peak_bytes"] - candidate.state_bytes, 1)
    correction[candidate.settings["memory.remat"]] = other / candidate.other_bytes
  fitting.sort(
    key=lambda it: (it["step_seconds_estimate"] or it["rough_seconds"], it["peak_bytes"])
  )
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
      ended_early or "estimated to be slower": len(untried) - len(too_large),
    },
    "ended_early": ended_early,
    "least_state_bytes": least,
  }


def _budget_exhausted(compiles: int, seconds: float) -> str | None:
  """Why a search ends that is not over."""
  if compiles >= MAX_COMPILES:
    return f"the search ended after {MAX_COMPILES} compiles"
  return f"the search ended after {MAX_SECONDS} s" if seconds > MAX_SECONDS else None


def with_settings(config: ConfigDict, settings: dict[str, Any]) -> ConfigDict:
  """A copy of the config with these settings."""
  config = copy.deepcopy(config)
  for name, value in settings.items():
    section, key = name.split(".")
    config[section][key] = value
  return config


def overrides(config: ConfigDict, settings: dict[str, Any], devices: int) -> list[str]:
  """The flags that make these settings of the config, without those that it has already, or that come to the same."""
  try:
    mesh = mesh_shape(config.mesh, devices)
  except RequestError:  # the mesh of the config does not go with this target
    mesh = {}
  has = {f"mesh.{axis}": size for axis, size in mesh.items()}
  flags = []
  for name, value in settings.items():
    section, key = name.split(".")
    if has.get(name, config[section][key]) != value:
      flags.append(f"--config.{name}={value}")
  return flags


def candidates(config: ConfigDict, cfg: ModelConfig, target: specs.Target) -> list[Candidate]:
  """Every mesh of all the target's devices, with every micro-batch and choice, that divides model and batch."""
  rough, platform = CostModel.of(config, cfg, target), "tpu" if target.kind in specs.TPUS else "gpu"
  found = []
  for data, fsdp, tensor in meshes(cfg, target):
    parts = data * fsdp
    if config.train.batch_size % parts:
      continue
    stages = (
      (3, 2, 1) if fsdp > 1 else (config.mesh.zero_stage,)
    )  # with nothing to cut over, stages are all the same
    rows = config.train.batch_size // parts
    micro_batches = [2**i for i in range(rows.bit_length()) if rows % 2**i == 0 and 2**i < rows] + [
      0
    ]
    for stage, micro, *choice in itertools.product(stages, micro_batches, *SEARCH_SPACE.values()):
      chosen = dict(zip(SEARCH_SPACE, choice, strict=True)) | {
        "mesh.data": data,
        "mesh.fsdp": fsdp,
        "mesh.tensor": tensor,
        "mesh.zero_stage": stage,
        "train.micro_batch_size": micro,
      }
      if offload.validate_offload(platform, (rough.shapes, rough.states), chosen["memory.offload"]):
        continue
      B = micro or rows
      state, other = rough.state_bytes(chosen), rough.other_bytes(chosen, B)
      found.append(Candidate(chosen, rough.seconds(chosen, B), state, other))
  return found


def meshes(cfg: ModelConfig, target: specs.Target) -> list[tuple[int, int, int]]:
  """(data, fsdp, tensor) over all devices: weights over all of them, over those of a node, or copies; tensor within a node."""
  n, facts = target.count, target.spec
  node = min(n, facts.node if isinstance(facts, specs.Gpu) else n)
  found = []
  for tensor in (1, 2, 4, 8):
    if node % tensor == 0 and cfg.N % tensor == 0 and cfg.F % tensor == 0:
      found += [
        (n // tensor // fsdp, fsdp, tensor)
        for fsdp in sorted({n // tensor, node // tensor, 1}, reverse=True)
        if cfg.D % fsdp == 0
      ]
  return found
