"""The rows of one file, by the end of its name."""

import codecs
import collections
import contextlib
import csv
import io
import json
import lzma
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple

from jaxft.errors import RequestError, first_line
from jaxft.utils.files import is_encodable, reject_lfs_pointer

CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}  # pyarrow's names
TEXT_FORMATS = (".txt", ".md")
COMPRESSION_SUFFIXES = (*CODECS, ".xz")  # after any of STREAMED
STREAMED_FORMATS = (".txt", ".jsonl", ".csv", ".md", ".ndjson", ".json", ".tsv")
READABLE_FORMATS = (*STREAMED_FORMATS, ".parquet", ".arrow", ".zip")
# What is read of a folder. The others lie beside data for other ends (README.md, dataset_infos.json, a zip of the same files):
# they are read where they are named, or where a folder has nothing else.
DEFAULT_FORMATS = (".txt", ".jsonl", ".csv", ".parquet")
BOM = b"\xef\xbb\xbf"
# Of pyarrow, zlib and zstd: OSError, ValueError or OverflowError. RuntimeError: an archive with a password.
READ_ERRORS = (
  OSError,
  ValueError,
  OverflowError,
  EOFError,
  lzma.LZMAError,
  zipfile.BadZipFile,
  RuntimeError,
)


class RawRow(NamedTuple):
  """A row as the source has it, or why there is none."""

  where: str  # file and number
  columns: dict[str, Any]  # all names; the values of those that were asked for
  fault: str = ""


class ReaderOptions(NamedTuple):
  """How files are read: settings of `config.data`."""

  columns: tuple[str, ...] | None  # those asked for: no other is decoded; None: all
  text_column: str = "text"  # the name of what a file of plain text holds
  separator: str = ""
  encoding: str = "utf-8"
  label_column: str = ""  # of a file of plain text, for its label; empty: none
  label: str = ""  # that label, the name of the file's folder

  def of(self, names: Iterable[str]) -> list[str]:
    """Those of a table's columns that are asked for."""
    return [name for name in dict.fromkeys(names) if self.columns is None or name in self.columns]


class ClassName(str):
  """The name of a class, and its number where the name is from."""

  number: int

  def __new__(cls, name: str, number: int) -> "ClassName":
    made = super().__new__(cls, name)
    made.number = number
    return made


def file_format(file: PurePath) -> str:
  """The suffix that says how a file is read, without that of a compression; "" for a file that is not read."""
  last = file.suffix.lower()
  if last in COMPRESSION_SUFFIXES:
    suffix = PurePath(file.stem).suffix.lower()
    return suffix if suffix in STREAMED_FORMATS else ""
  return last if last in READABLE_FORMATS else ""


def read_rows(file: Path, how: ReaderOptions, notes: collections.Counter) -> Iterator[RawRow]:
  """All rows of a file. Those that do not parse come with a fault; a file that cannot be read at all raises one of ERRORS."""
  reject_lfs_pointer(file)
  how = how._replace(label=file.absolute().parent.name)
  if file_format(file) == ".zip":
    yield from _read_archive(file, how, notes)
  elif file_format(file) in STREAMED_FORMATS:
    with _open_decompressed(file) as stream:
      yield from _read_stream(str(file), file_format(file), stream, how, notes)
  else:
    # pyarrow opens no file whose name is not UTF-8.
    with contextlib.nullcontext(file) if is_encodable(str(file)) else file.open("rb") as source:
      yield from _read_table(str(file), file_format(file), source, how)


def _read_archive(file: Path, how: ReaderOptions, notes: collections.Counter) -> Iterator[RawRow]:
  """The rows of the files in a zip, of which those are read that would be read in a folder."""
  with zipfile.ZipFile(file) as archive:
    kinds = {}
    for entry in sorted(archive.infolist(), key=lambda entry: entry.filename):
      path = PurePath(entry.filename)
      hidden = any(part == "__MACOSX" or part.startswith(".") for part in path.parts)
      if hidden or entry.is_dir() or not path.parts:
        continue
      kinds[entry] = (
        ""
        if path.suffix.lower() in COMPRESSION_SUFFIXES or file_format(path) == ".zip"
        else file_format(path)
      )
    known = {entry: of for entry, of in kinds.items() if of}
    read = select_files(f"data source {str(file)!r}", known, "unpack it, and name those")
    notes["files in archives that are of no kind that is read"] += len(kinds) - len(known)
    notes[
      "files in archives that are read only where there is no other kind (.json, .md, ...)"
    ] += len(known) - len(read)
    for entry in read:
      where, of = f"{file}: {entry.filename}", kinds[entry]
      how = how._replace(label=PurePath(entry.filename).parent.name)
      with archive.open(entry) as raw:
        if of in STREAMED_FORMATS:
          yield from _read_stream(where, of, io.BufferedReader(raw), how, notes)
        else:
          yield from _read_table(where, of, io.BytesIO(raw.read()), how)


def select_files(where: str, kinds: dict[Any, str], way_out: str) -> list[Any]:
  """Which files of a folder or an archive are read: those of USUAL kinds, or all of one kind where there are none of them.

  Raises RequestError for several unusual kinds.
  """
  if usual := [file for file, kind in kinds.items() if kind in DEFAULT_FORMATS]:
    return usual
  if len(found := sorted(set(kinds.values()))) > 1:
    raise RequestError(
      f"{where}: files of several kinds ({', '.join(found)}) in it; {way_out} to read"
    )
  return list(kinds)


@contextlib.contextmanager
def _open_decompressed(file: Path) -> Iterator[io.BufferedReader]:
  """The bytes of a file, decompressed. Python opens it: its name may be no UTF-8, and its suffix in capitals."""
  last = file.suffix.lower()
  with file.open("rb") as raw:
    if last == ".xz":
      with lzma.open(raw) as content:
        yield io.BufferedReader(content)
    elif last in CODECS:
      import pyarrow

      with (
        pyarrow.input_stream(raw, compression=CODECS[last]) as content,
        io.BufferedReader(content) as stream,
      ):
        yield stream
    else:
      yield raw


class _Utf8Stream(io.RawIOBase):
  """A stream in another encoding, as UTF-8."""

  def __init__(self, stream: BinaryIO, encoding: str):
    self._stream, self._decoder, self._rest = stream, codecs.getincrementaldecoder(encoding)(), b""

  def readable(self) -> bool:
    return True

  def readinto(self, into: Any) -> int:
    while not self._rest:
      piece = self._stream.read(2**16)
      self._rest = self._decoder.decode(piece, final=not piece).encode("utf-8", "surrogatepass")
      if not piece:
        break
    size = min(len(into), len(self._rest))
    into[:size], self._rest = self._rest[:size], self._rest[size:]
    return size


# ---- Text, JSON, CSV ---------------------------------------------------------------------------------------------------


def _read_stream(
  where: str, kind: str, stream: io.BufferedReader, how: ReaderOptions, notes: collections.Counter
) -> Iterator[RawRow]:
  if how.encoding.lower().replace("_", "-") not in ("utf-8", "utf8"):
    stream = io.BufferedReader(_Utf8Stream(stream, how.encoding))
  elif stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
    raise RequestError(
      f"{where}: begins as UTF-16 does, which Excel calls Unicode; set config.data.encoding=utf-16"
    )
  if stream.peek(3)[:3] == BOM:
    notes["files with a byte order mark"] += 1
    stream.read(3)
  if kind in TEXT_FORMATS:
    yield from _read_text(where, stream, how, notes)
  elif kind == ".csv":
    yield from _read_csv(where, stream, how, notes, ",", csv.QUOTE_MINIMAL)
  elif kind == ".tsv":
    content = stream.read()
    quoting = _detect_tsv_quoting(content)
    notes[".tsv files whose quotes are letters"] += quoting == csv.QUOTE_NONE
    yield from _read_csv(where, io.BufferedReader(io.BytesIO(content)), how, notes, "\t", quoting)
  elif kind == ".json":
    yield from _read_json(where, stream, how, notes)
  else:
    yield from _read_json_lines(where, stream, notes)


def _read_text(
  where: str, stream: io.BufferedReader, how: ReaderOptions, notes: collections.Counter
) -> Iterator[RawRow]:
  """The file as one row, or as many as `separator` cuts it into."""
  content = stream.read()
  notes[".txt files with \\r\\n, which is kept"] += b"\r\n" in content
  parts = content.split(how.separator.encode()) if how.separator else [content]
  for number, part in enumerate(parts, 1):
    at = f"{where}, part {number}" if how.separator else where
    if how.separator and not part.strip():  # what lies before a first separator, or after a last
      notes["parts between separators with nothing but blanks in them, left out"] += 1
      continue
    try:
      label = {how.label_column: how.label} if how.label_column else {}
      yield RawRow(at, {how.text_column: part.decode()} | label)
    except UnicodeDecodeError as error:
      yield RawRow(at, {}, _utf8_error(error))


def _utf8_error(error: UnicodeDecodeError) -> str:
  return f"not UTF-8 ({error.reason} at byte {error.start}; config.data.encoding names another, such as cp1252)"


def _read_json(
  where: str, stream: io.BufferedReader, how: ReaderOptions, notes: collections.Counter
) -> Iterator[RawRow]:
  """An array of objects, or an object a line."""
  content = stream.read()
  try:
    found = json.loads(content)
  except (ValueError, RecursionError):  # of which the first line is whole, and more follows
    yield from _read_json_lines(where, io.BytesIO(content), notes)
    return
  is_row = isinstance(found, dict) and (how.columns is None or found.keys() & {*how.columns})
  if (
    isinstance(found, dict)
    and not is_row
    and any(isinstance(value, list) for value in found.values())
  ):
    raise RequestError(
      f"{where}: one JSON object, with {', '.join(map(repr, found))[:200]}, and not a list of rows; "
      "write the list in it into a file of its own"
    )
  for number, row in enumerate(found if isinstance(found, list) else [found], 1):
    at = f"{where}, row {number}"
    yield RawRow(at, row) if isinstance(row, dict) else RawRow(at, {}, "not a JSON object")


def _read_json_lines(
  where: str, stream: Iterable[bytes], notes: collections.Counter
) -> Iterator[RawRow]:
  for number, line in enumerate(stream, 1):
    at = f"{where}, row {number}"
    if not line.strip():
      notes["blank lines, left out"] += 1
      continue
    try:
      row = json.loads(line.decode())
    except UnicodeDecodeError as error:
      yield RawRow(at, {}, _utf8_error(error))
    except (ValueError, RecursionError) as error:
      yield RawRow(at, {}, f"not JSON ({first_line(error)})")
    else:
      yield RawRow(at, row) if isinstance(row, dict) else RawRow(at, {}, "not a JSON object")


def _detect_tsv_quoting(content: bytes) -> int:
  """Whether quotes enclose cells, as in csv, or are letters: csv.QUOTE_MINIMAL or csv.QUOTE_NONE.

  Read as csv, two stray quotes make one row of all rows between them. So quotes are letters if the file is no valid csv, or if
  a quoted cell spans lines although every line has the tabs of a whole row.
  """
  csv.field_size_limit(2**31 - 1)
  text = content.decode(errors="replace")
  rows = csv.reader(io.StringIO(text, newline=""), "excel-tab", strict=True)
  try:
    over_lines = any("\n" in cell for row in rows for cell in row)
  except csv.Error:
    return csv.QUOTE_NONE
  tabs = {line.count("\t") for line in text.split("\n") if line.strip()} if over_lines else ()
  return csv.QUOTE_NONE if len(tabs) == 1 and tabs != {0} else csv.QUOTE_MINIMAL


def _read_csv(
  where: str,
  stream: io.BufferedReader,
  how: ReaderOptions,
  notes: collections.Counter,
  delimiter: str,
  quoting: int,
) -> Iterator[RawRow]:
  csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is shorter than a chapter
  delimiter = _detect_delimiter(stream.peek().splitlines()[:1], how, notes, delimiter)
  # Bytes that are no UTF-8 become halves of surrogate pairs, which `is_encodable` finds in the row that has them.
  with io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="") as text:
    yield from _read_cells(
      where, csv.reader(text, delimiter=delimiter, quoting=quoting, strict=True), how
    )


def _read_cells(where: str, lines: Any, how: ReaderOptions) -> Iterator[RawRow]:
  names = next(lines, [])
  _check_unique(where, names, how)
  number = 0
  while True:
    number += 1
    at = f"{where}, row {number}"
    try:
      cells = next(lines)
    except StopIteration:
      return
    except csv.Error as error:  # a quote that is never closed, or closed in the middle of a cell
      yield RawRow(at, {}, f"not CSV ({error}, at line {lines.line_num})")
      continue
    if not cells:  # an empty line, which csv.writer never writes for a row
      number -= 1
    elif len(cells) > len(names):
      yield RawRow(
        at,
        {},
        f"more cells than the first line names ({len(cells)} and {len(names)}; is a comma not quoted?)",
      )
    else:
      yield RawRow(at, dict(zip(names, cells)))


def _detect_delimiter(
  first: list[bytes], how: ReaderOptions, notes: collections.Counter, usual: str
) -> str:
  """What divides the cells: another where the first line has a column that is asked for only if it is divided by that."""
  header = b"".join(first).decode(errors="replace")
  for delimiter in (usual, ";", "\t"):
    try:
      names = next(csv.reader([header], delimiter=delimiter), [])
    except csv.Error:
      continue
    if len(names) > 1 if how.columns is None else set(names) & set(how.columns):
      notes[f"csv files whose cells are divided by {delimiter!r}"] += delimiter != usual
      return delimiter
  return usual


def _check_unique(where: str, names: list[str], how: ReaderOptions) -> None:
  """Raises RequestError for a column that is asked for and is there twice; other names may be, as the empty one often is."""
  if twice := [name for name in how.columns or () if names.count(name) > 1]:
    raise RequestError(f"{where}: two columns are called {twice[0]!r}")


# ---- Tables of pyarrow -------------------------------------------------------------------------------------------------


def _read_table(
  where: str, kind: str, file: Path | BinaryIO, how: ReaderOptions
) -> Iterator[RawRow]:
  import pyarrow.parquet

  if kind == ".parquet":
    content = pyarrow.parquet.ParquetFile(file)
    schema, count = content.schema_arrow, content.metadata.num_rows
    batches = lambda names: content.iter_batches(1000, columns=names)
  else:
    content = _open_arrow(file)
    schema, count = content.schema, content.num_rows
    batches = lambda names: content.select(names).to_batches(1000)
  _check_unique(where, schema.names, how)
  nothing, wanted = dict.fromkeys(schema.names), how.of(schema.names)
  if not wanted:
    yield from (RawRow(f"{where}, row {number}", nothing) for number in range(1, count + 1))
    return
  names, number = class_names(_hf_features(schema.metadata or {})), 0
  for batch in batches(wanted):
    for row, fault in _batch_rows(batch):
      number += 1
      yield RawRow(f"{where}, row {number}", with_class_names(nothing | row, names), fault)


def _open_arrow(file: Path | BinaryIO) -> Any:
  """A table of pyarrow, mapped into memory: as the datasets library writes it, a stream, or a file with an index."""
  import pyarrow.ipc

  source = (
    pyarrow.memory_map(str(file)) if isinstance(file, Path) else pyarrow.py_buffer(file.read())
  )
  try:
    return pyarrow.ipc.open_stream(source).read_all()
  except pyarrow.ArrowInvalid:
    if isinstance(file, Path):
      source.seek(0)
    return pyarrow.ipc.open_file(source).read_all()


def _batch_rows(batch: Any) -> Iterator[tuple[dict[str, Any], str]]:
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


def _hf_features(metadata: Mapping[bytes, bytes]) -> Mapping[str, Any]:
  """What the datasets library says of the columns in a table that it has written."""
  try:
    features = json.loads(metadata[b"huggingface"])["info"]["features"]
  except (KeyError, TypeError, ValueError, RecursionError):
    return {}
  return features if isinstance(features, dict) else {}


def class_names(features: Mapping[str, Any]) -> dict[str, list[ClassName]]:
  """The names of the classes of each column that holds their numbers (datasets.ClassLabel, or what a file says of one)."""
  found = {}
  for column, feature in features.items():
    about = feature if isinstance(feature, dict) else {"_type": type(feature).__name__}
    names = about.get("names", getattr(feature, "names", None))
    if (
      about.get("_type") == "ClassLabel"
      and isinstance(names, list)
      and all(isinstance(name, str) for name in names)
    ):
      found[column] = [ClassName(name, number) for number, name in enumerate(names)]
  return found


def with_class_names(
  columns: dict[str, Any], names: Mapping[str, list[ClassName]]
) -> dict[str, Any]:
  """The columns with a name for each class number; a number without one, such as -1 for no label, becomes no label."""
  for column in names.keys() & columns.keys():
    number = columns[column]
    if isinstance(number, int):
      columns = columns | {
        column: names[column][number] if 0 <= number < len(names[column]) else None
      }
  return columns
