"""Searches the fastest settings that fit: a cost model ranks them, the first few are compiled."""

import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxft.config import Config, flatten
from jaxft.errors import RequestError
from jaxft.hardware import specs
from jaxft.model.config import ModelConfig
from jaxft.plan.cost_model import CostModel
from jaxft.sharding.mesh import mesh_shape
from jaxft.training import offload

# Share of the usable memory that stays free: plans are to be within this of what a device takes.
MEMORY_MARGIN = 0.05
NUM_PLANS = 3  # plans to find, where a search is requested; one is enough to show a way out
MAX_COMPILES = 10
MAX_SECONDS = 150
# Settings to try, with every mesh and every micro-batch that divides the batch. None of them
# changes what is learned.
SEARCH_SPACE = {
  "memory.offload": ("none", "optimizer", "all"),
  "memory.remat": ("none", "dots", "full"),
  "memory.loss_chunk": (-1, 64),
}


class Candidate(NamedTuple):
  """Settings to try, with the cost model's estimates: seconds of a step, bytes of a device."""

  settings: dict[str, Any]
  seconds: float
  state_bytes: int
  other_bytes: float


def find_settings(
  config: Config,
  cfg: ModelConfig,
  target: specs.Target,
  compile_plan: Callable[[Config], dict[str, Any]],
  num_plans: int = NUM_PLANS,
  on_progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """Searches the fastest settings that fit `target`.

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
  untried = sorted(candidates(config, cfg, target), key=lambda it: it.seconds)
  num_candidates = len(untried)
  least = min((it.state_bytes for it in untried), default=None)
  # Measured over estimated bytes, for each remat policy.
  correction = dict.fromkeys(SEARCH_SPACE["memory.remat"], 1.0)

  def size(it: Candidate) -> float:
    return it.state_bytes + correction[it.settings["memory.remat"]] * it.other_bytes

  fitting: list[dict[str, Any]] = []
  lost: list[dict[str, Any]] = []
  started = time.monotonic()
  num_too_large = 0
  ended_early = None
  while untried and len(fitting) < num_plans:
    candidate = next((it for it in untried if size(it) <= budget), None)
    if candidate is None:  # by the model nothing fits: the smallest decides
      candidate = min(untried, key=size)
      num_too_large += 1
      if candidate.state_bytes > budget or num_too_large > 2 or fitting:
        break
    if ended_early := _budget_exhausted(len(fitting) + len(lost), time.monotonic() - started):
      break
    untried.remove(candidate)
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
      keys = ("peak_bytes", "host_bytes", "step_seconds_estimate", "accumulation_steps")
      entry = {"overrides": flags, "settings": candidate.settings}
      entry |= {key: plan[key] for key in keys} | {"rough_seconds": candidate.seconds}
      fitting.append(entry)
    else:
      why = f"does not fit, by {excess / 2**30:.2f} GiB"
      lost.append({"overrides": flags, "why": why, "peak_bytes": peak})
    measured = max(peak - candidate.state_bytes, 1)
    correction[candidate.settings["memory.remat"]] = measured / candidate.other_bytes

  def seconds(entry: dict[str, Any]) -> float:
    return entry["step_seconds_estimate"] or entry["rough_seconds"]

  fitting.sort(key=lambda entry: (seconds(entry), entry["peak_bytes"]))
  too_large = [it for it in untried if size(it) > budget]
  over = [it for it in too_large if it.state_bytes > budget]
  return {
    "room_bytes": budget,
    "candidates": num_candidates,
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
  """Returns the reason to end a search early, if there is one."""
  if compiles >= MAX_COMPILES:
    return f"the search ended after {MAX_COMPILES} compiles"
  return f"the search ended after {MAX_SECONDS} s" if seconds > MAX_SECONDS else None


def overrides(config: Config, settings: dict[str, Any], devices: int) -> list[str]:
  """Returns the flags that change the config to these settings."""
  try:
    mesh = mesh_shape(config.mesh, devices)
  except RequestError:  # the mesh of the config does not go with this target
    mesh = {}
  has = flatten(config) | {f"mesh.{axis}": size for axis, size in mesh.items()}
  changed = {name: value for name, value in settings.items() if has[name] != value}
  return [f"--config.{name}={value}" for name, value in changed.items()]


def candidates(config: Config, cfg: ModelConfig, target: specs.Target) -> list[Candidate]:
  """Returns every mesh, micro-batch and choice of SEARCH_SPACE that divides model and batch."""
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
      settings = dict(zip(SEARCH_SPACE, choice, strict=True)) | mesh
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
  """Returns (data, fsdp, tensor) meshes of all devices.

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
