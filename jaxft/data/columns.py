"""Which columns of a source a format reads: those that the settings name or, where they are not there, the obvious ones."""

import collections
import itertools
from collections.abc import Collection, Iterable
from pathlib import PurePath
from typing import Any

from ml_collections import ConfigDict

from jaxft.config_checks import TEMPLATE_FIELD
from jaxft.data import formats, readers, sources

# What data sets call them. A name counts where the source has none of the name that is asked for, and one of these.
COLUMN_ALIASES = {
  "prompt_column": ("prompt", "question", "instruction", "query", "input"),
  "completion_column": ("completion", "response", "answer", "output", "reply"),
  "label_column": ("label", "labels", "class", "category", "sentiment", "target"),
}
MAX_PROBED_ROWS = 100  # rows at the beginning


def resolve(name: str, split: str, data: ConfigDict) -> tuple[ConfigDict, list[str]]:
  """`config.data` with the names of columns that this source has, and a line for each name that is another one.

  A name that nothing stands for stays as it is: the first row is refused then.

  Args:
    name: a file, or a hub data set.
    split: of a hub data set that names none.
    data: `config.data`.
  """
  wanted = formats.required_columns(data)
  rows = _first_rows(name, split, data, wanted)
  if not rows or rows[0].keys() >= {*wanted}:
    return data, []
  if readers.file_format(PurePath(name)) in readers.TEXT_FORMATS and formats.is_templated(data):
    plain = ConfigDict(data.to_dict() | {"template": formats.DEFAULT_TEMPLATE})
    return plain, ["plain text has no columns for config.data.template, so it is read as it is"]
  if not (rows := _first_rows(name, split, data, None)):  # values that Python cannot have
    return data, []
  names = {
    name: None for row in rows for name in row
  }  # in their order; a row of JSON may lack some
  found, lines, taken = ConfigDict(data), [], set()
  # Those with usual names first: what is the label, or the prompt, is not the text.
  for setting in sorted(
    formats.column_settings(data), key=lambda setting: setting not in COLUMN_ALIASES
  ):
    column = _match_column(setting, rows, [name for name in names if name not in taken], found)
    if column not in (None, found[setting]):
      lines.append(
        f"column {column!r} is read, as config.data.{setting}={found[setting]!r} is not there"
      )
      found[setting] = column
    taken.add(column)
  if formats.is_templated(data):
    for field in TEMPLATE_FIELD.findall(data.template):
      if (column := _find_column(field, names)) not in (None, field):
        lines.append(f"column {column!r} is read for {{{field}}} of config.data.template")
        found.template = found.template.replace(f"{{{field}}}", f"{{{column}}}")
  if data.nats_column and data.nats_column not in names:
    lines.append(
      f"no column {data.nats_column!r} (config.data.nats_column), so no floor of the loss"
    )
    found.nats_column = ""
  return found, lines


def _first_rows(
  name: str, split: str, data: ConfigDict, columns: tuple[str, ...] | None
) -> list[dict[str, Any]]:
  """The good ones of the first rows: one of them, or LOOKED_AT where all columns are asked for."""
  how = readers.ReaderOptions(
    columns, data.text_column, data.separator, data.encoding, formats.label_column(data)
  )
  rows = itertools.islice(
    sources.read_rows((name,), split, how, collections.Counter()), MAX_PROBED_ROWS
  )
  return [
    row.columns
    for row in itertools.islice(
      (row for row in rows if not row.fault), None if columns is None else 1
    )
  ]


def _match_column(
  setting: str, rows: list[dict[str, Any]], names: list[str], data: ConfigDict
) -> str | None:
  """The column, one of `names`, that a setting means; None where there are several candidates, or none."""
  if same := _find_column(data[setting], names):
    return same
  if setting in COLUMN_ALIASES:
    return _only_one(name for name in names if name.strip().casefold() in COLUMN_ALIASES[setting])
  return _only_one(name for name in names if _looks_like_text([row.get(name) for row in rows]))


def _find_column(wanted: str, names: Collection[str]) -> str | None:
  """The column of that name or, if there is one, of that name in other case."""
  if wanted in names:
    return wanted
  return _only_one(name for name in names if name.strip().casefold() == wanted.strip().casefold())


def _only_one(names: Iterable[str]) -> str | None:
  found = list(names)
  return found[0] if len(found) == 1 else None


def _looks_like_text(values: list[Any]) -> bool:
  """Whether most values that are not empty have letters: not numbers, and not dates."""
  there = [value for value in values if value not in (None, "")]
  with_letters = sum(isinstance(value, str) and any(map(str.isalpha, value)) for value in there)
  return 2 * with_letters > len(there)
