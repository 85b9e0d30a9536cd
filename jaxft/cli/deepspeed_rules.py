"""Rules for the keys of a DeepSpeed config: a value becomes a setting, is ignored or refused."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeGuard

import jaxft.config
from jaxft import config_checks

AUTO = "auto: as the flags or their defaults say"


class Context:
  """The leaves of one file by their dotted names, and the settings that they became so far."""

  def __init__(self, values: Mapping[str, object]):
    self.values = values
    self.settings: dict[str, object] = {}
    self.first_on: dict[str, str | None] = {}  # section -> the key that switches it on

  def set(self, name: str, value: object, why: str = "") -> str:
    """Record a setting; return its outcome. Raises ValueError if it cannot have this value."""
    self.settings[name] = validate(name, value)
    return as_flag(name, self.settings[name]) + (f" ({why})" if why else "")

  def type_of(self, section: str) -> str:
    """Return the type of the optimizer or the scheduler in lower case, or ""."""
    name = self.values.get(f"{section}.type")
    return name.lower() if isinstance(name, str) else ""


class Rule(NamedTuple):
  """The meaning of a key."""

  doc: str  # for the page
  # (context, key, value) -> outcome; raises ValueError with the reason if the value is refused.
  translate: Callable[[Context, str, object], str]
  handles_auto: bool = False  # else "auto" is `AUTO`


def as_flag(name: str, value: object) -> str:
  """Format a setting as a word of the command line."""
  return f"--config.{name}={','.join(value) if isinstance(value, tuple) else value}"


def validate(name: str, value: object) -> object:
  """Return the value with the type of this setting; raises ValueError with what it must be."""
  setting = jaxft.config.BY_NAME[name]
  if is_number(value) and not abs(value) <= jaxft.config.MAX_INT:  # nor NaN
    raise ValueError(f"at most {jaxft.config.MAX_INT:,}")
  if isinstance(setting.default, float) and is_number(value):
    value = float(value)
  expected = config_checks.type_error(setting.kind, value) or setting.check(value)
  if expected:
    raise ValueError(f"must be {expected}")
  return value


def is_number(value: object) -> TypeGuard[int | float]:
  """Whether this is a JSON number, which true and false are not."""
  return isinstance(value, int | float) and not isinstance(value, bool)


def is_off(value: object) -> bool:
  """Whether this is false, null or 0."""
  return value is None or value is False or is_number(value) and value == 0


def to_bool(value: object) -> bool:
  """Return True for true; raises ValueError for anything but true, false or null."""
  if value is not None and not isinstance(value, bool):
    raise ValueError("must be true or false")
  return bool(value)


def to_count(value: object) -> int | None:
  """Return a number of rows or steps, or None for "auto" and null; raises ValueError otherwise."""
  if value is None or value == "auto":
    return None
  is_int = isinstance(value, int) and not isinstance(value, bool)
  if not is_int or not 1 <= value <= jaxft.config.MAX_INT:
    raise ValueError(f"must be a whole number from 1 to {jaxft.config.MAX_INT:,}")
  return value


def ignored(why: str) -> Rule:
  """Make a rule that accepts any value, which has no meaning here."""
  return Rule(f"nothing: {why}", lambda *_: f"nothing: {why}", handles_auto=True)


def maps_to(name: str, why: str = "") -> Rule:
  """Make a rule by which the value is that of a setting."""
  doc = f"`--config.{name}`" + (f" ({why})" if why else "")
  return Rule(doc, lambda ctx, _, value: ctx.set(name, value, why))


def counts(doc: str, outcome: str) -> Rule:
  """Make a rule of a number of rows or steps, which stands for {} in the outcome."""

  def translate(_: Context, __: str, value: object) -> str:
    count = to_count(value)
    return "nothing: null" if count is None else outcome.format(count)

  return Rule(doc, translate)


def when_true(name: str, setting_value: object, why: str = "") -> Rule:
  """Make a rule of a switch that gives a setting one value."""

  def translate(ctx: Context, _: str, value: object) -> str:
    return ctx.set(name, setting_value, why) if to_bool(value) else "nothing: it is off"

  doc = f"`true`: `{as_flag(name, setting_value)}`" + (f" ({why})" if why else "")
  return Rule(doc, translate)


def must_be_off(way_out: str) -> Rule:
  """Make a rule that refuses anything but false, null or 0."""

  def translate(_: Context, __: str, value: object) -> str:
    if not is_off(value):
      raise ValueError(way_out)
    return "nothing: it is off"

  return Rule(f"refused, unless it is off: {way_out}", translate)


def must_be(required: str | int, way_out: str) -> Rule:
  """Make a rule that refuses anything but the value for what always happens."""
  is_bool = isinstance(required, bool)

  def translate(_: Context, __: str, value: object) -> str:
    if value is not None and (value != required or isinstance(value, bool) != is_bool):
      raise ValueError(way_out)
    return "nothing: always so"

  text = str(required).lower() if is_bool else required
  return Rule(f"`{text}`: always so; refused otherwise: {way_out}", translate)


def by_key(rules: dict[str, Rule]) -> dict[str, Rule]:
  """Return the rule of each key; "section: a b" in `rules` stands for section.a and section.b."""
  result = {}
  for names, rule in rules.items():
    section, colon, keys = names.rpartition(": ")
    result |= {f"{section}.{key}" if colon else key: rule for key in keys.split()}
  return result
