"""Searches the fastest settings that fit: a cost model ranks them, the first few are compiled."""

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

# Share of the usable memory that stays free: plans are to be within this of what a device takes.
MEMORY_MARGIN = 0.05
NUM_PLANS = 3  # plans to find, where a search is requested; one is enough to show a way out
MAX_COMPILES = 10
MAX_SECONDS = 150
# What a search keeps of a plan that fits.
PLAN_KEYS = ("peak_bytes", "host_bytes", "step_seconds_estimate", "accumulation_steps")
# Settings to try, with every mesh and every micro-batch that divides the batch. None of them
# changes what is learned.
SEARCH_SPACE: Json = {
  "memory.offload": ("none", "optimizer", "all"),
  "memory.remat": ("none", "dots", "full"),
  "memory.loss_chunk": (-1, 64),
}


class Candidate(NamedTuple):
  """Settings to try, with the cost model's estimates: seconds of a step, bytes of a device."""

  settings: Json
  seconds: float
  state_bytes: int
  other_bytes: float


class Ranking:
  """The candidates that are not compiled yet, by a cost model that compiled ones correct."""

  def __init__(self, candidates: list[Candidate], budget: int):
    self.untried = sorted(candidates, key=lambda it: it.seconds)
    self._budget = budget
    # Measured over estimated bytes, for each remat policy.
    self._correction = dict.fromkeys(SEARCH_SPACE["memory.remat"], 1.0)
    self._num_too_large = 0

  def is_too_large(self, it: Candidate) -> bool:
    return self._size(it) > self._budget

  def next(self, has_fitting: bool) -> Candidate | None:
    """Return the fastest that may fit; None if none may, `has_fitting` or not."""
    if fastest := next((it for it in self.untried if not self.is_too_large(it)), None):
      return fastest
    smallest = min(self.untried, key=self._size)  # by the model nothing fits: it decides
    self._num_too_large += 1
    hopeless = smallest.state_bytes > self._budget or self._num_too_large > 2 or has_fitting
    return None if hopeless else smallest

  def correct(self, it: Candidate, peak: int) -> None:
    """Correct the model by the measured peak of a candidate."""
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

  A cost model ranks the candidates and rules out those that are far too large; each compiled plan
  corrects it for the next. The search ends with enough plans that fit, as all others are slower by
  the model, or when nothing left could fit; or, before that, after MAX_COMPILES or MAX_SECONDS.

  Args:
    compile_plan: compiles one config.
    num_plans: how many plans that fit are enough.

  Returns:
    {"best": plans that fit with a margin, fastest first; "lost": compiled plans and why they lost;
    "not_compiled": number of candidates for each reason; "ended_early": why, or None; ...}.
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
    on_progress(f"{' '.join(flags) or 'as it is'}: {outcome}")
    if excess <= 0:
      fitting.append(
        {"overrides": flags, "settings": candidate.settings}
        | {key: plan[key] for key in PLAN_KEYS}
        | {"rough_seconds": candidate.seconds}
      )
    else:
      reason = f"does not fit, by {excess / 2**30:.2f} GiB"
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
  """Return the reason to end a search early, if there is one."""
  if compiles >= MAX_COMPILES:
    return f"the search ended after {MAX_COMPILES} compiles"
  return f"the search ended after {MAX_SECONDS} s" if seconds > MAX_SECONDS else None


def overrides(config: Config, settings: Json, devices: int) -> list[str]:
  """Return the flags that change the config to these settings."""
  try:
    mesh = mesh_shape(config.mesh, devices)
  except RequestError:  # the mesh of the config does not go with this target
    mesh = {}
  has = flatten(config) | {f"mesh.{axis}": size for axis, size in mesh.items()}
  changed = {name: value for name, value in settings.items() if has[name] != value}
  return [f"--config.{name}={value}" for name, value in changed.items()]


def candidates(config: Config, cfg: ModelConfig, target: specs.Target) -> list[Candidate]:
  """Return every mesh, micro-batch and choice of SEARCH_SPACE that divides model and batch."""
  cost = CostModel.from_config(config, cfg, target)
  platform = "tpu" if target.kind in specs.TPUS else "gpu"
  results = []
  for data, fsdp, tensor in meshes(cfg, target):
    if config.train.batch_size % (data * fsdp):
      continue
    mesh = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
    # With an fsdp axis of one, the ZeRO stages are all the same.
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

  Weights are sharded over all of them, over those of a node, or not at all; tensor stays in a node.
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
