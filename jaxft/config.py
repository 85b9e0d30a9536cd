"""Every setting of a run: its name, type, default, unit and meaning, once.

A config file (`configs/X.py`) has `get_config()`, which starts from `default()` and sets what the
experiment is about. `resolve` makes that ConfigDict the frozen `Config` of a run.
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
  """Define a setting: a field of a section, whose annotation has its type and its choices."""
  return dataclasses.field(default=default, metadata={"doc": doc, "check": check})


@dataclass(frozen=True, kw_only=True)
class ModelSection:
  path: str = setting("", "checkpoint to start from: a Hugging Face hub id or a folder")
  revision: str = setting("main", "branch, tag or commit of the hub id")
  torch_bin: bool = setting(
    False,
    "read pytorch_model*.bin, a pickle, where there are no other weights: through torch, which "
    "then must be installed, with weights_only=True",
  )
  init: Literal["pretrained", "scratch"] = setting(
    "pretrained", "read the weights, or draw new ones"
  )
  head: Literal["lm", "classification"] = setting(
    "lm", "lm writes text; classification tells the labels of data.format=classification apart"
  )
  config: str = setting(
    "", "config.json of the model to draw from scratch; empty: the one in model.path"
  )
  config_overrides: str = setting(
    "",
    "keys of that config.json with other values, for a model drawn from scratch: "
    "n_embd=512,n_layer=4",
    config_overrides,
  )
  tokenizer: str = setting(
    "", "folder or hub id of another tokenizer; empty: the one in model.path"
  )
  compute_dtype: str = setting(
    "auto", "dtype of activations; auto: bfloat16 on GPU and TPU, float32 on CPU", compute_dtype
  )
  param_dtype: Literal["float32", "bfloat16"] = setting(
    "float32",
    "of the matrices of layers; bfloat16 takes half the memory, and rounds updates up or down by "
    "chance",
  )
  attention: Literal["auto", "cudnn", "splash", "chunked", "reference"] = setting(
    "auto",
    "auto: cudnn or splash where the hardware has it, else chunked; reference: all probabilities "
    "in memory",
  )
  dropout: float | None = setting(
    None, "dropout everywhere; unset: the rates of the model's config.json", between(0, 1)
  )


@dataclass(frozen=True, kw_only=True)
class DataSection:
  train: tuple[str, ...] = setting(
    (),
    "one or more sources: hub:NAME[:SPLIT], or a .txt, .jsonl, .csv or .parquet file, glob or "
    "folder; with @WEIGHT after it an epoch passes so often over its documents: stories.jsonl@0.5",
  )
  validation: tuple[str, ...] = setting(
    (), "sources to evaluate on; empty: split off the training documents"
  )
  unrelated: tuple[str, ...] = setting(
    (),
    "sources of text that has nothing to do with data.train: evaluated with the held-out text, to "
    "see what was forgotten",
  )
  validation_fraction: float = setting(
    0.05,
    "share of documents held out when data.validation is empty; of fewer documents than that the "
    "end of each; 0: nothing is held out, and there is no eval loss",
    between(0, 1),
  )
  format: Literal["text", "prompt_completion", "classification"] = setting(
    "text",
    "what a row is: text to learn, a prompt and the completion to learn, or text and its label "
    "(the folder's name, for .txt files)",
  )
  text_column: str = setting("text", "column that holds the text")
  prompt_column: str = setting("prompt", "column of the prompt, for prompt_completion")
  completion_column: str = setting("completion", "column of the completion, for prompt_completion")
  label_column: str = setting("label", "column of the label, for classification")
  template: str = setting(
    "{prompt}{completion}",
    "how a prompt and its completion are put together; what follows the prompt's text is learned "
    "from {completion} on. With data.format=text another one puts columns of the row together, all "
    "of it to be learned: Question: {q}. Answer: {a}",
  )
  encoding: str = setting(
    "utf-8", "of text, JSON and CSV files: utf-8, cp1252, latin-1, utf-16, ...", encoding
  )
  separator: str = setting(
    "", "text that cuts a .txt file into documents; empty: a file is one document"
  )
  on_bad_row: Literal["error", "skip"] = setting(
    "error", "end the run at a row that is no text, or count it and go on"
  )
  duplicates: Literal["keep", "drop"] = setting(
    "keep", "what becomes of a document that was read before"
  )
  layout: Literal["concat", "pack", "pad"] = setting(
    "concat",
    "concat: one stream cut into rows; pack: several examples a row that do not see each other; "
    "pad: one example a row",
  )
  cache_dir: str = setting(
    "", "folder that keeps the tokens; empty: ~/.cache/jaxft/tokens (or XDG_CACHE_HOME)"
  )
  nats_column: str = setting(
    "",
    "column with -log p of each document in nats, where the text was drawn from a known "
    "distribution: the floor no model can beat is then printed beside the eval loss",
  )
  sequence_length: int = setting(512, "tokens a row", at_least(2))
  limit_train: int = setting(
    0, "use this many training documents, drawn with shuffle_seed; 0: all", at_least(0)
  )
  limit_validation: int = setting(
    0, "use this many validation documents, drawn likewise; 0: all", at_least(0)
  )
  shuffle_seed: int = setting(
    0, "seed of the order of rows and of every draw of documents", between(0, 2**31)
  )


@dataclass(frozen=True, kw_only=True)
class TrainSection:
  steps: int = setting(0, "optimizer steps; 0: as many as train.epochs takes", at_least(0))
  epochs: float = setting(
    0.0, "passes over the training rows; 0: train.steps says when to end", at_least(0)
  )
  batch_size: int = setting(8, "sequences per optimizer step, over all devices", at_least(1))
  micro_batch_size: int = setting(
    0,
    "most sequences a device takes at once; a batch that is larger is accumulated; 0: no limit",
    at_least(0),
  )
  profile_steps: int = setting(
    0,
    "optimizer steps, from the third on, that JAX's profiler traces into WORKDIR/profile",
    at_least(0),
  )
  seed: int = setting(0, "seed of dropout, of new weights and of the samples", between(0, 2**31))
  log_every: int | Literal["epoch"] = setting(
    10, "steps between lines of metrics.jsonl, or epoch", at_least(1)
  )
  eval_every: int | Literal["epoch"] = setting(
    0,
    "steps between evaluations, or epoch; 0: only before the first and after the last",
    at_least(0),
  )
  eval_batch_size: int = setting(
    0,
    "sequences an evaluation takes at once, over all devices; 0: as many as training does",
    at_least(0),
  )
  eval_batches: int = setting(0, "batches an evaluation; 0: all validation rows", at_least(0))
  save_every: int | Literal["epoch"] = setting(
    500, "steps between checkpoints, or epoch; 0: only after the last", at_least(0)
  )
  keep: int = setting(2, "newest checkpoints to keep", at_least(1))
  keep_best_metric: Literal["", "eval/loss", "eval/perplexity"] = setting(
    "",
    "keep the checkpoint with the least of this too: one is saved after each evaluation; empty: "
    "only the newest",
  )
  early_stopping_patience: int = setting(
    0, "evaluations without a lower eval loss that end the run; 0: none do", at_least(0)
  )
  max_bad_steps: int = setting(
    1, "non-finite steps in a row that end the run (they change no weight)", at_least(1)
  )
  sample_prompts: tuple[str, ...] = setting(
    (), "prompts completed before and after training, with the same seed"
  )
  sample_every: int = setting(
    0, "steps between further samples; 0: only before and after", at_least(0)
  )
  sample_tokens: int = setting(100, "tokens drawn for each prompt", at_least(1))
  trainable_params: tuple[str, ...] = setting(
    (),
    "names of the weights to train, as the checkpoint has them, with * for anything: "
    "transformer.h.11.*, transformer.ln_f.*; the others stay as they are; empty: all are trained",
  )


@dataclass(frozen=True, kw_only=True)
class OptimSection:
  name: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = setting(
    "adamw", "optimizer; muon: for matrices of layers, and adamw for the rest"
  )
  learning_rate: float = setting(5e-05, "peak learning rate", above(0))
  schedule: Literal["constant", "linear", "cosine"] = setting("linear", "course after the warm-up")
  warmup_steps: int = setting(
    0, "steps of linear warm-up, from 0; where the run has fewer, a tenth of them", at_least(0)
  )
  warmup_ratio: float = setting(
    0.0, "share of all steps to warm up in; goes without warmup_steps", between(0, 1)
  )
  end_learning_rate: float = setting(
    0.0, "learning rate that linear and cosine end at", at_least(0)
  )
  weight_decay: float = setting(
    0.0, "decoupled decay of matrices and embeddings (not biases, not norms)", at_least(0)
  )
  b1: float = setting(0.9, "decay of the first moment (momentum for sgd)", between(0, 1))
  b2: float = setting(0.999, "decay of the second moment", between(0, 1))
  eps: float = setting(1e-08, "added to the root of the second moment", at_least(1e-30))
  clip_norm: float = setting(
    1.0, "largest global norm of the gradient; 0: no clipping", at_least(0)
  )
  state_dtype: Literal["float32", "bfloat16"] = setting("float32", "dtype of the first moment")


@dataclass(frozen=True, kw_only=True)
class MeshSection:
  data: int = setting(1, "devices that hold copies and split the batch; -1: the rest", axis_size)
  fsdp: int = setting(
    -1, "devices that split weights, optimizer state and the batch; -1: the rest", axis_size
  )
  tensor: int = setting(
    1,
    "devices that split heads, feed-forward and vocabulary of each layer; -1: the rest",
    axis_size,
  )
  zero_stage: int = setting(
    3,
    "what mesh.fsdp splits: 0 nothing but the batch, 1 the optimizer state, 2 and the gradients, 3 "
    "and the weights",
    between(0, 4),
  )


@dataclass(frozen=True, kw_only=True)
class MemorySection:
  remat: Literal["none", "dots", "full"] = setting(
    "dots",
    "activations recomputed in the backward pass: none, all but matrix products and attention, all "
    "but each layer's input",
  )
  offload: Literal["none", "optimizer", "all"] = setting(
    "none",
    "what the host's memory holds: nothing; weights and optimizer state, with a copy of the "
    "weights in the compute dtype on the device; weights, gradient and optimizer state, of which "
    "the device has one layer at a time",
  )
  loss_chunk: int = setting(
    -1,
    "positions a row whose logits exist at once; -1: as many as 128 MiB hold, on a GPU or TPU 512 "
    "MiB unless `memory.remat` is full; 0: all of them",
    at_least(-1),
  )


@dataclass(frozen=True, kw_only=True)
class LoraSection:
  rank: int = setting(
    0, "rank of adapters that are trained instead of the weights; 0: none", at_least(0)
  )
  alpha: float = setting(16.0, "adapters are scaled by alpha / rank", above(0))
  dropout: float = setting(0.0, "dropout of what goes into an adapter", between(0, 1))
  targets: tuple[str, ...] = setting(
    (),
    "matrices with an adapter, by the ends of their names in the checkpoint: c_attn, mlp.c_proj, "
    "q_proj, ..., or all-linear; empty: what PEFT takes, c_attn of GPT-2 and q_proj and v_proj of "
    "the others",
  )
  layers: tuple[str, ...] = setting((), 'layers with an adapter, such as "0-3", "11"; empty: all')


@dataclass(frozen=True, kw_only=True)
class TrackingSection:
  writers: tuple[str, ...] = setting(
    (),
    "trackers of the run, beside the console and metrics.jsonl: tensorboard, mlflow, wandb, "
    "trackio; docs/trackers.md",
    writers,
  )
  run_name: str = setting("", "name of the run in trackers; empty: the workdir's")
  logging_dir: str = setting(
    "", "folder of TensorBoard's files, one in it for each run; empty: WORKDIR/tensorboard"
  )
  system_metrics: bool = setting(
    False,
    "log the load and memory of the host of process 0 and of its devices too, in metrics.jsonl and "
    "trackers",
  )


@dataclass(frozen=True, kw_only=True)
class ExportSection:
  out: str = setting("", "folder for the Hugging Face model; empty: WORKDIR/export")
  dtype: Literal["float32", "bfloat16", "float16"] = setting(
    "float32", "dtype of the exported weights"
  )
  max_shard_size: str = setting(
    "5GB", "largest weight file: a number and KB, MB, GB or TB", file_size
  )
  push_to_hub: str = setting("", "hub repository (OWNER/NAME) to upload the export to; empty: none")


@dataclass(frozen=True, kw_only=True)
class Config:
  """All settings of a run, as `resolve` checked them."""

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
    """Return {"data": {"cache_dir": "", ...}, ...}, sorted as a ConfigDict's."""
    sections = sorted(dataclasses.asdict(self).items())
    return {name: dict(sorted(values.items())) for name, values in sections}

  def replace(self, settings: Mapping[str, Value]) -> "Config":
    """Return the config with other values of these settings: {"train.steps": 3, ...}.

    The values are not checked: `resolve` does that. Raises RequestError for an unknown setting.
    """
    if lines := unknown_settings([*settings]):
      raise RequestError("\n".join(lines))
    return _from_flat({**flatten(self), **settings})


class Setting(NamedTuple):
  """A field of a section."""

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
MAX_INT = 2**31 - 1  # of a whole number: steps and rows are counted in 32 bits
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

# Two settings of one quantity: if one is on the command line, the other one of the config file is
# set to its default.
EXCLUSIVE_PAIRS = (("train.steps", "train.epochs"), ("optim.warmup_steps", "optim.warmup_ratio"))

# Settings that may differ when a run is resumed: they change what is written, not what is learned.
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
  """Return every setting at its default, locked: an unknown key raises AttributeError."""
  config = ConfigDict(type_safe=False)  # `normalize` and `validate` look at types
  for setting in SETTINGS:
    section, key = setting.name.split(".")
    if section not in config:
      config[section] = ConfigDict(type_safe=False)
    unset = config_dict.placeholder(setting.kind)
    config[section][key] = unset if setting.default is None else setting.default
  return config.lock()


def normalize(config: ConfigDict | Config) -> ConfigDict:
  """Return a copy whose values have the settings' types if their meaning is clear.

  A Path becomes its text, a text a tuple of it, a numpy number the number, 1e3 becomes 1000 and ~
  the user's home. `validate` reports the rest.
  """
  normalized = ConfigDict(type_safe=False)
  for name, value in flatten(config).items():
    section, _, key = name.partition(".")
    if not key:  # no section: `validate` reports it
      normalized[section] = value
      continue
    if section not in normalized:
      normalized[section] = ConfigDict(type_safe=False)
    normalized[section][key] = _normalize_value(BY_NAME[name], value) if name in BY_NAME else value
  return normalized.lock()


def _normalize_value(setting: Setting, value: object) -> object:
  if hasattr(value, "tolist"):  # of numpy, pandas
    value = value.tolist()
  if setting.kind is tuple:
    value = tuple(value) if isinstance(value, list) else value
    items = value if isinstance(value, tuple) else (value,)
    items = () if items == ("",) else items  # --config.data.validation= means none
    return tuple(_expand_path(item, setting) for item in items)
  value = _expand_path(value, setting)
  # From the command line, which takes text here.
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


# What other tools call a setting, if that is nearer to the name of another one.
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

# Settings with another name in the config.json and the checkpoints of earlier runs.
RENAMED = {"train.only": "train.trainable_params"}  # until 2026-11-29


def unknown_settings(names: list[str]) -> list[str]:
  """Return one line for each name that is no setting, with the nearest one that is."""
  by_key = {known.split(".")[1]: known for known in BY_NAME}
  lines = []
  for name in names:
    if name in BY_NAME:
      continue
    key = name.split(".")[-1]
    # The key decides: `optim.lerning_rate`, `train.learning_rate` and `learning_rate` mean one.
    near = difflib.get_close_matches(name, BY_NAME, 1)
    near = near or [by_key[match] for match in difflib.get_close_matches(key, by_key, 1)]
    way_out = f"did you mean {near[0]}?" if near else "--print_config lists all settings"
    if new_name := RENAMED.get(name, FOREIGN_NAMES.get(key)):
      way_out = f"here it is {new_name}"
    lines.append(f"config.{name}: there is no such setting; {way_out}")
  return lines


def flatten(config: ConfigDict | Config | Mapping[str, object]) -> dict[str, object]:
  """Return {"train.steps": 3, ...} of a config or of the nested dict in a config.json.

  Lists become tuples.
  """
  flat = {}
  for section, values in (config if isinstance(config, Mapping) else config.to_dict()).items():
    if not isinstance(values, Mapping):  # a key outside any section, which is reported as unknown
      flat[section] = values
      continue
    for key, value in values.items():
      flat[f"{section}.{key}"] = tuple(value) if isinstance(value, list | tuple) else value
  return flat


def rename_saved(saved: Json) -> Json:
  """The nested config that a run has left, each setting under the name that it has now."""
  renamed = {**saved}  # not dict(): it takes lists of pairs too
  for old, new in RENAMED.items():
    section, key = old.split(".")
    values = renamed.get(section)
    if isinstance(values, Mapping) and key in values:
      renamed[section] = {new.split(".")[1] if it == key else it: values[it] for it in values}
  return renamed


def with_prefix(config: ConfigDict | Config) -> dict[str, object]:
  """Return {"config.train.steps": 3, ...}: settings by their names in messages."""
  return {f"config.{name}": value for name, value in flatten(config).items()}


def resolve(config: ConfigDict | Config) -> Config:
  """Parse what a user wrote, normalized; raises RequestError with all that `validate` finds."""
  return _parse(flatten(normalize(config)))


def _parse(values: Mapping[str, object]) -> Config:
  """Invert `flatten`; raises RequestError with all that is wrong with the values."""
  if lines := _validate_values(values):
    raise RequestError("\n".join(lines))
  return _from_flat(values)


def _from_flat(values: Mapping[str, object]) -> Config:
  """Invert `flatten` for values that are valid by themselves."""
  sections = {
    name: section(**{key.name: values[f"{name}.{key.name}"] for key in dataclasses.fields(section)})
    for name, section in SECTIONS.items()
  }
  return Config(**sections)


def validate(config: ConfigDict | Config | Mapping[str, object]) -> list[str]:
  """Return the errors of the values themselves, one line each; files and devices come later."""
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
      lines.append(f"config.{name}: a number of {len(str(abs(value)))} digits; at most {MAX_INT:,}")
    elif wanted := setting.check(value):
      lines.append(f"config.{name}={value!r}: must be {wanted}")
  return sorted(lines) or _validate_combinations(_from_flat(values))


def _validate_combinations(config: Config) -> list[str]:
  """Return what is wrong with values that are valid by themselves, one line each."""
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
    lines.append("config.model.path: empty; name a hub id (gpt2) or a folder")
  if not data.train:
    lines.append("config.data.train: empty; name a file, a folder or hub:NAME")
  for name in ("lora.targets", "lora.layers", "lora.dropout"):
    if not config.lora.rank and values[name] != BY_NAME[name].default:
      lines.append(f"{show(name)}: there are no adapters with config.lora.rank=0")
  if config.lora.rank and train.trainable_params:
    trainable = show("train.trainable_params")
    lines.append(f"{trainable}: with {show('lora.rank')} the adapters are trained; set one")
  if config.lora.rank and from_scratch:
    lines.append(
      f"{show('lora.rank')}: adapters change a model that was trained; "
      "config.model.init=scratch has none"
    )
  if train.trainable_params and from_scratch:
    lines.append(
      "config.train.trainable_params: the other weights would stay as they are drawn with "
      "config.model.init=scratch"
    )
  if bool(train.steps) == bool(train.epochs):
    lines.append(f"{show('train.steps')} and {show('train.epochs')}: set one of the two")
  classifies = model.head == "classification"
  has_labels = data.format == "classification"
  if classifies != has_labels:
    settings = f"{show('model.head')} and {show('data.format')}"
    lines.append(f"{settings}: classification is both or neither")
  eval_settings = ("train.keep_best_metric", "train.early_stopping_patience")
  for name in eval_settings:
    if values[name] and not train.eval_every:
      lines.append(f"{show(name)}: goes with evaluations; set config.train.eval_every")
  if data.nats_column and data.format != "text":
    lines.append(f"{show('data.nats_column')}: goes with data.format=text only")
  if data.unrelated and has_labels:
    lines.append(f"{show('data.unrelated')}: a model that classifies has no loss on other text")
  for name in eval_settings:
    if values[name] and not (data.validation or data.validation_fraction):
      lines.append(
        f"{show(name)}: nothing is held out with config.data.validation_fraction=0; "
        "name sources in config.data.validation"
      )
  if classifies and train.sample_prompts:
    lines.append(
      "config.train.sample_prompts: a model with a classification head writes no text; "
      "leave it empty"
    )
  rest = [show(name) for name in ("mesh.data", "mesh.fsdp", "mesh.tensor") if values[name] == -1]
  if len(rest) > 1:
    lines.append(f"{' and '.join(rest)}: only one can take the rest")
  if optim.end_learning_rate > optim.learning_rate:
    lines.append(f"{show('optim.end_learning_rate')}: above {show('optim.learning_rate')}")
  if optim.warmup_steps and optim.warmup_ratio:
    warmup = f"{show('optim.warmup_steps')} and {show('optim.warmup_ratio')}"
    lines.append(f"{warmup}: set one of the two")
  if model.config_overrides and not from_scratch:
    lines.append(
      f"{show('model.config_overrides')}: weights that are read have their own sizes; "
      "config.model.init=scratch draws new ones"
    )
  return lines


def _validate_template(data: DataSection) -> list[str]:
  """Return what is wrong with `data.template`.

  Its fields are a prompt and a completion or, for plain text, columns.
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
    expected = "text with {prompt} and after it {completion}, each once"
  return [] if is_valid else [f"config.data.template={x!r}: must be {expected}"]


def diff_from_saved(saved: Json, config: ConfigDict | Config) -> list[str]:
  """Return a line for each setting that changes what is learned and differs from a saved config."""
  # A setting that did not exist yet had its default.
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
  """Invert `to_json`; raises RequestError for anything that it cannot have written."""
  try:
    flat = flatten(rename_saved(json.loads(text)))
  except (ValueError, TypeError, AttributeError, RecursionError) as error:
    raise RequestError(f"config.json of the run: not a config ({first_line(error)})") from error
  if lines := unknown_settings(list(flat)):
    raise RequestError("\n".join(lines))
  given = {name: value for name, value in flat.items() if value is not None}
  return _parse(flatten(default()) | given)


def load_run_config(file: Path) -> Config:
  """Read the config.json of a run; raises RequestError if `to_json` cannot have written it."""
  try:
    return from_json(file.read_text(encoding="utf-8"))
  except (OSError, UnicodeDecodeError) as error:
    raise RequestError(f"{file}: {first_line(error)}") from error


def describe(config: ConfigDict | Config) -> str:
  """Return every setting with its value and its meaning, as `--print_config` shows it."""
  values = flatten(config)
  lines = []
  for setting in SETTINGS:
    lines += [f"# {setting.doc}", f"config.{setting.name} = {values[setting.name]!r}"]
  return "\n".join(lines)
