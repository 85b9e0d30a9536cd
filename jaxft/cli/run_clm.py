"""Translation of transformers' run_clm.py flags to jaxft's, and the defaults of run_clm.py.

python -m jaxft.train --model_name_or_path gpt2 --train_file a.txt --do_train --output_dir runs/x
"""

import contextlib
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ml_collections import ConfigDict

import jaxft.config
from jaxft.config_checks import TRACKERS
from jaxft.data import sources
from jaxft.errors import RequestError
from jaxft.utils.files import expand_user

if TYPE_CHECKING:
  from jaxft.cli.deepspeed_config import ParsedConfig

TRUE = ("true", "1", "yes", "y", "t", "")


class MapsTo(NamedTuple):
  """The setting for a flag, and the conversion of its value."""

  setting: str
  # Returns None to leave the setting unchanged; raises ValueError with the reason for a bad value.
  value: Callable[[str], str | None] = str
  remark: str = ""  # for docs/recipes/run_clm.md


def _choice(**choices: str) -> Callable[[str], str]:
  def value(text: str) -> str:
    if text not in choices:
      near = difflib.get_close_matches(text, choices, 1)
      hint = f"; did you mean {near[0]}?" if near else ""
      raise ValueError(f"must be one of {', '.join(choices)}{hint}")
    return choices[text]

  return value


def _integer(text: str) -> str:
  with contextlib.suppress(ValueError):
    if (number := float(text)) >= 0 and number.is_integer():
      return str(int(number))
  raise ValueError("must be a whole number")


def _positive_int(text: str) -> str:
  number = _integer(text)
  if int(number) < 1:
    raise ValueError("must be at least 1")
  return number


def _interval(text: str) -> str:
  """Read an interval in steps; transformers also accepts a share of all steps."""
  if text.startswith("0.") and 0 < float(_number(text)) < 1:
    raise ValueError("a share of all steps is not supported; set a number of steps")
  return _positive_int(text)


def _number(text: str) -> str:
  with contextlib.suppress(ValueError):
    if math.isfinite(float(text)):
      return text
  raise ValueError("must be a number")


def _save_limit(text: str) -> str:
  """Read the number of checkpoints to keep; for 0 or less transformers keeps all."""
  return str(jaxft.config.MAX_INT) if re.fullmatch("-[0-9]+|0", text) else _integer(text)


def _percentage(text: str) -> str:
  return str(float(_number(text)) / 100)


def _if_true(on: str, off: str | None) -> Callable[[str], str | None]:
  """Map True and False to two values of a setting; None leaves it unchanged."""
  return lambda text: on if _is_true(text) else off


def _is_true(text: str) -> bool:
  if text.lower() not in (*TRUE, "false", "0", "no", "n", "f"):
    raise ValueError("must be True or False")
  return text.lower() in TRUE


def _trackers(text: str) -> str:
  known = _choice(none="", **{name: name for name in TRACKERS})
  names = [name for word in text.split(",") if (name := known(word.strip()))]
  return str(tuple(names)) if names[1:] else "".join(names)


NO_FLOAT16 = (
  "float16 is not supported; uses bfloat16 if the device supports it, else float32, without loss "
  "scaling"
)
MAPPED = {
  "model_name_or_path": MapsTo("model.path"),
  "model_revision": MapsTo("model.revision"),
  "tokenizer_name": MapsTo("model.tokenizer"),
  "config_overrides": MapsTo("model.config_overrides", remark="only for new weights"),
  "train_file": MapsTo("data.train"),
  "validation_file": MapsTo("data.validation"),
  "validation_split_percentage": MapsTo("data.validation_fraction", _percentage),
  "max_train_samples": MapsTo("data.limit_train", _positive_int, "documents, sampled at random"),
  "max_eval_samples": MapsTo(
    "data.limit_validation", _positive_int, "documents, sampled at random"
  ),
  "block_size": MapsTo("data.sequence_length", _positive_int),
  "learning_rate": MapsTo("optim.learning_rate", _number),
  "num_train_epochs": MapsTo("train.epochs", _number),
  "max_steps": MapsTo("train.steps", _integer, "overrides `--num_train_epochs`"),
  "lr_scheduler_type": MapsTo(
    "optim.schedule",
    _choice(linear="linear", cosine="cosine", constant="constant", constant_with_warmup="constant"),
  ),
  "warmup_steps": MapsTo(
    "optim.warmup_steps",
    _integer,
    "below 1, as in transformers 5: `--config.optim.warmup_ratio`",
  ),
  "warmup_ratio": MapsTo("optim.warmup_ratio", _number),
  "optim": MapsTo(
    "optim.name",
    _choice(
      **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw"),
      **{"adafactor": "adafactor", "lion_32bit": "lion"},
    ),
  ),
  "adafactor": MapsTo("optim.name", _if_true("adafactor", None)),
  "weight_decay": MapsTo("optim.weight_decay", _number),
  "adam_beta1": MapsTo("optim.b1", _number),
  "adam_beta2": MapsTo("optim.b2", _number),
  "adam_epsilon": MapsTo("optim.eps", _number),
  "max_grad_norm": MapsTo("optim.clip_norm", _number),
  "seed": MapsTo("train.seed", _integer, "without `--data_seed` also `--config.data.shuffle_seed`"),
  "data_seed": MapsTo("data.shuffle_seed", _integer),
  "bf16": MapsTo("model.compute_dtype", _if_true("bfloat16", "float32")),
  "gradient_checkpointing": MapsTo("memory.remat", _if_true("full", "dots")),
  "activation_checkpointing": MapsTo("memory.remat", _if_true("full", "dots")),
  "logging_dir": MapsTo("tracking.logging_dir", remark="with `--report_to tensorboard`"),
  "logging_steps": MapsTo("train.log_every", _interval),
  "eval_steps": MapsTo("train.eval_every", _interval),
  "save_steps": MapsTo("train.save_every", _interval),
  "save_total_limit": MapsTo("train.keep", _save_limit),
  "load_best_model_at_end": MapsTo("train.keep_best_metric", _if_true("eval/loss", "")),
  "report_to": MapsTo("tracking.writers", _trackers),
  "run_name": MapsTo("tracking.run_name"),
}
# Flags for the kind of an interval -> the flag and the setting for its length.
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
PER_DEVICE = "per_device_train_batch_size"
ACCUMULATION = "gradient_accumulation_steps"
EVAL_PER_DEVICE = "per_device_eval_batch_size"
BATCH_SETTINGS = {"train.batch_size", "train.micro_batch_size"}
STREAMING_NOTE = "downloads the data set, tokenizes it once and memory-maps the tokens"
LOADER = "the loader reads memory-mapped tokens and needs no options"
NO_DDP = "XLA creates the collectives"
NO_TORCH = "an option of torch; XLA compiles every step"
NO_METRICS = "an evaluation reports loss and perplexity, or accuracy and F1"
FIRST_EVALUATION = "a run always evaluates before the first step"


def _by_flag(reasons: dict[str, str]) -> dict[str, str]:
  """Split the keys of `reasons`, each with one or more flags, into single flags."""
  return {name: reason for names, reason in reasons.items() for name in names.split()}


# Flags without effect: every run does this, or it changes no result. The reason is printed if the
# value asks for something else. "name=X" takes a value; "name=False" has the default False.
_NO_OPS = _by_flag(
  {
    "do_train": "",
    "do_eval": f"{FIRST_EVALUATION} and after the last",
    "low_cpu_mem_usage": "",
    "eval_on_start": FIRST_EVALUATION,
    "prediction_loss_only": "",
    "logging_first_step=False": f"{FIRST_EVALUATION}; the loss of the first step is not "
    "logged separately",
    "logging_nan_inf_filter": "non-finite steps are always reported and never applied",
    "include_num_input_tokens_seen=X": "",
    "past_index=X": "no state carries over from batch to batch",
    "ray_scope=X": "jaxft has no hyperparameter search",
    "use_legacy_prediction_loop include_tokens_per_second skip_memory_metrics": "",
    "full_determinism enable_jit_checkpoint": "",
    "save_safetensors": "weights are always saved as safetensors",
    "average_tokens_across_devices": "the loss is a mean over the tokens of all devices",
    "remove_unused_columns": "",
    "overwrite_cache": "a change of text, tokenizer or settings always renews the token cache",
    "use_fast_tokenizer": "always uses the fast tokenizer, which gives the same tokens",
    "keep_linebreaks": "always keeps newlines in the text",
    "disable_tqdm=False": "a log that is not a terminal has no progress bar",
    "log_level=X": "the log has no levels",
    "log_level_replica=X log_on_each_node=False": "only process 0 logs",
    "save_on_each_node=False": "all hosts share the workdir",
    "bf16_full_eval=False fp16_full_eval=False": "evaluation uses the same dtype as training",
    "torch_compile": "every step is compiled",
    "torch_compile_backend=X torch_compile_mode=X torch_empty_cache_steps=X": NO_TORCH,
    "torchdynamo=X jit_mode_eval=False use_ipex=False": NO_TORCH,
    "use_liger_kernel": "config.model.attention and XLA choose the kernels",
    "half_precision_backend=X fp16_opt_level=X fp16_backend=X": "jaxft has only one backend",
    "gradient_checkpointing_kwargs=X": "config.memory.remat has no other options",
    "activation_checkpointing_kwargs=X": "config.memory.remat has no other options",
    "use_cache=False": "training uses no KV cache",
    "eval_accumulation_steps=X": "an evaluation keeps only sums, on the device",
    "eval_do_concat_batches eval_use_gather_object batch_eval_metrics": NO_METRICS,
    "ddp_find_unused_parameters ddp_bucket_cap_mb=X ddp_broadcast_buffers ddp_static_graph": NO_DDP,
    "ddp_backend=X xpu_backend=X": NO_DDP,
    "ddp_timeout=X": "--peer_timeout sets how long another process may be silent",
    "local_rank=X": "processes are detected",
    "preprocessing_num_workers=X dataloader_num_workers=X dataloader_pin_memory": LOADER,
    "dataloader_persistent_workers dataloader_prefetch_factor=X": LOADER,
    "dataloader_multiprocessing_context=X dataloader_in_order dispatch_batches": LOADER,
    "split_batches": LOADER,
  }
)
NO_OPS = {name.partition("=")[0]: reason for name, reason in _NO_OPS.items()}
NO_OPS_WITH_VALUE = {name.removesuffix("=X") for name in _NO_OPS if name.endswith("=X")}
ONLY_FALSE = {name.removesuffix("=False") for name in _NO_OPS if name.endswith("=False")}
# Values that need no note: they change nothing.
SILENT_VALUES = {
  "log_level": ("passive",),
  "log_level_replica": ("passive", "warning"),
  "ddp_timeout": ("1800",),
  "local_rank": ("-1", "0"),
}
# Flags for which False is refused.
ONLY_TRUE = {
  "keep_linebreaks": "newlines are part of the text; remove them from the file",
  "save_safetensors": "jaxft saves no pickles; leave it out",
}
SHARDING = "use config.mesh and config.memory to shard a run: docs/sharding.md"
PACK = "use --config.data.layout=pack, which leaves no padding"
PROJECT = "docs/trackers.md describes how to name projects"
UNSUPPORTED = _by_flag(
  {
    "trust_remote_code": "jaxft never runs code from a checkpoint; leave it out",
    "fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap": SHARDING,
    "sharded_ddp accelerator_config parallelism_config mp_parameters": SHARDING,
    "tpu_num_cores": "JAX uses all devices that it finds; leave it out",
    "hub_token token use_auth_token push_to_hub_token": "log in with huggingface_hub, or set "
    "HF_TOKEN",
    "push_to_hub_model_id": "use --hub_model_id OWNER/NAME",
    "push_to_hub_organization": "use --hub_model_id OWNER/NAME",
    "hub_private_repo": "create the repository as private before the run",
    "hub_strategy hub_always_push": "the model is uploaded once, at the end; leave it out",
    "hub_revision": "the model is uploaded to the branch main; leave it out",
    "dataloader_drop_last": "a batch may span two epochs, so no sequence is dropped; leave it out",
    "label_smoothing_factor": "the loss is plain cross-entropy; leave it out",
    "label_names": "the targets are the tokens; leave it out",
    "neftune_noise_alpha": "noise on embeddings is not supported; use --config.model.dropout",
    "do_predict": "use python -m jaxft.generate or python -m jaxft.evaluate after the run",
    "auto_find_batch_size": "python -m jaxft.plan --fit finds the largest batch that fits, before "
    "the run",
    "group_by_length": PACK,
    "train_sampling_strategy": f"each epoch has a new random order; {PACK}",
    "length_column_name": PACK,
    "no_cuda use_cpu": "set JAX_PLATFORMS=cpu before the command",
    "use_mps_device": "JAX has no stable support for MPS; leave it out",
    "tf32": "set JAX_DEFAULT_MATMUL_PRECISION, to tensorfloat32 or float32, before the command",
    "optim_args": "use the settings in config.optim",
    "optim_target_modules": "use --config.train.trainable_params or --config.lora.targets",
    "lr_scheduler_kwargs": "use the settings in config.optim",
    "greater_is_better": "the metric is the eval loss, and lower is better; leave it out",
    "eval_delay": "use --config.train.eval_every",
    "include_for_metrics include_inputs_for_metrics": NO_METRICS,
    "save_only_model": "checkpoints hold the full state, to resume; WORKDIR/export holds the model "
    "alone",
    "ignore_data_skip": "a resumed run finds the next sequences without a delay; leave it out",
    "restore_callback_states_from_checkpoint": "resuming restores the full state; leave it out",
    "liger_kernel_config": "config.model.attention and XLA choose the kernels",
    "project trackio_space_id trackio_bucket_id trackio_static_space_id": PROJECT,
    "debug tpu_metrics_debug": "a run always reports NaN and infinity, with the names of the "
    "tensors; leave it out",
  }
)
# Values of unsupported flags that switch them off, and so are accepted.
OFF_VALUES = {"false", "0", "0.0", "no", "none", "{}", "[]"}
HF_DEFAULTS = {"train_sampling_strategy": "random", "hub_strategy": "every_save"}
KNOWN_FLAGS = {
  *"output_dir overwrite_output_dir resume_from_checkpoint push_to_hub hub_model_id".split(),
  *"dataset_name dataset_config_name streaming cache_dir metric_for_best_model".split(),
  *"model_type config_name torch_dtype fp16 deepspeed".split(),
  *(PER_DEVICE, ACCUMULATION, EVAL_PER_DEVICE),
  *(*MAPPED, *STRATEGIES, *ALIASES, *NO_OPS, *UNSUPPORTED),
}
# Flags that mean True without a value.
BOOL_FLAGS = (
  "bf16 fp16 gradient_checkpointing activation_checkpointing adafactor load_best_model_at_end "
  "overwrite_output_dir resume_from_checkpoint push_to_hub streaming"
).split()
# Common names of flags elsewhere, if the nearest flag by spelling would be wrong.
SUGGESTIONS = {
  "model": "model_name_or_path",
  "data": "train_file",
  "resume": "resume_from_checkpoint",
  "overwrite": "overwrite_output_dir",
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
  """A batch size per device, as in run_clm.py; None if the config sets it."""

  micro_batch_size: int | None
  accumulation_steps: int
  eval_batch_size: int | None = None
  batch_size: int | None = None  # only of a DeepSpeed config with all three values

  def apply_to(self, config: ConfigDict, devices: int) -> None:
    """Set the batch size of a run.

    Args:
      config: the config to change.
      devices: the number of devices of the run.

    Raises:
      RequestError: the DeepSpeed config has another `train_batch_size`.
    """
    rows = self.micro_batch_size
    if rows:
      config.train.micro_batch_size = rows
      config.train.batch_size = rows * self.accumulation_steps * devices
    if self.batch_size and self.batch_size != config.train.batch_size:
      raise RequestError(
        f"--deepspeed: train_batch_size={self.batch_size} is not {rows} sequences x "
        f"{self.accumulation_steps} accumulation steps x {devices} devices; leave one of them out, "
        'or set it to "auto"'
      )
    if self.eval_batch_size:
      config.train.eval_batch_size = self.eval_batch_size * devices


def get_config() -> ConfigDict:
  """Return a config with the defaults of run_clm.py."""
  config = jaxft.config.default()
  config.data.sequence_length = 1024
  config.train.epochs = 3.0
  config.train.log_every = 500
  return config


def translate(words: list[str], own: Iterable[str] = ()) -> tuple[list[str], PerDeviceBatch | None]:
  """Translate flags of run_clm.py on a command line to flags of jaxft.

  Prints a note on standard error for each flag whose translation may surprise.

  Args:
    words: the command line, without the name of the command.
    own: names of jaxft's flags.

  Returns:
    The translated words, and the batch if its size is set per device.

  Raises:
    RequestError: one line for each unsupported flag, with the reason or a suggestion.
  """
  own_words, flags, notes = _split_words(words, {*own})
  if not flags:
    return own_words, None
  translator = FlagTranslator(own_words, flags, notes)
  lines = []
  for name, value in flags.items():
    try:
      translator.add(name, value)
    except ValueError as error:
      lines.append(f"--{name}{'=' + value if value else ''}: {error}")
  if lines:
    raise RequestError("\n".join(lines))
  try:
    translator.add_deepspeed()
    translator.add_batch()
  except ValueError as error:
    raise RequestError(str(error)) from error
  for line in translator.notes:
    print(line, file=sys.stderr)
  config = [] if translator.has_config else [f"--config={__file__}"]
  settings = [f"--config.{name}={value}" for name, value in translator.settings.items()]
  return [*config, *own_words, *settings], translator.batch


def _split_words(words: list[str], own: set[str]) -> tuple[list[str], dict[str, str], list[str]]:
  """Return jaxft's words, the flags of run_clm.py, and notes on repeated flags.

  Raises RequestError with a line for each unknown flag.
  """
  own_words: list[str] = []
  flags: dict[str, str] = {}
  lines: list[str] = []
  notes: list[str] = []
  own_names = own | {f"no{name}" for name in own}
  ours = {*own_names, "", "help", "config"}
  rest = words[::-1]
  while rest:
    word = rest.pop()
    name, equals, value = word.lstrip("-").partition("=")
    name = name.replace("-", "_")
    negated = name.removeprefix("no_") if name.startswith("no_") and name not in KNOWN_FLAGS else ""
    if word.startswith("--") and negated in KNOWN_FLAGS:
      flags[ALIASES.get(negated, negated)] = "False"
    elif word.startswith("--") and name in KNOWN_FLAGS:
      name = ALIASES.get(name, name)
      if not equals and rest and not rest[-1].startswith("--"):
        value = rest.pop()
      if flags.get(name, value) != value:
        notes.append(f"--{name}={flags[name]}: overridden by --{name}={value}")
      flags[name] = value
    elif word.startswith("--") and name not in ours and not name.startswith("config."):
      lines.append(f"{word.split('=')[0]}: unknown flag; {_suggestion(name, KNOWN_FLAGS | own)}")
    elif word.startswith("-") and word[1:2].isalpha() and name in KNOWN_FLAGS | own_names:
      lines.append(f"{word.split('=')[0]}: unknown flag; did you mean --{name}?")
    else:
      own_words.append(word)
  if lines:
    raise RequestError("\n".join(lines))
  return own_words, flags, notes


def _suggestion(name: str, known: Iterable[str]) -> str:
  near = [SUGGESTIONS[name]] if name in SUGGESTIONS else difflib.get_close_matches(name, known, 1)
  key = name.split(".")[-1]
  near = near or [f"config.{it}" for it in jaxft.config.BY_NAME if it.split(".")[1] == key]
  if not near:
    return "see --help and docs/recipes/run_clm.md"
  return f"did you mean --{near[0]}?"


def _conflict(word: str) -> ValueError:
  return ValueError(f"conflicts with {word}; use only one of the two")


class FlagTranslator:
  """A translation in progress: the flags of run_clm.py, and the settings translated so far.

  A flag may have a method with its name: `_seed` translates --seed.
  """

  def __init__(self, own_words: list[str], flags: dict[str, str], notes: list[str]):
    self.has_config = any(it == "--config" or it.startswith("--config=") for it in own_words)
    self.settings: dict[str, object] = {}
    self.notes = notes
    self.batch: PerDeviceBatch | None = None
    self._flags = flags
    self._own_words = own_words
    self._name = ""  # of the current flag
    self._parsed: ParsedConfig | None = None
    self._set_by: dict[str, str] = {}  # setting -> flag, with its value

  def add(self, name: str, value: str) -> None:
    """Translate a flag.

    Args:
      name: the flag, without dashes.
      value: its value, or "".

    Raises:
      ValueError: the reason why the flag or its value is unsupported.
    """
    self._name = name
    method = getattr(self, f"_{name}", None)
    if not value and name not in BOOL_FLAGS and (name in MAPPED or method):
      raise ValueError("needs a value")
    if name in UNSUPPORTED:
      # Values such as False, as in --trust_remote_code False, are accepted.
      if value.lower() not in OFF_VALUES and value != HF_DEFAULTS.get(name):
        raise ValueError(UNSUPPORTED[name])
    elif name in NO_OPS:
      self._ignore(value)
    elif name in STRATEGIES:
      self._set_strategy(value)
    elif method:
      method(value)
    elif not self._is_overruled():
      self._set_mapped(value)

  def _set_mapped(self, value: str) -> None:
    self._set(MAPPED[self._name].setting, MAPPED[self._name].value(value))

  def _set(self, setting: str, value: object) -> None:
    if value is None:
      return
    words = self._setting_words(_with_counterpart(setting))
    if words and words[-1] != f"--config.{setting}={value}":
      raise _conflict(words[-1])
    if setting in self._set_by and self.settings[setting] != value:
      raise _conflict(self._set_by[setting])
    self.settings[setting] = value
    self._set_by[setting] = f"--{self._name}={self._flags[self._name]}"

  def _note(self, text: str, flag: str = "") -> None:
    flag = flag or self._name
    self.notes.append(f"--{flag}={self._flags[flag]}: {text}")

  def _is_given(self, flag: str) -> bool:
    """Return whether a switch is given and not False."""
    return flag in self._flags and _is_true(self._flags[flag])

  def _setting_words(self, names: set[str]) -> list[str]:
    """Return the words of the command line that set one of these settings directly."""
    prefixes = tuple(f"--config.{name}=" for name in names)
    return [word for word in self._own_words if word.startswith(prefixes)]

  def _is_overruled(self) -> bool:
    """Return whether another flag overrides this one."""
    name = self._name
    if name == "num_train_epochs" and _is_step_limit(self._flags.get("max_steps", "-1")):
      self._note(f"ignored, because --max_steps={self._flags['max_steps']} is given")
      return True
    if name == "bf16" and not _is_true(self._flags[name]) and self._is_given("fp16"):
      return True
    is_constant = self._flags.get("lr_scheduler_type") == "constant"
    if name in ("warmup_steps", "warmup_ratio") and is_constant:
      if float(_number(self._flags[name])):
        self._note("ignored: the schedule constant has no warm-up; use constant_with_warmup")
      return True
    strategies = {steps: self._flags.get(strategy) for strategy, (steps, _) in STRATEGIES.items()}
    if strategies.get(name) in ("no", "epoch", "best"):
      self._note(f"ignored with the strategy {strategies[name]}")
      return True
    return False

  def _ignore(self, value: str) -> None:
    """Accept a flag without effect; add a note if its value asks for something else."""
    name = self._name
    eval_only = name == "do_eval" and _is_true(value) and "do_train" not in self._flags
    if name == "do_train" and not _is_true(value) or eval_only:
      raise ValueError(
        "this command always trains; to evaluate a model, use python -m jaxft.evaluate --model "
        "MODEL --data FILE"
      )
    if name in ONLY_TRUE and not _is_true(value):
      raise ValueError(ONLY_TRUE[name])
    reason = NO_OPS[name]
    if name in NO_OPS_WITH_VALUE:
      is_silent = value.lower() in SILENT_VALUES.get(name, ())
      asks_more = not is_silent and reason not in (LOADER, NO_TORCH, NO_DDP)
    else:
      asks_more = _is_true(value) == (name in ONLY_FALSE)
    if reason and asks_more:
      self._note(reason)

  def _set_strategy(self, value: str) -> None:
    steps, setting = STRATEGIES[self._name]
    if value not in ("no", "steps", "epoch", *(["best"] if self._name == "save_strategy" else [])):
      raise ValueError("must be no, steps or epoch")
    if value == "steps":
      if steps in self._flags or self._setting_words({setting}):
        return
      if self.has_config and (steps == "save_steps" or "logging_steps" not in self._flags):
        raise ValueError(f"needs a number of steps; give --{steps} too")
      if steps != "save_steps":
        self._set(setting, _interval(self._flags.get("logging_steps", "500")))
    elif value == "epoch":
      self._set(setting, "epoch")
    elif self._name == "logging_strategy":
      self._note("metrics.jsonl is still written, every 500 steps")
      self._set(setting, 500)
    else:
      self._set(setting, 0)
      if value == "best":
        self._set("train.keep_best_metric", "eval/loss")

  def _max_steps(self, value: str) -> None:
    if _is_step_limit(value):
      self._set_mapped(value)
      self.settings["train.epochs"] = 0.0

  def _num_train_epochs(self, value: str) -> None:
    if not self._is_overruled():
      self._set_mapped(value)
      self.settings["train.steps"] = 0

  def _warmup_steps(self, value: str) -> None:
    if self._is_overruled():
      return
    if 0 < float(_number(value)) < 1:  # a share of all steps, since transformers 5
      return self._set("optim.warmup_ratio", value)
    self._set_mapped(value)
    if float(_number(self._flags.get("warmup_ratio", "0"))) and int(_integer(value)):
      self._note(f"ignored, because --warmup_steps={value} is given", "warmup_ratio")

  def _warmup_ratio(self, value: str) -> None:
    if not 0 <= float(_number(value)) < 1:
      raise ValueError("must be at least 0 and below 1, as a share of all steps")
    if not self._is_overruled() and not float(_number(self._flags.get("warmup_steps", "0"))):
      self._set_mapped(value)

  def _lr_scheduler_type(self, value: str) -> None:
    self._set_mapped(value)
    has_warmup = self._setting_words({"optim.warmup_steps", "optim.warmup_ratio"})
    if value == "constant" and not has_warmup:
      self._set("optim.warmup_steps", 0)

  def _seed(self, value: str) -> None:
    self._set_mapped(value)
    if "data_seed" in self._flags or self._setting_words({"data.shuffle_seed"}):
      return
    self._set("data.shuffle_seed", _integer(value))
    if not {"validation_file", "dataset_name"} & self._flags.keys():
      self._note(
        "also sets the order of sequences and the held-out split; use --data_seed to set these "
        "separately"
      )

  def _optim(self, value: str) -> None:
    if value == "sgd":
      raise ValueError(
        "use --config.optim.name=sgd --config.optim.b1=0 for torch's SGD; b1 is the momentum"
      )
    self._set_mapped(value)

  def _dataset_name(self, value: str) -> None:
    configuration = self._flags.get("dataset_config_name")
    name = f"hub:{value}" if configuration is None else f"hub:{value}/{configuration}"
    self._set("data.train", name)
    if "validation_file" not in self._flags and sources.has_split(name, "validation"):
      self._set("data.validation", f"{name}:validation")
      self._note("trains on the split train, evaluates on the split validation")

  def _dataset_config_name(self, value: str) -> None:
    if "dataset_name" not in self._flags:
      raise ValueError("needs --dataset_name")

  def _validation_split_percentage(self, value: str) -> None:
    if "validation_file" in self._flags:
      return self._note("ignored, because --validation_file is given")
    self._set_mapped(value)

  def _max_train_samples(self, value: str) -> None:
    self._set_mapped(value)
    self._note(
      "uses this many documents (rows of the data), sampled at random; run_clm.py uses the first "
      "blocks of tokens"
    )

  _max_eval_samples = _max_train_samples

  def _model_type(self, value: str) -> None:
    if "model_name_or_path" in self._flags:
      return  # run_clm.py uses it only for new models; a checkpoint names its own type
    if "config_name" not in self._flags and "tokenizer_name" not in self._flags:
      raise ValueError(
        "new weights need a tokenizer; give --tokenizer_name, or --model_name_or_path for "
        "pretrained weights"
      )
    if "config_name" not in self._flags:
      self._init_from_scratch(self._flags["tokenizer_name"])
    pairs = filter(None, [f"model_type={value}", self._flags.get("config_overrides")])
    self.settings["model.config_overrides"] = ",".join(pairs)

  def _config_name(self, value: str) -> None:
    if "model_name_or_path" in self._flags:
      raise ValueError(
        "pretrained weights have their own config.json; leave --model_name_or_path out for new "
        "weights"
      )
    self._init_from_scratch(value)

  def _init_from_scratch(self, path: str) -> None:
    self.settings |= {"model.path": path, "model.init": "scratch"}
    self.notes.append(
      f"no --model_name_or_path: initializes new weights, with the sizes in {path}/config.json"
    )

  def _config_overrides(self, value: str) -> None:
    if "model_name_or_path" in self._flags:
      raise ValueError(
        "pretrained weights have fixed sizes; leave --model_name_or_path out for new weights"
      )
    self.settings.setdefault("model.config_overrides", value)

  def _fp16(self, value: str) -> None:
    if not _is_true(value):
      return
    if self._is_given("bf16"):
      raise _conflict("--bf16")
    self._set("model.compute_dtype", "auto")
    self.notes.append(f"--fp16: {NO_FLOAT16}")

  def _torch_dtype(self, value: str) -> None:
    read = _choice(auto="float32", float32="float32", bfloat16="bfloat16", float16="bfloat16")
    dtype = read(value)
    self._set("model.param_dtype", dtype)
    if dtype == "bfloat16":
      self._set("model.compute_dtype", dtype if value == dtype else "auto")
    if value in ("auto", "float16"):
      reason = "" if value == "auto" else f": {NO_FLOAT16}"
      self._note(f"stores weights in {dtype}{reason}")

  def _output_dir(self, value: str) -> None:
    if words := [word for word in self._own_words if word.startswith("--workdir")]:
      raise _conflict(words[0])
    self._own_words.append(f"--workdir={value}")

  def _overwrite_output_dir(self, value: str) -> None:
    if _is_true(value):
      self._own_words.append("--overwrite_output_dir")

  def _resume_from_checkpoint(self, value: str) -> None:
    workdir = self._find_workdir()
    if self._is_given("overwrite_output_dir"):
      raise ValueError("--overwrite_output_dir starts a new run; use only one of the two")
    if value.lower() == "false":
      raise ValueError(
        "an existing run is always resumed; use --overwrite_output_dir to start a new one"
      )
    if value.lower() in ("true", ""):  # the default: an existing run is always resumed
      if not _checkpoint_steps(workdir):
        note = f"--resume_from_checkpoint: {workdir} has no checkpoint, so this starts a new run"
        self.notes.append(note)
    elif not _is_latest(Path(expand_user(value)), workdir):
      if (Path(value) / "trainer_state.json").exists():
        raise ValueError(
          "is a checkpoint of transformers' Trainer; to start from its weights, use "
          f"--model_name_or_path={value}"
        )
      raise ValueError(
        f"not the newest checkpoint of --output_dir={workdir}; a run always resumes from the "
        "newest, so leave it out"
      )

  def _find_workdir(self) -> Path:
    """Return the folder of the run that the command line names."""
    workdir = f"runs/{Path(__file__).stem}"
    for i, word in enumerate(self._own_words):
      name, _, value = word.partition("=")
      if name == "--workdir":
        workdir = value or "".join(self._own_words[i + 1 : i + 2])
        break
    return Path(expand_user(self._flags.get("output_dir") or workdir))

  def _streaming(self, value: str) -> None:
    if _is_true(value):
      self.notes.append(f"--streaming: {STREAMING_NOTE}")

  def _cache_dir(self, value: str) -> None:
    """Set the folder for downloads; the Hugging Face libraries read it when imported, later."""
    self._set("data.cache_dir", str(Path(value) / "tokens"))
    os.environ["HF_HUB_CACHE"] = os.environ["HF_DATASETS_CACHE"] = expand_user(value)
    self._note("used for downloads and the token cache")

  def _hub_model_id(self, value: str) -> None:
    """Do nothing: `_push_to_hub` uses the value."""

  def _push_to_hub(self, value: str) -> None:
    if not _is_true(value):
      return
    if "hub_model_id" not in self._flags:
      raise ValueError("give --hub_model_id OWNER/NAME too")
    self._set("export.push_to_hub", self._flags["hub_model_id"])

  def _metric_for_best_model(self, value: str) -> None:
    if value not in ("eval_loss", "loss"):
      raise ValueError("must be eval_loss")

  def _logging_dir(self, value: str) -> None:
    self._set_mapped(value)
    if "tensorboard" not in self._flags.get("report_to", ""):
      self._note("only used with --report_to tensorboard")

  def _report_to(self, value: str) -> None:
    if value == "all":
      raise ValueError("must name trackers: tensorboard, mlflow, wandb or trackio")
    self._set_mapped(value)

  def _per_device_train_batch_size(self, value: str) -> None:
    _positive_int(value)  # only a check; `add_batch` sets the batch

  _per_device_eval_batch_size = _gradient_accumulation_steps = _per_device_train_batch_size

  def _deepspeed(self, value: str) -> None:
    """Do nothing: `add_deepspeed` reads the file later, as all other flags override it."""

  def add_deepspeed(self) -> None:
    """Add the settings of a ds_config.json that the command line does not set; print a table."""
    from jaxft.cli import deepspeed_config, deepspeed_keys  # large tables, rarely needed

    if not (value := self._flags.get("deepspeed")):
      return
    self._parsed = deepspeed_config.read(Path(expand_user(value)))
    overridden = {}
    for setting, file_value in self._parsed.settings.items():
      if winner := self._overriding(setting):
        overridden[setting] = winner
      else:
        self.settings[setting] = file_value
    counted = (PER_DEVICE, ACCUMULATION)
    for key, flags, settings in (
      (deepspeed_keys.MICRO_BATCH, (PER_DEVICE,), BATCH_SETTINGS),
      (deepspeed_keys.ACCUMULATION, (ACCUMULATION,), BATCH_SETTINGS),
      (deepspeed_keys.TRAIN_BATCH, counted, {"train.batch_size"}),
    ):
      given = [f"--{flag}={self._flags[flag]}" for flag in flags if flag in self._flags]
      if winners := [*self._setting_words(settings), *given]:
        overridden[key] = winners[0]
    print(deepspeed_config.format_table(self._parsed.entries, overridden), file=sys.stderr)

  def _overriding(self, setting: str) -> str | None:
    """Return the word of the command line that sets this setting or its counterpart, if any."""
    names = _with_counterpart(setting)
    flags = (flag for name, flag in self._set_by.items() if name in names)
    return next(iter([*self._setting_words(names), *flags]), None)

  def add_batch(self) -> None:
    """Set the batch from flags, the DeepSpeed file and defaults.

    Raises:
      ValueError: two of them conflict.
    """
    flags = self._flags
    words = self._setting_words(BATCH_SETTINGS)
    counted = {PER_DEVICE, ACCUMULATION} & flags.keys()
    if words and counted:
      raise ValueError(f"{words[0]}: conflicts with a batch per device; use only one of the two")
    file_rows, file_steps, batch_size = self._parsed[1:4] if self._parsed else (None, None, None)
    if words and batch_size and not self._setting_words({"train.batch_size"}):
      self.settings["train.batch_size"] = batch_size
    if words:  # the command line overrides the file
      file_rows = file_steps = batch_size = None
    numbers = {
      flag: int(_positive_int(flags[flag])) for flag in (*counted, EVAL_PER_DEVICE) if flag in flags
    }
    rows = numbers.get(PER_DEVICE, file_rows)
    steps = numbers.get(ACCUMULATION, file_steps)
    if steps and not rows and self.has_config and not batch_size:
      flag = ACCUMULATION if ACCUMULATION in flags else "deepspeed"
      raise ValueError(
        f"--{flag}={flags[flag]}: {steps} accumulation steps need a batch size; give "
        f"--{PER_DEVICE} too, or --config.train.batch_size and --config.train.micro_batch_size "
        "instead"
      )
    if counted:
      batch_size = None
    if batch_size and not (file_rows and file_steps):
      self.settings["train.batch_size"] = batch_size
      self.settings["train.micro_batch_size"] = file_rows or 0
      if file_steps:
        raise ValueError(
          f"--deepspeed: train_batch_size={batch_size} with gradient_accumulation_steps="
          f"{file_steps}: set train_micro_batch_size_per_gpu instead of one of the two"
        )
      rows = batch_size = None
    elif not rows and (counted or not self.has_config and not words):
      rows = 8
    eval_batch_size = numbers.get(EVAL_PER_DEVICE)
    if rows or eval_batch_size:
      self.batch = PerDeviceBatch(
        micro_batch_size=rows,
        accumulation_steps=steps or 1,
        eval_batch_size=eval_batch_size,
        batch_size=batch_size,
      )


def _with_counterpart(setting: str) -> set[str]:
  return {setting}.union(*(pair for pair in jaxft.config.EXCLUSIVE_PAIRS if setting in pair))


def _is_step_limit(max_steps: str) -> bool:
  """Return whether --max_steps limits the run; with 0 or less the epochs do."""
  return not re.fullmatch("-[0-9]+|0", max_steps)


def _checkpoint_steps(workdir: Path) -> list[int]:
  folder = workdir / "checkpoints"
  return [int(it.name) for it in folder.iterdir() if it.name.isdecimal()] if folder.is_dir() else []


def _is_latest(path: Path, workdir: Path) -> bool:
  """Return whether a path is the run, its folder of checkpoints, or the newest of them."""
  folder = (workdir / "checkpoints").resolve()
  latest = [folder / str(step) for step in sorted(_checkpoint_steps(workdir))[-1:]]
  return path.resolve() in (workdir.resolve(), folder, *latest)


def markdown_table() -> str:
  """Return all flags as a Markdown table, for docs/recipes/run_clm.md."""
  rows = {}
  for name, (setting, _, remark) in MAPPED.items():
    rows[f"`--{name}`"] = f"`--config.{setting}`" + (f"; {remark}" if remark else "")
  rows |= {
    "`--output_dir`": "`--workdir`",
    "`--overwrite_output_dir`": "starts a new run and renames an existing one in `--output_dir`, "
    "and prints the new name; leave the flag out to resume",
    "`--resume_from_checkpoint`": "no effect: the same command always resumes; any checkpoint "
    "except the newest of `--output_dir` is refused",
    "`--streaming`": STREAMING_NOTE,
    "`--cache_dir`": "folder for downloads and the token cache",
    "`--dataset_name` with `--dataset_config_name`": "`--config.data.train=hub:NAME/CONFIGURATION`",
    "`--model_type`, `--config_name`": "without `--model_name_or_path`: new weights, "
    "`--config.model.init=scratch`",
    f"`--{PER_DEVICE}`": "`--config.train.micro_batch_size`; multiplied by devices and "
    "accumulation steps: `--config.train.batch_size`",
    f"`--{ACCUMULATION}`": "see above",
    f"`--{EVAL_PER_DEVICE}`": "multiplied by devices: `--config.train.eval_batch_size`",
    "`--deepspeed`": "reads the file and prints a table with the translation of each key: "
    "[deepspeed.md](deepspeed.md)",
    "`--fp16`": f"`--config.model.compute_dtype=auto`: {NO_FLOAT16}",
    "`--torch_dtype`": "`--config.model.param_dtype`; `float16` becomes bfloat16",
  }
  for name, (steps, setting) in STRATEGIES.items():
    rows[f"`--{name}`"] = (
      f"`no`: never; `steps`: every `--{steps}` steps; `epoch`: `--config.{setting}=epoch`"
    )
  rows |= {
    "`--metric_for_best_model`": "only `eval_loss`, which `--load_best_model_at_end` always uses",
    "`--push_to_hub` with `--hub_model_id`": "`--config.export.push_to_hub`",
  }
  rows |= {f"`--{name}`": f"same as `--{new}`" for name, new in ALIASES.items()}
  for name, reason in NO_OPS.items():
    rows[f"`--{name}`"] = f"no effect: {reason}" if reason else "no effect"
  rows |= {f"`--{name}`": f"refused: {reason}" for name, reason in UNSUPPORTED.items()}
  lines = [f"| {flag} | {meaning} |" for flag, meaning in rows.items()]
  return "\n".join(["| run_clm.py | jaxft |", "|---|---|", *lines])
