"""Which columns of a source a format reads: those that the settings name, else the obvious ones."""

import collections
import dataclasses
import itertools
from collections.abc import Collection, Iterable
from pathlib import PurePath
from typing import Any

from jaxft.config import DataSection
from jaxft.config_checks import TEMPLATE_FIELD
from jaxft.data import formats, readers, sources

# Common names in data sets. One is used if the source lacks the configured name and has just one.
COLUMN_ALIASES = {
  "prompt_column": ("prompt", "question", "instruction", "query", "input"),
  "completion_column": ("completion", "response", "answer", "output", "reply"),
  "label_column": ("label", "labels", "class", "category", "sentiment", "target"),
}
MAX_PROBED_ROWS = 100  # from the beginning of a source


def resolve(name: str, split: str, data: DataSection) -> tuple[DataSection, list[str]]:
  """Return `config.data` with the column names of this source, and a line for each that differs.

  A name without a match stays as it is: the first row is then rejected.

  Args:
    name: a file, or a hub data set.
    split: of a hub data set that names none.
    data: `config.data`.
  """
  required = formats.required_columns(data)
  rows = _first_rows(name, split, data, required)
  if not rows or rows[0].keys() >= {*required}:
    return data, []
  if readers.file_format(PurePath(name)) in readers.TEXT_FORMATS and formats.is_templated(data):
    untemplated = dataclasses.replace(data, template=formats.DEFAULT_TEMPLATE)
    line = "plain text has no columns for config.data.template, so it is read as it is"
    return untemplated, [line]
  if not (rows := _first_rows(name, split, data, None)):  # values that Python cannot represent
    return data, []
  # In their order; a JSON row may lack some.
  names = list(dict.fromkeys(name for row in rows for name in row))
  changes: dict[str, Any] = {}
  lines = []
  used = set()
  # Columns with aliases first: the label or the prompt is not the text.
  settings = formats.column_settings(data)
  for setting in sorted(settings, key=lambda setting: setting not in COLUMN_ALIASES):
    unused = [name for name in names if name not in used]
    configured = getattr(data, setting)
    column = _match_column(setting, rows, unused, configured)
    if column not in (None, configured):
      missing = f"config.data.{setting}={configured!r}"
      lines.append(f"column {column!r} is read, as {missing} is not there")
      changes[setting] = column
    used.add(column)
  if formats.is_templated(data):
    template = data.template
    for field in TEMPLATE_FIELD.findall(data.template):
      if (column := _find_column(field, names)) not in (None, field):
        lines.append(f"column {column!r} is read for {{{field}}} of config.data.template")
        template = template.replace(f"{{{field}}}", f"{{{column}}}")
    changes["template"] = template
  if data.nats_column and data.nats_column not in names:
    missing = f"no column {data.nats_column!r} (config.data.nats_column)"
    lines.append(f"{missing}, so no floor of the loss")
    changes["nats_column"] = ""
  return dataclasses.replace(data, **changes), lines


def _first_rows(
  name: str, split: str, data: DataSection, columns: tuple[str, ...] | None
) -> list[dict[str, Any]]:
  """Return valid rows of the first MAX_PROBED_ROWS: one, or all of them where `columns` is None."""
  options = readers.ReaderOptions.from_config(data, columns, formats.label_column(data))
  rows = sources.read_rows((name,), split, options, collections.Counter())
  valid = (row.columns for row in itertools.islice(rows, MAX_PROBED_ROWS) if not row.error)
  return list(itertools.islice(valid, None if columns is None else 1))


def _match_column(
  setting: str, rows: list[dict[str, Any]], names: list[str], configured: str
) -> str | None:
  """Return the one of `names` that a setting means; None if none or several of them may be."""
  if column := _find_column(configured, names):
    return column
  if setting in COLUMN_ALIASES:
    return _only_one(name for name in names if name.strip().casefold() in COLUMN_ALIASES[setting])
  return _only_one(name for name in names if _looks_like_text([row.get(name) for row in rows]))


def _find_column(column: str, names: Collection[str]) -> str | None:
  """Return the column of that name or, if there is just one, of that name in other case."""
  if column in names:
    return column
  return _only_one(name for name in names if name.strip().casefold() == column.strip().casefold())


def _only_one(names: Iterable[str]) -> str | None:
  candidates = list(names)
  return candidates[0] if len(candidates) == 1 else None


def _looks_like_text(values: list[Any]) -> bool:
  """Return whether most values that are not empty have letters, unlike numbers and dates."""
  non_empty = [value for value in values if value not in (None, "")]
  texts = sum(isinstance(value, str) and any(map(str.isalpha, value)) for value in non_empty)
  return 2 * texts > len(non_empty)
