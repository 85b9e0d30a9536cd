"""A plan: will it fit, how full, how fast, what to change; as one dict, which `--json` prints."""

import dataclasses
import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict

import jaxft.config
from jaxft.errors import RequestError
from jaxft.hardware import roofline, specs
from jaxft.hf import base_model, model_config, repo, trainable_params
from jaxft.hf.known_models import PUBLISHED
from jaxft.model.config import ModelConfig
from jaxft.plan import aot_compiler, measure
from jaxft.plan.search import NUM_PLANS, find_settings
from jaxft.training.build import TrainProgram
from jaxft.utils import backend

# What the compiler tells in every plan, and is None in one that was refused.
COMPILER_KEYS = (
  *(
    "devices",
    "peak_bytes",
    "breakdown",
    "host_bytes",
    "flops",
    "collective_bytes",
    "step_seconds_estimate",
  ),
  "compile_seconds",
)
VERSIONED_PACKAGES = {"gpu": ("jax-cuda13-plugin",), "tpu": ("libtpu",), "cpu": ()}


def plan_for(
  config: ConfigDict,
  device: str,
  *,
  search: bool = False,
  prices: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, Any]:
  """Compiles the train step of `config` for `device`, which need not be there, and tells what it takes.

  Args:
    config: from `jaxft.config.default()`; its data need not be there, and of the model only config.json.
    device: h100, h100x8, rtx4090, v5e:2x4, cpu, ...: see `jaxft.hardware.specs`.
    search: look for the fastest settings that fit, too. Where `config` itself does not fit, one that does is looked for anyway.
    prices: of a device an hour, such as {"h100": 2.5}; the plan then has a "cost", too.

  Raises RequestError when config or device are wrong, or the compiler is not installed.
  """
  return plans_for(config, [device], search=search, prices=prices)[0]


def plans_for(
  config: ConfigDict,
  devices: list[str],
  *,
  search: bool = False,
  prices: Mapping[str, float] = MappingProxyType({}),
  tell: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
  """`plan_for` several devices, one after the other; `tell` takes lines on what goes on.

  One of several that does not go with the config has a plan with the reason as "refused"; alone it is a RequestError.
  """
  config = jaxft.config.normalize(config)
  if lines := jaxft.config.validate(config):
    raise RequestError("\n".join(lines))
  wanted = [
    specs.parse_device(device) for device in devices
  ]  # a mistyped one is told before any is compiled
  cfg = resolve_model_config(config)
  plans = []
  with aot_compiler.Compiler() as compiler:
    for target in wanted:
      try:
        plans.append(
          _make_plan(compiler, config, cfg, target, search, prices.get(target.kind), tell)
        )
      except RequestError as error:
        if len(wanted) == 1:
          raise
        plans.append(_refused_plan(config, target, error))
  return plans


def resolve_model_config(config: ConfigDict) -> ModelConfig:
  """The architecture that `config` trains, without its weights; of the published models without a network too."""
  path, published = config.model.path, {name.lower(): value for name, value in PUBLISHED.items()}
  name = path.lower().removeprefix("openai-community/")
  scratch = config.model.init == "scratch"
  if config.model.config and scratch:
    return _apply_run_config(config, *base_model.scratch_config(config.model))
  if name in published and not repo.is_local(path):
    hf_config, cfg = published[name], model_config.from_hf_config(published[name])
  else:
    _, hf_config, cfg, *_ = repo.resolve(path, config.model.revision, weights=False)
  if scratch:
    hf_config, cfg = base_model.scratch_config(config.model, hf_config, Path(path) / "config.json")
  return _apply_run_config(config, hf_config, cfg)


def _apply_run_config(
  config: ConfigDict, hf_config: dict[str, Any], cfg: ModelConfig
) -> ModelConfig:
  """The architecture as a run of `config` changes it; raises RequestError for rows that are too long for it."""
  if config.data.sequence_length > cfg.P:
    raise RequestError(
      f"config.data.sequence_length={config.data.sequence_length}: the model has {cfg.P} positions"
    )
  if config.model.head == "classification" and not cfg.classes:
    cfg = dataclasses.replace(
      cfg, classes=2
    )  # as many as the data has labels: of no account for memory
  return trainable_params.apply_config(cfg, config, hf_config["model_type"])


def _make_plan(
  compiler: aot_compiler.Compiler,
  config: ConfigDict,
  cfg: ModelConfig,
  target: specs.Target,
  do_search: bool,
  price: float | None,
  tell: Callable[[str], None],
) -> dict[str, Any]:
  def of(config: ConfigDict) -> dict[str, Any]:
    tell(f"compiling for {target.name} ...")
    found = compiler(
      aot_compiler.CompileRequest(
        jaxft.config.to_json(config), dataclasses.asdict(cfg), target.name
      )
    )
    return _to_plan(config, target, found, price)

  aot_compiler.check_compiler_installed(target)
  try:
    plan = of(config)
  except RequestError as error:
    if not do_search:
      raise
    tell(
      f"as it is: {error}"
    )  # a batch or a mesh that does not go with this target; the search has its own
    plan = _refused_plan(config, target, error)
  if do_search or not plan["fits"]:
    plan["advice"] = find_settings(
      config, cfg, target, of, tell, shown=NUM_PLANS if do_search else 1
    )
  return plan


def plan_from_compiled(
  config: ConfigDict,
  cfg: ModelConfig,
  run: TrainProgram,
  traced: Any,
  compiled: Any,
  eval_compiled: Any,
) -> dict[str, Any]:
  """The plan of steps that are compiled already, for the devices they will run on; `traced` is the train step's."""
  mesh = run.batch_sharding.mesh
  device = mesh.local_devices[0]
  found = measure.measure_traced(run, config, cfg, traced) | measure.measure_compiled(run, compiled)
  found |= {"eval_peak_bytes": measure.eval_peak_bytes(run, eval_compiled), "compile_seconds": None}
  plan = _to_plan(config, specs.local_target(device, mesh.size), found)
  share = backend.device_memory_bytes(device) // (mesh.size if device.platform == "cpu" else 1)
  return plan | {
    "usable_bytes": share,
    "fits": max(plan["peak_bytes"], plan["eval_peak_bytes"]) <= share,
  }


def _refused_plan(config: ConfigDict, target: specs.Target, error: RequestError) -> dict[str, Any]:
  return (
    _plan_header(config, target)
    | dict.fromkeys(COMPILER_KEYS)
    | {"fits": False, "refused": str(error)}
  )


def _plan_header(config: ConfigDict, target: specs.Target) -> dict[str, Any]:
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
  except importlib.metadata.PackageNotFoundError:  # a plugin of another CUDA
    return None


def _to_plan(
  config: ConfigDict, target: specs.Target, found: dict[str, Any], price: float | None = None
) -> dict[str, Any]:
  """The figures of the compiler as a plan."""
  if "refused" in found:
    raise RequestError(f"--device={target.name!r}: {found['refused']}")
  refused = "needs_bytes" in found
  plan = _plan_header(config, target) | {
    "device_kind": found["device_kind"],
    "devices": found["devices"],
    "mesh": found["mesh"],
    "accumulation_steps": found["accumulation_steps"],
    "compute_dtype": found["compute_dtype"],
    "attention": found["attention"],
  }
  if refused:  # the compiler's own limit counts
    plan |= {"fits": False, "peak_bytes": found["needs_bytes"], "usable_bytes": found["has_bytes"]}
    plan["host_bytes"] = found["host_bytes"]
    plan["breakdown"] = found["arguments"] | {"gradients": found["gradient_bytes"]}
    plan["breakdown"]["activations"] = max(0, plan["peak_bytes"] - sum(plan["breakdown"].values()))
  else:
    plan |= {
      name: found[name] for name in ("peak_bytes", "eval_peak_bytes", "breakdown", "host_bytes")
    }
    plan["fits"] = max(found["peak_bytes"], found["eval_peak_bytes"]) <= plan["usable_bytes"]
  step_estimate = None
  if not refused:
    step_estimate = roofline.estimate_step(
      target,
      found["devices"],
      dtype=found["compute_dtype"],
      flops=found["flops"],
      model_flops=found["model_flops"],
      moved_bytes=found["moved_bytes"],
      collective_bytes=found["collective_bytes"],
      tokens=found["tokens"],
      bus_bytes=found["bus_bytes"],
    )
  return plan | {
    "logits_bytes": found["logits_bytes"],
    "checkpoint_bytes": found["checkpoint_bytes"],
    "flops": found["flops"],
    "model_flops": found["model_flops"],
    "tokens": found["tokens"],
    "bus_bytes": found["bus_bytes"],
    "pinned_bytes": backend.max_pinned_bytes(found["bytes_on_every_host"])
    if target.kind in specs.GPUS
    else 0,
    "moved_bytes": found.get("moved_bytes"),
    "collective_bytes": found.get("collective_bytes", {}),
    "step_seconds_estimate": step_estimate and step_estimate.step_seconds,
    "cost": roofline.estimate_cost(price, target, step_estimate),
    "estimate": roofline.to_dict(step_estimate, target, found["compute_dtype"]),
    "rows_to_hide_the_bus": step_estimate
    and step_estimate.rows_to_hide_the_bus(config.train.batch_size),
    "compile_seconds": found["compile_seconds"],
  }
