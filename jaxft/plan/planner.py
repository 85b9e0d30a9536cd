"""Plans: dicts, printed by `--json`, with memory and speed of a run."""

import dataclasses
import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from jax.stages import Compiled, Traced
from ml_collections import ConfigDict

import jaxft.config
from jaxft.config import Config
from jaxft.errors import RequestError
from jaxft.hardware import roofline, specs
from jaxft.hf import base_model, model_config, repo, trainable_params
from jaxft.hf.known_models import PUBLISHED
from jaxft.model.config import ModelConfig
from jaxft.plan import aot_compiler, measure
from jaxft.plan.search import NUM_PLANS, find_settings
from jaxft.training.build import TrainProgram
from jaxft.utils import backend
from jaxft.utils.types import Json

# Values from the compiler; they are None in a plan that was refused.
COMPILER_KEYS = (
  *("devices", "peak_bytes", "breakdown", "host_bytes", "flops", "collective_bytes"),
  *("step_seconds_estimate", "compile_seconds"),
)
VERSIONED_PACKAGES = {"gpu": ("jax-cuda13-plugin",), "tpu": ("libtpu",), "cpu": ()}


def plan_for(
  config: ConfigDict | Config,
  device: str,
  *,
  search: bool = False,
  prices: Mapping[str, float] = MappingProxyType({}),
) -> Json:
  """Compile the train step of `config` for `device` and return its plan.

  The device need not exist on this machine.

  Args:
    config: from `jaxft.config.default()`. Its data need not exist, and its model needs only a
      config.json.
    device: h100, h100x8, rtx4090, v5e:2x4, cpu, ...: see `jaxft.hardware.specs`.
    search: also search the fastest settings that fit. If `config` does not fit, one plan that fits
      is searched in any case.
    prices: price of a device per hour, such as {"h100": 2.5}; adds a "cost" to the plan.

  Returns:
    The plan: "fits", "peak_bytes", "breakdown", "step_seconds_estimate" and more.

  Raises:
    RequestError: config or device are invalid, or the compiler is not installed.
  """
  return plans_for(config, [device], search=search, prices=prices)[0]


def plans_for(
  config: ConfigDict | Config,
  devices: list[str],
  *,
  search: bool = False,
  prices: Mapping[str, float] = MappingProxyType({}),
  on_progress: Callable[[str], None] = lambda line: None,
) -> list[Json]:
  """Make a plan for each of several devices.

  A device that does not match the config gets a plan with the reason as "refused". If it is the
  only device, the reason is raised as a RequestError.

  Args:
    config: as in `plan_for`.
    devices: names of devices.
    search: as in `plan_for`.
    prices: as in `plan_for`.
    on_progress: called with lines of text.
  """
  config = jaxft.config.resolve(config)
  # Check all names before the first device is compiled for.
  targets = [specs.parse_device(device) for device in devices]
  cfg = resolve_model_config(config)
  plans = []
  with aot_compiler.Compiler() as compiler:
    for target in targets:
      price = prices.get(target.kind)
      try:
        plans.append(_make_plan(compiler, config, cfg, target, search, price, on_progress))
      except RequestError as error:
        if len(targets) == 1:
          raise
        plans.append(_refused_plan(config, target, error))
  return plans


def resolve_model_config(config: Config) -> ModelConfig:
  """Return the architecture to train; published models need no network."""
  path = config.model.path
  published = {name.lower(): value for name, value in PUBLISHED.items()}
  name = path.lower().removeprefix("openai-community/")
  scratch = config.model.init == "scratch"
  if config.model.config and scratch:
    return _apply_run_config(config, *base_model.scratch_config(config.model))
  if name in published and not repo.is_local(path):
    hf_config = published[name]
    cfg = model_config.from_hf_config(hf_config)
  else:
    _, hf_config, cfg, *_ = repo.resolve(path, config.model.revision, weights=False)
  if scratch:
    hf_config, cfg = base_model.scratch_config(config.model, hf_config, Path(path) / "config.json")
  return _apply_run_config(config, hf_config, cfg)


def _apply_run_config(config: Config, hf_config: Json, cfg: ModelConfig) -> ModelConfig:
  """Apply `config` to the architecture; refuse sequences that are too long."""
  T = config.data.sequence_length
  if T > cfg.P:
    raise RequestError(
      f"config.data.sequence_length={T}: must be at most {cfg.P}, the model's positions"
    )
  if config.model.head == "classification" and not cfg.classes:
    # The data defines the number of labels, which hardly changes the memory.
    cfg = dataclasses.replace(cfg, classes=2)
  return trainable_params.apply_config(cfg, config, hf_config["model_type"])


def _make_plan(
  compiler: aot_compiler.Compiler,
  config: Config,
  cfg: ModelConfig,
  target: specs.Target,
  do_search: bool,
  price: float | None,
  on_progress: Callable[[str], None],
) -> Json:
  def compile_plan(config: Config) -> Json:
    on_progress(f"compiling for {target.name} ...")
    request = aot_compiler.CompileRequest(
      config=jaxft.config.to_json(config), cfg=dataclasses.asdict(cfg), device=target.name
    )
    return _to_plan(config, target, compiler(request), price)

  aot_compiler.check_compiler_installed(target)
  try:
    plan = compile_plan(config)
  except RequestError as error:
    if not do_search:
      raise
    # The batch or the mesh does not match this target; the search tries others.
    on_progress(f"as given: {error}")
    plan = _refused_plan(config, target, error)
  if do_search or not plan["fits"]:
    num_plans = NUM_PLANS if do_search else 1
    plan["advice"] = find_settings(config, cfg, target, compile_plan, num_plans, on_progress)
  return plan


def plan_from_compiled(
  config: Config,
  cfg: ModelConfig,
  program: TrainProgram,
  traced: Traced,
  compiled: Compiled,
  eval_compiled: Compiled,
) -> Json:
  """Return the plan of steps that are compiled for this machine's devices.

  Args:
    config: the config of the run.
    cfg: its model.
    program: the program of the run.
    traced: the traced train step.
    compiled: the compiled train step.
    eval_compiled: the compiled eval step.
  """
  mesh = program.batch_sharding.mesh
  device = mesh.local_devices[0]
  measured = measure.measure_traced(program, config, cfg, traced)
  measured |= measure.measure_compiled(program, compiled)
  measured["eval_peak_bytes"] = measure.eval_peak_bytes(program, eval_compiled)
  measured["compile_seconds"] = None
  plan = _to_plan(config, specs.local_target(device, mesh.size), measured)
  # CPU devices share the memory of one machine.
  usable = backend.device_memory_bytes(device) // (mesh.size if device.platform == "cpu" else 1)
  fits = max(plan["peak_bytes"], plan["eval_peak_bytes"]) <= usable
  return plan | {"usable_bytes": usable, "fits": fits}


def _refused_plan(config: Config, target: specs.Target, error: RequestError) -> Json:
  plan = _plan_header(config, target) | dict.fromkeys(COMPILER_KEYS)
  return plan | {"fits": False, "refused": str(error)}


def _plan_header(config: Config, target: specs.Target) -> Json:
  kind = "tpu" if target.kind in specs.TPUS else "gpu" if target.kind in specs.GPUS else "cpu"
  packages = ("jaxft", "jax", "jaxlib", *VERSIONED_PACKAGES[kind])
  return {
    "device": target.name,
    "model": config.model.path,
    "usable_bytes": target.usable_bytes,
    "versions": {name: version for name in packages if (version := _version(name))},
  }


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:  # the plugin of another CUDA version
    return None


def _to_plan(
  config: Config, target: specs.Target, measured: Json, price: float | None = None
) -> Json:
  """Make a plan from the result of `measure_step`; raise if it was refused."""
  if "refused" in measured:
    raise RequestError(f"--device={target.name!r}: {measured['refused']}")

  def pick(*keys: str) -> Json:
    return {key: measured[key] for key in keys}

  plan = _plan_header(config, target) | pick("device_kind", "devices", "mesh")
  plan |= pick("accumulation_steps", "compute_dtype", "attention")
  estimate = None
  if "needs_bytes" in measured:  # out of memory: use the compiler's own limit
    peak = measured["needs_bytes"]
    limit = measured["has_bytes"]
    plan |= {"fits": False, "peak_bytes": peak, "usable_bytes": limit} | pick("host_bytes")
    plan["breakdown"] = measured["arguments"] | {"gradients": measured["gradient_bytes"]}
    plan["breakdown"]["activations"] = max(0, peak - sum(plan["breakdown"].values()))
  else:
    plan |= pick("peak_bytes", "eval_peak_bytes", "breakdown", "host_bytes")
    plan["fits"] = max(plan["peak_bytes"], plan["eval_peak_bytes"]) <= plan["usable_bytes"]
    estimate = roofline.estimate_step(
      target,
      dtype=measured["compute_dtype"],
      **pick("devices", "flops", "model_flops", "moved_bytes"),
      **pick("collective_bytes", "tokens", "bus_bytes"),
    )
  on_gpu = target.kind in specs.GPUS
  batch_size = config.train.batch_size
  return (
    plan
    | pick("logits_bytes", "checkpoint_bytes", "flops", "model_flops", "tokens", "bus_bytes")
    | {
      "pinned_bytes": backend.max_pinned_bytes(measured["bytes_on_every_host"]) if on_gpu else 0,
      "moved_bytes": measured.get("moved_bytes"),
      "collective_bytes": measured.get("collective_bytes", {}),
      "step_seconds_estimate": estimate and estimate.step_seconds,
      "cost": roofline.estimate_cost(price, target, estimate),
      "estimate": roofline.to_dict(estimate, target, measured["compute_dtype"]),
      "rows_to_hide_the_bus": estimate and estimate.rows_to_hide_the_bus(batch_size),
    }
    | pick("compile_seconds")
  )
