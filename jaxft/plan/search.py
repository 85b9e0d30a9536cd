"""Search for the fastest settings that fit.

A cost model ranks all candidates, and the first few are compiled.
"""

import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

from jaxft.config import Config, flatten
from jaxft.errors import RequestError
from jaxft.hardware import specs
from jaxft.model.config import ModelConfig
from jaxft.plan.cost_model import CostModel
from jaxft.sharding.mesh import mesh_shape
from jaxft.training import offload
from jaxft.utils.types import Json

# Share of the usable memory that a plan must leave free: the error that a plan may have.
MEMORY_MARGIN = 0.05
NUM_PLANS = 3  # plans to find if the user requests a search; else one, if the config does not fit
MAX_COMPILES = 10
MAX_SECONDS = 150
# Values of a fitting plan that the result includes.
PLAN_KEYS = ("peak_bytes", "host_bytes", "step_seconds_estimate", "accumulation_steps")
# Settings to try, in addition to every mesh and every micro-batch that divides the batch. They do
# not change what the model learns.
SEARCH_SPACE: Json = {
  "memory.offload": ("none", "optimizer", "all"),
  "memory.remat": ("none", "dots", "full"),
  "memory.loss_chunk": (-1, 64),
}


class Candidate(NamedTuple):
  """Settings to try, with estimated seconds of a step and bytes of a device."""

  settings: Json
  seconds: float
  state_bytes: int
  other_bytes: float


class Ranking:
  """Candidates that are not compiled yet, ranked by a corrected cost model."""

  def __init__(self, candidates: list[Candidate], budget: int):
    self.untried = sorted(candidates, key=lambda it: it.seconds)
    self._budget = budget
    # Remat policy -> measured bytes / estimated bytes.
    self._correction = dict.fromkeys(SEARCH_SPACE["memory.remat"], 1.0)
    self._num_too_large = 0

  def is_too_large(self, it: Candidate) -> bool:
    """Return whether the corrected estimate exceeds the memory budget."""
    return self._size(it) > self._budget

  def next(self, has_fitting: bool) -> Candidate | None:
    """Return the fastest candidate that may fit.

    If by the model none fits, return the smallest, because the model may be wrong. This happens at
    most twice, and only if the state of the smallest fits and no compiled plan does.

    Args:
      has_fitting: whether a compiled plan fits.

    Returns:
      None if it is not worth compiling more.
    """
    if fastest := next((it for it in self.untried if not self.is_too_large(it)), None):
      return fastest
    smallest = min(self.untried, key=self._size)
    self._num_too_large += 1
    hopeless = smallest.state_bytes > self._budget or self._num_too_large > 2 or has_fitting
    return None if hopeless else smallest

  def correct(self, it: Candidate, peak: int) -> None:
    """Correct the model with the measured peak of a candidate, in bytes."""
    measured = max(peak - it.state_bytes, 1)
    self._correction[it.settings["memory.remat"]] = measured / it.other_bytes

  def _size(self, it: Candidate) -> float:
    return it.state_bytes + self._correction[it.settings["memory.remat"]] * it.other_bytes


def find_settings(
  config: Config,
  cfg: ModelConfig,
  target: specs.Target,
  compile_plan: Callable[[Config], Json],
  num_plans: int = NUM_PLANS,
  on_progress: Callable[[str], None] = lambda line: None,
) -> Json:
  """Search the fastest settings that fit `target`.

  A cost model ranks the candidates and rules out those that are far too large. Each compiled plan
  corrects the model for the next. The search ends with enough plans that fit, because the model
  estimates all others to be slower. It also ends if no other candidate can fit, or after
  MAX_COMPILES or MAX_SECONDS.

  Args:
    config: the config of the run.
    cfg: its model.
    target: the devices.
    compile_plan: compiles one config and returns its plan.
    num_plans: number of fitting plans to find.
    on_progress: called with a line for each compiled plan.

  Returns:
    A dict with "best", the plans that fit with a margin, fastest first; "lost", other compiled
    plans, with reasons; "not_compiled", the number of candidates for each reason; "ended_early",
    the reason or None; and more.
  """
  budget = int(target.usable_bytes * (1 - MEMORY_MARGIN))
  all_candidates = candidates(config, cfg, target)
  ranking = Ranking(all_candidates, budget)
  fitting: list[Json] = []
  lost: list[Json] = []
  started = time.monotonic()
  ended_early = None
  while ranking.untried and len(fitting) < num_plans:
    candidate = ranking.next(bool(fitting))
    if candidate is None:
      break
    if ended_early := _budget_exhausted(len(fitting) + len(lost), time.monotonic() - started):
      break
    ranking.untried.remove(candidate)
    flags = overrides(config, candidate.settings, target.count)
    try:
      plan = compile_plan(config.replace(candidate.settings))
    except RequestError as error:
      lost.append({"overrides": flags, "why": str(error)})
      continue
    peak = plan["peak_bytes"]
    excess = max(peak, plan.get("eval_peak_bytes", 0)) - budget
    outcome = "fits" if excess <= 0 else f"{excess / 2**30:.1f} GiB too large"
    on_progress(f"{' '.join(flags) or 'as given'}: {outcome}")
    if excess <= 0:
      fitting.append(
        {"overrides": flags, "settings": candidate.settings}
        | {key: plan[key] for key in PLAN_KEYS}
        | {"rough_seconds": candidate.seconds}
      )
    else:
      reason = f"does not fit: {excess / 2**30:.2f} GiB too large"
      lost.append({"overrides": flags, "why": reason, "peak_bytes": peak})
    ranking.correct(candidate, peak)

  def seconds(entry: Json) -> float:
    return entry["step_seconds_estimate"] or entry["rough_seconds"]

  fitting.sort(key=lambda entry: (seconds(entry), entry["peak_bytes"]))
  too_large = [it for it in ranking.untried if ranking.is_too_large(it)]
  num_over = sum(it.state_bytes > budget for it in too_large)
  return {
    "room_bytes": budget,
    "candidates": len(all_candidates),
    "best": fitting,
    "lost": lost,
    "not_compiled": {
      "weights, gradient and optimizer state alone are too large": num_over,
      "estimated not to fit": len(too_large) - num_over,
      ended_early or "estimated to be slower": len(ranking.untried) - len(too_large),
    },
    "ended_early": ended_early,
    "least_state_bytes": min((it.state_bytes for it in all_candidates), default=None),
  }


def _budget_exhausted(compiles: int, seconds: float) -> str | None:
  """Return the reason to end a search early, or None."""
  if compiles >= MAX_COMPILES:
    return f"the search ended after {MAX_COMPILES} compiles"
  return f"the search ended after {MAX_SECONDS} s" if seconds > MAX_SECONDS else None


def overrides(config: Config, settings: Json, devices: int) -> list[str]:
  """Return the flags that change the config to these settings."""
  try:
    mesh = mesh_shape(config.mesh, devices)
  except RequestError:  # the config's mesh does not match this target
    mesh = {}
  has = flatten(config) | {f"mesh.{axis}": size for axis, size in mesh.items()}
  changed = {name: value for name, value in settings.items() if has[name] != value}
  return [f"--config.{name}={value}" for name, value in changed.items()]


def candidates(config: Config, cfg: ModelConfig, target: specs.Target) -> list[Candidate]:
  """Return all candidates whose mesh and micro-batch divide model and batch."""
  cost = CostModel.from_config(config, cfg, target)
  platform = "tpu" if target.kind in specs.TPUS else "gpu"
  results = []
  for data, fsdp, tensor in meshes(cfg, target):
    if config.train.batch_size % (data * fsdp):
      continue
    mesh = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
    # With an fsdp axis of one, all ZeRO stages are the same.
    stages = (3, 2, 1) if fsdp > 1 else (config.mesh.zero_stage,)
    rows = config.train.batch_size // (data * fsdp)
    micro_batches = [2**i for i in range(rows.bit_length()) if rows % 2**i == 0 and 2**i < rows]
    micro_batches.append(0)  # the whole batch
    for stage, micro, *choice in itertools.product(stages, micro_batches, *SEARCH_SPACE.values()):
      settings: Json = dict(zip(SEARCH_SPACE, choice, strict=True)) | mesh
      settings |= {"mesh.zero_stage": stage, "train.micro_batch_size": micro}
      shapes = (cost.trained, cost.opt_state)
      if offload.validate_offload(platform, shapes, settings["memory.offload"]):
        continue
      B = micro or rows
      results.append(
        Candidate(
          settings=settings,
          seconds=cost.seconds(settings, B),
          state_bytes=cost.state_bytes(settings),
          other_bytes=cost.other_bytes(settings, B),
        )
      )
  return results


def meshes(cfg: ModelConfig, target: specs.Target) -> list[tuple[int, int, int]]:
  """Return (data, fsdp, tensor) meshes of all devices.

  Weights are sharded over all devices, over those of a node, or not at all. The tensor axis stays
  within a node.
  """
  n = target.count
  spec = target.spec
  node = min(n, spec.node if isinstance(spec, specs.Gpu) else n)
  results = []
  for tensor in (1, 2, 4, 8):
    if node % tensor == 0 and cfg.N % tensor == 0 and cfg.F % tensor == 0:
      results += [
        (n // tensor // fsdp, fsdp, tensor)
        for fsdp in sorted({n // tensor, node // tensor, 1}, reverse=True)
        if cfg.D % fsdp == 0
      ]
  return results
