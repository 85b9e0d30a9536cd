"""Rows to examples: what is text, where the loss begins, what the label is."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxft.config import DataSection
from jaxft.config_checks import TEMPLATE_FIELD
from jaxft.data.readers import ClassName, RawRow
from jaxft.errors import RequestError
from jaxft.utils.files import is_encodable

PROMPT, COMPLETION = "{prompt}", "{completion}"
DEFAULT_TEMPLATE = PROMPT + COMPLETION  # of `data.template`; plain text then has no template


class Example(NamedTuple):
  text: str
  prompt_chars: int = 0  # characters of the text that are not learned
  label: str | None = None
  nats: float | None = None  # -log p(text), if the source gives it


class BadRowError(Exception):
  """A row that is no example; the message gives the reason, which the report counts."""


def to_example(row: RawRow, data: DataSection) -> Example:
  """Return a row as an example of `data.format`; raises BadRowError."""
  if row.error:
    raise BadRowError(row.error)
  columns = row.columns
  nats = _parse_nats(columns, data) if data.nats_column else None
  if is_templated(data):
    return Example(_fill_template(columns, data.template), nats=nats)
  if data.format == "text":
    return Example(_text_cell(columns, data, "text_column"), nats=nats)
  if data.format == "classification":
    return Example(_text_cell(columns, data, "text_column"), label=_parse_label(columns, data))
  prompt = _text_cell(columns, data, "prompt_column")
  before, _, rest = data.template.partition(PROMPT)
  between, _, after = rest.partition(COMPLETION)
  prompt = before + prompt + between
  completion = _text_cell(columns, data, "completion_column") + after
  return Example(prompt + completion, prompt_chars=len(prompt))


def is_templated(data: DataSection) -> bool:
  """Return whether a text is made of several columns of its row, all of it to be learned."""
  return data.format == "text" and data.template != DEFAULT_TEMPLATE


def column_settings(data: DataSection) -> tuple[str, ...]:
  """Return the settings of `config.data` that name the columns of its format."""
  if is_templated(data):
    return ()
  by_format = {"text": ("text_column",), "classification": ("text_column", "label_column")}
  return by_format.get(data.format, ("prompt_column", "completion_column"))


def label_column(data: DataSection) -> str:
  """Return the column that gets the folder's name of a .txt file; "" if there are no labels."""
  return data.label_column if data.format == "classification" else ""


def required_columns(data: DataSection) -> tuple[str, ...]:
  """Return the columns that `to_example` reads."""
  names = [getattr(data, setting) for setting in column_settings(data)]
  fields = TEMPLATE_FIELD.findall(data.template) if is_templated(data) else ()
  return (*names, *dict.fromkeys(fields), *filter(None, [data.nats_column]))


def error_category(message: str) -> str:
  """Return a message without its row's details, as the report counts it."""
  return message.split(" (")[0]


def _fill_template(columns: dict[str, Any], template: str) -> str:
  return TEMPLATE_FIELD.sub(lambda field: _cell(columns, field[1], "template"), template)


def _text_cell(columns: dict[str, Any], data: DataSection, setting: str) -> str:
  return _cell(columns, getattr(data, setting), setting)


def _cell(columns: dict[str, Any], column: str, setting: str) -> str:
  if column not in columns:
    names = ", ".join(map(repr, columns)) or "none"
    raise BadRowError(f"no column {column!r} (it has {names}; config.data.{setting} says which)")
  value = columns[column]
  if not isinstance(value, str):
    raise BadRowError(f"column {column!r} is no text ({_describe(value)})")
  if not value:
    raise BadRowError(f"column {column!r} is empty")
  if not is_encodable(value):
    raise BadRowError(f"column {column!r} is not UTF-8 (halves of surrogate pairs, or stray bytes)")
  return value


def _describe(value: Any) -> str:
  return f"{type(value).__name__} {str(value)[:40]!r}"


def _parse_label(columns: dict[str, Any], data: DataSection) -> str:
  column = data.label_column
  value = columns.get(column)
  if isinstance(value, float) and value.is_integer():  # pandas' integers in a column with gaps
    value = int(value)
  if isinstance(value, bool | int | str) and str(value) and is_encodable(str(value)):
    return value if isinstance(value, ClassName) else str(value)
  details = f"{_describe(value)}; config.data.label_column"
  raise BadRowError(f"column {column!r} is no label ({details})")


def class_ids(labels: list[str], classes: Sequence[str]) -> list[int]:
  """Return the class index of each label: by name, by name in other case, or by number.

  Raises RequestError for a label that is no class.
  """
  by_name = {name: i for i, name in enumerate(classes)}
  folded = [name.casefold() for name in classes]
  by_case = {name: i for i, name in enumerate(folded) if folded.count(name) == 1}
  by_number = {number: i for i in range(len(classes)) for number in (str(i), f"{i}.0")}
  if len(classes) == 2:
    by_number |= {"false": 0, "true": 1}
  for index, normalize in ((by_name, str), (by_case, str.casefold), (by_number, str.casefold)):
    if all(normalize(label) in index for label in labels):
      return [index[normalize(label)] for label in labels]
  unnamed = all(name in (str(i), f"LABEL_{i}") for i, name in enumerate(classes))
  if unnamed and all(isinstance(x, ClassName) and x.number < len(classes) for x in labels):
    return [label.number for label in labels]
  unknown = next(label for label in labels if label not in by_name)
  raise RequestError(f"label {unknown!r}: the model's classes are {', '.join(map(repr, classes))}")


def _parse_nats(columns: dict[str, Any], data: DataSection) -> float:
  column = data.nats_column
  try:
    nats = float(columns[column])
  except (KeyError, TypeError, ValueError, OverflowError):
    nats = math.nan
  if not math.isfinite(nats):
    raise BadRowError(f"column {column!r} is no finite number of nats (config.data.nats_column)")
  return nats


def as_request_error(row: RawRow, error: BadRowError) -> RequestError:
  """Return the error of a run that does not skip bad rows."""
  way_out = "correct it, or leave such rows out with --config.data.on_bad_row=skip"
  return RequestError(f"{row.location}: {error}; {way_out}")
