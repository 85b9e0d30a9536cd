"""Documents out of files and hub data sets."""

import csv
import glob
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.errors import RequestError, first_line
from jaxft.files import exists

READABLE = (".txt", ".jsonl", ".csv", ".parquet")


class Document(NamedTuple):
  text: str
  nats: float | None  # -log p(text) where the source says so


def find_files(source: str) -> list[Path]:
  """The files that a path, a glob or a folder stands for, sorted; raises RequestError when there are none."""
  path = Path(source)
  if exists(path) and path.is_dir():
    files = sorted(p for p in path.rglob("*") if p.suffix in READABLE and p.is_file())
    what = f"no {', '.join(READABLE)} file in this folder"
  elif exists(path):
    files, what = [path], ""
  else:
    files, what = sorted(Path(p) for p in glob.glob(source, recursive=True)), "no such file or folder"
  if not files:
    raise RequestError(f"data source {source!r}: {what}; give a file, a glob, a folder or hub:NAME")
  for file in files:
    if file.suffix not in READABLE:
      raise RequestError(
        f"data source {str(file)!r}: cannot read {file.suffix or 'a file without a suffix'}; "
        f"it must be one of {', '.join(READABLE)}"
      )
  return files


def faults(sources: tuple[str, ...]) -> list[str]:
  """One line for each local source that cannot be found."""
  lines = []
  for source in sources:
    try:
      if not source.startswith("hub:"):
        find_files(source)
    except RequestError as error:
      lines.append(str(error))
  return lines


def read(sources: tuple[str, ...], split: str, text_column: str, nats_column: str = "") -> Iterator[Document]:
  """All documents of the sources, in order. A .txt file is one document, newlines and all.

  Raises RequestError, with file and row, on a row without text or a file that does not parse.
  """
  for source in sources:
    if source.startswith("hub:"):
      yield from _documents(source, _hub_rows(source, split), text_column, nats_column)
      continue
    for file in find_files(source):
      try:
        yield from _documents(str(file), _file_rows(file, text_column), text_column, nats_column)
      except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, OSError, ValueError) as error:
        raise RequestError(f"{file}: {error}") from error


def _documents(where: str, rows: Iterator[dict], text_column: str, nats_column: str) -> Iterator[Document]:
  for number, row in enumerate(rows, 1):
    text = row.get(text_column) if isinstance(row, dict) else None
    if not isinstance(text, str):
      found = f"columns {', '.join(map(str, row))}" if isinstance(row, dict) else type(row).__name__
      raise RequestError(
        f"{where}, row {number}: no text in column {text_column!r} ({found}); set config.data.text_column"
      )
    if not is_text(text):
      raise RequestError(f"{where}, row {number}: half of a surrogate pair in column {text_column!r}, which is no text")
    yield Document(text, _nats(f"{where}, row {number}", row, nats_column))


def is_text(text: str) -> bool:
  """False for what no file can hold: halves of surrogate pairs, which JSON's \\u escapes and a shell's stray bytes give."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def _nats(where: str, row: dict, column: str) -> float | None:
  if not column:
    return None
  try:
    nats = float(row[column])
  except (KeyError, TypeError, ValueError, OverflowError):
    nats = math.nan
  if not math.isfinite(nats):
    raise RequestError(f"{where}: no number in column {column!r}; correct it or leave config.data.nats_column empty")
  return nats


def _hub_rows(source: str, split: str) -> Iterator[dict[str, Any]]:
  import datasets  # a second to import: only runs that read from the hub pay for it

  name, _, chosen = source.removeprefix("hub:").partition(":")
  try:
    return iter(datasets.load_dataset(name, split=chosen or split))
  except Exception as error:  # hub, network and format errors share no class; all mean that this source cannot be read
    raise RequestError(
      f"data source {source!r}: {first_line(error)}; check the name and the split, or download it and give the files"
    ) from error


def _file_rows(file: Path, text_column: str) -> Iterator[dict[str, Any]]:
  if file.suffix == ".txt":
    yield {text_column: file.read_bytes().decode()}  # not read_text(): it would turn \r\n into \n
  elif file.suffix == ".jsonl":
    with file.open(encoding="utf-8") as lines:
      for number, line in enumerate(lines, 1):
        try:
          if line.strip():
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
          raise RequestError(f"{file}, row {number}: not JSON ({first_line(error)})") from error
  elif file.suffix == ".csv":
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is shorter than a chapter
    with file.open(encoding="utf-8-sig", newline="") as lines:
      yield from csv.DictReader(lines)
  else:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
      yield from batch.to_pylist()
