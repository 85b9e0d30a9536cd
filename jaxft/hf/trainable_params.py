"""Applies a run's config to a model: dropout, adapters and trainable weights."""

import dataclasses
import fnmatch
import re
from collections.abc import Iterator

from jaxft.config import Config, LoraSection
from jaxft.errors import RequestError
from jaxft.hf.weight_map import FAMILIES, Rule, full_name
from jaxft.model.config import ModelConfig
from jaxft.model.lora import TARGET_MODULES

# PEFT's default targets in each family, used if `lora.targets` is empty.
DEFAULT_TARGETS = {
  "gpt2": ("c_attn",),
  "gpt_neo": ("q_proj", "v_proj"),
  "gptj": ("q_proj", "v_proj"),
}
ALL_LINEAR = "all-linear"


def apply_config(cfg: ModelConfig, config: Config, model_type: str) -> ModelConfig:
  """Return the `ModelConfig` as the run trains it.

  Raises:
    RequestError: a setting names an unknown matrix, layer or weight.
  """
  if config.model.dropout is not None:
    cfg = cfg.with_dropout(config.model.dropout)
  if config.lora.rank:
    return _with_lora(cfg, config.lora, model_type)
  if not config.train.trainable_params:
    return cfg
  return dataclasses.replace(
    cfg, trained=_match_params(cfg, config.train.trainable_params, model_type)
  )


def lora_modules(model_type: str) -> dict[str, str]:
  """Return a layer's matrices: {name in the checkpoint: key in `TARGET_MODULES`}."""
  modules = {}
  for rule in FAMILIES[model_type].rules:
    if rule.by_layer and rule.param.endswith(".kernel"):
      target = rule.param.split(".")[-2]
      targets = "qkv" if len(rule.names) > 1 else [target]
      modules |= dict(zip(map(_module_name, rule.names), targets, strict=True))
  return modules


def _with_lora(cfg: ModelConfig, lora: LoraSection, model_type: str) -> ModelConfig:
  modules = lora_modules(model_type)
  targets = set()
  for pattern in lora.targets or DEFAULT_TARGETS[model_type]:
    suffix = f".{pattern}"
    matches = [name for name in modules if pattern in (ALL_LINEAR, name) or name.endswith(suffix)]
    if not matches:
      raise RequestError(
        f"config.lora.targets: a {model_type} layer has no matrix {pattern!r}; "
        f"choose from {', '.join(modules)}, or {ALL_LINEAR}"
      )
    targets |= {modules[name] for name in matches}
  layers = _parse_layers(lora.layers, cfg.L)
  adapters = {
    ".".join(("blocks", *TARGET_MODULES[target], "adapter", ab))
    for target in targets
    for ab in ("lora_a", "lora_b")
  }
  trained = [(path, layers) for path in sorted(adapters)]
  trained += [("output.score", ())] * bool(cfg.classes)
  return dataclasses.replace(
    cfg,
    lora_rank=lora.rank,
    lora_scale=lora.alpha / lora.rank,
    lora_dropout=lora.dropout,
    lora_targets=tuple(sorted(targets, key=list(TARGET_MODULES).index)),
    trained=tuple(trained),
  )


def _parse_layers(ranges: tuple[str, ...], L: int) -> tuple[int, ...]:
  """Parse ranges of layers: ("0-2", "5") -> (0, 1, 2, 5)."""
  layers = set()
  for text in ranges:
    first, _, last = text.partition("-")
    number = re.fullmatch(r"[0-9]{1,6}(-[0-9]{1,6})?", text)
    if not number or not int(first) <= int(last or first) < L:
      raise RequestError(
        f"config.lora.layers: {text!r} must be a layer or FIRST-LAST, from 0 to {L - 1}"
      )
    layers |= set(range(int(first), int(last or first) + 1))
  return tuple(sorted(layers))


def _match_params(
  cfg: ModelConfig, patterns: tuple[str, ...], model_type: str
) -> tuple[tuple[str, tuple[int, ...]], ...]:
  """Return `ModelConfig.trained` for weights whose full names match a pattern."""
  rules = FAMILIES[model_type].rules
  unused = set(patterns)
  trained = []
  for rule in rules:
    layers = []
    for layer, names in _tensor_names(rule, cfg):
      matches = [{it for it in patterns if fnmatch.fnmatchcase(name, it)} for name in names]
      unused -= set().union(*matches)
      if any(matches) and not all(matches):
        raise RequestError(
          f"config.train.trainable_params: jaxft stores {' and '.join(names)} as one array; "
          "name all of them, or none"
        )
      if all(matches):
        layers.append(layer)
    new_head = rule.param == "output.score" and cfg.classes
    if layers or new_head:  # a new head is random, so it is always trained
      trained.append((rule.param, tuple(layers) if rule.by_layer and len(layers) < cfg.L else ()))
  if unused:
    names = [name for rule in rules for _, some in _tensor_names(rule, cfg) for name in some]
    raise RequestError(
      f"config.train.trainable_params: {min(unused)!r} matches no weight; "
      f"the names are {', '.join(names[:3])}, ... {names[-1]}"
    )
  return tuple(sorted(trained))


def _tensor_names(rule: Rule, cfg: ModelConfig) -> Iterator[tuple[int, list[str]]]:
  """Yield each layer and the names of a parameter's tensors in it.

  Yields nothing if the model lacks the parameter.
  """
  exists = {
    "output.kernel": not cfg.tied and not cfg.classes,
    "output.bias": cfg.head_bias and not cfg.classes,
    "output.score": bool(cfg.classes),
  }
  if exists.get(rule.param, True):
    for layer in range(cfg.L if rule.by_layer else 1):
      yield layer, [full_name(name.format(layer)) for name in rule.names]


def _module_name(name: str) -> str:
  """Return the module of a weight: "h.{}.attn.c_attn.weight" -> "attn.c_attn"."""
  return name.removeprefix("h.{}.").removesuffix(".weight")
