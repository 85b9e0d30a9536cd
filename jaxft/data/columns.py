"""Which columns of a source a format reads: those that the settings name or, where they are not there, the obvious ones."""

import collections
import itertools
import re
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from jaxft.checks import FIELD
from jaxft.data import formats, sources

# What data sets call them. A name counts where the source has none of the name that is asked for, and one of these.
USUAL = {
  "prompt_column": ("prompt", "question", "instruction", "query", "input"),
  "completion_column": ("completion", "response", "answer", "output", "reply"),
  "label_column": ("label", "labels", "class", "category", "sentiment", "target"),
}
LOOKED_AT = 100  # rows at the beginning, for one that can be read
NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?", re.IGNORECASE)


def resolve(name: str, split: str, data: ConfigDict) -> tuple[ConfigDict, list[str]]:
  """`config.data` with the names of columns that this source has, and a line for each name that is another one.

  A name that nothing stands for stays as it is: the first row is refused then.

  Args:
    name: a source.
    split: of a hub data set that names none.
    data: `config.data`.
  """
  wanted = formats.columns(data)
  row = _first_row(name, split, data, wanted)
  if row.keys() >= {*wanted}:
    return data, []
  row = _first_row(name, split, data, None)
  found, lines = ConfigDict(data), []
  if formats.is_templated(data) and row and not any(_there(field, row) for field in FIELD.findall(data.template)):
    lines.append(f"{name}: none of the columns of config.data.template, so its text is read as it is")
    found.template = formats.PLAIN
  for setting in formats.settings(found):
    if (column := _column(setting, row, found)) not in (None, found[setting]):
      lines.append(f"{name}: column {column!r} is read, as config.data.{setting}={found[setting]!r} is not there")
      found[setting] = column
  if formats.is_templated(found):
    for field in FIELD.findall(data.template):
      if (column := _there(field, row)) not in (None, field):
        lines.append(f"{name}: column {column!r} is read for {{{field}}} of config.data.template")
        found.template = found.template.replace(f"{{{field}}}", f"{{{column}}}")
  if row and data.nats_column and data.nats_column not in row:
    lines.append(f"{name}: no column {data.nats_column!r} (config.data.nats_column), so no floor of the loss")
    found.nats_column = ""
  return found, lines


def _first_row(name: str, split: str, data: ConfigDict, columns: tuple[str, ...] | None) -> dict[str, Any]:
  how = sources.How(columns, data.text_column, data.separator, data.encoding, formats.label_column(data))
  rows = sources.read((name,), split, how, collections.Counter())
  return next((row.columns for row in itertools.islice(rows, LOOKED_AT) if not row.fault), {})


def _column(setting: str, row: dict[str, Any], data: ConfigDict) -> str | None:
  """The column of a row that a setting stands for; None where several may, or none."""
  if same := _there(data[setting], row):
    return same
  if setting in USUAL:
    return _one(name for name in row if name.strip().casefold() in USUAL[setting])
  return _one(name for name, value in row.items() if _is_text(value))


def _there(wanted: str, row: dict[str, Any]) -> str | None:
  """The column of that name or, if there is one, of that name in other case."""
  if wanted in row:
    return wanted
  return _one(name for name in row if name.strip().casefold() == wanted.strip().casefold())


def _one(names: Iterable[str]) -> str | None:
  found = list(names)
  return found[0] if len(found) == 1 else None


def _is_text(value: Any) -> bool:
  return isinstance(value, str) and bool(value.strip()) and not NUMBER.fullmatch(value.strip())
