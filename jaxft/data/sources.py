"""Rows out of files and hub data sets, one at a time: no source is in memory whole, but for each .txt file."""

import collections
import csv
import glob
import hashlib
import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.errors import RequestError, first_line
from jaxft.files import exists

READABLE = (".txt", ".jsonl", ".csv", ".parquet")
COMPRESSED = (".gz", ".zst")  # after any of them but .parquet, which compresses its own columns
# Of a run or a model, in whose folder text may lie too.
OWN_FOLDERS = ("checkpoints", "profile", "export", "adapter", "model", "tensorboard", "mlartifacts", "wandb", "trackio")
OWN_FILES = ("metrics.jsonl", "samples.jsonl", "merges.txt", "vocab.txt")
MODEL_FILES = (".safetensors", ".msgpack", ".bin", "tokenizer.json", "tokenizer_config.json")
BOM = b"\xef\xbb\xbf"


class ClassName(str):
  """The name of a class, and its number where the name is from."""

  number: int

  def __new__(cls, name: str, number: int) -> "ClassName":
    made = super().__new__(cls, name)
    made.number = number
    return made


class Row(NamedTuple):
  """A row as the source has it, or why there is none."""

  where: str  # file and number
  columns: dict[str, Any]
  fault: str = ""


def kind(file: Path) -> str:
  """The suffix that says how a file is read, without that of a compression; "" for a file that is not read."""
  last = file.suffix.lower()
  suffix = Path(file.stem).suffix.lower() if last in COMPRESSED else last
  return suffix if suffix in READABLE and not (suffix == ".parquet" != last) else ""


def find_files(source: str) -> list[Path]:
  """The files that a path, a glob or a folder stands for, sorted; raises RequestError when there are none."""
  path = Path(source)
  if exists(path) and path.is_dir():
    files, what = (
      [p for p in _inside(path, collections.Counter()) if kind(p)],
      f"no {', '.join(READABLE)} file in this folder",
    )
  elif exists(path):
    files, what = [path] if path.is_file() else [], "not an ordinary file"
  else:
    files, what = (
      sorted(Path(p) for p in glob.glob(source, recursive=True) if Path(p).is_file()),
      "no such file or folder",
    )
  if not files:
    raise RequestError(f"data source {source!r}: {what}; give a file, a glob, a folder or hub:NAME")
  for file in files:
    if not kind(file):
      raise RequestError(
        f"data source {str(file)!r}: cannot read {file.suffix or 'a file without a suffix'}; "
        f"it must be one of {', '.join(READABLE)}, or one of the first three with {' or '.join(COMPRESSED)} after it"
      )
  return files


def _inside(folder: Path, notes: collections.Counter) -> list[Path]:
  """The files of a folder and of the folders in it, but for hidden ones, and for runs and models, which hold no text to learn.

  The folder itself may be a run's or a model's, with text beside: of that the text is taken.
  """
  files = []
  for at, folders, names in os.walk(folder):
    folders[:] = [name for name in folders if not name.startswith(".")]
    this = _not_text(Path(at))
    holds = {name: what for name in folders if (what := _not_text(Path(at, name)))}
    holds |= {name: "folders of runs" for name in folders if this == "folders of runs" and name in OWN_FOLDERS}
    notes.update(f"{what}, left out" for what in holds.values())
    folders[:] = [name for name in folders if name not in holds]
    own = {name for name in names if this and name in OWN_FILES}
    notes["files of a run or a model, left out"] += len(own)
    files += [Path(at, name) for name in names if not name.startswith(".") and name not in own]
  return sorted(file for file in files if file.is_file())


def _not_text(folder: Path) -> str:
  """What a folder is that holds no text to learn, though it has files of kinds that are read; "" for any other."""
  names = {path.name for path in folder.iterdir()} if os.access(folder, os.R_OK) else set()
  if "run.lock" in names or {"config.json", "metrics.jsonl"} <= names:
    return "folders of runs"
  if "parity.json" in names or "config.json" in names and any(name.endswith(MODEL_FILES) for name in names):
    return "folders of models"
  return "Python environments" if "pyvenv.cfg" in names else ""


def weighted(source: str) -> tuple[str, float]:
  """A source of training data, and how often an epoch passes over its documents: SOURCE@0.5, SOURCE@3; 1 where it says nothing.

  Raises RequestError for a weight that no epoch can have.
  """
  name, at, text = source.rpartition("@")
  if (
    not at or "/" in text or kind(Path(source)) or exists(Path(source))
  ):  # a file or a folder may have an @ in its name
    return source, 1.0
  try:
    weight = float(text)
  except ValueError:
    weight = math.nan
  if not 0 < weight <= 100:
    raise RequestError(f"data source {source!r}: what follows the @ must be a number above 0 and at most 100")
  return name, weight


def faults(data: Mapping[str, Any]) -> list[str]:
  """One line for each local source in `config.data` that cannot be found."""
  named = [(key, source) for key in ("train", "validation", "unrelated") for source in data.get(key) or ()]
  lines = []
  for key, source in named:
    try:
      name = weighted(source)[0] if key == "train" else source
      if not name.startswith("hub:"):
        find_files(name)
    except RequestError as error:
      lines.append(f"config.data.{key}: {error}")
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
      with _named(source):
        rows = _hub(source, split)
        names = _class_names(rows.features or {})
        for number, columns in enumerate(rows, 1):
          yield Row(f"{source}, row {number}", _with_names(columns, names))
      continue
    if Path(source).is_dir():
      notes["files in folders that are of no kind that is read"] += sum(
        not kind(p) for p in _inside(Path(source), notes)
      )
    for file in find_files(source):
      with _named(file):
        yield from _file_rows(file, text_column, separator, notes)


class _named:
  """Whatever goes wrong with a source becomes one line that names it."""

  def __init__(self, source: Path | str):
    self.source = source

  def __enter__(self) -> None:
    pass

  def __exit__(self, _, error: BaseException | None, __) -> None:
    if isinstance(error, OSError | ValueError | OverflowError):  # pyarrow's and zlib's errors are of these, too
      raise RequestError(f"{self.source}: {first_line(error)}") from error


def _hub(source: str, split: str) -> Any:
  import datasets  # a second to import: only runs that read from the hub pay for it

  name, _, chosen = source.removeprefix("hub:").partition(":")
  if not name:
    raise RequestError(f"data source {source!r}: no name; give hub:NAME or hub:NAME:SPLIT")
  try:
    return datasets.load_dataset(name, split=chosen or split)
  except Exception as error:  # hub, network and format errors share no class; all mean that this source cannot be read
    raise RequestError(
      f"data source {source!r}: {first_line(error)}; check the name and the split, or download it and give the files"
    ) from error


def _file_rows(file: Path, text_column: str, separator: str, notes: collections.Counter) -> Iterator[Row]:
  if kind(file) == ".parquet":
    import pyarrow.parquet

    content, number = pyarrow.parquet.ParquetFile(file), 0
    names = _class_names(_features(content.schema_arrow.metadata or {}))
    for batch in content.iter_batches(1000):
      for row, fault in _parquet(batch):
        number += 1
        yield Row(f"{file}, row {number}", _with_names(row, names), fault)
    return
  import pyarrow

  with pyarrow.input_stream(str(file), compression="detect") as raw, io.BufferedReader(raw) as stream:
    if stream.peek(3)[:3] == BOM:
      notes["files with a byte order mark"] += 1
      stream.read(3)
    reader = {".txt": _txt, ".jsonl": _jsonl, ".csv": _csv}[kind(file)]
    yield from reader(file, stream, text_column, separator, notes)


def _features(metadata: Mapping[bytes, bytes]) -> Mapping[str, Any]:
  """What the datasets library says of the columns in a parquet file that it has written."""
  try:
    features = json.loads(metadata[b"huggingface"])["info"]["features"]
  except (KeyError, TypeError, ValueError, RecursionError):
    return {}
  return features if isinstance(features, dict) else {}


def _class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
  """The names of the classes of each column that holds their numbers (datasets.ClassLabel, or what a file says of one)."""
  found = {}
  for column, feature in features.items():
    about = feature if isinstance(feature, dict) else {"_type": type(feature).__name__}
    names = about.get("names", getattr(feature, "names", None))
    if about.get("_type") == "ClassLabel" and isinstance(names, list) and all(isinstance(name, str) for name in names):
      found[column] = [ClassName(name, number) for number, name in enumerate(names)]
  return found


def _with_names(columns: dict[str, Any], names: Mapping[str, list[str]]) -> dict[str, Any]:
  """The columns with a name for each class number; a number without one, such as -1 for no label, becomes no label."""
  for column in names.keys() & columns.keys():
    number = columns[column]
    if isinstance(number, int):
      columns = columns | {column: names[column][number] if 0 <= number < len(names[column]) else None}
  return columns


def _parquet(batch: Any) -> Iterator[tuple[dict[str, Any], str]]:
  """Rows of a pyarrow batch; one by one where there is a value that Python cannot have (bytes that are no UTF-8, a date)."""
  try:
    yield from ((row, "") for row in batch.to_pylist())
    return
  except (ValueError, OverflowError):
    pass
  for i in range(len(batch)):
    try:
      (row,) = batch.slice(i, 1).to_pylist()
      yield row, ""
    except (ValueError, OverflowError) as error:
      yield {}, f"a value cannot be read ({first_line(error)})"


def _txt(
  file: Path, stream: io.BufferedReader, column: str, separator: str, notes: collections.Counter
) -> Iterator[Row]:
  content = stream.read()
  notes[".txt files with \\r\\n, which is kept"] += b"\r\n" in content
  parts = content.split(separator.encode()) if separator else [content]
  for number, part in enumerate(parts, 1):
    where = f"{file}, part {number}" if separator else str(file)
    if separator and not part.strip():  # what lies before a first separator, or after a last
      notes["parts between separators with nothing but blanks in them, left out"] += 1
      continue
    try:
      yield Row(where, {column: part.decode()})
    except UnicodeDecodeError as error:
      yield Row(where, {}, f"not UTF-8 ({error.reason} at byte {error.start})")


def _jsonl(
  file: Path, stream: io.BufferedReader, column: str, separator: str, notes: collections.Counter
) -> Iterator[Row]:
  for number, line in enumerate(stream, 1):
    where = f"{file}, row {number}"
    if not line.strip():
      notes["blank lines, left out"] += 1
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
  lines = csv.reader(io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline=""), strict=True)
  names = next(lines, [])
  if twice := [name for name, count in collections.Counter(names).items() if count > 1]:
    raise RequestError(f"{file}: two columns are called {twice[0]!r}")
  number = 0
  while True:
    number += 1
    where = f"{file}, row {number}"
    try:
      cells = next(lines)
    except StopIteration:
      return
    except csv.Error as error:  # a quote that is never closed, or closed in the middle of a cell
      yield Row(where, {}, f"not CSV ({error}, at line {lines.line_num})")
      continue
    if not cells:  # an empty line, which csv.writer never writes for a row
      number -= 1
    elif len(cells) > len(names):
      yield Row(
        where, {}, f"more cells than the first line names ({len(cells)} and {len(names)}; is a comma not quoted?)"
      )
    else:
      yield Row(where, dict(zip(names, cells)))
