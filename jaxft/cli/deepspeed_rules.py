"""What a rule of `jaxft.cli.deepspeed_keys` is made of: a value of a DeepSpeed config as a setting, as nothing, or refused."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jaxft.config
from jaxft import config_checks

AUTO = "auto: as the flags or their defaults say"


class Reading:
  """The leaves of one file by their dotted names, and the settings that they have come to so far."""

  def __init__(self, values: Mapping[str, Any]):
    self.values = values
    self.settings: dict[str, Any] = {}
    self._found: dict[Any, Any] = {}

  def set(self, name: str, value: Any, why: str = "") -> str:
    """Records a setting; returns it as a row tells it. Raises ValueError where it cannot have this value."""
    self.settings[name] = checked(name, value)
    return given(name, self.settings[name]) + (f" ({why})" if why else "")

  def once(self, name: Any, find: Callable[[], Any]) -> Any:
    """What `find` returns, called once for each name."""
    if name not in self._found:
      self._found[name] = find()
    return self._found[name]

  def kind(self, section: str) -> str:
    """The type of the optimizer or the scheduler in lower case; empty where there is none."""
    kind = self.values.get(f"{section}.type")
    return kind.lower() if isinstance(kind, str) else ""


class Rule(NamedTuple):
  """What a key is here."""

  says: str  # for the page
  read: Callable[
    [Reading, str, Any], str
  ]  # of its value in a file; raises ValueError with the reason of a refusal
  reads_auto: bool = False  # or "auto" is `AUTO`
  empty: bool = False  # whether an object without keys may be its value


def given(name: str, value: Any) -> str:
  """A setting as the command line has it."""
  return f"--config.{name}={','.join(value) if isinstance(value, tuple) else value}"


def checked(name: str, value: Any) -> Any:
  """The value with the type of this setting; raises ValueError with what it must be."""
  setting = jaxft.config.BY_NAME[name]
  if is_number(value) and not abs(value) <= jaxft.config.MAX_INT:  # nor NaN
    raise ValueError(f"at most {jaxft.config.MAX_INT:,}")
  if isinstance(setting.default, float) and is_number(value):
    value = float(value)
  wanted = config_checks.type_error(setting.default, value) or setting.check(value)
  if wanted:
    raise ValueError(f"must be {wanted}")
  return value


def is_number(value: Any) -> bool:
  """Whether this is a number of JSON, which true and false are not."""
  return isinstance(value, int | float) and not isinstance(value, bool)


def is_off(value: Any) -> bool:
  """Whether this is false, null or 0."""
  return value is None or value is False or is_number(value) and value == 0


def switch(value: Any) -> bool:
  """True for true; raises ValueError for what is no true, false or null."""
  if value is not None and not isinstance(value, bool):
    raise ValueError("must be true or false")
  return bool(value)


def nothing(why: str) -> Rule:
  """Any value is accepted, and means nothing here."""
  return Rule(f"nothing: {why}", lambda *_: f"nothing: {why}", reads_auto=True)


def sets(name: str, why: str = "") -> Rule:
  """The value is that of a setting."""
  says = f"`--config.{name}`" + (f" ({why})" if why else "")
  return Rule(says, lambda reading, _, value: reading.set(name, value, why))


def when_true(name: str, wanted: Any, why: str = "") -> Rule:
  """A switch that gives a setting one value."""

  def read(reading: Reading, _: str, value: Any) -> str:
    return reading.set(name, wanted, why) if switch(value) else "nothing: it is off"

  return Rule(f"`true`: `{given(name, wanted)}`" + (f" ({why})" if why else ""), read)


def off(way_out: str) -> Rule:
  """Refused, unless it is false, null or 0."""

  def read(_: Reading, __: str, value: Any) -> str:
    if not is_off(value):
      raise ValueError(way_out)
    return "nothing: it is off"

  return Rule(f"refused, unless it is off: {way_out}", read)


def only(wanted: Any, way_out: str) -> Rule:
  """Refused, unless it asks for what always happens."""

  def read(_: Reading, __: str, value: Any) -> str:
    if value is not None and (
      value != wanted or isinstance(value, bool) != isinstance(wanted, bool)
    ):
      raise ValueError(way_out)
    return "nothing: always so"

  shown = str(wanted).lower() if isinstance(wanted, bool) else wanted
  return Rule(f"`{shown}`: always so; refused otherwise: {way_out}", read)


def each(section: str, names: str, rule: Rule) -> dict[str, Rule]:
  """The same rule for several keys of a section, or of the file itself where that is empty."""
  return {f"{section}.{name}" if section else name: rule for name in names.split()}


def count(value: Any) -> int | None:
  """A number of rows or steps; None for "auto", and for null. Raises ValueError for anything else."""
  if value is None or value == "auto":
    return None
  if (
    not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= jaxft.config.MAX_INT
  ):
    raise ValueError(f"must be a whole number from 1 to {jaxft.config.MAX_INT:,}")
  return value
