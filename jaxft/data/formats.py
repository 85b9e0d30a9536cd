"""Rows to examples: what is text, where the loss begins, what the label is. One function a format."""

import collections
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxft.config_checks import TEMPLATE_FIELD
from jaxft.data.readers import ClassName, RawRow
from jaxft.errors import RequestError
from jaxft.utils.files import is_encodable

PROMPT, COMPLETION = "{prompt}", "{completion}"
DEFAULT_TEMPLATE = (
  PROMPT + COMPLETION
)  # the default of `data.template`, which says nothing of plain text


class Example(NamedTuple):
  text: str
  prompt_chars: int = 0  # characters of the text that are not learned
  label: str | None = None
  nats: float | None = None  # -log p(text) where the source says so


class BadRowError(Exception):
  """A row that no example can be made of; its text says why, and is what the report counts."""


def to_example(row: RawRow, data: ConfigDict) -> Example:
  """The example that a row is in `data.format`; raises BadRow."""
  if row.fault:
    raise BadRowError(row.fault)
  nats = _parse_nats(row.columns, data) if data.nats_column else None
  if is_templated(data):
    return Example(_fill_template(row.columns, data.template), nats=nats)
  if data.format == "text":
    return Example(_text_cell(row.columns, data, "text_column"), nats=nats)
  if data.format == "classification":
    return Example(
      _text_cell(row.columns, data, "text_column"), label=_parse_label(row.columns, data)
    )
  prompt = _text_cell(row.columns, data, "prompt_column")
  before, _, rest = data.template.partition(PROMPT)
  between, _, after = rest.partition(COMPLETION)
  asked = before + prompt + between
  return Example(
    asked + _text_cell(row.columns, data, "completion_column") + after, prompt_chars=len(asked)
  )


def is_templated(data: ConfigDict) -> bool:
  """Whether the text of a row is put together from its columns, all of it to be learned."""
  return data.format == "text" and data.template != DEFAULT_TEMPLATE


def column_settings(data: ConfigDict) -> tuple[str, ...]:
  """The settings of `config.data` that name the columns of its format."""
  if is_templated(data):
    return ()
  of = {"text": ("text_column",), "classification": ("text_column", "label_column")}
  return of.get(data.format, ("prompt_column", "completion_column"))


def label_column(data: ConfigDict) -> str:
  """The column that the folder of a .txt file is told in; "" where there are no labels."""
  return data.label_column if data.format == "classification" else ""


def required_columns(data: ConfigDict) -> tuple[str, ...]:
  """The columns that `to_example` looks at."""
  names = [data[setting] for setting in column_settings(data)]
  fields = TEMPLATE_FIELD.findall(data.template) if is_templated(data) else ()
  return (*names, *dict.fromkeys(fields), *filter(None, [data.nats_column]))


def error_category(fault: str) -> str:
  """A fault without what is different in each row: what the report counts."""
  return fault.split(" (")[0]


def _fill_template(columns: dict[str, Any], template: str) -> str:
  return TEMPLATE_FIELD.sub(lambda field: _cell(columns, field[1], "template"), template)


def _text_cell(columns: dict[str, Any], data: ConfigDict, setting: str) -> str:
  return _cell(columns, data[setting], setting)


def _cell(columns: dict[str, Any], column: str, setting: str) -> str:
  if column not in columns:
    there = ", ".join(map(repr, columns)) or "none"
    raise BadRowError(f"no column {column!r} (it has {there}; config.data.{setting} says which)")
  value = columns[column]
  if not isinstance(value, str):
    raise BadRowError(f"column {column!r} is no text ({type(value).__name__} {str(value)[:40]!r})")
  if not value:
    raise BadRowError(f"column {column!r} is empty")
  if not is_encodable(value):
    raise BadRowError(f"column {column!r} is not UTF-8 (halves of surrogate pairs, or stray bytes)")
  return value


def _parse_label(columns: dict[str, Any], data: ConfigDict) -> str:
  column = data.label_column
  value = columns.get(column)
  if (
    isinstance(value, float) and value.is_integer()
  ):  # what pandas makes of whole numbers in a column with gaps
    value = int(value)
  if isinstance(value, bool | int | str) and str(value) and is_encodable(str(value)):
    return value if isinstance(value, ClassName) else str(value)
  raise BadRowError(
    f"column {column!r} is no label ({type(value).__name__} {str(value)[:40]!r}; config.data.label_column)"
  )


def class_ids(labels: list[str], classes: Sequence[str]) -> list[int]:
  """The number of each label's class: by name, by name in other case, or by its number where labels or classes are numbers.

  Raises RequestError for a label that is no class.
  """
  by_case = collections.Counter(name.casefold() for name in classes)
  ways = (
    {name: i for i, name in enumerate(classes)},
    {name.casefold(): i for i, name in enumerate(classes) if by_case[name.casefold()] == 1},
    {number: i for i in range(len(classes)) for number in (str(i), f"{i}.0")}
    | ({"false": 0, "true": 1} if len(classes) == 2 else {}),
  )
  for number, same in zip(ways, (str, str.casefold, str.casefold), strict=True):
    if all(same(label) in number for label in labels):
      return [number[same(label)] for label in labels]
  nameless = all(name in (str(i), f"LABEL_{i}") for i, name in enumerate(classes))
  if nameless and all(
    isinstance(label, ClassName) and label.number < len(classes) for label in labels
  ):
    return [label.number for label in labels]
  unknown = next(label for label in labels if label not in ways[0])
  raise RequestError(f"label {unknown!r}: the model's classes are {', '.join(map(repr, classes))}")


def _parse_nats(columns: dict[str, Any], data: ConfigDict) -> float:
  column = data.nats_column
  try:
    nats = float(columns[column])
  except (KeyError, TypeError, ValueError, OverflowError):
    nats = math.nan
  if not math.isfinite(nats):
    raise BadRowError(f"column {column!r} is no finite number of nats (config.data.nats_column)")
  return nats


def as_request_error(row: RawRow, fault: BadRowError) -> RequestError:
  """The error of a run that does not skip bad rows."""
  return RequestError(
    f"{row.where}: {fault}; correct it, or leave such rows out with --config.data.on_bad_row=skip"
  )
