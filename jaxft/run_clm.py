"""The flags of transformers' run_clm.py: what each is here, or why it is nothing here. Also the config that they start from.

python -m jaxft.train --model_name_or_path gpt2 --train_file my_texts.txt --do_train --output_dir runs/mine
"""

import difflib
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from jaxft import config as settings
from jaxft.data import sources
from jaxft.errors import RequestError
from jaxft.files import at_home


class Same(NamedTuple):
  """A setting that means the same."""

  setting: str
  # None: nothing is set. Raises ValueError with the reason where the value cannot mean anything.
  value: Callable[[str], str | None] = str


def _choice(**choices: str) -> Callable[[str], str]:
  def value(text: str) -> str:
    if text not in choices:
      near = difflib.get_close_matches(text, choices, 1)
      raise ValueError(f"there is only {', '.join(choices)} here" + (f"; did you mean {near[0]}?" if near else ""))
    return choices[text]

  return value


def _whole(text: str) -> str:
  if not text.isdecimal():
    raise ValueError("give a whole number")
  return text


def _number(text: str) -> str:
  try:
    fine = math.isfinite(float(text))
  except ValueError:
    fine = False
  if not fine:
    raise ValueError("give a number")
  return text


def _share(text: str) -> str:
  return str(float(_number(text)) / 100)


def _switch(on: str, off: str | None = None) -> Callable[[str], str | None]:
  """The value of a setting for True, and for False, where None leaves it as it is."""
  return lambda text: on if _is_true(text) else off


def _is_true(text: str) -> bool:
  return text.lower() in ("true", "1", "yes", "y", "t", "")


FLOAT16 = (
  "float16 is not there yet; computed in bfloat16 where the device has it, else in float32, which need no loss scale"
)
SAME = {
  "model_name_or_path": Same("model.path"),
  "model_revision": Same("model.revision"),
  "tokenizer_name": Same("model.tokenizer"),
  "config_overrides": Same("model.config_overrides"),
  "train_file": Same("data.train"),
  "validation_file": Same("data.validation"),
  "validation_split_percentage": Same("data.validation_fraction", _share),
  "max_train_samples": Same("data.limit_train", _whole),
  "max_eval_samples": Same("data.limit_validation", _whole),
  "block_size": Same("data.sequence_length", _whole),
  "learning_rate": Same("optim.learning_rate", _number),
  "num_train_epochs": Same("train.epochs", _number),
  "max_steps": Same("train.steps", _whole),
  "lr_scheduler_type": Same(
    "optim.schedule", _choice(linear="linear", cosine="cosine", constant="constant", constant_with_warmup="constant")
  ),
  "warmup_steps": Same("optim.warmup_steps", _whole),
  "warmup_ratio": Same("optim.warmup_ratio", _number),
  "optim": Same(
    "optim.name",
    _choice(adamw_torch="adamw", adamw_torch_fused="adamw", adamw_hf="adamw", adafactor="adafactor", lion_32bit="lion"),
  ),
  "adafactor": Same("optim.name", _switch("adafactor")),
  "weight_decay": Same("optim.weight_decay", _number),
  "adam_beta1": Same("optim.b1", _number),
  "adam_beta2": Same("optim.b2", _number),
  "adam_epsilon": Same("optim.eps", _number),
  "max_grad_norm": Same("optim.clip_norm", _number),
  "seed": Same("train.seed", _whole),
  "data_seed": Same("data.shuffle_seed", _whole),
  "bf16": Same("model.compute_dtype", _switch("bfloat16", "float32")),
  "gradient_checkpointing": Same("memory.remat", _switch("full")),
  "activation_checkpointing": Same("memory.remat", _switch("full")),
  "logging_dir": Same("tracking.logging_dir"),
  "logging_steps": Same("train.log_every", _whole),
  "eval_steps": Same("train.eval_every", _whole),
  "save_steps": Same("train.save_every", _whole),
  "save_total_limit": Same("train.keep", _whole),
  "load_best_model_at_end": Same("train.keep_best_metric", _switch("eval/loss")),
  "report_to": Same(
    "tracking.writers", _choice(none="", tensorboard="tensorboard", mlflow="mlflow", wandb="wandb", trackio="trackio")
  ),
  "run_name": Same("tracking.run_name"),
}
# When something happens, and the flag and the setting that say how often.
STRATEGIES = {
  "logging_strategy": ("logging_steps", "train.log_every"),
  "eval_strategy": ("eval_steps", "train.eval_every"),
  "save_strategy": ("save_steps", "train.save_every"),
}
OLD_NAMES = {
  "evaluation_strategy": "eval_strategy",
  "dtype": "torch_dtype",
  "per_gpu_train_batch_size": "per_device_train_batch_size",
  "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}
PUSH, HUB_NAME = "push_to_hub", "hub_model_id"
BEST = "metric_for_best_model"
PER_DEVICE, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
EVAL_PER_DEVICE = "per_device_eval_batch_size"
WORKDIR, OVERWRITE, RESUME = "output_dir", "overwrite_output_dir", "resume_from_checkpoint"
DATASET, CONFIGURATION = "dataset_name", "dataset_config_name"
MODEL_TYPE, CONFIG_NAME, CACHE = "model_type", "config_name", "cache_dir"
DEEPSPEED, FLOAT_16, DTYPE = "deepspeed", "fp16", "torch_dtype"
STREAMING, STREAMED = "streaming", "the data set is downloaded, and its tokens made once and memory-mapped"
LOADER = "the loader has nothing to set: it reads memory-mapped tokens"
NO_DDP, NO_TORCH = "XLA makes the collectives", "it is torch's; XLA compiles every step"
NO_METRICS = "an evaluation tells loss and perplexity, or accuracy and F1"
# Flags that ask for what every run does, or for what changes no result, with the reason where it is not plain.
ALWAYS = {
  "do_train": "",
  "do_eval": "weights are evaluated before the first step and after the last in any case",
  "low_cpu_mem_usage": "",
  "eval_on_start": "",
  "prediction_loss_only": "",
  "logging_first_step": "",
  "logging_nan_inf_filter": "what is not finite is told, and never applied",
  "include_num_input_tokens_seen": "",
  "include_tokens_per_second": "",
  "skip_memory_metrics": "",
  "full_determinism": "",
  "enable_jit_checkpoint": "",
  "save_safetensors": "weights are written as safetensors",
  "average_tokens_across_devices": "",
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
  "ddp_timeout": "--peer_timeout says how long a silent process is waited for",
  "local_rank": "processes are found out",
} | dict.fromkeys(
  "preprocessing_num_workers dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
  "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order".split(),
  LOADER,
)  # fmt: skip
# Of these only True asks for what always happens.
ONLY_TRUE = {
  "keep_linebreaks": "text without its newlines is other text; leave them out of the file",
  "save_safetensors": "pickles are not written",
}
SHARDING = "config.mesh and config.memory say how a run is spread: docs/sharding.md"
TOKEN = "the token is read where huggingface_hub keeps it, or from HF_TOKEN"
REFUSED = {
  "trust_remote_code": "no code from a checkpoint is ever run; leave it out",
  "fsdp": SHARDING,
  "fsdp_config": SHARDING,
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
  "dataloader_drop_last": "the last rows of an epoch are in the same batch as the first of the next: none is dropped",
  "label_smoothing_factor": "the loss is plain cross-entropy",
  "label_names": "targets are the tokens themselves",
  "neftune_noise_alpha": "there is no noise on embeddings",
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
  "save_only_model": "a checkpoint has what a run needs to continue; the model alone is in WORKDIR/export",
  "ignore_data_skip": "a run that continues takes the rows that come next, and looks them up at once",
  "restore_callback_states_from_checkpoint": "a run that continues has all of its state",
  "liger_kernel_config": "config.model.attention and XLA choose the kernels",
  "project": "docs/trackers.md says how to name projects",
  "trackio_space_id": "docs/trackers.md says how to name projects",
  "trackio_bucket_id": "docs/trackers.md says how to name projects",
  "trackio_static_space_id": "docs/trackers.md says how to name projects",
  "debug": "a step that is not finite is told with the tensors that are not",
}
KNOWN = (
  SAME.keys() | STRATEGIES.keys() | OLD_NAMES.keys() | ALWAYS.keys() | REFUSED.keys()
  | {PUSH, HUB_NAME, BEST, PER_DEVICE, ACCUMULATION, EVAL_PER_DEVICE, WORKDIR, OVERWRITE, RESUME, DATASET, CONFIGURATION}
  | {MODEL_TYPE, CONFIG_NAME, CACHE, STREAMING, DEEPSPEED, FLOAT_16, DTYPE}
)  # fmt: skip


# Those that may stand alone, for True.
SWITCHES = {
  "bf16",
  FLOAT_16,
  "gradient_checkpointing",
  "activation_checkpointing",
  "adafactor",
  "load_best_model_at_end",
}
SWITCHES |= {OVERWRITE, RESUME, PUSH, STREAMING}
# What people type for a flag with a name that is nearer to another one's.
MEANT = {
  "model": "model_name_or_path",
  "data": "train_file",
  "resume": RESUME,
  "overwrite": OVERWRITE,
  "batch_size": PER_DEVICE,
  "train_batch_size": PER_DEVICE,
  "eval_batch_size": EVAL_PER_DEVICE,
  "lr": "learning_rate",
  "epochs": "num_train_epochs",
  "steps": "max_steps",
  "max_length": "block_size",
  "max_seq_length": "block_size",
}


class PerDevice(NamedTuple):
  """A batch as run_clm.py counts it; None where the config says it."""

  rows: int | None
  accumulation: int
  eval_rows: int | None = None
  batch_size: int | None = None  # of a DeepSpeed config that says all three

  def into(self, config: ConfigDict, devices: int) -> None:
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
  config = settings.default()
  config.data.sequence_length = 1024
  config.train.epochs = 3.0
  config.train.log_every = 500
  return config


def translate(words: list[str], own: Iterable[str] = ()) -> tuple[list[str], PerDevice | None]:
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
  command = Command(rest, given)
  command.notes += notes
  for name, value in given.items():
    try:
      command.add(name, value)
    except ValueError as error:
      lines.append(f"--{name}{'=' + value if value else ''}: {error}")
  try:
    command.add_batch()
  except ValueError as error:
    lines.append(str(error))
  if lines:
    raise RequestError("\n".join(lines))
  for line in command.notes:
    print(line, file=sys.stderr)
  config = [] if command.has_config else [f"--config={__file__}"]
  return [*config, *rest, *(f"--config.{setting}={value}" for setting, value in command.ours.items())], command.batch


def _given(words: list[str], own: set[str]) -> tuple[list[str], dict[str, str], list[str], list[str]]:
  """The words that are none of run_clm.py's, the values of those that are, and lines of unknown and of repeated flags."""
  rest, given, lines, notes, i = [], {}, [], [], 0
  switches = own | {f"no{name}" for name in own}
  while i < len(words):
    word, i = words[i], i + 1
    name, equals, value = word.lstrip("-").partition("=")
    name = name.replace("-", "_")
    negated = name.removeprefix("no_") if name.startswith("no_") and name not in KNOWN else ""
    if word.startswith("--") and negated in KNOWN:
      given[OLD_NAMES.get(negated, negated)] = "False"
    elif word.startswith("--") and name in KNOWN:
      name = OLD_NAMES.get(name, name)
      if not equals and i < len(words) and not words[i].startswith("--"):
        value, i = words[i], i + 1
      if given.get(name, value) != value:
        notes.append(f"--{name}={given[name]}: given again, as {value}, which counts")
      given[name] = value
    elif word.startswith("--") and name not in (*switches, "", "help", "config") and not name.startswith("config."):
      lines.append(f"{word.split('=')[0]}: no such flag; {_nearest(name, KNOWN | own)}")
    else:
      rest.append(word)
  return rest, given, lines, notes


def _nearest(name: str, known: Iterable[str]) -> str:
  near = [MEANT[name]] if name in MEANT else difflib.get_close_matches(name, known, 1)
  near = near or [f"config.{setting}" for setting in settings.BY_NAME if setting.split(".")[1] == name.split(".")[-1]]
  return f"did you mean --{near[0]}?" if near else "--help and docs/recipes/run_clm.md tell what there is"


class Command:
  """A command line of run_clm.py while it is read."""

  def __init__(self, rest: list[str], given: dict[str, str]):
    self.has_config = any(word == "--config" or word.startswith("--config=") for word in rest)
    self.ours: dict[str, object] = {}  # setting -> value
    self.notes: list[str] = []
    self.batch: PerDevice | None = None
    self._given, self._rest, self._file = given, rest, None
    if DEEPSPEED in given:
      self._read_deepspeed(given[DEEPSPEED])

  def add(self, name: str, value: str) -> None:
    """Takes a flag; raises ValueError with the reason where it means nothing here."""
    if not value and name not in SWITCHES and (name in SAME or hasattr(self, f"_{name}")):
      raise ValueError("give a value")
    if name in REFUSED:
      if value.lower() in ("false", "0", "no", "none"):
        return  # --trust_remote_code False asks for what always happens
      raise ValueError(REFUSED[name])
    if name in ALWAYS:
      return self._always(name, value)
    if name in STRATEGIES:
      return self._strategy(name, value)
    if method := getattr(self, f"_{name}", None):
      return method(value)
    if name in SAME and not self._is_off(name):
      self._set(SAME[name].setting, SAME[name].value(value), name)

  def _set(self, setting: str, value: object, flag: str) -> None:
    if value is None:
      return
    words = self._words_of(_with_counterpart(setting))
    if words and words[-1] != f"--config.{setting}={value}":
      raise ValueError(f"{words[-1]} is given too; leave one of the two out")
    self.ours[setting] = value

  def _words_of(self, names: set[str]) -> list[str]:
    return [word for word in self._rest if any(word.startswith(f"--config.{name}=") for name in names)]

  def _is_off(self, name: str) -> bool:
    """Whether another flag says that this one is of no account."""
    if name == "num_train_epochs" and self._given.get("max_steps", "-1") != "-1":
      self.notes.append(
        f"--num_train_epochs={self._given[name]}: --max_steps={self._given['max_steps']} says when to end"
      )
      return True
    of = {steps: self._given.get(strategy) for strategy, (steps, _) in STRATEGIES.items()}
    if of.get(name) in ("no", "epoch", "best"):
      self.notes.append(f"--{name}={self._given[name]}: of no account with a strategy of {of[name]}")
      return True
    return False

  def _always(self, name: str, value: str) -> None:
    if name == "do_train" and not _is_true(value) or name == "do_eval" and "do_train" not in self._given:
      raise ValueError("this command trains; python -m jaxft.evaluate --model MODEL --data FILE measures a model")
    if name in ONLY_TRUE and not _is_true(value):
      raise ValueError(ONLY_TRUE[name])
    if ALWAYS[name] and value.lower() == "false":
      self.notes.append(f"--{name}={value}: {ALWAYS[name]}")

  def _strategy(self, name: str, value: str) -> None:
    steps, setting = STRATEGIES[name]
    if value not in ("no", "steps", "epoch", *(["best"] if name == "save_strategy" else [])):
      raise ValueError("there is only no, steps and epoch")
    if value == "steps" and steps not in self._given and name != "save_strategy":
      self.ours[setting] = SAME["logging_steps"].value(self._given.get("logging_steps", "500"))
    elif value == "epoch":
      self._set(setting, "epoch", name)
    elif value == "best":
      self._set(setting, 0, name)
      self._set("train.keep_best_metric", "eval/loss", name)
    elif value == "no" and name == "logging_strategy":
      self.notes.append("--logging_strategy=no: metrics.jsonl is written all the same, every 500 steps")
      self.ours[setting] = 500
    elif value == "no":
      self._set(setting, 0, name)

  def _max_steps(self, value: str) -> None:
    if value != "-1":
      self._set("train.steps", _whole(value), "max_steps")
      self.ours["train.epochs"] = 0.0

  def _num_train_epochs(self, value: str) -> None:
    if not self._is_off("num_train_epochs"):
      self._set("train.epochs", _number(value), "num_train_epochs")
      self.ours["train.steps"] = 0

  def _warmup_steps(self, value: str) -> None:
    if 0 < float(_number(value)) < 1:  # transformers 5: a share
      return self._set("optim.warmup_ratio", value, "warmup_steps")
    self._set("optim.warmup_steps", _whole(value), "warmup_steps")
    if float(_number(self._given.get("warmup_ratio", "0"))) and int(value):
      self.notes.append(f"--warmup_ratio={self._given['warmup_ratio']}: --warmup_steps={value} says how many")

  def _warmup_ratio(self, value: str) -> None:
    number = float(_number(value))
    if not 0 <= number < 1:
      raise ValueError("must be at least 0 and below 1: a share of the steps")
    if self._given.get("warmup_steps", "0") == "0":
      self._set("optim.warmup_ratio", value, "warmup_ratio")

  def _dataset_name(self, value: str) -> None:
    name = f"hub:{value}/{self._given[CONFIGURATION]}" if CONFIGURATION in self._given else f"hub:{value}"
    self._set("data.train", name, DATASET)
    if "validation_file" not in self._given and sources.has_split(name, "validation"):
      self._set("data.validation", f"{name}:validation", DATASET)
      self.notes.append(f"--{DATASET}={value}: trained on its split train, evaluated on its split validation")

  def _dataset_config_name(self, value: str) -> None:
    if DATASET not in self._given:
      raise ValueError(f"goes with --{DATASET}")

  def _validation_split_percentage(self, value: str) -> None:
    if "validation_file" in self._given:
      return self.notes.append(f"--validation_split_percentage={value}: --validation_file names what is evaluated on")
    self._set("data.validation_fraction", _share(value), "validation_split_percentage")

  def _max_train_samples(self, value: str) -> None:
    self._limit("max_train_samples", value)

  def _max_eval_samples(self, value: str) -> None:
    self._limit("max_eval_samples", value)

  def _limit(self, name: str, value: str) -> None:
    self._set(SAME[name].setting, _whole(value), name)
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
      raise ValueError("weights that are read have their own config.json; leave --model_name_or_path out for new ones")
    self._new_weights(value)

  def _new_weights(self, path: str) -> None:
    self.ours |= {"model.path": path, "model.init": "scratch"}
    self.notes.append(f"no --model_name_or_path: new weights are drawn, of the sizes that {path}/config.json says")

  def _config_overrides(self, value: str) -> None:
    if "model_name_or_path" in self._given:
      raise ValueError("weights that are read have their own sizes; leave --model_name_or_path out for new ones")
    self.ours.setdefault("model.config_overrides", value)

  def _fp16(self, value: str) -> None:
    if not _is_true(value):
      return
    if "bf16" in self._given:
      raise ValueError("--bf16 is given too; leave one of the two out")
    self._set("model.compute_dtype", "auto", FLOAT_16)
    self.notes.append(f"--fp16: {FLOAT16}")

  def _torch_dtype(self, value: str) -> None:
    which = _choice(auto="float32", float32="float32", bfloat16="bfloat16", float16="bfloat16")(value)
    self._set("model.param_dtype", which, DTYPE)
    if which == "bfloat16":
      self._set("model.compute_dtype", which, DTYPE)
    if value in ("auto", "float16"):
      self.notes.append(f"--{DTYPE}={value}: weights are kept in {which}" + (": " + FLOAT16 if value != "auto" else ""))

  def _output_dir(self, value: str) -> None:
    if words := [word for word in self._rest if word.startswith("--workdir")]:
      raise ValueError(f"{words[0]} is given too; leave one of the two out")
    self._rest.append(f"--workdir={value}")

  def _overwrite_output_dir(self, value: str) -> None:
    if _is_true(value):
      self._rest.append(f"--{OVERWRITE}")

  def _resume_from_checkpoint(self, value: str) -> None:
    words = [word.partition("=")[2] for word in self._rest if word.startswith("--workdir=")]
    workdir = Path(at_home(self._given.get(WORKDIR) or next(iter(words), ".")))
    if OVERWRITE in self._given and _is_true(self._given[OVERWRITE]):
      raise ValueError(f"--{OVERWRITE} begins a new run; leave one of the two out")
    if value.lower() == "false":
      raise ValueError(f"a run that is there is continued; --{OVERWRITE} begins a new one")
    if value.lower() in ("true", "") or _is_newest(Path(at_home(value)), workdir):
      return  # a run is continued always
    if (Path(value) / "trainer_state.json").exists():
      raise ValueError(f"a checkpoint of transformers' Trainer; --model_name_or_path={value} begins with its weights")
    raise ValueError(
      f"not the newest checkpoint of --{WORKDIR}={workdir}, which is the one that is continued; leave it out"
    )

  def _streaming(self, value: str) -> None:
    if _is_true(value):
      self.notes.append(f"--{STREAMING}: {STREAMED}")

  def _cache_dir(self, value: str) -> None:
    """Has models and data sets downloaded to a folder. Both libraries read where to when they are imported, which is later."""
    self._set("data.cache_dir", str(Path(value) / "tokens"), CACHE)
    os.environ["HF_HUB_CACHE"] = os.environ["HF_DATASETS_CACHE"] = at_home(value)
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
      self.notes.append(f"--logging_dir={value}: of TensorBoard's files, which --report_to tensorboard switches on")

  def _report_to(self, value: str) -> None:
    if value == "all":
      raise ValueError("name those to tell: tensorboard, mlflow, wandb or trackio")
    self._set("tracking.writers", SAME["report_to"].value(value), "report_to")

  def _per_device_train_batch_size(self, value: str) -> None:
    _at_least_one(value)

  def _gradient_accumulation_steps(self, value: str) -> None:
    _at_least_one(value)

  def _per_device_eval_batch_size(self, value: str) -> None:
    _at_least_one(value)

  def _deepspeed(self, value: str) -> None:
    """Has been read already."""

  def _read_deepspeed(self, value: str) -> None:
    """Takes what a ds_config.json says and no flag or setting of the command line says, and prints what became of it."""
    from jaxft import ds_config, ds_keys  # tables that few commands need

    self._file = ds_config.read(Path(at_home(value)))
    beaten = {}
    for setting, of_file in self._file.settings.items():
      if beats := self._beats(setting):
        beaten[setting] = beats
      else:
        self.ours[setting] = of_file
    for key, flag in ((ds_keys.ROWS, PER_DEVICE), (ds_keys.ACCUMULATION, ACCUMULATION), (ds_keys.BATCH, PER_DEVICE)):
      if flag in self._given:
        beaten[key] = f"--{flag}={self._given[flag]}"
    print(ds_config.table(self._file.entries, beaten), file=sys.stderr)

  def _beats(self, setting: str) -> str | None:
    """What the command line says of a setting, or of its counterpart; None where it says nothing."""
    same = _with_counterpart(setting)
    words = self._words_of(same)
    flags = [f"--{name}={self._given[name]}" for name in self._given if name in SAME and SAME[name].setting in same]
    return next(iter([*words, *flags]), None)

  def add_batch(self) -> None:
    """Finds out the batch, from flags, the DeepSpeed file and the defaults; raises ValueError where they contradict."""
    given, file = self._given, self._file
    words = [w for w in self._rest if w.startswith(("--config.train.batch_size", "--config.train.micro_batch_size"))]
    counted = {PER_DEVICE, ACCUMULATION} & given.keys()
    if words and counted:
      raise ValueError(f"{words[0]}: a batch by device is given too; leave one of the two out")
    rows = int(given[PER_DEVICE]) if given.get(PER_DEVICE, "").isdecimal() else file and file.rows
    each = int(given[ACCUMULATION]) if given.get(ACCUMULATION, "").isdecimal() else file and file.accumulation
    eval_rows = int(given[EVAL_PER_DEVICE]) if given.get(EVAL_PER_DEVICE, "").isdecimal() else None
    if ACCUMULATION in given and not rows and self.has_config:
      raise ValueError(f"--{ACCUMULATION}: of how many rows? give --{PER_DEVICE} too, or config.train.batch_size")
    batch_size = file.batch_size if file and not counted and not words else None
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
      self.batch = PerDevice(rows, each or 1, eval_rows, batch_size)


def _with_counterpart(setting: str) -> set[str]:
  return {setting, *(other for pair in settings.COUNTERPARTS if setting in pair for other in pair)}


def _at_least_one(text: str) -> None:
  if int(_whole(text)) < 1:
    raise ValueError("must be at least 1")


def _is_newest(path: Path, workdir: Path) -> bool:
  """Whether a path names a run, or the checkpoint of it that is continued: the newest."""
  there, folder = path.resolve(), (workdir / "checkpoints").resolve()
  steps = [int(it.name) for it in folder.iterdir() if it.name.isdecimal()] if folder.is_dir() else []
  return there in (workdir.resolve(), folder, *([folder / str(max(steps))] if steps else []))


def table() -> str:
  """All flags in Markdown, for docs/recipes/run_clm.md."""
  special = {
    "max_train_samples": "documents, drawn",
    "max_eval_samples": "documents, drawn",
    "max_steps": "beats `--num_train_epochs`",
    "warmup_steps": "below 1, as transformers 5 has it, `--config.optim.warmup_ratio`",
    "config_overrides": "of new weights",
    "logging_dir": "with `--report_to tensorboard`",
  }
  lines = [
    f"| `--{name}` | `--config.{same.setting}`{'; ' + special[name] if name in special else ''} |"
    for name, same in SAME.items()
  ]
  lines += [
    f"| `--{WORKDIR}` | `--workdir` |",
    f"| `--{OVERWRITE}` | a new run: one that is in `--{WORKDIR}` is moved to a folder beside it, which is told |",
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
    *(f"| `--{name}` | as `--{new}` |" for name, new in OLD_NAMES.items()),
    *(f"| `--{name}` | always so{': ' + reason if reason else ''} |" for name, reason in ALWAYS.items()),
    *(f"| `--{name}` | refused: {reason} |" for name, reason in REFUSED.items()),
  ]
  return "\n".join(["| run_clm.py | jaxft |", "|---|---|", *lines])
