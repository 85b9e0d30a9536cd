"""A DeepSpeed config, ds_config.json, as settings of jaxft. `jaxft.cli.deepspeed_keys` says what each of its keys is here."""

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.cli import deepspeed_keys, deepspeed_sections
from jaxft.cli.deepspeed_rules import AUTO, Reading, Rule, count, is_off, nothing
from jaxft.errors import RequestError, first_line

LARGEST_FILE = 2**20  # bytes; a config has some hundreds
DEEPEST = 12  # levels of objects; DeepSpeed's own have six
# Strings as they are, and comments, which DeepSpeed's own reader leaves out too.
COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/\*.*?\*/', re.DOTALL)
LAST_COMMA = re.compile(r'"(?:\\.|[^"\\\n])*"|,(?=\s*[}\]])', re.DOTALL)
COMMENT_KEYS = ("_", "//", "#", "$")
HINTS = 20  # lines that say which key was meant; looking for it takes milliseconds
SECTIONS = deepspeed_keys.sections()
NAMES = (*deepspeed_keys.known_keys(), *sorted(SECTIONS))
TIMES = Counter(name.rpartition(".")[2] for name in NAMES)
LAST_PARTS = {last: name for name in NAMES if TIMES[last := name.rpartition(".")[2]] == 1}


class Entry(NamedTuple):
  """A leaf of a file: its dotted name, its value, and what it has become."""

  key: str
  value: Any
  outcome: str  # "--config.mesh.zero_stage=2", "nothing: why" or "auto: as the flags or their defaults say"


class ParsedConfig(NamedTuple):
  """What a file says; a batch is counted by the run, which knows its devices."""

  settings: dict[str, Any]  # by the names of `jaxft.config.SETTINGS`
  rows: int | None  # train_micro_batch_size_per_gpu, if a number
  accumulation: int | None  # gradient_accumulation_steps, if a number
  batch_size: int | None  # train_batch_size, if a number
  entries: list[Entry]  # all leaves, in the order of the file


class _Leaf(NamedTuple):
  key: str
  value: Any
  is_comment: bool


class _Object(dict):
  """An object of JSON that remembers which of its keys came twice."""

  def __init__(self, pairs: list[tuple[str, Any]]):
    super().__init__(pairs)
    names = [name for name, _ in pairs]
    self.twice = [name for name in self if names.count(name) > 1] if len(self) < len(names) else []


def read(file: Path) -> ParsedConfig:
  """Translates a ds_config.json, which may have comments and a comma too many, as DeepSpeed's own reader allows.

  Args:
    file: the path, as `--deepspeed` has it.

  Returns:
    The settings that the file comes to, its batch, and a row for each of its leaves.

  Raises:
    RequestError: the file cannot be read or is no JSON, or one line for each key that is unknown or can mean nothing here.
  """
  try:
    if not file.is_file():
      raise RequestError(
        f"{file}: {'not a file' if file.exists() else 'no such file'}; name a ds_config.json"
      )
    if file.stat().st_size > LARGEST_FILE:
      raise RequestError(
        f"{file}: {file.stat().st_size:,} bytes are no DeepSpeed config; name a ds_config.json"
      )
    text = file.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise RequestError(f"{file}: byte {error.start:,} is not UTF-8; save it as UTF-8") from error
  except (OSError, ValueError) as error:  # no permission; a name with NUL
    raise RequestError(
      f"{file}: {getattr(error, 'strerror', None) or first_line(error)}"
    ) from error
  text = COMMENT.sub(
    lambda found: found[0] if found[0][0] == '"' else "\n" * found[0].count("\n"), text
  )
  text = LAST_COMMA.sub(lambda found: found[0] if found[0][0] == '"' else "", text)
  try:
    content = json.loads(text, object_pairs_hook=_Object)
  except RecursionError as error:
    raise RequestError(
      f"{file}: objects or lists lie too deep in each other; a DeepSpeed config has few"
    ) from error
  except ValueError as error:  # JSONDecodeError, and a number of thousands of digits
    raise RequestError(f"{file}: not JSON: {first_line(error)}") from error
  if not isinstance(content, dict):
    raise RequestError(
      f'{file}: {_shown(content)} is no object; a DeepSpeed config is one, such as {{"bf16": ...}}'
    )
  return translate(content, str(file))


def translate(config: Mapping[str, Any], where: str) -> ParsedConfig:
  """Translates what a file has, or the dictionary that a script gives to `TrainingArguments(deepspeed=...)`.

  Args:
    config: the keys and values, nested as in the file.
    where: what errors call it.

  Returns:
    See `read`.

  Raises:
    RequestError: one line for each key that is unknown or can mean nothing here.
  """
  leaves = list(_leaves(config))
  reading = Reading({leaf.key: leaf.value for leaf in leaves if not leaf.is_comment})
  lines, entries = (
    [f"{where}: {name}: is there twice; leave one out" for name in _twice(config)],
    [],
  )
  for key, value, is_comment in leaves:
    try:
      entries.append(
        Entry(key, value, "nothing: a comment" if is_comment else _became(reading, key, value))
      )
    except LookupError as error:
      hint = (
        _nearest(key) if len(lines) < HINTS else "docs/recipes/deepspeed.md has all that there are"
      )
      lines.append(f"{where}: {key}: {error.args[0]}; {hint}")
    except ValueError as error:
      lines.append(f"{where}: {key}={_shown(value)}: {error}")
  if lines:
    raise RequestError("\n".join(lines))
  batch = (
    count(reading.values.get(name))
    for name in (
      deepspeed_keys.MICRO_BATCH,
      deepspeed_keys.ACCUMULATION,
      deepspeed_keys.TRAIN_BATCH,
    )
  )
  return ParsedConfig(reading.settings, *batch, entries)


def format_table(entries: Iterable[Entry], overridden: Mapping[str, str]) -> str:
  """Aligned columns for a terminal: the key, its value, and what it has become.

  Args:
    entries: of `ParsedConfig`.
    overridden: the flag that says otherwise, by the name of the setting, or by the key for what is no setting of its own
      (`gradient_accumulation_steps`); the row tells it.

  Returns:
    One line for each entry.
  """
  rows = []
  for key, value, became in entries:
    names = [key, *re.findall(r"(?:^| )--config\.([a-z_0-9.]+)=", became.partition("(")[0])]
    flags = dict.fromkeys(overridden[name] for name in names if name in overridden)
    rows.append(
      (key, _shown(value, 32), became + "".join(f"; {flag} is given, and wins" for flag in flags))
    )
  widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
  return "\n".join(
    f"{key:{widths[0]}}  {value:{widths[1]}}  {became}" for key, value, became in rows
  )


def _leaves(config: Mapping[str, Any], above: str = "", depth: int = 1) -> Iterator[_Leaf]:
  """All of them; an object without keys, one very deep in others, and a comment are leaves too."""
  for key, value in config.items():
    name, is_comment = above + _name(key), str(key).startswith(COMMENT_KEYS) or key == "comment"
    if isinstance(value, Mapping) and value and depth < DEEPEST and not is_comment:
      yield from _leaves(value, f"{name}.", depth + 1)
    else:
      yield _Leaf(name, value, is_comment)


def _twice(config: Mapping[str, Any], above: str = "", depth: int = 1) -> Iterator[str]:
  """Dotted names of the keys that are there twice."""
  yield from (above + _name(key) for key in getattr(config, "twice", ()))
  for key, value in config.items():
    if isinstance(value, Mapping) and depth < DEEPEST:
      yield from _twice(value, f"{above}{_name(key)}.", depth + 1)


def _name(key: Any) -> str:
  """A key as messages name it: in quotes where it is not plain, so that "a.b" is not b of a."""
  return (
    key if isinstance(key, str) and re.fullmatch(r"[\w/#$-]+", key, re.ASCII) else _shown(str(key))
  )


def _became(reading: Reading, key: str, value: Any) -> str:
  """What a leaf has become; raises ValueError with what is wrong with its value, LookupError where there is no such key."""
  rule, is_section = _rule(reading, key), key in SECTIONS
  if is_section and (value is None or value == {}):
    return "nothing: empty"
  if rule is None and is_section:
    inside = next(name for name in deepspeed_keys.known_keys() if name.startswith(f"{key}."))
    raise ValueError(f"give an object with its keys, such as {inside.removeprefix(f'{key}.')}")
  if rule is None:
    raise LookupError("DeepSpeed has no such key")
  if isinstance(value, Mapping) and (value or not rule.empty):
    raise ValueError("give a value, not an object")
  if any(
    isinstance(it, float) and not math.isfinite(it)
    for it in (value if isinstance(value, list) else [value])
  ):
    raise ValueError("not a finite number")
  return (
    AUTO
    if isinstance(value, str) and value == "auto" and not rule.reads_auto
    else rule.read(reading, key, value)
  )


def _rule(reading: Reading, key: str) -> Rule | None:
  """The rule of a key in this file; None where DeepSpeed has no such key."""
  section, _, param = key.partition(".params.")
  if param and section in deepspeed_sections.TYPES:
    return _rule_of_param(reading, section, param)
  if key in deepspeed_keys.RULES:
    return deepspeed_keys.RULES[key]
  whole = next(
    (name for name in (*deepspeed_keys.FREE, *deepspeed_keys.SWITCHED) if _is_in(key, name)), None
  )
  if whole in deepspeed_keys.FREE:
    return nothing(deepspeed_keys.FREE[whole])._replace(empty=True)
  return whole and _switched(reading, whole)


def _rule_of_param(reading: Reading, section: str, param: str) -> Rule | None:
  """The rule of a parameter, which the type of the optimizer or the scheduler decides."""
  kinds = {name.lower(): kind for name, kind in deepspeed_sections.TYPES[section].items()}
  if f"{section}.type" not in reading.values:

    def read(*_: Any) -> str:
      raise ValueError(f"of which {section}? give {section}.type too")

    return (
      Rule("", read, reads_auto=True)
      if any(param in kind.params for kind in kinds.values())
      else None
    )
  name = reading.kind(section)
  kind = next(iter(kinds.values())) if name == "auto" else kinds.get(name)
  return kind.params.get(param) if kind else nothing(f"{section}.type is refused")


def _switched(reading: Reading, section: str) -> Rule:
  """Of the keys of a section that may be on: the first one that says so is refused."""
  first = reading.once(("on", section), lambda: _first_on(reading, section))

  def read(_: Reading, key: str, __: Any) -> str:
    if key == first:
      raise ValueError(deepspeed_keys.SWITCHED[section])
    return "nothing: it is off"

  return Rule("", read, reads_auto=True, empty=True)


def _first_on(reading: Reading, section: str) -> str | None:
  """The key by which a section is on: its `enabled`, or that of any part of it, or its being there at all."""
  inside = {key: value for key, value in reading.values.items() if _is_in(key, section)}
  switches = {key: value for key, value in inside.items() if key.endswith(".enabled")}
  if f"{section}.enabled" in inside:  # says it for all of the section
    switches = {f"{section}.enabled": inside[f"{section}.enabled"]}
  return next(
    (key for key, value in (switches or inside).items() if not is_off(value) and value != {}), None
  )


def _is_in(key: str, section: str) -> bool:
  return key == section or key.startswith(f"{section}.")


def _nearest(key: str) -> str:
  """A hint to the key that was meant: by its whole name, else by its last part, if that is the last part of one key only."""
  last = key.rpartition(".")[2]
  near = difflib.get_close_matches(key, NAMES, 1, 0.85)
  near = near or [LAST_PARTS[part] for part in difflib.get_close_matches(last, LAST_PARTS, 1, 0.7)]
  return f"did you mean {near[0]}?" if near else "docs/recipes/deepspeed.md has all that there are"


def _shown(value: Any, length: int = 60) -> str:
  """A value as JSON, in one line of ASCII, cut where it is long."""
  try:
    text = json.dumps(value, default=str)
  except (
    RecursionError,
    ValueError,
    TypeError,
  ):  # very deep; thousands of digits; no text for its keys
    text = f"a {type(value).__name__}"
  return text if len(text) <= length else f"{text[: length - 4]} ..."
