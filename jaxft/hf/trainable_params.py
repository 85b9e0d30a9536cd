"""What a config makes of a model: its dropout, adapters, and which weights are trained, by their names in the checkpoint."""

import dataclasses
import fnmatch
import re
from collections.abc import Iterator

from ml_collections import ConfigDict

from jaxft.errors import RequestError
from jaxft.hf.weight_map import FAMILIES, Rule, full_name
from jaxft.model.config import ModelConfig
from jaxft.model.lora import TARGET_MODULES

# Where `lora.targets` says nothing: what PEFT adapts in each family.
DEFAULT_TARGETS = {
  "gpt2": ("c_attn",),
  "gpt_neo": ("q_proj", "v_proj"),
  "gptj": ("q_proj", "v_proj"),
}
ALL_LINEAR = "all-linear"


def apply_config(cfg: ModelConfig, config: ConfigDict, model_type: str) -> ModelConfig:
  """The facts of the model as `config` trains it; raises RequestError for a name that the model has not."""
  if config.model.dropout is not None:
    cfg = cfg.with_dropout(config.model.dropout)
  if config.lora.rank:
    return _with_lora(cfg, config.lora, model_type)
  return (
    dataclasses.replace(cfg, trained=_match_params(cfg, config.train.only, model_type))
    if config.train.only
    else cfg
  )


def lora_modules(model_type: str) -> dict[str, str]:
  """Of a layer's matrix products: {name in the checkpoint: the one of `jaxft.model.lora.TARGET_MODULES` that adapts it}."""
  found = {}
  for rule in FAMILIES[model_type].rules:
    if rule.by_layer and rule.param.endswith(".kernel"):
      target = rule.param.split(".")[-2]
      targets = "qkv" if len(rule.names) > 1 else [target]
      found |= dict(zip(map(_module_name, rule.names), targets, strict=True))
  return found


def _with_lora(cfg: ModelConfig, lora: ConfigDict, model_type: str) -> ModelConfig:
  there, targets = lora_modules(model_type), []
  for wanted in lora.targets or DEFAULT_TARGETS[model_type]:
    matches = [
      name
      for name in there
      if wanted == ALL_LINEAR or name == wanted or name.endswith(f".{wanted}")
    ]
    if not matches:
      raise RequestError(
        f"config.lora.targets: {wanted!r} is no matrix of a {model_type} layer; there are {', '.join(there)}, and {ALL_LINEAR}"
      )
    targets += [there[name] for name in matches]
  targets = tuple(sorted(set(targets), key=list(TARGET_MODULES).index))
  layers = _parse_layers(lora.layers, cfg.L)
  adapters = {
    ".".join(("blocks", *TARGET_MODULES[target], "adapter", part))
    for target in targets
    for part in ("lora_a", "lora_b")
  }
  trained = [(path, layers) for path in sorted(adapters)] + [("output.score", ())] * bool(
    cfg.classes
  )
  return dataclasses.replace(
    cfg,
    lora_rank=lora.rank,
    lora_scale=lora.alpha / lora.rank,
    lora_dropout=lora.dropout,
    lora_targets=targets,
    trained=tuple(trained),
  )


def _parse_layers(chosen: tuple[str, ...], L: int) -> tuple[int, ...]:
  """("0-2", "5") -> (0, 1, 2, 5)."""
  found = set()
  for text in chosen:
    first, _, last = text.partition("-")
    if (
      not re.fullmatch(r"[0-9]{1,6}(-[0-9]{1,6})?", text)
      or not int(first) <= int(last or first) < L
    ):
      raise RequestError(
        f"config.lora.layers: {text!r} must be a layer, or first-last, of 0 to {L - 1}"
      )
    found |= set(range(int(first), int(last or first) + 1))
  return tuple(sorted(found))


def _match_params(
  cfg: ModelConfig, patterns: tuple[str, ...], model_type: str
) -> tuple[tuple[str, tuple[int, ...]], ...]:
  """`ModelConfig.trained` for weights whose full names match one of the patterns."""
  unused, trained = set(patterns), []
  for rule in FAMILIES[model_type].rules:
    layers = []
    for layer, names in _tensor_names(rule, cfg):
      matches = [
        [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)] for name in names
      ]
      unused -= {pattern for some in matches for pattern in some}
      if any(matches) and not all(matches):
        raise RequestError(
          f"config.train.only: jaxft keeps {' and '.join(names)} in one array; name all of them, or none"
        )
      if all(matches):
        layers.append(layer)
    if (
      layers or rule.param == "output.score" and cfg.classes
    ):  # a new head would stay as it is drawn
      trained.append((rule.param, tuple(layers) if rule.by_layer and len(layers) < cfg.L else ()))
  if unused:
    names = [
      name
      for rule in FAMILIES[model_type].rules
      for _, some in _tensor_names(rule, cfg)
      for name in some
    ]
    raise RequestError(
      f"config.train.only: {min(unused)!r} is the name of no weight; there are {', '.join(names[:3])}, ... {names[-1]}"
    )
  return tuple(sorted(trained))


def _tensor_names(rule: Rule, cfg: ModelConfig) -> Iterator[tuple[int, list[str]]]:
  """Of each layer the names of the tensors that a parameter is made of; nothing for one that this model has not."""
  here = {
    "output.kernel": not cfg.tied and not cfg.classes,
    "output.bias": cfg.head_bias and not cfg.classes,
    "output.score": bool(cfg.classes),
  }
  if here.get(rule.param, True):
    for layer in range(cfg.L if rule.by_layer else 1):
      yield layer, [full_name(name.format(layer)) for name in rule.names]


def _module_name(name: str) -> str:
  """ "h.{}.attn.c_attn.weight" -> "attn.c_attn"."""
  return name.removeprefix("h.{}.").removesuffix(".weight")
