"""Validators of the values of settings; `jaxft.config` assigns them to settings."""

import codecs
import difflib
import re
from collections.abc import Callable
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


def any_value(_: object) -> None:
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
