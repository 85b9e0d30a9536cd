"""Turn rows into examples: text, end of the prompt, label."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxft.config import DataSection
from jaxft.config_checks import TEMPLATE_FIELD
from jaxft.data.readers import ClassName, RawRow
from jaxft.errors import RequestError
from jaxft.utils.files import is_encodable
from jaxft.utils.types import Json

PROMPT, COMPLETION = "{prompt}", "{completion}"
DEFAULT_TEMPLATE = (
  PROMPT + COMPLETION
)  # the default of `data.template`; plain text then uses no template


class Example(NamedTuple):
  """The text of a row, and the part of it to learn."""

  text: str
  prompt_chars: int = 0  # characters at the beginning that do not count in the loss
  label: str | None = None
  nats: float | None = None  # -log p(text), if the source gives it


class BadRowError(Exception):
  """A row that cannot become an example.

  data_report.json counts these errors by their message.
  """


def to_example(row: RawRow, data: DataSection) -> Example:
  """Return a row as an example of `data.format`.

  Raises:
    BadRowError: the row cannot be read, or a value has the wrong type or is empty.
  """
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
  """Return whether a template joins several columns to one text, all of it learned."""
  return data.format == "text" and data.template != DEFAULT_TEMPLATE


def column_settings(data: DataSection) -> tuple[str, ...]:
  """Return the settings of `config.data` that name the columns of its format."""
  if is_templated(data):
    return ()
  by_format = {"text": ("text_column",), "classification": ("text_column", "label_column")}
  return by_format.get(data.format, ("prompt_column", "completion_column"))


def label_column(data: DataSection) -> str:
  """Return the column that gets the folder name of a .txt file as its label.

  "" if the format has no labels.
  """
  return data.label_column if data.format == "classification" else ""


def required_columns(data: DataSection) -> tuple[str, ...]:
  """Return the columns that `to_example` reads."""
  names = [getattr(data, setting) for setting in column_settings(data)]
  fields = TEMPLATE_FIELD.findall(data.template) if is_templated(data) else ()
  return (*names, *dict.fromkeys(fields), *filter(None, [data.nats_column]))


def error_category(message: str) -> str:
  """Return an error message without details of its row.

  data_report.json counts dropped rows by this text.
  """
  return message.split(" (")[0]


def _fill_template(columns: Json, template: str) -> str:
  return TEMPLATE_FIELD.sub(lambda field: _cell(columns, field[1], "template"), template)


def _text_cell(columns: Json, data: DataSection, setting: str) -> str:
  return _cell(columns, getattr(data, setting), setting)


def _cell(columns: Json, column: str, setting: str) -> str:
  if column not in columns:
    names = ", ".join(map(repr, columns)) or "none"
    raise BadRowError(f"no column {column!r} (columns: {names}; set config.data.{setting})")
  value = columns[column]
  if not isinstance(value, str):
    raise BadRowError(f"column {column!r} is not text ({_describe(value)})")
  if not value:
    raise BadRowError(f"column {column!r} is empty")
  if not is_encodable(value):
    raise BadRowError(f"column {column!r} is not UTF-8 (lone surrogates or stray bytes)")
  return value


def _describe(value: object) -> str:
  return f"{type(value).__name__} {str(value)[:40]!r}"


def _parse_label(columns: Json, data: DataSection) -> str:
  column = data.label_column
  value = columns.get(column)
  if (
    isinstance(value, float) and value.is_integer()
  ):  # pandas stores integers of a column with gaps as floats
    value = int(value)
  if isinstance(value, bool | int | str) and str(value) and is_encodable(str(value)):
    return value if isinstance(value, ClassName) else str(value)
  details = f"{_describe(value)}; set config.data.label_column"
  raise BadRowError(f"column {column!r} is not a label ({details})")


def class_ids(labels: list[str], classes: Sequence[str]) -> list[int]:
  """Return the class index of each label.

  Labels match the classes by name, by name in any case, or by number. All labels must match in the
  same way.

  Raises:
    RequestError: a label matches no class.
  """
  by_name = {name: i for i, name in enumerate(classes)}
  folded = [name.casefold() for name in classes]
  by_case = {name: i for i, name in enumerate(folded) if folded.count(name) == 1}
  by_number = {number: i for i in range(len(classes)) for number in (str(i), f"{i}.0")}
  if len(classes) == 2:
    by_number |= {"false": 0, "true": 1}
  folded_labels = [label.casefold() for label in labels]
  for index, names in ((by_name, labels), (by_case, folded_labels), (by_number, folded_labels)):
    if all(name in index for name in names):
      return [index[name] for name in names]
  unnamed = all(name in (str(i), f"LABEL_{i}") for i, name in enumerate(classes))
  numbers = [label.number for label in labels if isinstance(label, ClassName)]
  if unnamed and len(numbers) == len(labels) and max(numbers) < len(classes):
    return numbers
  unknown = next(label for label in labels if label not in by_name)
  raise RequestError(
    f"label {unknown!r}: must be one of the model's classes, {', '.join(map(repr, classes))}"
  )


def _parse_nats(columns: Json, data: DataSection) -> float:
  column = data.nats_column
  try:
    nats = float(columns[column])
  except (KeyError, TypeError, ValueError, OverflowError):
    nats = math.nan
  if not math.isfinite(nats):
    raise BadRowError(f"column {column!r} is not a finite number (config.data.nats_column)")
  return nats


def as_request_error(row: RawRow, error: BadRowError) -> RequestError:
  """Return the error that ends a run at its first bad row."""
  way_out = "fix the row, or skip bad rows with --config.data.on_bad_row=skip"
  return RequestError(f"{row.location}: {error}; {way_out}")
