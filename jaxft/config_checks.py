"""What a right value of a setting is, alone and next to the others; `jaxft.config` says which setting wants what."""

import codecs
import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxft.utils.files import is_encodable

# A check looks at one value and returns what a right value would be, or None when the value is right.
Check = Callable[[Any], str | None]

TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio")
TEMPLATE_FIELD = re.compile(r"\{([^{}]+)\}")  # of a template
BUILTIN_WRITERS = ("console", "jsonl")  # writers that may be named, and are always there


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
  return (
    None
    if re.fullmatch(r"[1-9]\d*[KMGT]B", x)
    else "a whole number and KB, MB, GB or TB, such as 5GB"
  )


def encoding(x: str) -> str | None:
  try:
    codecs.getincrementaldecoder(x)()
    "".encode(x)  # not one of bytes to bytes
  except (LookupError, ValueError, TypeError):
    return "the name of an encoding, such as utf-8, cp1252, latin-1 or utf-16"
  return None


def config_overrides(x: str) -> str | None:
  fine = (
    all(re.fullmatch(r"\s*\w+\s*=\s*[^=,]+", pair) for pair in x.split(",")) if x.strip() else not x
  )
  return None if fine else "pairs such as n_embd=512,n_layer=4"


def _validate_template(v: Mapping[str, Any]) -> list[str]:
  """What is wrong with `data.template`, whose fields are a prompt and a completion or, of plain text, columns."""
  x, prompt, completion = v["data.template"], "{prompt}", "{completion}"
  if v["data.format"] == "text":
    fine, wanted = (
      TEMPLATE_FIELD.search(x),
      "text with the name of a column in braces, such as {question}",
    )
  else:
    fine = x.count(prompt) == 1 == x.count(completion) and x.index(prompt) < x.index(completion)
    wanted = "text with {prompt} and after it {completion}, each once"
  return [] if fine else [f"config.data.template={x!r}: must be {wanted}"]


def writers(x: tuple[str, ...]) -> str | None:
  for i, name in enumerate(x):
    if name not in TRACKERS + BUILTIN_WRITERS:
      near = difflib.get_close_matches(name, TRACKERS + BUILTIN_WRITERS, 1, cutoff=0.4)
      return f"some of {', '.join(TRACKERS)}" + (
        f"; for {name!r}, did you mean {near[0]}?" if near else ""
      )
    if name in x[:i]:
      return f"different writers; {name} is there twice"
  return None


def compute_dtype(x: str) -> str | None:
  if x == "float16":
    return "auto, float32 or bfloat16: float16 ends at 65504, and training overflows it; bfloat16 has float32's range"
  return one_of("auto", "float32", "bfloat16")(x)


def any_value(_: Any) -> None:
  return None


def type_error(default: Any, value: Any) -> str | None:
  """What a value of this setting must be, if it is not: a config file can put anything anywhere."""
  optional = isinstance(default, type)
  kind = default if optional else type(default)
  if value is None and optional:
    return None
  if kind is tuple:
    fine = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    wanted = "text, or a tuple of texts"
  else:
    fine = isinstance(value, int | float if kind is float else kind) and (
      kind is bool
    ) == isinstance(value, bool)
    wanted = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}[kind]
  if fine and not all(
    is_encodable(item) and "\0" not in item for item in (value if kind is tuple else (str(value),))
  ):
    fine, wanted = False, "text in UTF-8, without NUL"
  return None if fine else wanted


def validate_combinations(v: Mapping[str, Any]) -> list[str]:
  """What is wrong with values, each right by itself, of all settings: one line each."""
  lines = _validate_template(v)
  if not v["model.path"]:
    lines.append("config.model.path: empty; name a hub id (gpt2) or a folder")
  if not v["data.train"]:
    lines.append("config.data.train: empty; name a file, a folder or hub:NAME")
  for name, nothing in (("lora.targets", ()), ("lora.layers", ()), ("lora.dropout", 0)):
    if not v["lora.rank"] and v[name] != nothing:
      lines.append(f"config.{name}={v[name]!r}: there are no adapters with config.lora.rank=0")
  if v["lora.rank"] and v["train.only"]:
    lines.append(
      f"config.train.only={v['train.only']}: with config.lora.rank={v['lora.rank']} the adapters are trained; set one"
    )
  if v["lora.rank"] and v["model.init"] == "scratch":
    lines.append(
      f"config.lora.rank={v['lora.rank']}: adapters change a model that was trained; config.model.init=scratch has none"
    )
  if v["train.only"] and v["model.init"] == "scratch":
    lines.append(
      "config.train.only: the other weights would stay as they are drawn with config.model.init=scratch"
    )
  if bool(v["train.steps"]) == bool(v["train.epochs"]):
    lines.append(
      f"config.train.steps={v['train.steps']} and config.train.epochs={v['train.epochs']}: set one of the two"
    )
  if (v["model.head"] == "classification") != (v["data.format"] == "classification"):
    lines.append(
      f"config.model.head={v['model.head']!r} and config.data.format={v['data.format']!r}: classification is both or neither"
    )
  for name in ("train.keep_best_metric", "train.early_stopping_patience"):
    if v[name] and not v["train.eval_every"]:
      lines.append(f"config.{name}={v[name]!r}: goes with evaluations; set config.train.eval_every")
  if v["data.nats_column"] and v["data.format"] != "text":
    lines.append(
      f"config.data.nats_column={v['data.nats_column']!r}: goes with data.format=text only"
    )
  if v["data.unrelated"] and v["data.format"] == "classification":
    lines.append(
      f"config.data.unrelated={v['data.unrelated']!r}: a model that classifies has no loss on other text"
    )
  held_out = v["data.validation"] or v["data.validation_fraction"]
  for name in ("train.keep_best_metric", "train.early_stopping_patience"):
    if v[name] and not held_out:
      lines.append(
        f"config.{name}={v[name]!r}: nothing is held out with config.data.validation_fraction=0; name sources in "
        "config.data.validation"
      )
  if v["model.head"] == "classification" and v["train.sample_prompts"]:
    lines.append(
      "config.train.sample_prompts: a model with a classification head writes no text; leave it empty"
    )
  rest = [
    f"config.mesh.{axis}=-1" for axis in ("data", "fsdp", "tensor") if v[f"mesh.{axis}"] == -1
  ]
  if len(rest) > 1:
    lines.append(f"{' and '.join(rest)}: only one can take the rest")
  peak, end = v["optim.learning_rate"], v["optim.end_learning_rate"]
  if end > peak:
    lines.append(f"config.optim.end_learning_rate={end}: above config.optim.learning_rate={peak}")
  warmup, ratio = v["optim.warmup_steps"], v["optim.warmup_ratio"]
  if warmup and ratio:
    lines.append(
      f"config.optim.warmup_steps={warmup} and config.optim.warmup_ratio={ratio}: set one of the two"
    )
  if v["model.config_overrides"] and v["model.init"] != "scratch":
    lines.append(
      f"config.model.config_overrides={v['model.config_overrides']!r}: weights that are read have their own sizes; "
      "config.model.init=scratch draws new ones"
    )
  return lines
