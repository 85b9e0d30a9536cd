"""The flags of transformers' run_clm.py: what each is here, or why it is nothing here. Also the config that they start from.

python -m jaxft.train --model_name_or_path gpt2 --train_file my_texts.txt --do_train --output_dir runs/mine
"""

from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from jaxft import config as settings
from jaxft.errors import RequestError


class Same(NamedTuple):
  """A setting that means the same."""

  setting: str
  value: Callable[[str], str] = str  # raises ValueError with the reason where the value cannot mean anything
  also: tuple[str, ...] = ()  # what is set with it, "setting=value"


def _choice(**choices: str) -> Callable[[str], str]:
  def value(text: str) -> str:
    if text not in choices:
      raise ValueError(f"there is only {', '.join(choices)} here")
    return choices[text]

  return value


def _whole(text: str) -> str:
  if not text.isdecimal():
    raise ValueError("give a whole number of steps")
  return text


def _only_true(setting_value: str) -> Callable[[str], str]:
  def value(text: str) -> str:
    if not _is_true(text):
      raise ValueError("leave the flag out instead")
    return setting_value

  return value


def _is_true(text: str) -> bool:
  return text.lower() in ("true", "1", "yes", "")


SAME = {
  "model_name_or_path": Same("model.path"),
  "model_revision": Same("model.revision"),
  "dataset_name": Same("data.train", lambda name: f"hub:{name}"),
  "train_file": Same("data.train"),
  "validation_file": Same("data.validation"),
  "validation_split_percentage": Same("data.validation_fraction", lambda text: str(float(text) / 100)),
  "block_size": Same("data.sequence_length"),
  "learning_rate": Same("optim.learning_rate"),
  "num_train_epochs": Same("train.epochs", also=("train.steps=0",)),
  "max_steps": Same("train.steps", _whole, also=("train.epochs=0.0",)),  # wins, whichever comes first
  "lr_scheduler_type": Same(
    "optim.schedule", _choice(linear="linear", cosine="cosine", constant="constant", constant_with_warmup="constant")
  ),
  "warmup_steps": Same("optim.warmup_steps", _whole),
  "optim": Same(
    "optim.name",
    _choice(adamw_torch="adamw", adamw_torch_fused="adamw", adamw_hf="adamw", adafactor="adafactor", lion_32bit="lion"),
  ),
  "weight_decay": Same("optim.weight_decay"),
  "adam_beta1": Same("optim.b1"),
  "adam_beta2": Same("optim.b2"),
  "adam_epsilon": Same("optim.eps"),
  "max_grad_norm": Same("optim.clip_norm"),
  "seed": Same("train.seed"),
  "data_seed": Same("data.shuffle_seed"),
  "bf16": Same("model.compute_dtype", _only_true("bfloat16")),
  "gradient_checkpointing": Same("memory.remat", _only_true("full")),
  "activation_checkpointing": Same("memory.remat", _only_true("full")),
  "logging_steps": Same("train.log_every", _whole),
  "eval_steps": Same("train.eval_every", _whole),
  "save_steps": Same("train.save_every", _whole),
  "save_total_limit": Same("train.keep"),
  "load_best_model_at_end": Same("train.keep_best_metric", _only_true("eval/loss")),
  "report_to": Same(
    "tracking.writers", _choice(none="", tensorboard="tensorboard", mlflow="mlflow", wandb="wandb", trackio="trackio")
  ),
  "run_name": Same("tracking.run_name"),
}
# Whether, and with what, evaluations and checkpoints are made.
STRATEGIES = {"eval_strategy": ("eval_steps", "train.eval_every"), "save_strategy": ("save_steps", "train.save_every")}
PUSH, HUB_NAME = "push_to_hub", "hub_model_id"
BEST = "metric_for_best_model"
PER_DEVICE, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
WORKDIR = "output_dir"
# True of every run here, so that they may be said.
ALWAYS = ("do_train", "do_eval", "low_cpu_mem_usage", "use_fast_tokenizer", "eval_on_start")
SAMPLES = (
  "config.data.limit_train and limit_validation count documents, drawn; run_clm.py's first blocks are no such thing"
)
LOADER = "the loader has nothing to set: it reads memory-mapped tokens"
SHARDING = "config.mesh and config.memory say how a run is spread: docs/recipes/deepspeed.md"
REFUSED = {
  "fp16": "float16 ends at 65504, and training overflows it; --bf16 has float32's range",
  "tokenizer_name": "the tokenizer is the one in --model_name_or_path",
  "dataset_config_name": "give the files of that part of the data set, or a data set that has one part only",
  "streaming": "tokens are made once and kept (config.data.cache_dir), and memory-mapped",
  "trust_remote_code": "no code from a checkpoint is ever run",
  "warmup_ratio": "--warmup_steps says how many",
  "overwrite_output_dir": "a run that is there is continued; name another --output_dir to begin anew",
  "resume_from_checkpoint": "the same command with the same --output_dir continues a run",
  "per_device_eval_batch_size": "an evaluation takes as many rows at once as a training step",
  "deepspeed": SHARDING,
  "fsdp": SHARDING,
  "fsdp_config": SHARDING,
  "config_name": "config.model.init=scratch with config.model.config draws new weights; read ones have their own config.json",
  "max_train_samples": SAMPLES,
  "max_eval_samples": SAMPLES,
  "hub_token": "the token is read where huggingface_hub keeps it, or from HF_TOKEN",
  "hub_private_repo": "make the repository first, as private as it should be",
  "torch_dtype": "weights are float32 or, with config.model.param_dtype, bfloat16, and computed in config.model.compute_dtype",
  "dtype": "weights are float32 or, with config.model.param_dtype, bfloat16, and computed in config.model.compute_dtype",
  "torch_compile": "every step is compiled",
  "preprocessing_num_workers": LOADER,
  "dataloader_num_workers": LOADER,
  "dataloader_drop_last": "the last rows of an epoch are in the same batch as the first of the next: none is dropped",
  "overwrite_cache": "tokens are made anew when text, tokenizer or settings change",
  "keep_linebreaks": "every newline is kept, or cut at by config.data.separator",
  "label_smoothing_factor": "the loss is plain cross-entropy",
  "neftune_noise_alpha": "there is no noise on embeddings",
  "local_rank": "processes are found out, or told by --process_id",
}
KNOWN = (
  SAME.keys()
  | STRATEGIES.keys()
  | {PER_DEVICE, ACCUMULATION, WORKDIR, PUSH, HUB_NAME, BEST}
  | set(ALWAYS)
  | REFUSED.keys()
)


class PerDevice(NamedTuple):
  """A batch as run_clm.py counts it."""

  rows: int
  accumulation: int

  def into(self, config: ConfigDict, devices: int) -> None:
    """Sets the batch of a run on so many devices."""
    config.train.micro_batch_size = self.rows
    config.train.batch_size = self.rows * self.accumulation * devices


def get_config() -> ConfigDict:
  """What run_clm.py does where no flag says otherwise."""
  config = settings.default()
  config.data.sequence_length = 1024
  config.train.epochs = 3.0
  config.train.log_every = 500
  return config


def translate(words: list[str]) -> tuple[list[str], PerDevice | None]:
  """The words of a command line with run_clm.py's flags as jaxft's own, and the batch where it is counted by device.

  Raises RequestError with every flag that cannot mean anything here, and the reason.
  """
  rest, given = _given(words)
  if not given:
    return words, None
  has_config = any(word == "--config" or word.startswith("--config=") for word in rest)
  ours, lines = [], []
  for name, value in given.items():
    try:
      ours += _ours(name, value, given)
    except ValueError as error:
      lines.append(f"--{name}{'=' + value if value else ''}: {error}")
  if ACCUMULATION in given and PER_DEVICE not in given and has_config:
    lines.append(f"--{ACCUMULATION}: of how many rows? give --{PER_DEVICE} too, or config.train.batch_size")
  batch = [word for word in rest if word.startswith(("--config.train.batch_size", "--config.train.micro_batch_size"))]
  if batch and {PER_DEVICE, ACCUMULATION} & given.keys():
    lines.append(f"{batch[0]}: a batch by device is given too; leave one of the two out")
  if lines:
    raise RequestError("\n".join(lines))
  config = [] if has_config else [f"--config={__file__}"]
  counted = None
  if {PER_DEVICE, ACCUMULATION} & given.keys() or not has_config and not batch:
    counted = PerDevice(int(given.get(PER_DEVICE, 8)), int(given.get(ACCUMULATION, 1)))
  return [*config, *rest, *ours], counted


def _given(words: list[str]) -> tuple[list[str], dict[str, str]]:
  """The words that are none of run_clm.py's, and the values of those that are, in order."""
  rest, given, i = [], {}, 0
  while i < len(words):
    word, i = words[i], i + 1
    name, equals, value = word.removeprefix("--").partition("=")
    if not word.startswith("--") or name not in KNOWN:
      rest.append(word)
      continue
    if not equals and i < len(words) and not words[i].startswith("--"):
      value, i = words[i], i + 1
    given[name] = value
  return rest, given


def _ours(name: str, value: str, given: dict[str, str]) -> list[str]:
  """What a flag is here; raises ValueError with the reason where it is nothing."""
  if name in REFUSED:
    raise ValueError(REFUSED[name])
  if name == WORKDIR:
    return [f"--workdir={value}"]
  if name in (PER_DEVICE, ACCUMULATION):
    _whole(value)
  if name == "do_train" and not _is_true(value) or name == "do_eval" and "do_train" not in given:
    raise ValueError("this command trains; jaxft.evaluate measures a model")
  if name == BEST and value not in ("eval_loss", "loss"):
    raise ValueError("there is only eval_loss here")
  if name == PUSH and _is_true(value):
    if HUB_NAME not in given:
      raise ValueError(f"give --{HUB_NAME} OWNER/NAME too")
    return [f"--config.export.push_to_hub={given[HUB_NAME]}"]
  if name in STRATEGIES:
    steps, setting = STRATEGIES[name]
    if value not in ("no", "steps"):
      raise ValueError("there is only no, and steps, here")
    if value == "steps" and steps == "eval_steps" and steps not in given:
      raise ValueError(f"give --{steps} too")
    return [f"--config.{setting}=0"] if value == "no" else []
  off = [strategy for strategy, (steps, _) in STRATEGIES.items() if steps == name and given.get(strategy) == "no"]
  if name not in SAME or off or name == "num_train_epochs" and given.get("max_steps", "-1") != "-1":
    return []
  if name == "max_steps" and value == "-1":
    return []
  same = SAME[name]
  return [f"--config.{same.setting}={same.value(value)}", *(f"--config.{pair}" for pair in same.also)]


def table() -> str:
  """All flags in Markdown, for docs/recipes/run_clm.md."""
  lines = [f"| `--{name}` | `--config.{same.setting}` |" for name, same in SAME.items()]
  lines += [
    f"| `--{WORKDIR}` | `--workdir` |",
    f"| `--{PER_DEVICE}` | `--config.train.micro_batch_size`; times devices and accumulation `--config.train.batch_size` |",
    f"| `--{ACCUMULATION}` | see above |",
    *(
      f"| `--{name}` | `no`: `--config.{setting}=0`; `steps`: as `--{steps}` says |"
      for name, (steps, setting) in STRATEGIES.items()
    ),
    f"| `--{BEST}` | `eval_loss`, as `--load_best_model_at_end` has it in any case; refused: another |",
    f"| `--{PUSH}` with `--{HUB_NAME}` | `--config.export.push_to_hub` |",
    *(f"| `--{name}` | always so |" for name in ALWAYS),
    *(f"| `--{name}` | refused: {reason} |" for name, reason in REFUSED.items()),
  ]
  return "\n".join(["| run_clm.py | jaxft |", "|---|---|", *lines])
