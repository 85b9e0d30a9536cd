"""Choose the columns to read: the configured ones, else usual names."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import PurePath

from jaxft.config import DataSection
from jaxft.config_checks import TEMPLATE_FIELD
from jaxft.data import formats, readers, sources
from jaxft.utils.types import Json

# Common names in data sets. If the source lacks the configured column and has exactly one of these,
# that one is used.
COLUMN_ALIASES = {
  "prompt_column": ("prompt", "question", "instruction", "query", "input"),
  "completion_column": ("completion", "response", "answer", "output", "reply"),
  "label_column": ("label", "labels", "class", "category", "sentiment", "target"),
}
MAX_PROBED_ROWS = 100  # from the beginning of a source


def resolve(name: str, split: str, data: DataSection) -> tuple[DataSection, list[str]]:
  """Adapt `config.data` to the columns of this source.

  A name without a match stays unchanged; the first row is then rejected.

  Args:
    name: a file or a hub data set.
    split: the split to read if the name of a hub data set does not include one.
    data: `config.data`.

  Returns:
    `config.data` with this source's column names, and one log line for each changed setting.
  """
  required = formats.required_columns(data)
  rows = _first_rows(name, split, data, required)
  if not rows or rows[0].keys() >= {*required}:
    return data, []
  if readers.file_format(PurePath(name)) in readers.TEXT_FORMATS and formats.is_templated(data):
    untemplated = dataclasses.replace(data, template=formats.DEFAULT_TEMPLATE)
    line = "plain text has no columns for config.data.template, so it is read without one"
    return untemplated, [line]
  if not (rows := _first_rows(name, split, data, None)):  # no row that Python can represent
    return data, []
  # In order of appearance, from all probed rows: a JSON row may lack some columns.
  names = list(dict.fromkeys(name for row in rows for name in row))
  changes: Json = {}
  lines = []
  used = set()
  # Settings with aliases choose first, so that the text is not taken from the label or the prompt.
  settings = formats.column_settings(data)
  for setting in sorted(settings, key=lambda setting: setting not in COLUMN_ALIASES):
    unused = [name for name in names if name not in used]
    configured = getattr(data, setting)
    column = _match_column(setting, rows, unused, configured)
    if column not in (None, configured):
      missing = f"config.data.{setting}={configured!r}"
      lines.append(f"reading column {column!r}, because the data has no {missing}")
      changes[setting] = column
    used.add(column)
  if formats.is_templated(data):
    template = data.template
    for field in TEMPLATE_FIELD.findall(data.template):
      if (column := _find_column(field, names)) not in (None, field):
        lines.append(f"reading column {column!r} for {{{field}}} in config.data.template")
        template = template.replace(f"{{{field}}}", f"{{{column}}}")
    changes["template"] = template
  if data.nats_column and data.nats_column not in names:
    missing = f"no column {data.nats_column!r} (config.data.nats_column)"
    lines.append(f"{missing}; the entropy floor is unknown")
    changes["nats_column"] = ""
  return dataclasses.replace(data, **changes), lines


def _first_rows(
  name: str, split: str, data: DataSection, columns: tuple[str, ...] | None
) -> list[Json]:
  """Return valid rows of the first MAX_PROBED_ROWS.

  Returns one row if `columns` are given, else all of them.
  """
  options = readers.ReaderOptions.from_config(data, columns, formats.label_column(data))
  rows = sources.read_rows((name,), split, options, Counter())
  valid = (row.columns for row in itertools.islice(rows, MAX_PROBED_ROWS) if not row.error)
  return list(itertools.islice(valid, None if columns is None else 1))


def _match_column(setting: str, rows: list[Json], names: list[str], configured: str) -> str | None:
  """Return the one column that fits a setting, or None.

  None also if several columns fit.
  """
  if column := _find_column(configured, names):
    return column
  if setting in COLUMN_ALIASES:
    return _only_one(name for name in names if name.strip().casefold() in COLUMN_ALIASES[setting])
  return _only_one(name for name in names if _looks_like_text([row.get(name) for row in rows]))


def _find_column(column: str, names: Collection[str]) -> str | None:
  """Return the column with that name.

  Case may differ if only one such column exists.
  """
  if column in names:
    return column
  return _only_one(name for name in names if name.strip().casefold() == column.strip().casefold())


def _only_one(names: Iterable[str]) -> str | None:
  candidates = list(names)
  return candidates[0] if len(candidates) == 1 else None


def _looks_like_text(values: list[object]) -> bool:
  """Return whether most non-empty values contain letters, unlike numbers and dates."""
  non_empty = [value for value in values if value not in (None, "")]
  texts = sum(isinstance(value, str) and any(map(str.isalpha, value)) for value in non_empty)
  return 2 * texts > len(non_empty)
