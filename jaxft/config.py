"""Settings of a run: name, type, default, unit and meaning of each.

A config file (`configs/X.py`) defines `get_config()`, which starts from `default()` and changes
settings. `resolve` turns that ConfigDict into the frozen `Config` of a run.
"""

import dataclasses
import difflib
import json
import math
import os
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Literal, NamedTuple, TypeAlias, TypeVar

from ml_collections import ConfigDict, config_dict

from jaxft import config_checks
from jaxft.config_checks import (
  TEMPLATE_FIELD,
  Check,
  above,
  any_value,
  at_least,
  axis_size,
  between,
  compute_dtype,
  config_overrides,
  encoding,
  file_size,
  one_of,
  writers,
)
from jaxft.errors import RequestError, first_line
from jaxft.utils.files import expand_user
from jaxft.utils.types import Json

T = TypeVar("T")
Value: TypeAlias = str | int | float | bool | tuple[str, ...] | None


def setting(default: T, doc: str, check: Check = any_value) -> T:
  """Define a setting: a field of a section, whose annotation gives its type and choices.

  Args:
    default: the default value.
    doc: the description that `--print_config` prints.
    check: the validator; see `jaxft.config_checks`.
  """
  return dataclasses.field(default=default, metadata={"doc": doc, "check": check})


@dataclass(frozen=True, kw_only=True)
class ModelSection:
  """Settings of the base model: checkpoint, tokenizer, dtypes, attention kernel."""

  path: str = setting("", "checkpoint to start from: a Hugging Face hub id or a folder")
  revision: str = setting("main", "branch, tag or commit of the hub id")
  torch_bin: bool = setting(
    False,
    "read pytorch_model*.bin (a pickle) if the checkpoint has no other weights; needs torch, which "
    "reads it with weights_only=True",
  )
  init: Literal["pretrained", "scratch"] = setting(
    "pretrained", "pretrained: load the weights; scratch: initialize new ones at random"
  )
  head: Literal["lm", "classification"] = setting(
    "lm", "lm: generate text; classification: predict the labels of data.format=classification"
  )
  config: str = setting(
    "", "config.json of a model with init=scratch; empty: the one in model.path"
  )
  config_overrides: str = setting(
    "",
    "values that replace keys of that config.json, only with init=scratch: n_embd=512,n_layer=4",
    config_overrides,
  )
  tokenizer: str = setting("", "folder or hub id of the tokenizer; empty: the one in model.path")
  compute_dtype: str = setting(
    "auto", "dtype of activations; auto: bfloat16 on GPU and TPU, float32 on CPU", compute_dtype
  )
  param_dtype: Literal["float32", "bfloat16"] = setting(
    "float32",
    "dtype of the weight matrices of layers; bfloat16 halves their memory and uses stochastic "
    "rounding",
  )
  attention: Literal["auto", "cudnn", "splash", "chunked", "reference"] = setting(
    "auto",
    "attention kernel; auto: cudnn or splash if the hardware supports it, else chunked; "
    "reference: holds all attention probabilities in memory",
  )
  dropout: float | None = setting(
    None, "dropout rate everywhere; unset: the rates in the model's config.json", between(0, 1)
  )


@dataclass(frozen=True, kw_only=True)
class DataSection:
  """Settings of the data: sources, columns, held-out split, layout of sequences."""

  train: tuple[str, ...] = setting(
    (),
    "one or more sources: hub:NAME[:SPLIT], or a .txt, .jsonl, .csv or .parquet file, glob or "
    "folder; append @WEIGHT to set how often an epoch reads its documents: stories.jsonl@0.5",
  )
  validation: tuple[str, ...] = setting(
    (), "sources of the held-out set; empty: a share of the training documents"
  )
  unrelated: tuple[str, ...] = setting(
    (),
    "sources of text unrelated to data.train; each evaluation reports its loss too, which shows "
    "forgetting",
  )
  validation_fraction: float = setting(
    0.05,
    "share of documents held out when data.validation is empty; with too few documents, the end of "
    "each is held out; 0: hold out nothing and report no eval loss",
    between(0, 1),
  )
  format: Literal["text", "prompt_completion", "classification"] = setting(
    "text",
    "content of a row: text; a prompt and its completion, with loss on the completion only; or "
    "text and its label (for .txt files, the name of the folder)",
  )
  text_column: str = setting("text", "column that holds the text")
  prompt_column: str = setting("prompt", "column of the prompt, for prompt_completion")
  completion_column: str = setting("completion", "column of the completion, for prompt_completion")
  label_column: str = setting("label", "column of the label, for classification")
  template: str = setting(
    "{prompt}{completion}",
    "joins a prompt and its completion; the loss starts at {completion}. With data.format=text it "
    "joins any columns, with loss on all tokens: Question: {q}. Answer: {a}",
  )
  encoding: str = setting(
    "utf-8",
    "encoding of text, JSON and CSV files: utf-8, cp1252, latin-1, utf-16, ...",
    encoding,
  )
  separator: str = setting(
    "", "text that separates documents in a .txt file; empty: a file is one document"
  )
  on_bad_row: Literal["error", "skip"] = setting(
    "error", "error: stop at a malformed row; skip: count it and continue"
  )
  duplicates: Literal["keep", "drop"] = setting(
    "keep", "keep or drop a document whose text occurred before"
  )
  layout: Literal["concat", "pack", "pad"] = setting(
    "concat",
    "concat: one stream of tokens cut into sequences; pack: several examples per sequence, without "
    "attention between them; pad: one example per sequence",
  )
  cache_dir: str = setting(
    "", "folder of the token cache; empty: ~/.cache/jaxft/tokens (or XDG_CACHE_HOME)"
  )
  nats_column: str = setting(
    "",
    "column with -log p of each document in nats, if the text was sampled from a known "
    "distribution; the run then prints this entropy floor, which no model can beat, next to the "
    "eval loss",
  )
  sequence_length: int = setting(512, "tokens per sequence", at_least(2))
  limit_train: int = setting(
    0, "number of training documents to use, sampled with shuffle_seed; 0: all", at_least(0)
  )
  limit_validation: int = setting(
    0, "number of held-out documents to use, sampled with shuffle_seed; 0: all", at_least(0)
  )
  shuffle_seed: int = setting(
    0, "seed of the order of sequences and of the sampling of documents", between(0, 2**31)
  )


@dataclass(frozen=True, kw_only=True)
class TrainSection:
  """Settings of the training loop: length, batch, evaluations, checkpoints, samples."""

  steps: int = setting(0, "optimizer steps of the run; 0: use train.epochs", at_least(0))
  epochs: float = setting(
    0.0, "passes over the training sequences; 0: use train.steps", at_least(0)
  )
  batch_size: int = setting(8, "sequences per optimizer step, over all devices", at_least(1))
  micro_batch_size: int = setting(
    0,
    "most sequences per device in one forward pass; larger batches use gradient accumulation; 0: "
    "no limit",
    at_least(0),
  )
  profile_steps: int = setting(
    0,
    "number of optimizer steps, starting with the third, to trace with JAX's profiler into "
    "WORKDIR/profile",
    at_least(0),
  )
  seed: int = setting(0, "seed of dropout, new weights and samples", between(0, 2**31))
  log_every: int | Literal["epoch"] = setting(
    10, "steps between lines of metrics.jsonl, or epoch", at_least(1)
  )
  eval_every: int | Literal["epoch"] = setting(
    0,
    "steps between evaluations, or epoch; 0: only before the first step and after the last",
    at_least(0),
  )
  eval_batch_size: int = setting(
    0,
    "sequences per evaluation step, over all devices; 0: same as in training",
    at_least(0),
  )
  eval_batches: int = setting(0, "batches per evaluation; 0: the whole held-out set", at_least(0))
  save_every: int | Literal["epoch"] = setting(
    500, "steps between checkpoints, or epoch; 0: only after the last step", at_least(0)
  )
  keep: int = setting(2, "number of newest checkpoints to keep", at_least(1))
  keep_best_metric: Literal["", "eval/loss", "eval/perplexity"] = setting(
    "",
    "also keep the checkpoint with the lowest value of this metric, and save one after each "
    "evaluation; empty: keep only the newest",
  )
  early_stopping_patience: int = setting(
    0,
    "stop the run after this many evaluations without a lower eval loss; 0: never",
    at_least(0),
  )
  max_bad_steps: int = setting(
    1,
    "stop the run after this many consecutive non-finite steps (they change no weights)",
    at_least(1),
  )
  sample_prompts: tuple[str, ...] = setting(
    (), "prompts to complete before and after training, with the same seed"
  )
  sample_every: int = setting(
    0, "steps between samples during training; 0: only before and after it", at_least(0)
  )
  sample_tokens: int = setting(100, "new tokens for each prompt", at_least(1))
  trainable_params: tuple[str, ...] = setting(
    (),
    "weights to train, by their names in the checkpoint, with * as a wildcard: transformer.h.11.*, "
    "transformer.ln_f.*; all others are frozen; empty: train all",
  )


@dataclass(frozen=True, kw_only=True)
class OptimSection:
  """Settings of the optimizer and of the learning-rate schedule."""

  name: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = setting(
    "adamw", "optimizer; muon updates the matrices of layers, and adamw all other weights"
  )
  learning_rate: float = setting(5e-05, "peak learning rate", above(0))
  schedule: Literal["constant", "linear", "cosine"] = setting(
    "linear", "learning-rate schedule after the warm-up"
  )
  warmup_steps: int = setting(
    0,
    "steps of linear warm-up, from 0; a tenth of the run if the run is shorter",
    at_least(0),
  )
  warmup_ratio: float = setting(
    0.0, "length of the warm-up as a share of all steps; excludes warmup_steps", between(0, 1)
  )
  end_learning_rate: float = setting(0.0, "final learning rate of linear and cosine", at_least(0))
  weight_decay: float = setting(
    0.0, "decoupled weight decay of matrices and embeddings (not biases or norms)", at_least(0)
  )
  b1: float = setting(0.9, "decay of the first moment (momentum for sgd)", between(0, 1))
  b2: float = setting(0.999, "decay of the second moment", between(0, 1))
  eps: float = setting(1e-08, "added to the root of the second moment", at_least(1e-30))
  clip_norm: float = setting(
    1.0, "clip the gradient to this global norm; 0: no clipping", at_least(0)
  )
  state_dtype: Literal["float32", "bfloat16"] = setting("float32", "dtype of the first moment")


@dataclass(frozen=True, kw_only=True)
class MeshSection:
  """Settings of the device mesh and of the ZeRO stage."""

  data: int = setting(
    1,
    "data-parallel size: replicas of the weights that split the batch; -1: all other devices",
    axis_size,
  )
  fsdp: int = setting(
    -1,
    "FSDP size: devices that split weights, optimizer state and the batch; -1: all other devices",
    axis_size,
  )
  tensor: int = setting(
    1,
    "tensor-parallel size: devices that split heads, feed-forward layers and the vocabulary; -1: "
    "all other devices",
    axis_size,
  )
  zero_stage: int = setting(
    3,
    "state that mesh.fsdp shards; 0: none; 1: optimizer state; 2: gradients too; 3: weights too",
    between(0, 4),
  )


@dataclass(frozen=True, kw_only=True)
class MemorySection:
  """Settings that trade speed for device memory."""

  remat: Literal["none", "dots", "full"] = setting(
    "dots",
    "activations to recompute in the backward pass (gradient checkpointing); none: nothing; dots: "
    "all except matrix products and attention; full: all except each layer's input",
  )
  offload: Literal["none", "optimizer", "all"] = setting(
    "none",
    "state in host memory; none: nothing; optimizer: weights and optimizer state, with a copy of "
    "the weights in the compute dtype on the device; all: weights, gradients and optimizer state, "
    "streamed to the device one layer at a time",
  )
  loss_chunk: int = setting(
    -1,
    "positions per sequence whose logits are in memory together; -1: up to 128 MiB, or 512 MiB on "
    "a GPU or TPU unless memory.remat is full; 0: all positions",
    at_least(-1),
  )


@dataclass(frozen=True, kw_only=True)
class LoraSection:
  """Settings of LoRA adapters."""

  rank: int = setting(
    0, "rank of the adapters, which are trained instead of the weights; 0: no adapters", at_least(0)
  )
  alpha: float = setting(16.0, "adapters are scaled by alpha / rank", above(0))
  dropout: float = setting(0.0, "dropout rate of the input of an adapter", between(0, 1))
  targets: tuple[str, ...] = setting(
    (),
    "matrices with an adapter, by the ends of their names in the checkpoint: c_attn, mlp.c_proj, "
    "q_proj, ..., or all-linear; empty: PEFT's default (GPT-2: c_attn; others: q_proj, v_proj)",
  )
  layers: tuple[str, ...] = setting((), 'layers with adapters, such as "0-3", "11"; empty: all')


@dataclass(frozen=True, kw_only=True)
class TrackingSection:
  """Settings of experiment trackers."""

  writers: tuple[str, ...] = setting(
    (),
    "trackers to use in addition to the console and metrics.jsonl: tensorboard, mlflow, wandb, "
    "trackio; see docs/trackers.md",
    writers,
  )
  run_name: str = setting("", "name of the run in trackers; empty: the name of the workdir")
  logging_dir: str = setting(
    "",
    "folder for TensorBoard, with a subfolder for each run; empty: WORKDIR/tensorboard",
  )
  system_metrics: bool = setting(
    False,
    "also log load and memory of process 0's host and devices, to metrics.jsonl and trackers",
  )


@dataclass(frozen=True, kw_only=True)
class ExportSection:
  """Settings of the export to Hugging Face format."""

  out: str = setting("", "folder of the exported Hugging Face model; empty: WORKDIR/export")
  dtype: Literal["float32", "bfloat16", "float16"] = setting(
    "float32", "dtype of the exported weights"
  )
  max_shard_size: str = setting(
    "5GB", "size limit of a weight file: a number and KB, MB, GB or TB", file_size
  )
  push_to_hub: str = setting(
    "", "hub repository (OWNER/NAME) to upload the export to; empty: no upload"
  )


@dataclass(frozen=True, kw_only=True)
class Config:
  """All settings of a run, validated by `resolve`."""

  model: ModelSection
  data: DataSection
  train: TrainSection
  optim: OptimSection
  mesh: MeshSection
  memory: MemorySection
  lora: LoraSection
  tracking: TrackingSection
  export: ExportSection

  def to_dict(self) -> dict[str, dict[str, Value]]:
    """Return {"data": {"cache_dir": "", ...}, ...}, sorted like a ConfigDict."""
    sections = sorted(dataclasses.asdict(self).items())
    return {name: dict(sorted(values.items())) for name, values in sections}

  def replace(self, settings: Mapping[str, Value]) -> "Config":
    """Return a copy with these settings changed; values are not validated.

    Args:
      settings: new values by name: {"train.steps": 3, ...}.

    Raises:
      RequestError: a setting is unknown.
    """
    if lines := unknown_settings([*settings]):
      raise RequestError("\n".join(lines))
    return _from_flat({**flatten(self), **settings})


class Setting(NamedTuple):
  """Name, type, default, description and validator of one setting."""

  name: str
  kind: type  # str, int, float, bool or tuple
  default: Value
  doc: str
  check: Check
  literals: tuple[str, ...]  # values of another type than `kind`


def _read_settings(name: str, section: type) -> Iterator[Setting]:
  annotations = typing.get_type_hints(section)
  for field in dataclasses.fields(section):
    annotation = annotations[field.name]
    is_union = typing.get_origin(annotation) in (typing.Union, UnionType)
    first, *others = typing.get_args(annotation) if is_union else [annotation]
    origin = typing.get_origin(first)
    yield Setting(
      name=f"{name}.{field.name}",
      kind=str if origin is Literal else origin or first,
      default=getattr(section, field.name),
      doc=field.metadata["doc"],
      check=one_of(*typing.get_args(first)) if origin is Literal else field.metadata["check"],
      literals=tuple(text for other in others for text in typing.get_args(other)),
    )


SECTIONS = typing.get_type_hints(Config)
SETTINGS = tuple(it for item in SECTIONS.items() for it in _read_settings(*item))
BY_NAME = {setting.name: setting for setting in SETTINGS}
MAX_INT = 2**31 - 1  # limit of integer settings: steps and rows are counted in 32 bits
PATH_SETTINGS = (
  "model.path",
  "model.config",
  "model.tokenizer",
  "data.train",
  "data.validation",
  "data.unrelated",
  "data.cache_dir",
  "tracking.logging_dir",
  "export.out",
)

# Two settings for one quantity. One on the command line resets the other, which the config file may
# have set, to its default.
EXCLUSIVE_PAIRS = (("train.steps", "train.epochs"), ("optim.warmup_steps", "optim.warmup_ratio"))

# Settings that may change when a run is resumed: they affect files, logs and speed, not updates.
MUTABLE_ON_RESUME = frozenset(
  {
    *(name for name in BY_NAME if name.startswith(("mesh.", "memory.", "tracking.", "export."))),
    "model.attention",
    "train.profile_steps",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.eval_batch_size",
    "train.save_every",
    "train.keep",
    "train.keep_best_metric",
    "train.early_stopping_patience",
    "train.max_bad_steps",
    "train.sample_prompts",
    "train.sample_every",
    "train.sample_tokens",
    "data.nats_column",
    "data.unrelated",
    "data.cache_dir",
  }
)


def default() -> ConfigDict:
  """Return all settings at their defaults, locked: an unknown key raises AttributeError."""
  config = ConfigDict(type_safe=False)  # `normalize` and `validate` check types instead
  for setting in SETTINGS:
    section, key = setting.name.split(".")
    if section not in config:
      config[section] = ConfigDict(type_safe=False)
    unset = config_dict.placeholder(setting.kind)
    config[section][key] = unset if setting.default is None else setting.default
  return config.lock()


def normalize(config: ConfigDict | Config) -> ConfigDict:
  """Return a copy whose values are converted to the settings' types if that is unambiguous.

  A Path becomes a string, a string a tuple if the setting needs one, a numpy number a Python
  number, 1e3 becomes 1000, and ~ the user's home folder. `validate` reports all other values.
  """
  normalized = ConfigDict(type_safe=False)
  for name, value in flatten(config).items():
    section, _, key = name.partition(".")
    if not key:  # outside any section: `validate` reports it
      normalized[section] = value
      continue
    if section not in normalized:
      normalized[section] = ConfigDict(type_safe=False)
    normalized[section][key] = _normalize_value(BY_NAME[name], value) if name in BY_NAME else value
  return normalized.lock()


def _normalize_value(setting: Setting, value: object) -> object:
  if hasattr(value, "tolist"):  # numpy and pandas objects
    value = value.tolist()
  if setting.kind is tuple:
    value = tuple(value) if isinstance(value, list) else value
    items = value if isinstance(value, tuple) else (value,)
    items = () if items == ("",) else items  # --config.data.validation= means none
    return tuple(_expand_path(item, setting) for item in items)
  value = _expand_path(value, setting)
  # The command line passes text for settings with literals.
  if setting.literals and isinstance(value, str) and value.isdecimal():
    return int(value)
  if setting.kind is float and isinstance(value, int | float) and not isinstance(value, bool):
    return float(value) if abs(value) < 2**1000 else value
  if setting.kind is int and isinstance(value, float) and value.is_integer():
    return int(value)
  return value


def _expand_path(value: object, setting: Setting) -> object:
  value = os.fspath(value) if isinstance(value, os.PathLike) else value
  return expand_user(value) if setting.name in PATH_SETTINGS and isinstance(value, str) else value


# Names of settings in other tools, if the nearest name by spelling would be wrong.
FOREIGN_NAMES = {
  "lr": "optim.learning_rate",
  "wd": "optim.weight_decay",
  "max_grad_norm": "optim.clip_norm",
  "grad_clip": "optim.clip_norm",
  "warmup": "optim.warmup_steps",
  "lr_scheduler_type": "optim.schedule",
  "num_train_epochs": "train.epochs",
  "num_epochs": "train.epochs",
  "max_steps": "train.steps",
  "max_iters": "train.steps",
  "per_device_train_batch_size": "train.micro_batch_size",
  "gradient_accumulation_steps": "train.micro_batch_size",
  "block_size": "data.sequence_length",
  "max_length": "data.sequence_length",
  "max_seq_length": "data.sequence_length",
  "context_length": "data.sequence_length",
  "output_dir": "export.out",
  "model_name_or_path": "model.path",
  "train_file": "data.train",
  "fp16": "model.compute_dtype",
  "bf16": "model.compute_dtype",
  "gradient_checkpointing": "memory.remat",
  "r": "lora.rank",
  "target_modules": "lora.targets",
  "report_to": "tracking.writers",
}

# Old names of settings, in the config.json and the checkpoints of earlier runs.
RENAMED = {"train.only": "train.trainable_params"}  # until 2026-11-29


def unknown_settings(names: list[str]) -> list[str]:
  """Return one error line for each unknown name, with the nearest setting."""
  by_key = {known.split(".")[1]: known for known in BY_NAME}
  lines = []
  for name in names:
    if name in BY_NAME:
      continue
    key = name.split(".")[-1]
    # Match by key alone too: `train.learning_rate` and `learning_rate` both mean
    # `optim.learning_rate`.
    near = difflib.get_close_matches(name, BY_NAME, 1)
    near = near or [by_key[match] for match in difflib.get_close_matches(key, by_key, 1)]
    way_out = f"did you mean {near[0]}?" if near else "--print_config lists all settings"
    if new_name := RENAMED.get(name, FOREIGN_NAMES.get(key)):
      way_out = f"use {new_name}"
    lines.append(f"config.{name}: unknown setting; {way_out}")
  return lines


def flatten(config: ConfigDict | Config | Mapping[str, object]) -> dict[str, object]:
  """Return {"train.steps": 3, ...} of a config or of the nested dict in a config.json.

  Lists become tuples.
  """
  flat = {}
  for section, values in (config if isinstance(config, Mapping) else config.to_dict()).items():
    if not isinstance(values, Mapping):  # outside any section: `validate` reports it as unknown
      flat[section] = values
      continue
    for key, value in values.items():
      flat[f"{section}.{key}"] = tuple(value) if isinstance(value, list | tuple) else value
  return flat


def rename_saved(saved: Json) -> Json:
  """Return the saved config of a run, with old names of settings replaced by the current ones."""
  renamed = {**saved}  # not dict(): it takes lists of pairs too
  for old, new in RENAMED.items():
    section, key = old.split(".")
    values = renamed.get(section)
    if isinstance(values, Mapping) and key in values:
      renamed[section] = {new.split(".")[1] if it == key else it: values[it] for it in values}
  return renamed


def with_prefix(config: ConfigDict | Config) -> dict[str, object]:
  """Return {"config.train.steps": 3, ...}, with the names that messages use."""
  return {f"config.{name}": value for name, value in flatten(config).items()}


def resolve(config: ConfigDict | Config) -> Config:
  """Normalize and validate a user's config, and freeze it.

  Raises:
    RequestError: one line for each error that `validate` finds.
  """
  return _parse(flatten(normalize(config)))


def _parse(values: Mapping[str, object]) -> Config:
  """Invert `flatten`; raises RequestError with a line for each invalid value."""
  if lines := _validate_values(values):
    raise RequestError("\n".join(lines))
  return _from_flat(values)


def _from_flat(values: Mapping[str, object]) -> Config:
  """Invert `flatten`, without validation of combinations."""
  sections = {
    name: section(**{key.name: values[f"{name}.{key.name}"] for key in dataclasses.fields(section)})
    for name, section in SECTIONS.items()
  }
  return Config(**sections)


def validate(config: ConfigDict | Config | Mapping[str, object]) -> list[str]:
  """Return one line for each invalid value or combination; files and devices are not checked."""
  return _validate_values(flatten(config))


def _validate_values(values: Mapping[str, object]) -> list[str]:
  lines = unknown_settings(list(values))
  lines += [f"config.{name}: missing" for name in BY_NAME if name not in values]
  for name in BY_NAME.keys() & values.keys():
    setting = BY_NAME[name]
    value = values[name]
    if value in setting.literals or value is setting.default is None:
      continue
    if wanted := config_checks.type_error(setting.kind, value):
      lines.append(f"config.{name}={value!r}: must be {' or '.join([wanted, *setting.literals])}")
    elif isinstance(value, float) and not math.isfinite(value):
      lines.append(f"config.{name}={value}: not a finite number")
    elif isinstance(value, int) and abs(value) > MAX_INT:
      digits = len(str(abs(value)))
      lines.append(f"config.{name}: has {digits} digits; must be at most {MAX_INT:,}")
    elif wanted := setting.check(value):
      lines.append(f"config.{name}={value!r}: must be {wanted}")
  return sorted(lines) or _validate_combinations(_from_flat(values))


def _validate_combinations(config: Config) -> list[str]:
  """Return one line for each combination of valid values that is invalid."""
  values = flatten(config)

  def show(name: str) -> str:
    return f"config.{name}={values[name]!r}"

  model = config.model
  data = config.data
  train = config.train
  optim = config.optim
  lines = _validate_template(data)
  from_scratch = model.init == "scratch"
  if not model.path:
    lines.append("config.model.path is empty; set it to a hub id (gpt2) or a folder")
  if not data.train:
    lines.append("config.data.train is empty; set it to a file, a folder or hub:NAME")
  for name in ("lora.targets", "lora.layers", "lora.dropout"):
    if not config.lora.rank and values[name] != BY_NAME[name].default:
      lines.append(f"{show(name)}: no adapters with config.lora.rank=0; set config.lora.rank")
  if config.lora.rank and train.trainable_params:
    trainable = show("train.trainable_params")
    lines.append(
      f"{trainable}: {show('lora.rank')} trains the adapters instead; set only one of the two"
    )
  if config.lora.rank and from_scratch:
    lines.append(
      f"{show('lora.rank')}: adapters need pretrained weights; set config.lora.rank=0 or "
      "config.model.init=pretrained"
    )
  if train.trainable_params and from_scratch:
    lines.append(
      "config.train.trainable_params: config.model.init=scratch would leave all other weights "
      "random; leave it empty"
    )
  if bool(train.steps) == bool(train.epochs):
    lines.append(f"{show('train.steps')} and {show('train.epochs')}: set exactly one of the two")
  classifies = model.head == "classification"
  has_labels = data.format == "classification"
  if classifies != has_labels:
    settings = f"{show('model.head')} and {show('data.format')}"
    lines.append(f"{settings}: set both or neither to classification")
  eval_settings = ("train.keep_best_metric", "train.early_stopping_patience")
  for name in eval_settings:
    if values[name] and not train.eval_every:
      lines.append(f"{show(name)}: needs evaluations; set config.train.eval_every")
  if data.nats_column and data.format != "text":
    lines.append(f"{show('data.nats_column')}: needs config.data.format=text")
  if data.unrelated and has_labels:
    lines.append(
      f"{show('data.unrelated')}: a classification model has no loss on plain text; leave it empty"
    )
  for name in eval_settings:
    if values[name] and not (data.validation or data.validation_fraction):
      lines.append(
        f"{show(name)}: needs a held-out set; set config.data.validation_fraction above 0 or "
        "config.data.validation"
      )
  if classifies and train.sample_prompts:
    lines.append(
      "config.train.sample_prompts: a classification model generates no text; leave it empty"
    )
  rest = [show(name) for name in ("mesh.data", "mesh.fsdp", "mesh.tensor") if values[name] == -1]
  if len(rest) > 1:
    lines.append(f"{' and '.join(rest)}: only one can be -1")
  if optim.end_learning_rate > optim.learning_rate:
    lines.append(
      f"{show('optim.end_learning_rate')}: must be at most {show('optim.learning_rate')}"
    )
  if optim.warmup_steps and optim.warmup_ratio:
    warmup = f"{show('optim.warmup_steps')} and {show('optim.warmup_ratio')}"
    lines.append(f"{warmup}: set only one of the two")
  if model.config_overrides and not from_scratch:
    lines.append(
      f"{show('model.config_overrides')}: pretrained weights have fixed sizes; set "
      "config.model.init=scratch for new weights"
    )
  return lines


def _validate_template(data: DataSection) -> list[str]:
  """Return the error of `data.template`, or an empty list.

  It must have the fields {prompt} and {completion} or, for plain text, names of columns.
  """
  x = data.template
  prompt = "{prompt}"
  completion = "{completion}"
  if data.format == "text":
    is_valid = bool(TEMPLATE_FIELD.search(x))
    expected = "text with the name of a column in braces, such as {question}"
  else:
    once = x.count(prompt) == 1 == x.count(completion)
    is_valid = once and x.index(prompt) < x.index(completion)
    expected = "text with one {prompt} and, after it, one {completion}"
  return [] if is_valid else [f"config.data.template={x!r}: must be {expected}"]


def diff_from_saved(saved: Json, config: ConfigDict | Config) -> list[str]:
  """Return a line for each changed setting that a resumed run must not change.

  Args:
    saved: the config.json of the run.
    config: the config that resumes it.
  """
  # A setting that did not exist when the run started had its default value.
  old = flatten(default()) | flatten(rename_saved(saved))
  new = flatten(config)
  return [
    f"config.{name}={new.get(name)!r}: the run was started with {old.get(name)!r}"
    for name in sorted(old.keys() | new.keys())
    if name not in MUTABLE_ON_RESUME and old.get(name) != new.get(name)
  ]


def to_json(config: ConfigDict | Config) -> str:
  """Return the resolved config as JSON text, nested by section."""
  return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> Config:
  """Invert `to_json`.

  Raises:
    RequestError: the text is not a valid config.
  """
  try:
    flat = flatten(rename_saved(json.loads(text)))
  except (ValueError, TypeError, AttributeError, RecursionError) as error:
    raise RequestError(f"config.json of the run: not a config ({first_line(error)})") from error
  if lines := unknown_settings(list(flat)):
    raise RequestError("\n".join(lines))
  given = {name: value for name, value in flat.items() if value is not None}
  return _parse(flatten(default()) | given)


def load_run_config(file: Path) -> Config:
  """Read the config.json of a run.

  Raises:
    RequestError: the file cannot be read or is not a valid config.
  """
  try:
    return from_json(file.read_text(encoding="utf-8"))
  except (OSError, UnicodeDecodeError) as error:
    raise RequestError(f"{file}: {first_line(error)}") from error


def describe(config: ConfigDict | Config) -> str:
  """Return all settings with values and descriptions, as `--print_config` prints them."""
  values = flatten(config)
  lines = []
  for setting in SETTINGS:
    lines += [f"# {setting.doc}", f"config.{setting.name} = {values[setting.name]!r}"]
  return "\n".join(lines)
