"""Read the rows of one file, in the format of its suffix."""

import codecs
import contextlib
import csv
import io
import itertools
import json
import lzma
import zipfile
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeVar

from jaxft.config import DataSection
from jaxft.errors import RequestError, first_line
from jaxft.utils.files import is_encodable, reject_lfs_pointer
from jaxft.utils.types import Json

if TYPE_CHECKING:
  import pyarrow
  from _typeshed import WriteableBuffer

File = TypeVar("File")  # a path in a folder, or an entry of an archive
CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}  # pyarrow's names
TEXT_FORMATS = (".txt", ".md")
COMPRESSION_SUFFIXES = (*CODECS, ".xz")  # after any of STREAMED_FORMATS
STREAMED_FORMATS = (".txt", ".jsonl", ".csv", ".md", ".ndjson", ".json", ".tsv")
READABLE_FORMATS = (*STREAMED_FORMATS, ".parquet", ".arrow", ".zip")
# The formats read from a folder. Files of other formats often accompany data (README.md,
# dataset_infos.json, a zip of the same files). They are read if they are named, or if the folder
# holds only them.
DEFAULT_FORMATS = (".txt", ".jsonl", ".csv", ".parquet")
BOM = b"\xef\xbb\xbf"
# pyarrow, zlib and zstd raise OSError, ValueError or OverflowError. An archive with a password
# raises RuntimeError.
READ_ERRORS = (OSError, ValueError, OverflowError, EOFError, RuntimeError)
READ_ERRORS += (lzma.LZMAError, zipfile.BadZipFile)


class RawRow(NamedTuple):
  """A row of a source, or the reason why it cannot be read."""

  location: str  # file and row number
  columns: Json  # all names; values only of requested columns
  error: str = ""


class ReaderOptions(NamedTuple):
  """How files are read: settings of `config.data`."""

  columns: tuple[str, ...] | None  # requested columns; no other is decoded; None: all
  text_column: str = "text"  # column for the content of a plain-text file
  separator: str = ""
  encoding: str = "utf-8"
  label_column: str = ""  # column for the label of a plain-text file; empty: no labels
  label: str = ""  # that label: the name of the file's folder

  @classmethod
  def from_config(
    cls, data: DataSection, columns: tuple[str, ...] | None, label_column: str
  ) -> "ReaderOptions":
    """Return the options for `config.data`."""
    return cls(
      columns=columns,
      text_column=data.text_column,
      separator=data.separator,
      encoding=data.encoding,
      label_column=label_column,
    )

  def select(self, names: Iterable[str]) -> list[str]:
    """Return the requested columns among `names`."""
    return [name for name in dict.fromkeys(names) if self.columns is None or name in self.columns]


class ClassName(str):
  """The name of a class, with its number in the data set."""

  number: int

  def __new__(cls, name: str, number: int) -> "ClassName":
    """Return the name as a string that carries its number."""
    self = super().__new__(cls, name)
    self.number = number
    return self


def file_format(file: PurePath) -> str:
  """Return a file's format as a suffix, without compression.

  "" if jaxft cannot read the file.
  """
  last = file.suffix.lower()
  if last in COMPRESSION_SUFFIXES:
    suffix = PurePath(file.stem).suffix.lower()
    return suffix if suffix in STREAMED_FORMATS else ""
  return last if last in READABLE_FORMATS else ""


def read_rows(file: Path, options: ReaderOptions, notes: Counter[str]) -> Iterator[RawRow]:
  """Yield all rows of a file. A row that does not parse has an error.

  Args:
    file: a file in one of READABLE_FORMATS, perhaps compressed.
    options: how to read it.
    notes: counts what data_report.json notes, such as files with a byte order mark.

  Raises:
    READ_ERRORS: one of these, if the file as a whole cannot be read.
  """
  reject_lfs_pointer(file)
  options = options._replace(label=file.absolute().parent.name)
  suffix = file_format(file)
  if suffix == ".zip":
    yield from _read_archive(file, options, notes)
  elif suffix in STREAMED_FORMATS:
    with _open_decompressed(file) as stream:
      yield from _read_stream(str(file), suffix, stream, options, notes)
  else:
    # pyarrow cannot open a file whose name is not UTF-8.
    with contextlib.nullcontext(file) if is_encodable(str(file)) else file.open("rb") as source:
      yield from _read_table(str(file), suffix, source, options)


def _read_archive(file: Path, options: ReaderOptions, notes: Counter[str]) -> Iterator[RawRow]:
  """Yield the rows of the files in a zip that would be read from a folder."""
  with zipfile.ZipFile(file) as archive:
    suffixes = {}
    for entry in sorted(archive.infolist(), key=lambda entry: entry.filename):
      path = PurePath(entry.filename)
      hidden = any(part == "__MACOSX" or part.startswith(".") for part in path.parts)
      if hidden or entry.is_dir() or not path.parts:
        continue
      suffix = file_format(path)
      nested = path.suffix.lower() in COMPRESSION_SUFFIXES or suffix == ".zip"
      suffixes[entry] = "" if nested else suffix
    readable = {entry: suffix for entry, suffix in suffixes.items() if suffix}
    entries = select_files(
      f"data source {str(file)!r}", readable, "unpack it and name the files to read"
    )
    notes["files in archives with an unsupported format, skipped"] += len(suffixes) - len(readable)
    unselected = "files in archives that are read only without other formats (.md, ...), skipped"
    notes[unselected] += len(readable) - len(entries)
    for entry in entries:
      location = f"{file}: {entry.filename}"
      suffix = suffixes[entry]
      options = options._replace(label=PurePath(entry.filename).parent.name)
      with archive.open(entry) as raw:
        if suffix in STREAMED_FORMATS:
          assert isinstance(raw, zipfile.ZipExtFile)
          yield from _read_stream(location, suffix, io.BufferedReader(raw), options, notes)
        else:
          yield from _read_table(location, suffix, io.BytesIO(raw.read()), options)


def select_files(location: str, suffixes: dict[File, str], way_out: str) -> list[File]:
  """Select the files of a folder or an archive to read.

  All files of DEFAULT_FORMATS are read; without any, all files of one other format.

  Args:
    location: the source, for the error.
    suffixes: the format of each file.
    way_out: how the user can choose files, for the error.

  Raises:
    RequestError: no file has a default format, and the files have several formats.
  """
  if default := [file for file, suffix in suffixes.items() if suffix in DEFAULT_FORMATS]:
    return default
  if len(distinct := sorted(set(suffixes.values()))) > 1:
    raise RequestError(
      f"{location}: has files of several formats ({', '.join(distinct)}); {way_out}"
    )
  return list(suffixes)


@contextlib.contextmanager
def _open_decompressed(file: Path) -> Generator[io.BufferedReader]:
  """Open a file, decompressed.

  Python opens the file, not pyarrow: its name may not be UTF-8, and its suffix may be in capitals.
  """
  suffix = file.suffix.lower()
  with file.open("rb") as raw:
    if suffix == ".xz":
      with lzma.open(raw) as content:
        yield io.BufferedReader(content)
    elif suffix in CODECS:
      import pyarrow

      content = pyarrow.input_stream(raw, compression=CODECS[suffix])
      with content, io.BufferedReader(content) as stream:
        yield stream
    else:
      yield raw


class _Utf8Stream(io.RawIOBase):
  """A stream that converts another encoding to UTF-8."""

  def __init__(self, stream: BinaryIO, encoding: str):
    self._stream = stream
    self._decoder = codecs.getincrementaldecoder(encoding)()
    self._rest = b""

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: "WriteableBuffer") -> int:
    while not self._rest:
      content = self._stream.read(2**16)
      text = self._decoder.decode(content, final=not content)
      self._rest = text.encode("utf-8", "surrogatepass")
      if not content:
        break
    view = memoryview(buffer)
    size = min(len(view), len(self._rest))
    view[:size], self._rest = self._rest[:size], self._rest[size:]
    return size


# ---- Text, JSON, CSV -----------------------------------------------------------------------------


def _read_stream(
  location: str, suffix: str, stream: io.BufferedReader, options: ReaderOptions, notes: Counter[str]
) -> Iterator[RawRow]:
  if options.encoding.lower().replace("_", "-") not in ("utf-8", "utf8"):
    stream = io.BufferedReader(_Utf8Stream(stream, options.encoding))
  elif stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
    raise RequestError(
      f"{location}: looks like UTF-16, which Excel calls Unicode; set config.data.encoding=utf-16"
    )
  if stream.peek(3)[:3] == BOM:
    notes["files with a byte order mark"] += 1
    stream.read(3)
  if suffix in TEXT_FORMATS:
    yield from _read_text(location, stream, options, notes)
  elif suffix == ".csv":
    yield from _read_csv(location, stream, options, notes, ",")
  elif suffix == ".tsv":
    content = stream.read()
    quoted = _has_quoted_cells(content)
    notes[".tsv files with quotes that are ordinary characters"] += not quoted
    stream = io.BufferedReader(io.BytesIO(content))
    yield from _read_csv(location, stream, options, notes, "\t", quoted)
  elif suffix == ".json":
    yield from _read_json(location, stream, options, notes)
  else:
    yield from _read_json_lines(location, stream, notes)


def _read_text(
  location: str, stream: io.BufferedReader, options: ReaderOptions, notes: Counter[str]
) -> Iterator[RawRow]:
  """Yield the file as one row, or one row for each part between separators."""
  content = stream.read()
  if not content and not options.separator:
    yield RawRow(location, {}, "the file is empty")
    return
  separator = options.separator
  notes[".txt files with \\r\\n, which is kept"] += b"\r\n" in content
  documents = content.split(separator.encode()) if separator else [content]
  for number, document in enumerate(documents, 1):
    row_location = f"{location}, part {number}" if separator else location
    if separator and not document.strip():  # before the first separator or after the last
      notes["blank parts between separators, skipped"] += 1
      continue
    try:
      label = {options.label_column: options.label} if options.label_column else {}
      yield RawRow(row_location, {options.text_column: document.decode()} | label)
    except UnicodeDecodeError as error:
      yield RawRow(row_location, {}, _utf8_error(error))


def _utf8_error(error: UnicodeDecodeError) -> str:
  position = f"{error.reason} at byte {error.start}"
  return f"not UTF-8 ({position}; set config.data.encoding, for example to cp1252)"


def _read_json(
  location: str, stream: io.BufferedReader, options: ReaderOptions, notes: Counter[str]
) -> Iterator[RawRow]:
  """Yield the objects of an array, or one object per line."""
  text = stream.read()
  try:
    content = json.loads(text)
  except (ValueError, RecursionError):  # one object per line is not one JSON value
    yield from _read_json_lines(location, io.BytesIO(text), notes)
    return
  if isinstance(content, dict):
    is_row = options.columns is None or content.keys() & {*options.columns}
    if not is_row and any(isinstance(value, list) for value in content.values()):
      keys = ", ".join(map(repr, content))[:200]
      raise RequestError(
        f"{location}: holds one JSON object with {keys}, not a list of rows; "
        "save the list inside it as a separate file"
      )
  for number, row in enumerate(content if isinstance(content, list) else [content], 1):
    yield _json_row(f"{location}, row {number}", row)


def _read_json_lines(
  location: str, stream: Iterable[bytes], notes: Counter[str]
) -> Iterator[RawRow]:
  for number, line in enumerate(stream, 1):
    row_location = f"{location}, row {number}"
    if not line.strip():
      notes["blank lines, skipped"] += 1
      continue
    try:
      row = json.loads(line.decode())
    except UnicodeDecodeError as error:
      yield RawRow(row_location, {}, _utf8_error(error))
    except (ValueError, RecursionError) as error:
      yield RawRow(row_location, {}, f"not JSON ({first_line(error)})")
    else:
      yield _json_row(row_location, row)


def _json_row(location: str, row: object) -> RawRow:
  is_object = isinstance(row, dict)
  return RawRow(location, row) if is_object else RawRow(location, {}, "not a JSON object")


def _has_quoted_cells(content: bytes) -> bool:
  """Return whether quotes in a .tsv file enclose cells.

  In csv, two stray quotes would merge all rows between them. So quotes are ordinary characters if
  the file is not valid csv, or if a quoted cell spans lines although every line has the same number
  of tabs.
  """
  csv.field_size_limit(2**31 - 1)
  text = content.decode(errors="replace")
  rows = csv.reader(io.StringIO(text, newline=""), "excel-tab", strict=True)
  try:
    spans_lines = any("\n" in cell for row in rows for cell in row)
  except csv.Error:
    return False
  tabs = {line.count("\t") for line in text.split("\n") if line.strip()} if spans_lines else ()
  return len(tabs) != 1 or tabs == {0}


def _read_csv(
  location: str,
  stream: io.BufferedReader,
  options: ReaderOptions,
  notes: Counter[str],
  delimiter: str,
  quoted: bool = True,
) -> Iterator[RawRow]:
  csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is shorter than a chapter
  delimiter = _detect_delimiter(stream.peek().splitlines()[:1], options, notes, delimiter)
  # Bytes that are not UTF-8 become surrogates; `is_encodable` then rejects only the rows with them.
  with io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="") as text:
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    lines = csv.reader(text, delimiter=delimiter, quoting=quoting, strict=True)
    names = next(lines, [])
    _check_unique(location, names, options)
    number = 0
    while True:
      number += 1
      row_location = f"{location}, row {number}"
      try:
        cells = next(lines)
      except StopIteration:
        return
      except csv.Error as error:  # a quote that never closes, or closes inside a cell
        yield RawRow(row_location, {}, f"not CSV ({error}, at line {lines.line_num})")
        continue
      if not cells:  # an empty line, which csv.writer never writes for a row
        number -= 1
      elif len(cells) > len(names):
        counts = f"{len(cells)} and {len(names)}; quote cells that contain {delimiter!r}"
        yield RawRow(row_location, {}, f"more cells than column names ({counts})")
      else:
        yield RawRow(row_location, dict(zip(names, cells)))


def _detect_delimiter(
  lines: list[bytes], options: ReaderOptions, notes: Counter[str], default: str
) -> str:
  """Return the delimiter of a csv file.

  It is the default unless only another one finds a requested column.
  """
  header = b"".join(lines).decode(errors="replace")
  for delimiter in (default, ";", "\t"):
    try:
      names = next(csv.reader([header], delimiter=delimiter), [])
    except csv.Error:
      continue
    if len(names) > 1 if options.columns is None else set(names) & set(options.columns):
      notes[f"csv files with the delimiter {delimiter!r}"] += delimiter != default
      return delimiter
  return default


def _check_unique(location: str, names: list[str], options: ReaderOptions) -> None:
  """Raise RequestError if a requested column occurs twice.

  Other columns may, often one without a name.
  """
  if duplicates := [name for name in options.columns or () if names.count(name) > 1]:
    raise RequestError(f"{location}: has two columns named {duplicates[0]!r}; rename one")


# ---- Tables of pyarrow ---------------------------------------------------------------------------


def _read_table(
  location: str, suffix: str, file: Path | BinaryIO, options: ReaderOptions
) -> Iterator[RawRow]:
  import pyarrow.parquet

  if suffix == ".parquet":
    table = pyarrow.parquet.ParquetFile(file)
    schema, count = table.schema_arrow, table.metadata.num_rows
    batches = lambda names: table.iter_batches(1000, columns=names)
  else:
    table = _open_arrow(file)
    schema, count = table.schema, table.num_rows
    batches = lambda names: table.select(names).to_batches(1000)
  _check_unique(location, schema.names, options)
  blank = dict.fromkeys(schema.names)
  columns = options.select(schema.names)
  if not columns:
    yield from (RawRow(f"{location}, row {number}", blank) for number in range(1, count + 1))
    return
  names = class_names(_hf_features(schema.metadata or {}))
  rows = itertools.chain.from_iterable(map(_batch_rows, batches(columns)))
  for number, (row, error) in enumerate(rows, 1):
    yield RawRow(f"{location}, row {number}", with_class_names(blank | row, names), error)


def _open_arrow(file: Path | BinaryIO) -> "pyarrow.Table":
  """Return a memory-mapped pyarrow table.

  Arrow files are a stream, as the datasets library writes them, or an indexed file.
  """
  import pyarrow.ipc

  is_path = isinstance(file, Path)
  source = pyarrow.memory_map(str(file)) if is_path else pyarrow.BufferReader(file.read())
  try:
    return pyarrow.ipc.open_stream(source).read_all()
  except pyarrow.ArrowInvalid:
    source.seek(0)
    return pyarrow.ipc.open_file(source).read_all()


def _batch_rows(batch: "pyarrow.RecordBatch") -> Iterator[tuple[Json, str]]:
  """Yield each row of a pyarrow batch with its error, or with an empty one.

  A row has an error if Python cannot represent a value.

  If the conversion of the whole batch fails (bytes that are not UTF-8, a date out of range), rows
  are converted one by one.
  """
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
      yield {}, f"cannot read a value ({first_line(error)})"


def _hf_features(metadata: Mapping[bytes, bytes]) -> Json:
  """Return the features that the datasets library has stored in a table's metadata."""
  try:
    features = json.loads(metadata[b"huggingface"])["info"]["features"]
  except (KeyError, TypeError, ValueError, RecursionError):
    return {}
  return features if isinstance(features, dict) else {}


def class_names(features: Mapping[str, object]) -> dict[str, list[ClassName]]:
  """Return the class names of each column of class numbers.

  Args:
    features: the feature of each column, a datasets.ClassLabel or its JSON.
  """
  by_column = {}
  for column, feature in features.items():
    about = feature if isinstance(feature, dict) else {"_type": type(feature).__name__}
    names = about.get("names", getattr(feature, "names", None))
    is_label = about.get("_type") == "ClassLabel" and isinstance(names, list)
    if is_label and all(isinstance(name, str) for name in names):
      by_column[column] = [ClassName(name, number) for number, name in enumerate(names)]
  return by_column


def with_class_names(columns: Json, class_names: Mapping[str, list[ClassName]]) -> Json:
  """Replace class numbers by class names.

  A number without a name, such as -1, becomes None.
  """
  for column in class_names.keys() & columns.keys():
    number = columns[column]
    names = class_names[column]
    if isinstance(number, int):
      columns = columns | {column: names[number] if 0 <= number < len(names) else None}
  return columns
