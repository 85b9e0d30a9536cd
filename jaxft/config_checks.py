"""Validators of settings, alone and in combination; `jaxft.config` assigns them to settings."""

import codecs
import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxft.utils.files import is_encodable

# A check takes one value and returns what a valid value would be, or None for a valid one.
Check = Callable[[Any], str | None]

TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio")
TEMPLATE_FIELD = re.compile(r"\{([^{}]+)\}")
BUILTIN_WRITERS = ("console", "jsonl")  # which may be named, and are always on


def at_least(low: float) -> Check:
  return lambda x: None if x >= low else f"at least {low}"


def above(low: float) -> Check:
  return lambda x: None if x > low else f"above {low}"


def between(low: float, high: float) -> Check:
  return lambda x: None if low <= x < high else f"at least {low} and below {high}"


def one_of(*choices: str) -> Check:
  return lambda x: None if x in choices else "one of " + ", ".join(choices)


def axis_size(x: int) -> str | None:
  return None if x == -1 or x >= 1 else "a number of devices, or -1 for all that are left"


def file_size(x: str) -> str | None:
  is_size = re.fullmatch(r"[1-9]\d*[KMGT]B", x)
  return None if is_size else "a whole number and KB, MB, GB or TB, such as 5GB"


def encoding(x: str) -> str | None:
  try:
    codecs.getincrementaldecoder(x)()
    "".encode(x)  # not one of bytes to bytes
  except (LookupError, ValueError, TypeError):
    return "the name of an encoding, such as utf-8, cp1252, latin-1 or utf-16"
  return None


def config_overrides(x: str) -> str | None:
  pairs = x.split(",") if x.strip() else []
  is_valid = all(re.fullmatch(r"\s*\w+\s*=\s*[^=,]+", pair) for pair in pairs)
  return None if is_valid and (pairs or not x) else "pairs such as n_embd=512,n_layer=4"


def _validate_template(v: Mapping[str, Any]) -> list[str]:
  """Return what is wrong with `data.template`.

  Its fields are a prompt and a completion or, for plain text, columns.
  """
  x = v["data.template"]
  prompt = "{prompt}"
  completion = "{completion}"
  if v["data.format"] == "text":
    is_valid = bool(TEMPLATE_FIELD.search(x))
    expected = "text with the name of a column in braces, such as {question}"
  else:
    once = x.count(prompt) == 1 == x.count(completion)
    is_valid = once and x.index(prompt) < x.index(completion)
    expected = "text with {prompt} and after it {completion}, each once"
  return [] if is_valid else [f"config.data.template={x!r}: must be {expected}"]


def writers(x: tuple[str, ...]) -> str | None:
  for i, name in enumerate(x):
    if name not in TRACKERS + BUILTIN_WRITERS:
      near = difflib.get_close_matches(name, TRACKERS + BUILTIN_WRITERS, 1, cutoff=0.4)
      hint = f"; for {name!r}, did you mean {near[0]}?" if near else ""
      return f"some of {', '.join(TRACKERS)}{hint}"
    if name in x[:i]:
      return f"different writers; {name} is there twice"
  return None


def compute_dtype(x: str) -> str | None:
  if x == "float16":
    return (
      "auto, float32 or bfloat16: float16 ends at 65504, and training overflows it; "
      "bfloat16 has float32's range"
    )
  return one_of("auto", "float32", "bfloat16")(x)


def any_value(_: Any) -> None:
  return None


def type_error(kind: type, value: object) -> str | None:
  """Return the type that a value should have, or None: a config file can assign anything."""
  if kind is tuple:
    is_valid = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    expected = "text, or a tuple of texts"
  else:
    is_valid = isinstance(value, int | float if kind is float else kind)
    is_valid = is_valid and (kind is bool) == isinstance(value, bool)
    expected = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}[kind]
  if not is_valid:
    return expected
  texts = value if isinstance(value, tuple) else (str(value),)
  is_text = all(is_encodable(text) and "\0" not in text for text in texts)
  return None if is_text else "text in UTF-8, without NUL"


def validate_combinations(v: Mapping[str, Any]) -> list[str]:
  """Return what is wrong with values that are valid by themselves, one line each.

  Args:
    v: all settings by name.
  """

  def show(name: str) -> str:
    return f"config.{name}={v[name]!r}"

  lines = _validate_template(v)
  from_scratch = v["model.init"] == "scratch"
  if not v["model.path"]:
    lines.append("config.model.path: empty; name a hub id (gpt2) or a folder")
  if not v["data.train"]:
    lines.append("config.data.train: empty; name a file, a folder or hub:NAME")
  for name, default in (("lora.targets", ()), ("lora.layers", ()), ("lora.dropout", 0)):
    if not v["lora.rank"] and v[name] != default:
      lines.append(f"{show(name)}: there are no adapters with config.lora.rank=0")
  if v["lora.rank"] and v["train.trainable_params"]:
    trainable = show("train.trainable_params")
    lines.append(f"{trainable}: with {show('lora.rank')} the adapters are trained; set one")
  if v["lora.rank"] and from_scratch:
    lines.append(
      f"{show('lora.rank')}: adapters change a model that was trained; "
      "config.model.init=scratch has none"
    )
  if v["train.trainable_params"] and from_scratch:
    lines.append(
      "config.train.trainable_params: the other weights would stay as they are drawn with "
      "config.model.init=scratch"
    )
  if bool(v["train.steps"]) == bool(v["train.epochs"]):
    lines.append(f"{show('train.steps')} and {show('train.epochs')}: set one of the two")
  classifies, has_labels = (v[x] == "classification" for x in ("model.head", "data.format"))
  if classifies != has_labels:
    settings = f"{show('model.head')} and {show('data.format')}"
    lines.append(f"{settings}: classification is both or neither")
  eval_settings = ("train.keep_best_metric", "train.early_stopping_patience")
  for name in eval_settings:
    if v[name] and not v["train.eval_every"]:
      lines.append(f"{show(name)}: goes with evaluations; set config.train.eval_every")
  if v["data.nats_column"] and v["data.format"] != "text":
    lines.append(f"{show('data.nats_column')}: goes with data.format=text only")
  if v["data.unrelated"] and has_labels:
    lines.append(f"{show('data.unrelated')}: a model that classifies has no loss on other text")
  held_out = v["data.validation"] or v["data.validation_fraction"]
  for name in eval_settings:
    if v[name] and not held_out:
      lines.append(
        f"{show(name)}: nothing is held out with config.data.validation_fraction=0; "
        "name sources in config.data.validation"
      )
  if classifies and v["train.sample_prompts"]:
    lines.append(
      "config.train.sample_prompts: a model with a classification head writes no text; "
      "leave it empty"
    )
  axes = [f"mesh.{axis}" for axis in ("data", "fsdp", "tensor")]
  rest = [show(axis) for axis in axes if v[axis] == -1]
  if len(rest) > 1:
    lines.append(f"{' and '.join(rest)}: only one can take the rest")
  if v["optim.end_learning_rate"] > v["optim.learning_rate"]:
    lines.append(f"{show('optim.end_learning_rate')}: above {show('optim.learning_rate')}")
  if v["optim.warmup_steps"] and v["optim.warmup_ratio"]:
    warmup = f"{show('optim.warmup_steps')} and {show('optim.warmup_ratio')}"
    lines.append(f"{warmup}: set one of the two")
  if v["model.config_overrides"] and not from_scratch:
    lines.append(
      f"{show('model.config_overrides')}: weights that are read have their own sizes; "
      "config.model.init=scratch draws new ones"
    )
  return lines
