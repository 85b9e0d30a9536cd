"""The flags of transformers' run_clm.py: what each is here, or why it is nothing here. Also the config that they start from.

python -m jaxft.train --model_name_or_path gpt2 --train_file my_texts.txt --do_train --output_dir runs/mine
"""

import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

import jaxft.config
from jaxft.config_checks import TRACKERS
from jaxft.data import sources
from jaxft.errors import RequestError
from jaxft.utils.files import expand_user


class MapsTo(NamedTuple):
  """A setting that means the same."""

  setting: str
  # None: nothing is set. Raises ValueError with the reason where the value cannot mean anything.
  value: Callable[[str], str | None] = str


def _choice(**choices: str) -> Callable[[str], str]:
  def value(text: str) -> str:
    if text not in choices:
      near = difflib.get_close_matches(text, choices, 1)
      raise ValueError(
        f"there is only {', '.join(choices)} here" + (f"; did you mean {near[0]}?" if near else "")
      )
    return choices[text]

  return value


def _whole(text: str) -> str:
  try:
    number = float(text)
  except ValueError:
    number = -1.0
  if not (number >= 0 and number.is_integer()):
    raise ValueError("give a whole number")
  return str(int(number))


def _at_least_one(text: str) -> str:
  if int(found := _whole(text)) < 1:
    raise ValueError("must be at least 1")
  return found


def _every(text: str) -> str:
  """How many steps apart; transformers takes a share of all steps too."""
  if text.startswith("0.") and 0 < float(_number(text)) < 1:
    raise ValueError("a share of the steps means nothing here; give a number of steps")
  return _at_least_one(text)


def _number(text: str) -> str:
  try:
    fine = math.isfinite(float(text))
  except ValueError:
    fine = False
  if not fine:
    raise ValueError("give a number")
  return text


def _at_most(text: str) -> str:
  """The number of checkpoints to keep; transformers keeps all where it is 0 or less."""
  return str(jaxft.config.MAX_INT) if re.fullmatch("-[0-9]+|0", text) else _whole(text)


def _share(text: str) -> str:
  return str(float(_number(text)) / 100)


def _switch(on: str, off: str | None) -> Callable[[str], str | None]:
  """The value of a setting for True, and for False, where None leaves it as it is."""
  return lambda text: on if _is_true(text) else off


def _is_true(text: str) -> bool:
  if text.lower() not in ("true", "1", "yes", "y", "t", "", "false", "0", "no", "n", "f"):
    raise ValueError("give True or False")
  return text.lower() in ("true", "1", "yes", "y", "t", "")


def _trackers(text: str) -> str:
  known = _choice(none="", **{name: name for name in TRACKERS})
  names = [name for word in text.split(",") if (name := known(word.strip()))]
  return str(tuple(names)) if names[1:] else "".join(names)


FLOAT16 = "float16 is not there yet; computed in bfloat16 where the device has it, else in float32, which need no loss scale"
MAPPED = {
  "model_name_or_path": MapsTo("model.path"),
  "model_revision": MapsTo("model.revision"),
  "tokenizer_name": MapsTo("model.tokenizer"),
  "config_overrides": MapsTo("model.config_overrides"),
  "train_file": MapsTo("data.train"),
  "validation_file": MapsTo("data.validation"),
  "validation_split_percentage": MapsTo("data.validation_fraction", _share),
  "max_train_samples": MapsTo("data.limit_train", _at_least_one),
  "max_eval_samples": MapsTo("data.limit_validation", _at_least_one),
  "block_size": MapsTo("data.sequence_length", _at_least_one),
  "learning_rate": MapsTo("optim.learning_rate", _number),
  "num_train_epochs": MapsTo("train.epochs", _number),
  "max_steps": MapsTo("train.steps", _whole),
  "lr_scheduler_type": MapsTo(
    "optim.schedule",
    _choice(linear="linear", cosine="cosine", constant="constant", constant_with_warmup="constant"),
  ),
  "warmup_steps": MapsTo("optim.warmup_steps", _whole),
  "warmup_ratio": MapsTo("optim.warmup_ratio", _number),
  "optim": MapsTo(
    "optim.name",
    _choice(
      adamw_torch="adamw",
      adamw_torch_fused="adamw",
      adamw_hf="adamw",
      adafactor="adafactor",
      lion_32bit="lion",
    ),
  ),
  "adafactor": MapsTo("optim.name", _switch("adafactor", None)),
  "weight_decay": MapsTo("optim.weight_decay", _number),
  "adam_beta1": MapsTo("optim.b1", _number),
  "adam_beta2": MapsTo("optim.b2", _number),
  "adam_epsilon": MapsTo("optim.eps", _number),
  "max_grad_norm": MapsTo("optim.clip_norm", _number),
  "seed": MapsTo("train.seed", _whole),
  "data_seed": MapsTo("data.shuffle_seed", _whole),
  "bf16": MapsTo("model.compute_dtype", _switch("bfloat16", "float32")),
  "gradient_checkpointing": MapsTo("memory.remat", _switch("full", "dots")),
  "activation_checkpointing": MapsTo("memory.remat", _switch("full", "dots")),
  "logging_dir": MapsTo("tracking.logging_dir"),
  "logging_steps": MapsTo("train.log_every", _every),
  "eval_steps": MapsTo("train.eval_every", _every),
  "save_steps": MapsTo("train.save_every", _every),
  "save_total_limit": MapsTo("train.keep", _at_most),
  "load_best_model_at_end": MapsTo("train.keep_best_metric", _switch("eval/loss", "")),
  "report_to": MapsTo("tracking.writers", _trackers),
  "run_name": MapsTo("tracking.run_name"),
}
# When something happens, and the flag and the setting that say how often.
STRATEGIES = {
  "logging_strategy": ("logging_steps", "train.log_every"),
  "eval_strategy": ("eval_steps", "train.eval_every"),
  "save_strategy": ("save_steps", "train.save_every"),
}
ALIASES = {
  "evaluation_strategy": "eval_strategy",
  "dtype": "torch_dtype",
  "per_gpu_train_batch_size": "per_device_train_batch_size",
  "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}
PUSH, HUB_NAME = "push_to_hub", "hub_model_id"
BEST = "metric_for_best_model"
PER_DEVICE, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
EVAL_PER_DEVICE = "per_device_eval_batch_size"
BATCH = {"train.batch_size", "train.micro_batch_size"}
WORKDIR, OVERWRITE, RESUME = "output_dir", "overwrite_output_dir", "resume_from_checkpoint"
DATASET, CONFIGURATION = "dataset_name", "dataset_config_name"
MODEL_TYPE, CONFIG_NAME, CACHE = "model_type", "config_name", "cache_dir"
DEEPSPEED, FLOAT_16, DTYPE = "deepspeed", "fp16", "torch_dtype"
STREAMING, STREAMED = (
  "streaming",
  "the data set is downloaded, and its tokens made once and memory-mapped",
)
LOADER = "the loader has nothing to set: it reads memory-mapped tokens"
NO_DDP, NO_TORCH = "XLA makes the collectives", "it is torch's; XLA compiles every step"
NO_METRICS = "an evaluation reports loss and perplexity, or accuracy and F1"
# Flags that ask for what every run does, or for what changes no result, with the reason where another value asks for more.
NO_OPS = {
  "do_train": "",
  "do_eval": "weights are evaluated before the first step and after the last in any case",
  "low_cpu_mem_usage": "",
  "eval_on_start": "weights are evaluated before the first step in any case",
  "prediction_loss_only": "",
  "logging_first_step": "weights are evaluated before the first step, whose loss is not logged separately",
  "logging_nan_inf_filter": "what is not finite is told, and never applied",
  "include_num_input_tokens_seen": "",
  "past_index": "no state is handed on from batch to batch",
  "ray_scope": "no hyper-parameters are searched",
  "use_legacy_prediction_loop": "",
  "include_tokens_per_second": "",
  "skip_memory_metrics": "",
  "full_determinism": "",
  "enable_jit_checkpoint": "",
  "save_safetensors": "weights are written as safetensors",
  "average_tokens_across_devices": "the loss is a mean over the tokens of all devices",
  "remove_unused_columns": "",
  "overwrite_cache": "tokens are made anew when text, tokenizer or settings change",
  "use_fast_tokenizer": "the fast tokenizer is read, whose tokens are the same",
  "keep_linebreaks": "every newline is kept",
  "disable_tqdm": "a log without a terminal has no bar",
  "log_level": "a run tells one story, without levels",
  "log_level_replica": "process 0 alone tells it",
  "log_on_each_node": "process 0 alone tells it",
  "save_on_each_node": "the workdir is shared",
  "bf16_full_eval": "an evaluation computes as training does",
  "fp16_full_eval": "an evaluation computes as training does",
  "torch_compile": "every step is compiled",
  "torch_compile_backend": NO_TORCH,
  "torch_compile_mode": NO_TORCH,
  "torch_empty_cache_steps": NO_TORCH,
  "torchdynamo": NO_TORCH,
  "jit_mode_eval": NO_TORCH,
  "use_ipex": NO_TORCH,
  "use_liger_kernel": "config.model.attention and XLA choose the kernels",
  "half_precision_backend": "there is one",
  "fp16_opt_level": "there is one",
  "fp16_backend": "there is one",
  "gradient_checkpointing_kwargs": "config.memory.remat is all there is",
  "activation_checkpointing_kwargs": "config.memory.remat is all there is",
  "use_cache": "training has no cache",
  "eval_accumulation_steps": "sums stay on the device",
  "eval_do_concat_batches": NO_METRICS,
  "eval_use_gather_object": NO_METRICS,
  "batch_eval_metrics": NO_METRICS,
  "ddp_find_unused_parameters": NO_DDP,
  "ddp_bucket_cap_mb": NO_DDP,
  "ddp_broadcast_buffers": NO_DDP,
  "ddp_static_graph": NO_DDP,
  "ddp_backend": NO_DDP,
  "xpu_backend": NO_DDP,
  "ddp_timeout": "--peer_timeout says how long a silent process is waited for",
  "local_rank": "processes are found out",
} | dict.fromkeys(
  "preprocessing_num_workers dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
  "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order dispatch_batches split_batches".split(),
  LOADER,
)  # fmt: skip
# Those that take a value, and those of which False asks for what always happens.
VALUED = {
  *(
    "log_level log_level_replica torch_compile_backend torch_compile_mode torch_empty_cache_steps fp16_opt_level"
  ).split(),
  *(
    "half_precision_backend fp16_backend gradient_checkpointing_kwargs activation_checkpointing_kwargs"
  ).split(),
  *(
    "eval_accumulation_steps ddp_bucket_cap_mb ddp_backend ddp_timeout local_rank past_index ray_scope"
  ).split(),
  *(
    "preprocessing_num_workers dataloader_num_workers dataloader_prefetch_factor torchdynamo xpu_backend"
  ).split(),
  *("dataloader_multiprocessing_context include_num_input_tokens_seen").split(),
}
ONLY_FALSE = {
  *(
    "disable_tqdm log_on_each_node save_on_each_node bf16_full_eval fp16_full_eval logging_first_step"
  ).split(),
  *("use_cache jit_mode_eval use_ipex").split(),
}
# Values of others that change nothing.
PLAIN = {
  "log_level": ("passive",),
  "log_level_replica": ("passive", "warning"),
  "ddp_timeout": ("1800",),
  "local_rank": ("-1", "0"),
}
# Of these only True asks for what always happens.
ONLY_TRUE = {
  "keep_linebreaks": "text without its newlines is other text; leave them out of the file",
  "save_safetensors": "pickles are not written",
}
SHARDING = "config.mesh and config.memory say how a run is spread: docs/sharding.md"
TOKEN = "the token is read where huggingface_hub keeps it, or from HF_TOKEN"
UNSUPPORTED = {
  "trust_remote_code": "no code from a checkpoint is ever run; leave it out",
  "fsdp": SHARDING,
  "fsdp_config": SHARDING,
  "fsdp_min_num_params": SHARDING,
  "fsdp_transformer_layer_cls_to_wrap": SHARDING,
  "sharded_ddp": SHARDING,
  "accelerator_config": SHARDING,
  "parallelism_config": SHARDING,
  "mp_parameters": SHARDING,
  "tpu_num_cores": "all devices are used that JAX finds",
  "hub_token": TOKEN,
  "token": TOKEN,
  "use_auth_token": TOKEN,
  "push_to_hub_token": TOKEN,
  "push_to_hub_model_id": "--hub_model_id OWNER/NAME is its name now",
  "push_to_hub_organization": "--hub_model_id OWNER/NAME names it too",
  "hub_private_repo": "make the repository first, as private as it should be",
  "hub_strategy": "the model is uploaded once, at the end",
  "hub_always_push": "the model is uploaded once, at the end",
  "hub_revision": "the model is uploaded to the branch main",
  "dataloader_drop_last": "the last rows of an epoch are in the same batch as the first of the next, so none is dropped: "
  "leave it out",
  "label_smoothing_factor": "the loss is plain cross-entropy; leave it out",
  "label_names": "targets are the tokens themselves",
  "neftune_noise_alpha": "there is no noise on embeddings; --config.model.dropout is what there is",
  "do_predict": "python -m jaxft.generate and python -m jaxft.evaluate use a model",
  "auto_find_batch_size": "python -m jaxft.plan --fit finds the largest batch that fits, before the run",
  "group_by_length": "--config.data.layout=pack leaves no padding to save",
  "train_sampling_strategy": "rows come in a new order each epoch; --config.data.layout=pack leaves no padding to save",
  "length_column_name": "--config.data.layout=pack leaves no padding to save",
  "no_cuda": "set JAX_PLATFORMS=cpu before the command",
  "use_cpu": "set JAX_PLATFORMS=cpu before the command",
  "use_mps_device": "JAX has no stable support for it",
  "tf32": "set JAX_DEFAULT_MATMUL_PRECISION, to tensorfloat32 or float32, before the command",
  "optim_args": "config.optim has what can be set of an optimizer",
  "optim_target_modules": "--config.train.only and --config.lora.targets choose what is trained",
  "lr_scheduler_kwargs": "config.optim has what can be set of a schedule",
  "greater_is_better": "less eval loss is better",
  "eval_delay": "--config.train.eval_every says when weights are evaluated",
  "include_for_metrics": NO_METRICS,
  "include_inputs_for_metrics": NO_METRICS,
  "save_only_model": "a checkpoint has what a run needs to continue; the model alone is in WORKDIR/export",
  "ignore_data_skip": "a run that continues takes the rows that come next, and looks them up at once",
  "restore_callback_states_from_checkpoint": "a run that continues has all of its state",
  "liger_kernel_config": "config.model.attention and XLA choose the kernels",
  "project": "docs/trackers.md says how to name projects",
  "trackio_space_id": "docs/trackers.md says how to name projects",
  "trackio_bucket_id": "docs/trackers.md says how to name projects",
  "trackio_static_space_id": "docs/trackers.md says how to name projects",
  "debug": "a step with a NaN or an infinity is reported with the names of such tensors",
  "tpu_metrics_debug": "a step with a NaN or an infinity is reported with the names of such tensors",
}
# Values that ask for what always happens, as no value at all does.
NOTHING = {"false", "0", "0.0", "no", "none", "{}", "[]"}
DEFAULTS = {"train_sampling_strategy": "random", "hub_strategy": "every_save"}
KNOWN_FLAGS = (
  MAPPED.keys() | STRATEGIES.keys() | ALIASES.keys() | NO_OPS.keys() | UNSUPPORTED.keys()
  | {PUSH, HUB_NAME, BEST, PER_DEVICE, ACCUMULATION, EVAL_PER_DEVICE, WORKDIR, OVERWRITE, RESUME, DATASET, CONFIGURATION}
  | {MODEL_TYPE, CONFIG_NAME, CACHE, STREAMING, DEEPSPEED, FLOAT_16, DTYPE}
)  # fmt: skip


# Those that may stand alone, for True.
BOOL_FLAGS = {
  "bf16",
  FLOAT_16,
  "gradient_checkpointing",
  "activation_checkpointing",
  "adafactor",
  "load_best_model_at_end",
}
BOOL_FLAGS |= {OVERWRITE, RESUME, PUSH, STREAMING}
# What people type for a flag with a name that is nearer to another one's.
SUGGESTIONS = {
  "model": "model_name_or_path",
  "data": "train_file",
  "resume": RESUME,
  "overwrite": OVERWRITE,
  "batch_size": PER_DEVICE,
  "train_batch_size": PER_DEVICE,
  "eval_batch_size": EVAL_PER_DEVICE,
  "lr": "learning_rate",
  "epochs": "num_train_epochs",
  "epoch": "num_train_epochs",
  "grad_accum": ACCUMULATION,
  "steps": "max_steps",
  "max_length": "block_size",
  "max_seq_length": "block_size",
}


class PerDeviceBatch(NamedTuple):
  """A batch as run_clm.py counts it; None where the config says it."""

  rows: int | None
  accumulation: int
  eval_rows: int | None = None
  batch_size: int | None = None  # of a DeepSpeed config that says all three

  def apply_to(self, config: ConfigDict, devices: int) -> None:
    """Sets the batch of a run on so many devices; raises RequestError where a DeepSpeed config says another."""
    if self.rows:
      config.train.micro_batch_size = self.rows
      config.train.batch_size = self.rows * self.accumulation * devices
    if self.batch_size and self.batch_size != config.train.batch_size:
      raise RequestError(
        f"--{DEEPSPEED}: train_batch_size={self.batch_size} is not {self.rows} rows x {self.accumulation} accumulation steps "
        f"x {devices} devices; leave one of them out, or say auto"
      )
    if self.eval_rows:
      config.train.eval_batch_size = self.eval_rows * devices


def get_config() -> ConfigDict:
  """What run_clm.py does where no flag says otherwise."""
  config = jaxft.config.default()
  config.data.sequence_length = 1024
  config.train.epochs = 3.0
  config.train.log_every = 500
  return config


def translate(words: list[str], own: Iterable[str] = ()) -> tuple[list[str], PerDeviceBatch | None]:
  """The words of a command line with run_clm.py's flags as jaxft's own, and the batch where it is counted by device.

  Tells, on standard error, what a flag became where that is not plain.

  Args:
    words: those after the name of the command.
    own: names of jaxft's own flags.

  Raises:
    RequestError: with every flag that cannot mean anything here, and the reason, or the nearest one that is known.
  """
  rest, given, lines, notes = _given(words, {*own})
  if lines:
    raise RequestError("\n".join(lines))
  if not given:
    return rest, None
  command = FlagTranslator(rest, given)
  command.notes += notes
  for name, value in given.items():
    try:
      command.add(name, value)
    except ValueError as error:
      lines.append(f"--{name}{'=' + value if value else ''}: {error}")
  if lines:
    raise RequestError("\n".join(lines))
  try:
    command.add_deepspeed()
    command.add_batch()
  except ValueError as error:
    raise RequestError(str(error)) from error
  for line in command.notes:
    print(line, file=sys.stderr)
  config = [] if command.has_config else [f"--config={__file__}"]
  return [
    *config,
    *rest,
    *(f"--config.{setting}={value}" for setting, value in command.ours.items()),
  ], command.batch


def _given(
  words: list[str], own: set[str]
) -> tuple[list[str], dict[str, str], list[str], list[str]]:
  """The words that are none of run_clm.py's, the values of those that are, and lines of unknown and of repeated flags."""
  rest, given, lines, notes, i = [], {}, [], [], 0
  switches = own | {f"no{name}" for name in own}
  while i < len(words):
    word, i = words[i], i + 1
    name, equals, value = word.lstrip("-").partition("=")
    name = name.replace("-", "_")
    negated = name.removeprefix("no_") if name.startswith("no_") and name not in KNOWN_FLAGS else ""
    if word.startswith("--") and negated in KNOWN_FLAGS:
      given[ALIASES.get(negated, negated)] = "False"
    elif word.startswith("--") and name in KNOWN_FLAGS:
      name = ALIASES.get(name, name)
      if not equals and i < len(words) and not words[i].startswith("--"):
        value, i = words[i], i + 1
      if given.get(name, value) != value:
        notes.append(f"--{name}={given[name]}: given again, as {value}, which counts")
      given[name] = value
    elif (
      word.startswith("--")
      and name not in (*switches, "", "help", "config")
      and not name.startswith("config.")
    ):
      lines.append(f"{word.split('=')[0]}: no such flag; {_nearest(name, KNOWN_FLAGS | own)}")
    elif word.startswith("-") and word[1:2].isalpha() and name in KNOWN_FLAGS | switches:
      lines.append(f"{word.split('=')[0]}: no such flag; did you mean --{name}?")
    else:
      rest.append(word)
  return rest, given, lines, notes


def _nearest(name: str, known: Iterable[str]) -> str:
  near = [SUGGESTIONS[name]] if name in SUGGESTIONS else difflib.get_close_matches(name, known, 1)
  near = near or [
    f"config.{setting}"
    for setting in jaxft.config.BY_NAME
    if setting.split(".")[1] == name.split(".")[-1]
  ]
  return (
    f"did you mean --{near[0]}?"
    if near
    else "--help and docs/recipes/run_clm.md tell what there is"
  )


class FlagTranslator:
  """A command line of run_clm.py while it is read."""

  def __init__(self, rest: list[str], given: dict[str, str]):
    self.has_config = any(word == "--config" or word.startswith("--config=") for word in rest)
    self.ours: dict[str, object] = {}  # setting -> value
    self.notes: list[str] = []
    self.batch: PerDeviceBatch | None = None
    self._given, self._rest, self._file = given, rest, None
    self._set_by: dict[str, str] = {}  # setting -> flag, with its value

  def add(self, name: str, value: str) -> None:
    """Takes a flag; raises ValueError with the reason where it means nothing here."""
    if not value and name not in BOOL_FLAGS and (name in MAPPED or hasattr(self, f"_{name}")):
      raise ValueError("give a value")
    if name in UNSUPPORTED:
      if value.lower() in NOTHING or value == DEFAULTS.get(name):
        return  # --trust_remote_code False asks for what always happens
      raise ValueError(UNSUPPORTED[name])
    if name in NO_OPS:
      return self._always(name, value)
    if name in STRATEGIES:
      return self._strategy(name, value)
    if method := getattr(self, f"_{name}", None):
      return method(value)
    if name in MAPPED and not self._is_off(name):
      self._set(MAPPED[name].setting, MAPPED[name].value(value), name)

  def _set(self, setting: str, value: object, flag: str) -> None:
    if value is None:
      return
    words, other = self._words_of(_with_counterpart(setting)), self._set_by.get(setting)
    if words and words[-1] != f"--config.{setting}={value}":
      raise ValueError(f"{words[-1]} is given too; leave one of the two out")
    if other and self.ours[setting] != value:
      raise ValueError(f"{other} is given too; leave one of the two out")
    self.ours[setting], self._set_by[setting] = value, f"--{flag}={self._given.get(flag, value)}"

  def _words_of(self, names: set[str]) -> list[str]:
    return [
      word for word in self._rest if any(word.startswith(f"--config.{name}=") for name in names)
    ]

  def _is_off(self, name: str) -> bool:
    """Whether another flag says that this one is of no account."""
    if name == "num_train_epochs" and _says_steps(self._given.get("max_steps", "-1")):
      self.notes.append(
        f"--num_train_epochs={self._given[name]}: --max_steps={self._given['max_steps']} says when to end"
      )
      return True
    if (
      name == "bf16"
      and not _is_true(self._given[name])
      and _is_true(self._given.get(FLOAT_16, "False"))
    ):
      return True
    if (
      name in ("warmup_steps", "warmup_ratio")
      and self._given.get("lr_scheduler_type") == "constant"
    ):
      if float(_number(self._given[name])):
        self.notes.append(
          f"--{name}={self._given[name]}: constant has no warm-up; constant_with_warmup has one"
        )
      return True
    of = {steps: self._given.get(strategy) for strategy, (steps, _) in STRATEGIES.items()}
    if of.get(name) in ("no", "epoch", "best"):
      self.notes.append(
        f"--{name}={self._given[name]}: of no account with a strategy of {of[name]}"
      )
      return True
    return False

  def _always(self, name: str, value: str) -> None:
    alone = name == "do_eval" and _is_true(value) and "do_train" not in self._given
    if name == "do_train" and not _is_true(value) or alone:
      raise ValueError(
        "this command trains; python -m jaxft.evaluate --model MODEL --data FILE measures a model"
      )
    if name in ONLY_TRUE and not _is_true(value):
      raise ValueError(ONLY_TRUE[name])
    if name in VALUED:
      more = value.lower() not in PLAIN.get(name, ()) and NO_OPS[name] not in (
        LOADER,
        NO_TORCH,
        NO_DDP,
      )
    else:
      more = _is_true(value) == (name in ONLY_FALSE)
    if NO_OPS[name] and more:
      self.notes.append(f"--{name}={value}: {NO_OPS[name]}")

  def _strategy(self, name: str, value: str) -> None:
    steps, setting = STRATEGIES[name]
    if value not in ("no", "steps", "epoch", *(["best"] if name == "save_strategy" else [])):
      raise ValueError("there is only no, steps and epoch")
    if value == "steps":
      if steps in self._given or self._words_of({setting}):
        return
      if self.has_config and (steps == "save_steps" or "logging_steps" not in self._given):
        raise ValueError(f"how many? give --{steps} too")
      if steps != "save_steps":
        self._set(setting, _every(self._given.get("logging_steps", "500")), name)
    elif value == "epoch":
      self._set(setting, "epoch", name)
    elif value == "best":
      self._set(setting, 0, name)
      self._set("train.keep_best_metric", "eval/loss", name)
    elif value == "no" and name == "logging_strategy":
      self.notes.append(
        "--logging_strategy=no: metrics.jsonl is written all the same, every 500 steps"
      )
      self._set(setting, 500, name)
    elif value == "no":
      self._set(setting, 0, name)

  def _max_steps(self, value: str) -> None:
    if _says_steps(value):
      self._set("train.steps", _whole(value), "max_steps")
      self.ours["train.epochs"] = 0.0

  def _num_train_epochs(self, value: str) -> None:
    if not self._is_off("num_train_epochs"):
      self._set("train.epochs", _number(value), "num_train_epochs")
      self.ours["train.steps"] = 0

  def _warmup_steps(self, value: str) -> None:
    if self._is_off("warmup_steps"):
      return
    if 0 < float(_number(value)) < 1:  # transformers 5: a share
      return self._set("optim.warmup_ratio", value, "warmup_steps")
    self._set("optim.warmup_steps", _whole(value), "warmup_steps")
    if float(_number(self._given.get("warmup_ratio", "0"))) and int(_whole(value)):
      self.notes.append(
        f"--warmup_ratio={self._given['warmup_ratio']}: --warmup_steps={value} says how many"
      )

  def _warmup_ratio(self, value: str) -> None:
    number = float(_number(value))
    if not 0 <= number < 1:
      raise ValueError("must be at least 0 and below 1: a share of the steps")
    if not self._is_off("warmup_ratio") and not float(
      _number(self._given.get("warmup_steps", "0"))
    ):
      self._set("optim.warmup_ratio", value, "warmup_ratio")

  def _lr_scheduler_type(self, value: str) -> None:
    self._set("optim.schedule", MAPPED["lr_scheduler_type"].value(value), "lr_scheduler_type")
    if value == "constant" and not self._words_of({"optim.warmup_steps", "optim.warmup_ratio"}):
      self._set("optim.warmup_steps", 0, "lr_scheduler_type")

  def _seed(self, value: str) -> None:
    self._set("train.seed", _whole(value), "seed")
    if "data_seed" in self._given or self._words_of({"data.shuffle_seed"}):
      return
    self._set("data.shuffle_seed", _whole(value), "seed")
    if not {"validation_file", DATASET} & self._given.keys():
      self.notes.append(
        f"--seed={value}: orders the rows and draws the held-out text too; --data_seed is a seed for these alone"
      )

  def _optim(self, value: str) -> None:
    if value == "sgd":
      raise ValueError(
        "--config.optim.name=sgd --config.optim.b1=0 is torch's SGD; b1 is its momentum"
      )
    self._set("optim.name", MAPPED["optim"].value(value), "optim")

  def _dataset_name(self, value: str) -> None:
    name = (
      f"hub:{value}/{self._given[CONFIGURATION]}"
      if CONFIGURATION in self._given
      else f"hub:{value}"
    )
    self._set("data.train", name, DATASET)
    if "validation_file" not in self._given and sources.has_split(name, "validation"):
      self._set("data.validation", f"{name}:validation", DATASET)
      self.notes.append(
        f"--{DATASET}={value}: trained on its split train, evaluated on its split validation"
      )

  def _dataset_config_name(self, value: str) -> None:
    if DATASET not in self._given:
      raise ValueError(f"goes with --{DATASET}")

  def _validation_split_percentage(self, value: str) -> None:
    if "validation_file" in self._given:
      return self.notes.append(
        f"--validation_split_percentage={value}: --validation_file names what is evaluated on"
      )
    self._set("data.validation_fraction", _share(value), "validation_split_percentage")

  def _max_train_samples(self, value: str) -> None:
    self._limit("max_train_samples", value)

  def _max_eval_samples(self, value: str) -> None:
    self._limit("max_eval_samples", value)

  def _limit(self, name: str, value: str) -> None:
    self._set(MAPPED[name].setting, MAPPED[name].value(value), name)
    self.notes.append(
      f"--{name}={value}: so many documents (rows of the data), drawn; run_clm.py takes its first blocks"
    )

  def _model_type(self, value: str) -> None:
    if "model_name_or_path" in self._given:
      return  # run_clm.py looks at it for new models only, and the checkpoint says what it is
    if CONFIG_NAME not in self._given and "tokenizer_name" not in self._given:
      raise ValueError(
        "new weights need a tokenizer: give --tokenizer_name, or --model_name_or_path for weights to read"
      )
    if CONFIG_NAME not in self._given:
      self._new_weights(self._given["tokenizer_name"])
    pairs = filter(None, [f"model_type={value}", self._given.get("config_overrides")])
    self.ours["model.config_overrides"] = ",".join(pairs)

  def _config_name(self, value: str) -> None:
    if "model_name_or_path" in self._given:
      raise ValueError(
        "weights that are read have their own config.json; leave --model_name_or_path out for new ones"
      )
    self._new_weights(value)

  def _new_weights(self, path: str) -> None:
    self.ours |= {"model.path": path, "model.init": "scratch"}
    self.notes.append(
      f"no --model_name_or_path: new weights are drawn, of the sizes that {path}/config.json says"
    )

  def _config_overrides(self, value: str) -> None:
    if "model_name_or_path" in self._given:
      raise ValueError(
        "weights that are read have their own sizes; leave --model_name_or_path out for new ones"
      )
    self.ours.setdefault("model.config_overrides", value)

  def _fp16(self, value: str) -> None:
    if not _is_true(value):
      return
    if _is_true(self._given.get("bf16", "False")):
      raise ValueError("--bf16 is given too; leave one of the two out")
    self._set("model.compute_dtype", "auto", FLOAT_16)
    self.notes.append(f"--fp16: {FLOAT16}")

  def _torch_dtype(self, value: str) -> None:
    which = _choice(auto="float32", float32="float32", bfloat16="bfloat16", float16="bfloat16")(
      value
    )
    self._set("model.param_dtype", which, DTYPE)
    if which == "bfloat16":
      self._set("model.compute_dtype", which if value == which else "auto", DTYPE)
    if value in ("auto", "float16"):
      self.notes.append(
        f"--{DTYPE}={value}: weights are kept in {which}"
        + (": " + FLOAT16 if value != "auto" else "")
      )

  def _output_dir(self, value: str) -> None:
    if words := [word for word in self._rest if word.startswith("--workdir")]:
      raise ValueError(f"{words[0]} is given too; leave one of the two out")
    self._rest.append(f"--workdir={value}")

  def _overwrite_output_dir(self, value: str) -> None:
    if _is_true(value):
      self._rest.append(f"--{OVERWRITE}")

  def _resume_from_checkpoint(self, value: str) -> None:
    workdir = self._workdir()
    if OVERWRITE in self._given and _is_true(self._given[OVERWRITE]):
      raise ValueError(f"--{OVERWRITE} begins a new run; leave one of the two out")
    if value.lower() == "false":
      raise ValueError(f"a run that is there is continued; --{OVERWRITE} begins a new one")
    if value.lower() in ("true", ""):  # a run is continued always
      if not _checkpoints(workdir):
        self.notes.append(f"--{RESUME}: {workdir} has no checkpoint, so a new run begins")
      return
    if _is_newest(Path(expand_user(value)), workdir):
      return
    if (Path(value) / "trainer_state.json").exists():
      raise ValueError(
        f"a checkpoint of transformers' Trainer; --model_name_or_path={value} begins with its weights"
      )
    raise ValueError(
      f"not the newest checkpoint of --{WORKDIR}={workdir}, which is the one that is continued; leave it out"
    )

  def _workdir(self) -> Path:
    """The folder of the run, as far as the command line says it."""
    said = [
      value or "".join(self._rest[i + 1 : i + 2])
      for i, (name, _, value) in enumerate(word.partition("=") for word in self._rest)
      if name == "--workdir"
    ]
    return Path(
      expand_user(self._given.get(WORKDIR) or next(iter(said), f"runs/{Path(__file__).stem}"))
    )

  def _streaming(self, value: str) -> None:
    if _is_true(value):
      self.notes.append(f"--{STREAMING}: {STREAMED}")

  def _cache_dir(self, value: str) -> None:
    """Has models and data sets downloaded to a folder. Both libraries read where to when they are imported, which is later."""
    self._set("data.cache_dir", str(Path(value) / "tokens"), CACHE)
    os.environ["HF_HUB_CACHE"] = os.environ["HF_DATASETS_CACHE"] = expand_user(value)
    self.notes.append(f"--{CACHE}={value}: for downloads and tokens")

  def _hub_model_id(self, value: str) -> None:
    pass  # goes with --push_to_hub

  def _push_to_hub(self, value: str) -> None:
    if not _is_true(value):
      return
    if HUB_NAME not in self._given:
      raise ValueError(f"give --{HUB_NAME} OWNER/NAME too")
    self._set("export.push_to_hub", self._given[HUB_NAME], PUSH)

  def _metric_for_best_model(self, value: str) -> None:
    if value not in ("eval_loss", "loss"):
      raise ValueError("there is only eval_loss here")

  def _logging_dir(self, value: str) -> None:
    self._set("tracking.logging_dir", value, "logging_dir")
    if "tensorboard" not in self._given.get("report_to", ""):
      self.notes.append(
        f"--logging_dir={value}: of TensorBoard's files, which --report_to tensorboard switches on"
      )

  def _report_to(self, value: str) -> None:
    if value == "all":
      raise ValueError("name those to tell: tensorboard, mlflow, wandb or trackio")
    self._set("tracking.writers", MAPPED["report_to"].value(value), "report_to")

  def _per_device_train_batch_size(self, value: str) -> None:
    _at_least_one(value)

  def _gradient_accumulation_steps(self, value: str) -> None:
    _at_least_one(value)

  def _per_device_eval_batch_size(self, value: str) -> None:
    _at_least_one(value)

  def _deepspeed(self, value: str) -> None:
    """Is read when all flags are known, which beat it."""

  def add_deepspeed(self) -> None:
    """Takes what a ds_config.json says and no flag or setting of the command line says, and prints what became of it."""
    from jaxft.cli import deepspeed_config, deepspeed_keys  # tables that few commands need

    if not (value := self._given.get(DEEPSPEED)):
      return
    self._file, beaten = deepspeed_config.read(Path(expand_user(value))), {}
    for setting, of_file in self._file.settings.items():
      if beats := self._beats(setting):
        beaten[setting] = beats
      else:
        self.ours[setting] = of_file
    counted = {
      flag: f"--{flag}={self._given[flag]}"
      for flag in (PER_DEVICE, ACCUMULATION)
      if flag in self._given
    }
    for key, flags in (
      (deepspeed_keys.MICRO_BATCH, (PER_DEVICE,)),
      (deepspeed_keys.ACCUMULATION, (ACCUMULATION,)),
      (deepspeed_keys.TRAIN_BATCH, counted),
    ):
      said = {"train.batch_size"} if key == deepspeed_keys.TRAIN_BATCH else BATCH
      if beats := [*self._words_of(said), *(counted[flag] for flag in flags if flag in counted)]:
        beaten[key] = beats[0]
    print(deepspeed_config.format_table(self._file.entries, beaten), file=sys.stderr)

  def _beats(self, setting: str) -> str | None:
    """What the command line says of a setting, or of its counterpart; None where it says nothing."""
    same = _with_counterpart(setting)
    return next(
      iter([*self._words_of(same), *(flag for name, flag in self._set_by.items() if name in same)]),
      None,
    )

  def add_batch(self) -> None:
    """Finds out the batch, from flags, the DeepSpeed file and the defaults; raises ValueError where they contradict."""
    given, file = self._given, self._file
    words = self._words_of(BATCH)
    counted = {PER_DEVICE, ACCUMULATION} & given.keys()
    if words and counted:
      raise ValueError(f"{words[0]}: a batch by device is given too; leave one of the two out")
    if words and file and file.batch_size and not self._words_of({"train.batch_size"}):
      self.ours["train.batch_size"] = file.batch_size
    file = None if words else file  # the command line says it
    of = {
      flag: int(_at_least_one(given[flag])) for flag in (*counted, EVAL_PER_DEVICE) if flag in given
    }
    rows = of.get(PER_DEVICE, file and file.rows)
    each = of.get(ACCUMULATION, file and file.accumulation)
    eval_rows = of.get(EVAL_PER_DEVICE)
    if each and not rows and self.has_config and not (file and file.batch_size):
      flag = ACCUMULATION if ACCUMULATION in given else DEEPSPEED
      raise ValueError(
        f"--{flag}={given[flag]}: {each} accumulation steps of how many rows? give --{PER_DEVICE} too, or "
        "--config.train.batch_size and --config.train.micro_batch_size in its place"
      )
    batch_size = file.batch_size if file and not counted else None
    if batch_size and not (file.rows and file.accumulation):
      self.ours["train.batch_size"] = batch_size
      self.ours["train.micro_batch_size"] = file.rows or 0
      if file.accumulation:
        raise ValueError(
          f"--{DEEPSPEED}: train_batch_size={batch_size} with gradient_accumulation_steps={file.accumulation}: give "
          "train_micro_batch_size_per_gpu in place of one of the two"
        )
      rows = batch_size = None
    elif not rows and (counted or not self.has_config and not words):
      rows = 8
    if rows or eval_rows:
      self.batch = PerDeviceBatch(rows, each or 1, eval_rows, batch_size)


def _with_counterpart(setting: str) -> set[str]:
  return {
    setting,
    *(other for pair in jaxft.config.EXCLUSIVE_PAIRS if setting in pair for other in pair),
  }


def _says_steps(max_steps: str) -> bool:
  """Whether --max_steps says when to end; with 0 or less the epochs do."""
  return not re.fullmatch("-[0-9]+|0", max_steps)


def _checkpoints(workdir: Path) -> list[int]:
  folder = workdir / "checkpoints"
  return [int(it.name) for it in folder.iterdir() if it.name.isdecimal()] if folder.is_dir() else []


def _is_newest(path: Path, workdir: Path) -> bool:
  """Whether a path names a run, or the checkpoint of it that is continued: the newest."""
  there, folder, steps = path.resolve(), (workdir / "checkpoints").resolve(), _checkpoints(workdir)
  return there in (workdir.resolve(), folder, *([folder / str(max(steps))] if steps else []))


def markdown_table() -> str:
  """All flags in Markdown, for docs/recipes/run_clm.md."""
  special = {
    "max_train_samples": "documents, drawn",
    "max_eval_samples": "documents, drawn",
    "max_steps": "beats `--num_train_epochs`",
    "seed": "and, without `--data_seed`, `--config.data.shuffle_seed`",
    "warmup_steps": "below 1, as transformers 5 has it, `--config.optim.warmup_ratio`",
    "config_overrides": "of new weights",
    "logging_dir": "with `--report_to tensorboard`",
  }
  lines = [
    f"| `--{name}` | `--config.{same.setting}`{'; ' + special[name] if name in special else ''} |"
    for name, same in MAPPED.items()
  ]
  lines += [
    f"| `--{WORKDIR}` | `--workdir` |",
    f"| `--{OVERWRITE}` | a new run: one that is in `--{WORKDIR}` is renamed, and the new name printed; the command that "
    "continues leaves the flag out |",
    f"| `--{RESUME}` | always so: the same command continues; refused: another checkpoint than the newest of `--{WORKDIR}` |",
    f"| `--{STREAMING}` | {STREAMED} |",
    f"| `--{CACHE}` | folder for downloads and tokens |",
    f"| `--{DATASET}` with `--{CONFIGURATION}` | `--config.data.train=hub:NAME/CONFIGURATION` |",
    f"| `--{MODEL_TYPE}`, `--{CONFIG_NAME}` | without `--model_name_or_path` `--config.model.init=scratch`: new weights |",
    f"| `--{PER_DEVICE}` | `--config.train.micro_batch_size`; times devices and accumulation `--config.train.batch_size` |",
    f"| `--{ACCUMULATION}` | see above |",
    f"| `--{EVAL_PER_DEVICE}` | times devices `--config.train.eval_batch_size` |",
    f"| `--{DEEPSPEED}` | the file is read, and a table printed of what each key became: [deepspeed.md](deepspeed.md) |",
    f"| `--{FLOAT_16}` | `--config.model.compute_dtype=auto`: {FLOAT16} |",
    f"| `--{DTYPE}` | `--config.model.param_dtype`; `float16` is bfloat16 |",
    *(
      f"| `--{name}` | `no`: never; `steps`: as `--{steps}` says; `epoch`: `--config.{setting}=epoch` |"
      for name, (steps, setting) in STRATEGIES.items()
    ),
    f"| `--{BEST}` | `eval_loss`, as `--load_best_model_at_end` has it in any case; refused: another |",
    f"| `--{PUSH}` with `--{HUB_NAME}` | `--config.export.push_to_hub` |",
    *(f"| `--{name}` | as `--{new}` |" for name, new in ALIASES.items()),
    *(
      f"| `--{name}` | always so{': ' + reason if reason else ''} |"
      for name, reason in NO_OPS.items()
    ),
    *(f"| `--{name}` | refused: {reason} |" for name, reason in UNSUPPORTED.items()),
  ]
  return "\n".join(["| run_clm.py | jaxft |", "|---|---|", *lines])
