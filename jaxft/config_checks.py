"""Validators for the values of settings; `jaxft.config` assigns them."""

import codecs
import difflib
import re
from collections.abc import Callable
from typing import Any

from jaxft.utils.files import is_encodable

# A check returns None for a valid value, else a description of valid values.
Check = Callable[[Any], str | None]

TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio")
TEMPLATE_FIELD = re.compile(r"\{([^{}]+)\}")
BUILTIN_WRITERS = ("console", "jsonl")  # always on; naming them is allowed


def at_least(low: float) -> Check:
  """Make a check for x >= low."""
  return lambda x: None if x >= low else f"at least {low}"


def above(low: float) -> Check:
  """Make a check for x > low."""
  return lambda x: None if x > low else f"above {low}"


def between(low: float, high: float) -> Check:
  """Make a check for low <= x < high."""
  return lambda x: None if low <= x < high else f"at least {low} and below {high}"


def one_of(*choices: str) -> Check:
  """Make a check for one of these choices."""
  return lambda x: None if x in choices else "one of " + ", ".join(choices)


def axis_size(x: int) -> str | None:
  """Check the size of a mesh axis."""
  return None if x == -1 or x >= 1 else "a number of devices, or -1 for all other devices"


def file_size(x: str) -> str | None:
  """Check a size such as 5GB."""
  is_size = re.fullmatch(r"[1-9]\d*[KMGT]B", x)
  return None if is_size else "a whole number and KB, MB, GB or TB, such as 5GB"


def encoding(x: str) -> str | None:
  """Check the name of a text encoding."""
  try:
    codecs.getincrementaldecoder(x)()
    "".encode(x)  # rejects codecs of bytes to bytes, such as base64
  except (LookupError, ValueError, TypeError):
    return "the name of an encoding, such as utf-8, cp1252, latin-1 or utf-16"
  return None


def config_overrides(x: str) -> str | None:
  """Check pairs such as n_embd=512,n_layer=4."""
  pairs = x.split(",") if x.strip() else []
  is_valid = all(re.fullmatch(r"\s*\w+\s*=\s*[^=,]+", pair) for pair in pairs)
  return None if is_valid and (pairs or not x) else "pairs such as n_embd=512,n_layer=4"


def writers(x: tuple[str, ...]) -> str | None:
  """Check names of trackers, each at most once."""
  for i, name in enumerate(x):
    if name not in TRACKERS + BUILTIN_WRITERS:
      near = difflib.get_close_matches(name, TRACKERS + BUILTIN_WRITERS, 1, cutoff=0.4)
      hint = f"; for {name!r}, did you mean {near[0]}?" if near else ""
      return f"one or more of {', '.join(TRACKERS)}{hint}"
    if name in x[:i]:
      return f"without duplicates; {name} occurs twice"
  return None


def compute_dtype(x: str) -> str | None:
  """Check the dtype of activations."""
  if x == "float16":
    return (
      "auto, float32 or bfloat16: training overflows float16, whose maximum is 65504; "
      "bfloat16 has the range of float32"
    )
  return one_of("auto", "float32", "bfloat16")(x)


def any_value(_: object) -> None:
  """Accept any value."""
  return None


def type_error(kind: type, value: object) -> str | None:
  """Check the type of a value: a config file can assign anything.

  Args:
    kind: the type of the setting: str, int, float, bool or tuple.
    value: the value.

  Returns:
    The required type in words, or None if the value has it.
  """
  if kind is tuple:
    is_valid = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    expected = "a string, or a tuple of strings"
  else:
    is_valid = isinstance(value, int | float if kind is float else kind)
    is_valid = is_valid and (kind is bool) == isinstance(value, bool)
    expected = {int: "a whole number", float: "a number", str: "a string", bool: "True or False"}[
      kind
    ]
  if not is_valid:
    return expected
  texts = value if isinstance(value, tuple) else (str(value),)
  is_text = all(is_encodable(text) and "\0" not in text for text in texts)
  return None if is_text else "valid UTF-8 without NUL"
