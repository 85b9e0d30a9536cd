"""Translation of a DeepSpeed config (ds_config.json) to settings of jaxft.

`jaxft.cli.deepspeed_keys` defines the rule for each key.
"""

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from jaxft.cli import deepspeed_keys, deepspeed_sections
from jaxft.cli.deepspeed_rules import AUTO, Context, Rule, ignored, is_off, to_count
from jaxft.errors import RequestError, first_line

MAX_FILE_BYTES = 2**20  # a real config has some hundreds
MAX_DEPTH = 12  # levels of nested objects; DeepSpeed uses six
# Matches strings, which stay, and comments, which DeepSpeed's reader removes too.
COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/\*.*?\*/', re.DOTALL)
TRAILING_COMMA = re.compile(r'"(?:\\.|[^"\\\n])*"|,(?=\s*[}\]])', re.DOTALL)
COMMENT_KEYS = ("_", "//", "#", "$")
SEE_PAGE = "docs/recipes/deepspeed.md lists all keys"
MAX_HINTS = 20  # limit of lines with a suggestion, as each search takes milliseconds
SECTIONS = deepspeed_keys.sections()
KEY_NAMES = (*deepspeed_keys.known_keys(), *sorted(SECTIONS))
LAST_PART_COUNTS = Counter(name.rpartition(".")[2] for name in KEY_NAMES)
LAST_PARTS = {
  last: name for name in KEY_NAMES if LAST_PART_COUNTS[last := name.rpartition(".")[2]] == 1
}


class Entry(NamedTuple):
  """A leaf of a file: its dotted name, its value and its outcome."""

  key: str
  value: object
  outcome: str  # "--config.mesh.zero_stage=2", "no effect: REASON" or `AUTO`


class ParsedConfig(NamedTuple):
  """The translation of a file; only the run, which knows its devices, computes the batch size."""

  settings: dict[str, object]  # by the names of `jaxft.config.SETTINGS`
  micro_batch_size: int | None  # train_micro_batch_size_per_gpu, if a number
  accumulation_steps: int | None  # gradient_accumulation_steps, if a number
  batch_size: int | None  # train_batch_size, if a number
  entries: list[Entry]  # all leaves, in file order


class _Leaf(NamedTuple):
  key: str
  value: object
  is_comment: bool


class _JsonObject(dict[str, object]):
  """A JSON object that records its duplicate keys."""

  def __init__(self, pairs: list[tuple[str, object]]):
    super().__init__(pairs)
    counts = Counter(name for name, _ in pairs)
    self.duplicates = [name for name in self if counts[name] > 1]


def read(file: Path) -> ParsedConfig:
  """Translate a ds_config.json; comments and trailing commas are allowed, as in DeepSpeed.

  Args:
    file: the path, as given to `--deepspeed`.

  Returns:
    The settings, the batch, and an entry for each leaf of the file.

  Raises:
    RequestError: the file cannot be read or is not JSON; or one line for each key that is unknown
      or unsupported.
  """
  try:
    if not file.is_file():
      reason = "not a file" if file.exists() else "no such file"
      raise RequestError(f"{file}: {reason}; give a ds_config.json")
    if (size := file.stat().st_size) > MAX_FILE_BYTES:
      raise RequestError(
        f"{file}: {size:,} bytes; too large for a DeepSpeed config, at most {MAX_FILE_BYTES:,}"
      )
    text = file.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise RequestError(f"{file}: byte {error.start:,} is not UTF-8; save it as UTF-8") from error
  except (OSError, ValueError) as error:  # no permission, or a path with NUL
    reason = getattr(error, "strerror", None) or first_line(error)
    raise RequestError(f"{file}: {reason}") from error
  # Keep the newlines of comments, so that errors have the right line numbers.
  text = COMMENT.sub(lambda it: it[0] if it[0][0] == '"' else "\n" * it[0].count("\n"), text)
  text = TRAILING_COMMA.sub(lambda it: it[0] if it[0][0] == '"' else "", text)
  try:
    content = json.loads(text, object_pairs_hook=_JsonObject)
  except RecursionError as error:
    raise RequestError(
      f"{file}: objects or lists are nested too deep for a DeepSpeed config"
    ) from error
  except ValueError as error:  # JSONDecodeError, or a number with thousands of digits
    raise RequestError(f"{file}: not JSON: {first_line(error)}") from error
  if not isinstance(content, dict):
    raise RequestError(
      f"{file}: {_format_value(content)} is not an object; a DeepSpeed config is an object such as "
      '{"bf16": ...}'
    )
  return translate(content, str(file))


def translate(config: Mapping[str, object], where: str) -> ParsedConfig:
  """Translate the content of a file, or the dictionary of `TrainingArguments(deepspeed=...)`.

  Args:
    config: the keys and values, nested as in the file.
    where: the name of the config in errors.

  Returns:
    See `read`.

  Raises:
    RequestError: one line for each key that is unknown or unsupported.
  """
  leaves = list(_leaves(config))
  ctx = Context({leaf.key: leaf.value for leaf in leaves if not leaf.is_comment})
  lines = [f"{where}: {it}: occurs twice; remove one" for it in _duplicate_keys(config)]
  entries = []
  for key, value, is_comment in leaves:
    try:
      outcome = "no effect: a comment" if is_comment else _translate_leaf(ctx, key, value)
      entries.append(Entry(key, value, outcome))
    except LookupError as error:
      hint = _suggestion(key) if len(lines) < MAX_HINTS else SEE_PAGE
      lines.append(f"{where}: {key}: {error.args[0]}; {hint}")
    except ValueError as error:
      lines.append(f"{where}: {key}={_format_value(value)}: {error}")
  if lines:
    raise RequestError("\n".join(lines))
  return ParsedConfig(
    settings=ctx.settings,
    micro_batch_size=to_count(ctx.values.get(deepspeed_keys.MICRO_BATCH)),
    accumulation_steps=to_count(ctx.values.get(deepspeed_keys.ACCUMULATION)),
    batch_size=to_count(ctx.values.get(deepspeed_keys.TRAIN_BATCH)),
    entries=entries,
  )


def format_table(entries: Iterable[Entry], overridden: Mapping[str, str]) -> str:
  """Format entries as aligned columns for a terminal: key, value and outcome.

  Args:
    entries: see `ParsedConfig`.
    overridden: the flag that overrides a setting, by the name of the setting, or by the key if no
      single setting has its value (`gradient_accumulation_steps`).

  Returns:
    One line for each entry.
  """
  rows = []
  for key, value, outcome in entries:
    names = [key, *re.findall(r"(?:^| )--config\.([a-z_0-9.]+)=", outcome.partition("(")[0])]
    flags = dict.fromkeys(overridden[name] for name in names if name in overridden)
    wins = "".join(f"; overridden by {flag}" for flag in flags)
    rows.append((key, _format_value(value, 32), outcome + wins))
  widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
  return "\n".join(f"{key:{widths[0]}}  {value:{widths[1]}}  {end}" for key, value, end in rows)


def _leaves(config: Mapping[str, object], above: str = "", depth: int = 1) -> Iterator[_Leaf]:
  """Yield all leaves; empty objects, very deep objects and comments count as leaves."""
  for key, value in config.items():
    name = above + _key_text(key)
    is_comment = isinstance(key, str) and key.startswith(COMMENT_KEYS) or key == "comment"
    if isinstance(value, Mapping) and value and depth < MAX_DEPTH and not is_comment:
      yield from _leaves(value, f"{name}.", depth + 1)
    else:
      yield _Leaf(name, value, is_comment)


def _duplicate_keys(config: Mapping[str, object], above: str = "", depth: int = 1) -> Iterator[str]:
  """Yield the dotted names of duplicate keys."""
  yield from (above + _key_text(key) for key in getattr(config, "duplicates", ()))
  for key, value in config.items():
    if isinstance(value, Mapping) and depth < MAX_DEPTH:
      yield from _duplicate_keys(value, f"{above}{_key_text(key)}.", depth + 1)


def _key_text(key: object) -> str:
  """Format a key for messages: quoted unless plain, so that "a.b" differs from b inside a."""
  is_plain = isinstance(key, str) and re.fullmatch(r"[\w/#$-]+", key, re.ASCII)
  return key if is_plain else _format_value(str(key))


def _translate_leaf(ctx: Context, key: str, value: object) -> str:
  """Translate a leaf; raises ValueError for a wrong value, LookupError for an unknown key."""
  rule = _rule_for(ctx, key)
  is_section = key in SECTIONS
  if is_section and (value is None or value == {}):
    return "no effect: empty"
  if rule is None and is_section:
    inside = next(name for name in deepspeed_keys.known_keys() if name.startswith(f"{key}."))
    raise ValueError(f"must be an object with keys such as {inside.removeprefix(f'{key}.')}")
  if rule is None:
    raise LookupError("unknown key")
  if isinstance(value, Mapping) and (value or not _section_without_rules(key)):
    raise ValueError("must be a value, not an object")
  numbers = value if isinstance(value, list) else [value]
  if any(isinstance(it, float) and not math.isfinite(it) for it in numbers):
    raise ValueError("not a finite number")
  is_auto = isinstance(value, str) and value == "auto"
  return AUTO if is_auto and not rule.handles_auto else rule.translate(ctx, key, value)


def _rule_for(ctx: Context, key: str) -> Rule | None:
  """Return the rule of a key in this file, or None if the key is unknown."""
  section, _, param = key.partition(".params.")
  if param and section in deepspeed_sections.TYPES:
    return _param_rule(ctx, section, param)
  if key in deepspeed_keys.RULES:
    return deepspeed_keys.RULES[key]
  section = _section_without_rules(key)
  if why := deepspeed_keys.IGNORED_SECTIONS.get(section):
    return ignored(why)
  return _off_rule(ctx, section) if section else None


def _section_without_rules(key: str) -> str:
  """Return the section of a key if all its keys are ignored or refused together, else ""."""
  sections = (*deepspeed_keys.IGNORED_SECTIONS, *deepspeed_keys.UNSUPPORTED_SECTIONS)
  return next((it for it in sections if _is_in(key, it)), "")


def _param_rule(ctx: Context, section: str, param: str) -> Rule | None:
  """Return the rule of a parameter for the type of optimizer or scheduler in this file."""
  types = {name.lower(): it for name, it in deepspeed_sections.TYPES[section].items()}
  if f"{section}.type" not in ctx.values:

    def reject(*_: object) -> str:
      raise ValueError(f"needs the type of {section}; give {section}.type too")

    is_known = any(param in it.params for it in types.values())
    return Rule("", reject, handles_auto=True) if is_known else None
  name = ctx.type_of(section)
  type_rule = next(iter(types.values())) if name == "auto" else types.get(name)
  return type_rule.params.get(param) if type_rule else ignored(f"{section}.type is refused")


def _off_rule(ctx: Context, section: str) -> Rule:
  """Return the rule of an unsupported section: it refuses the first key that switches it on."""
  if section not in ctx.first_on:
    ctx.first_on[section] = _first_key_on(ctx, section)

  def reject_first(_: Context, key: str, __: object) -> str:
    if key == ctx.first_on[section]:
      raise ValueError(deepspeed_keys.UNSUPPORTED_SECTIONS[section])
    return "no effect: it is off"

  return Rule("", reject_first, handles_auto=True)


def _first_key_on(ctx: Context, section: str) -> str | None:
  """Return the key that switches a section on.

  This is its `enabled`, else `enabled` of any subsection, else any key.
  """
  inside = {key: value for key, value in ctx.values.items() if _is_in(key, section)}
  switches = {key: value for key, value in inside.items() if key.endswith(".enabled")}
  if f"{section}.enabled" in inside:  # it applies to the whole section
    switches = {f"{section}.enabled": inside[f"{section}.enabled"]}
  keys = (key for key, value in (switches or inside).items() if not is_off(value) and value != {})
  return next(keys, None)


def _is_in(key: str, section: str) -> bool:
  return key == section or key.startswith(f"{section}.")


def _suggestion(key: str) -> str:
  """Suggest a key by its whole name, else by its last part if that is unique."""
  last = key.rpartition(".")[2]
  near = difflib.get_close_matches(key, KEY_NAMES, 1, 0.85)
  near = near or [LAST_PARTS[part] for part in difflib.get_close_matches(last, LAST_PARTS, 1, 0.7)]
  return f"did you mean {near[0]}?" if near else SEE_PAGE


def _format_value(value: object, length: int = 60) -> str:
  """Format a value as JSON, in one line of ASCII, cut if it is long."""
  try:
    text = json.dumps(value, default=str)
  except (RecursionError, ValueError, TypeError):  # deep nesting, thousands of digits, odd keys
    text = f"a {type(value).__name__}"
  return text if len(text) <= length else f"{text[: length - 4]} ..."
