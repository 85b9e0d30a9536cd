"""Rules for keys of a DeepSpeed config: a value becomes a setting, is ignored or refused."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeGuard

import jaxft.config
from jaxft import config_checks

AUTO = "auto: set by flags or their defaults"


class Context:
  """The leaves of one file by dotted name, and the settings translated so far."""

  def __init__(self, values: Mapping[str, object]):
    self.values = values
    self.settings: dict[str, object] = {}
    self.first_on: dict[str, str | None] = {}  # section -> the key that switches it on

  def set(self, name: str, value: object, why: str = "") -> str:
    """Set a setting and return its outcome.

    Args:
      name: the setting.
      value: its value.
      why: a reason to add to the outcome.

    Raises:
      ValueError: the setting cannot have this value.
    """
    self.settings[name] = validate(name, value)
    return as_flag(name, self.settings[name]) + (f" ({why})" if why else "")

  def type_of(self, section: str) -> str:
    """Return the type of the optimizer or the scheduler in lower case, or ""."""
    name = self.values.get(f"{section}.type")
    return name.lower() if isinstance(name, str) else ""


class Rule(NamedTuple):
  """The translation of a key."""

  doc: str  # for docs/recipes/deepspeed.md
  # (context, key, value) -> outcome; raises ValueError with the reason to refuse the value.
  translate: Callable[[Context, str, object], str]
  handles_auto: bool = False  # otherwise the outcome of "auto" is `AUTO`


def as_flag(name: str, value: object) -> str:
  """Format a setting as a word of the command line."""
  return f"--config.{name}={','.join(value) if isinstance(value, tuple) else value}"


def validate(name: str, value: object) -> object:
  """Return the value with the type of this setting.

  Raises:
    ValueError: the description of valid values.
  """
  setting = jaxft.config.BY_NAME[name]
  if is_number(value) and not abs(value) <= jaxft.config.MAX_INT:  # also true for NaN
    raise ValueError(f"must be at most {jaxft.config.MAX_INT:,}")
  if isinstance(setting.default, float) and is_number(value):
    value = float(value)
  expected = config_checks.type_error(setting.kind, value) or setting.check(value)
  if expected:
    raise ValueError(f"must be {expected}")
  return value


def is_number(value: object) -> TypeGuard[int | float]:
  """Return whether this is a JSON number; true and false are not numbers."""
  return isinstance(value, int | float) and not isinstance(value, bool)


def is_off(value: object) -> bool:
  """Return whether this is false, null or 0."""
  return value is None or value is False or is_number(value) and value == 0


def to_bool(value: object) -> bool:
  """Return whether this is true; raises ValueError unless it is true, false or null."""
  if value is not None and not isinstance(value, bool):
    raise ValueError("must be true or false")
  return bool(value)


def to_count(value: object) -> int | None:
  """Return a number of sequences or steps, or None for "auto" and null.

  Raises:
    ValueError: not a valid number.
  """
  if value is None or value == "auto":
    return None
  is_int = isinstance(value, int) and not isinstance(value, bool)
  if not is_int or not 1 <= value <= jaxft.config.MAX_INT:
    raise ValueError(f"must be a whole number from 1 to {jaxft.config.MAX_INT:,}")
  return value


def ignored(why: str) -> Rule:
  """Make a rule that accepts and ignores any value."""
  return Rule(f"no effect: {why}", lambda *_: f"no effect: {why}", handles_auto=True)


def maps_to(name: str, why: str = "") -> Rule:
  """Make a rule that passes the value to a setting.

  Args:
    name: the setting.
    why: a remark for the outcome and the page.
  """
  doc = f"`--config.{name}`" + (f" ({why})" if why else "")
  return Rule(doc, lambda ctx, _, value: ctx.set(name, value, why))


def counts(doc: str, outcome: str) -> Rule:
  """Make a rule for a number of sequences or steps.

  Args:
    doc: the text on the page.
    outcome: the outcome, with {} for the number.
  """

  def translate(_: Context, __: str, value: object) -> str:
    count = to_count(value)
    return "no effect: null" if count is None else outcome.format(count)

  return Rule(doc, translate)


def when_true(name: str, setting_value: object, why: str = "") -> Rule:
  """Make a rule for a switch that sets a setting to one value.

  Args:
    name: the setting.
    setting_value: its value if the switch is true.
    why: a remark for the outcome and the page.
  """

  def translate(ctx: Context, _: str, value: object) -> str:
    return ctx.set(name, setting_value, why) if to_bool(value) else "no effect: it is off"

  doc = f"`true`: `{as_flag(name, setting_value)}`" + (f" ({why})" if why else "")
  return Rule(doc, translate)


def must_be_off(way_out: str) -> Rule:
  """Make a rule that accepts only false, null and 0; the error is `way_out`."""

  def translate(_: Context, __: str, value: object) -> str:
    if not is_off(value):
      raise ValueError(way_out)
    return "no effect: it is off"

  return Rule(f"refused unless off: {way_out}", translate)


def must_be(required: str | int, way_out: str) -> Rule:
  """Make a rule that accepts only one value, which has no effect; the error is `way_out`."""
  is_bool = isinstance(required, bool)

  def translate(_: Context, __: str, value: object) -> str:
    if value is not None and (value != required or isinstance(value, bool) != is_bool):
      raise ValueError(way_out)
    return "no effect: the only supported value"

  text = str(required).lower() if is_bool else required
  return Rule(f"only `{text}`; other values are refused: {way_out}", translate)


def by_key(rules: dict[str, Rule]) -> dict[str, Rule]:
  """Return the rule of each key; "section: a b" in `rules` means section.a and section.b."""
  result = {}
  for names, rule in rules.items():
    section, colon, keys = names.rpartition(": ")
    result |= {f"{section}.{key}" if colon else key: rule for key in keys.split()}
  return result
