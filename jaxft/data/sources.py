"""Rows out of files and hub data sets, one at a time: no source is ever held in memory."""

import collections
import csv
import glob
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.errors import RequestError, first_line
from jaxft.files import exists

READABLE = (".txt", ".jsonl", ".csv", ".parquet")
COMPRESSED = (".gz", ".zst")  # after any of them but .parquet, which compresses its own columns
BOM = b"\xef\xbb\xbf"


class Row(NamedTuple):
  """A row as the source has it, or why there is none."""

  where: str  # file and number
  columns: dict[str, Any]
  fault: str = ""


def kind(file: Path) -> str:
  """The suffix that says how a file is read, without that of a compression; "" for a file that is not read."""
  suffix = Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix
  return suffix if suffix in READABLE and not (suffix == ".parquet" != file.suffix) else ""


def find_files(source: str) -> list[Path]:
  """The files that a path, a glob or a folder stands for, sorted; raises RequestError when there are none."""
  path = Path(source)
  if exists(path) and path.is_dir():
    files = sorted(p for p in path.rglob("*") if kind(p) and p.is_file())
    what = f"no {', '.join(READABLE)} file in this folder"
  elif exists(path):
    files, what = [path], ""
  else:
    files, what = sorted(Path(p) for p in glob.glob(source, recursive=True)), "no such file or folder"
  if not files:
    raise RequestError(f"data source {source!r}: {what}; give a file, a glob, a folder or hub:NAME")
  for file in files:
    if not kind(file):
      raise RequestError(
        f"data source {str(file)!r}: cannot read {file.suffix or 'a file without a suffix'}; "
        f"it must be one of {', '.join(READABLE)}, or one of the first three with {' or '.join(COMPRESSED)} after it"
      )
  return files


def weighted(source: str) -> tuple[str, float]:
  """A source of training data, and how often an epoch passes over its documents: SOURCE@0.5, SOURCE@3; 1 where it says nothing.

  Raises RequestError for a weight that no epoch can have.
  """
  found = re.fullmatch(r"(.+)@(\d*\.?\d+)", source)
  if not found or exists(Path(source)):  # a folder may be called so
    return source, 1.0
  name, weight = found[1], float(found[2])
  if not 0 < weight <= 100:
    raise RequestError(f"data source {source!r}: a weight must be above 0 and at most 100")
  return name, weight


def faults(train: tuple[str, ...], validation: tuple[str, ...]) -> list[str]:
  """One line for each local source that cannot be found."""
  lines = []
  for source, may_weigh in [(name, True) for name in train] + [(name, False) for name in validation]:
    try:
      name = weighted(source)[0] if may_weigh else source
      if not name.startswith("hub:"):
        find_files(name)
    except RequestError as error:
      lines.append(str(error))
  return lines


def fingerprint(sources: tuple[str, ...], split: str) -> list[str]:
  """One line for each file or hub data set, which changes when anything in it does."""
  lines = []
  for source in sources:
    if source.startswith("hub:"):
      lines.append("hub " + _hub(source, split)._fingerprint)
      continue
    for file in find_files(source):
      with _named(file), file.open("rb") as stream:
        lines.append(f"{kind(file)} {hashlib.file_digest(stream, 'sha256').hexdigest()}")
  return lines


def read(
  sources: tuple[str, ...],
  split: str,
  *,
  text_column: str,
  separator: str,
  notes: collections.Counter,
) -> Iterator[Row]:
  """All rows of the sources, in order.

  A .txt file is one row, or as many as `separator` cuts it into; its text is in `text_column`, newlines and all. Rows that
  do not parse come as rows with a fault; a file that cannot be read at all raises RequestError.

  Args:
    split: of hub data sets that name none.
    notes: counts what was seen on the way: files with a byte order mark, .txt files with \\r\\n.
  """
  for source in sources:
    if source.startswith("hub:"):
      for number, columns in enumerate(_hub(source, split), 1):
        yield Row(f"{source}, row {number}", columns)
      continue
    for file in find_files(source):
      with _named(file):
        yield from _file_rows(file, text_column, separator, notes)


class _named:
  """Whatever goes wrong with a file becomes one line that names it."""

  def __init__(self, file: Path):
    self.file = file

  def __enter__(self) -> None:
    pass

  def __exit__(self, _, error: BaseException | None, __) -> None:
    if isinstance(error, OSError | ValueError | csv.Error):  # pyarrow's and zlib's errors are of these, too
      raise RequestError(f"{self.file}: {first_line(error)}") from error


def _hub(source: str, split: str) -> Any:
  import datasets  # a second to import: only runs that read from the hub pay for it

  name, _, chosen = source.removeprefix("hub:").partition(":")
  try:
    return datasets.load_dataset(name, split=chosen or split)
  except Exception as error:  # hub, network and format errors share no class; all mean that this source cannot be read
    raise RequestError(
      f"data source {source!r}: {first_line(error)}; check the name and the split, or download it and give the files"
    ) from error


def _file_rows(file: Path, text_column: str, separator: str, notes: collections.Counter) -> Iterator[Row]:
  if kind(file) == ".parquet":
    import pyarrow.parquet

    batches = pyarrow.parquet.ParquetFile(file).iter_batches(1000)
    rows = (row for batch in batches for row in batch.to_pylist())
    yield from (Row(f"{file}, row {number}", row) for number, row in enumerate(rows, 1))
    return
  import pyarrow

  with pyarrow.input_stream(str(file), compression="detect") as raw, io.BufferedReader(raw) as stream:
    if stream.peek(3)[:3] == BOM:
      notes["files with a byte order mark"] += 1
      stream.read(3)
    reader = {".txt": _txt, ".jsonl": _jsonl, ".csv": _csv}[kind(file)]
    yield from reader(file, stream, text_column, separator, notes)


def _txt(
  file: Path, stream: io.BufferedReader, column: str, separator: str, notes: collections.Counter
) -> Iterator[Row]:
  content = stream.read()
  notes[".txt files with \\r\\n, which is kept"] += b"\r\n" in content
  parts = content.split(separator.encode()) if separator else [content]
  for number, part in enumerate(parts, 1):
    where = f"{file}, part {number}" if separator else str(file)
    if separator and not part.strip():
      continue  # what lies before a first separator, or after a last
    try:
      yield Row(where, {column: part.decode()})
    except UnicodeDecodeError as error:
      yield Row(where, {}, f"not UTF-8 ({error.reason} at byte {error.start})")


def _jsonl(file: Path, stream: io.BufferedReader, *_) -> Iterator[Row]:
  for number, line in enumerate(stream, 1):
    where = f"{file}, row {number}"
    if not line.strip():
      continue
    try:
      row = json.loads(line.decode())
    except UnicodeDecodeError as error:
      yield Row(where, {}, f"not UTF-8 ({error.reason} at byte {error.start})")
    except (ValueError, RecursionError) as error:
      yield Row(where, {}, f"not JSON ({first_line(error)})")
    else:
      yield Row(where, row) if isinstance(row, dict) else Row(where, {}, "not a JSON object")


def _csv(file: Path, stream: io.BufferedReader, *_) -> Iterator[Row]:
  csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is shorter than a chapter
  # Bytes that are no UTF-8 become halves of surrogate pairs, which `is_text` finds in the row that has them.
  lines = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
  for number, row in enumerate(csv.DictReader(lines), 1):
    yield Row(f"{file}, row {number}", row)
