"""Read rows from files and hub data sets, one at a time.

Text, .tsv and .json files are read into memory whole; so are tables inside zip archives.
"""

import contextlib
import fnmatch
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import re
import socket
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from jaxft.config import DataSection
from jaxft.data import readers
from jaxft.data.readers import READABLE_FORMATS, RawRow, ReaderOptions, file_format
from jaxft.errors import RequestError, first_line
from jaxft.utils.files import HUB_URL, exists

if TYPE_CHECKING:
  import datasets

# Names in the folder of a run or a model. The same folder may hold text to train on.
RUN_FOLDERS = (
  "checkpoints profile export adapter run.model tensorboard mlartifacts wandb trackio"
).split()
RUN_FILES = ("metrics.jsonl", "samples.jsonl", "merges.txt", "vocab.txt")
MODEL_FILES = (".safetensors", ".msgpack", ".bin", ".h5", "tokenizer.json", "tokenizer_config.json")
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
TOKENIZER_FILES |= {"vocab.json", "special_tokens_map.json"}
HUB_TIMEOUT = 5  # seconds to wait for the hub
# Notes of data_report.json.
SEEN_NOTE = "links to folders that are read anyway or contain this one, skipped"
RUN_NOTE = "files of a run or a model, skipped"
RUN_KIND = "folders of runs"
SAVED_STATE = "state.json"  # written by datasets.Dataset.save_to_disk
SAVED_SPLITS = "dataset_dict.json"  # written by datasets.DatasetDict.save_to_disk


def find_files(source: str, split: str, notes: Counter[str] | None = None) -> list[Path]:
  """Return the files of a path, a glob or a folder, sorted.

  Args:
    source: the path or glob.
    split: the split of a folder written by datasets.DatasetDict.save_to_disk.
    notes: counts the skipped files of folders.

  Raises:
    RequestError: no file matches, or a file has a format that jaxft cannot read.
  """
  path = Path(source)
  notes = Counter() if notes is None else notes
  if exists(path) and path.is_dir():
    return _folder_files(path, split, notes)
  if exists(path):
    files = [path] if path.is_file() else []
    problem = "not an ordinary file"
  else:
    files = _match_glob(source, notes)
    problem = "no such file or folder"
  if not files and (url := HUB_URL.fullmatch(source)) and url["datasets"]:
    raise RequestError(f"data source {source!r}: is a URL; give hub:{url['id']}")
  if not files:
    way_out = "give a file, a glob, a folder or hub:NAME"
    raise RequestError(f"data source {source!r}: {problem}; {way_out}")
  for file in files:
    if not file_format(file):
      raise RequestError(
        f"data source {str(file)!r}: cannot read {file.suffix or 'a file without a suffix'}; "
        f"supported: {', '.join(READABLE_FORMATS)}; text, JSON and CSV may be compressed "
        f"({', '.join(readers.COMPRESSION_SUFFIXES)})"
      )
  return files


def _folder_files(folder: Path, split: str, notes: Counter[str]) -> list[Path]:
  """Return the files of a folder to read.

  All files of the default formats are read; without any, all files of one other format.
  """
  if _has_list(folder / SAVED_SPLITS, "splits"):
    if not (folder / split).is_dir():
      splits = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "none"
      raise RequestError(
        f"data source {str(folder)!r}: has no split {split!r} (splits: {splits}); "
        f"name one as {folder}/SPLIT"
      )
    folder = folder / split
  if _has_list(folder / SAVED_STATE, "_data_files"):
    return _saved_files(folder)
  source = f"data source {str(folder)!r}"
  files = _list_files(folder, notes)
  suffixes = {file: suffix for file in files if (suffix := file_format(file))}
  selected = readers.select_files(
    source, suffixes, f"name the files to read, for example {folder}/*.SUFFIX"
  )
  if not selected:
    raise RequestError(
      f"{source}: this folder has no {', '.join(READABLE_FORMATS)} file; "
      "give a file, a glob, a folder or hub:NAME"
    )
  if left := Counter(file_format(file) for file in {*files} - {*selected}):
    notes["files in folders with an unsupported format, skipped"] += left.pop("", 0)
    named_only = "files in folders that are read only if named (.json, .md, .zip, ...), skipped"
    notes[named_only] += left.total()
  return selected


def _has_list(file: Path, key: str) -> bool:
  """Return whether a JSON object has a list at `key`.

  The check matters because other tools use the same file names.
  """
  try:
    content = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):
    return False
  return isinstance(content, dict) and isinstance(content.get(key), list)


def _saved_files(folder: Path) -> list[Path]:
  """Return the files that datasets.Dataset.save_to_disk wrote, in order."""
  source = f"data source {str(folder)!r}"
  try:
    state = json.loads((folder / SAVED_STATE).read_text(encoding="utf-8"))
    names = [file["filename"] for file in state["_data_files"]]
    are_names = all(isinstance(name, str) and Path(name).name == name for name in names)
    if state.get("_indices_data_files") or not are_names:
      raise ValueError("not written by datasets 2.0 or newer")
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise RequestError(f"{source}: {SAVED_STATE}: {first_line(error)}") from error
  for name in names:
    if not (folder / name).is_file():
      raise RequestError(f"{source}: {SAVED_STATE} names {name}, which does not exist")
  return [folder / name for name in names]


def _list_files(folder: Path, notes: Counter[str]) -> list[Path]:
  """Return the files below a folder, except hidden, run and model files.

  Links to folders are followed, and each folder is read once. If the folder itself is a run's or a
  model's, any text next to the run's files is read.

  Raises:
    RequestError: permission to read a folder is missing.
  """
  files = []
  with _as_request_error(str(folder)):
    for path, folders, names in _walk(folder, notes):
      folders[:] = sorted(name for name in folders if not name.startswith("."))
      kind = _non_text_kind(path)
      skipped = {name: sub for name in folders if (sub := _non_text_kind(path / name))}
      if kind == RUN_KIND:
        skipped |= {name: RUN_KIND for name in folders if name in RUN_FOLDERS}
      notes.update(f"{sub}, skipped" for sub in skipped.values())
      folders[:] = [name for name in folders if name not in skipped]
      run_files = _run_files(kind, names)
      notes[RUN_NOTE] += len(run_files)
      files += [path / name for name in names if not name.startswith(".") and name not in run_files]
    return sorted(file for file in files if _is_accessible(file, notes) and file.is_file())


@contextlib.contextmanager
def _as_request_error(source: str) -> Generator[None]:
  """Turn an OSError about a folder into a RequestError of one line."""
  try:
    yield
  except OSError as error:
    raise RequestError(f"data source {source!r}: {error.filename}: {error.strerror}") from error


def _walk(folder: Path, notes: Counter[str]) -> Iterator[tuple[Path, list[str], list[str]]]:
  """Walk like os.walk, but follow links and enter each folder once.

  A folder that cannot be listed raises OSError.
  """

  def raise_error(error: OSError) -> None:
    raise error

  # The parents count as seen: a link to one of them would lead back here.
  seen = {_inode(parent) for parent in folder.resolve().parents}
  for path, folders, names in os.walk(folder, followlinks=True, onerror=raise_error):
    if (inode := _inode(Path(path))) in seen:
      notes[SEEN_NOTE] += 1
      folders.clear()
      continue
    seen.add(inode)
    yield Path(path), folders, names


def _is_accessible(file: Path, notes: Counter[str]) -> bool:
  """Return whether a path exists.

  Raises PermissionError if that cannot be determined.
  """
  try:
    file.stat()
  except PermissionError:
    raise
  except OSError:  # a broken link, or a link to itself
    notes["broken links, skipped"] += 1
    return False
  return True


def _match_glob(pattern: str, notes: Counter[str]) -> list[Path]:
  """Return the files that match a glob.

  Files of runs and models are skipped below the fixed part of the pattern.
  """
  parts = Path(pattern).parts
  base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts[:-1]))
  inode = functools.cache(_inode)

  @functools.cache
  def is_skipped(folder: Path) -> bool:
    if folder == base:
      return False
    in_run = _non_text_kind(folder.parent) == RUN_KIND and folder.name in RUN_FOLDERS
    return in_run or bool(_non_text_kind(folder)) or is_skipped(folder.parent)

  start = Path(parts[0]) if Path(pattern).is_absolute() else Path()
  with _as_request_error(pattern):
    matches = sorted(_expand_glob(start, parts[start.is_absolute() :], notes))
    matches = [file for file in matches if _is_accessible(file, notes) and file.is_file()]
  files = []
  seen = set()
  for file in matches:
    if (identity := (inode(file.parent), file.name)) in seen:
      notes[SEEN_NOTE] += 1
      continue
    seen.add(identity)
    # Listing a folder is slow, so do it only for the few names that runs and models use.
    may_be_run_file = glob.has_magic(parts[-1]) and file.name in RUN_FILES
    if is_skipped(file.parent) or may_be_run_file and _is_run_file(file):
      notes[RUN_NOTE] += 1
    else:
      files.append(file)
  return files


def _expand_glob(folder: Path, parts: tuple[str, ...], notes: Counter[str]) -> Iterator[Path]:
  """Yield the matches of a pattern in a folder, like glob.glob(recursive=True).

  Unlike glob, ** enters each folder once, and an unreadable folder raises OSError instead of being
  skipped. Broken links are yielded too.
  """
  part, rest = parts[0], parts[1:]
  if part == "**":
    for path, folders, names in _walk(folder, notes):
      folders[:] = sorted(name for name in folders if not name.startswith("."))
      if rest:
        yield from _expand_glob(path, rest, notes)
      else:
        yield from (path / name for name in names if not name.startswith("."))
  elif not glob.has_magic(part):
    path = folder / part
    if rest and path.is_dir():
      yield from _expand_glob(path, rest, notes)
    elif not rest and os.path.lexists(path):
      yield path
  else:
    for name in fnmatch.filter(sorted(os.listdir(folder)), part):
      if name.startswith(".") and not part.startswith("."):
        continue
      if not rest:
        yield folder / name
      elif (folder / name).is_dir():
        yield from _expand_glob(folder / name, rest, notes)


def _is_run_file(file: Path) -> bool:
  names = [path.name for path in file.parent.iterdir()]
  return file.name in _run_files(_non_text_kind(file.parent), names)


def _run_files(kind: str, names: list[str]) -> set[str]:
  """Return the names that a run or a model wrote, and that are not text."""
  return {name for name in names if name in RUN_FILES and (kind or TOKENIZER_FILES & {*names})}


def _inode(folder: Path) -> tuple[int, int]:
  stat = folder.stat()
  return stat.st_dev, stat.st_ino


def _non_text_kind(folder: Path) -> str:
  """Return the kind of a folder that holds no text to train on.

  "" for any other folder.
  """
  readable = os.access(folder, os.R_OK | os.X_OK)
  names = {path.name for path in folder.iterdir()} if readable else set()
  if "run.lock" in names or {"config.json", "metrics.jsonl"} <= names:
    return RUN_KIND
  has_weights = any(name.endswith(MODEL_FILES) for name in names)
  if names & {"parity.json", "adapter_config.json"} or "config.json" in names and has_weights:
    return "folders of models"
  return "Python environments" if "pyvenv.cfg" in names else ""


def parse_weight(source: str) -> tuple[str, float]:
  """Split SOURCE@WEIGHT, such as text.txt@0.5, into the source and its weight.

  The weight is how often an epoch reads the source, 1 by default.

  Raises:
    RequestError: the weight is not above 0 and at most 100.
  """
  name, at, text = source.rpartition("@")
  # The name of a file or a folder may contain an @ too.
  if not at or "/" in text or file_format(Path(source)) or exists(Path(source)):
    return source, 1.0
  try:
    weight = float(text)
  except ValueError:
    weight = math.nan
  if not 0 < weight <= 100:
    wanted = "a number above 0 and at most 100"
    raise RequestError(f"data source {source!r}: the weight after @ must be {wanted}")
  return name, weight


def validate_sources(data: DataSection) -> list[str]:
  """Return one line for each local source in `config.data` that cannot be found."""
  lines = []
  for key in ("train", "validation", "unrelated"):
    for source in getattr(data, key):
      try:
        name = parse_weight(source)[0] if key == "train" else source
        if not name.startswith("hub:"):
          find_files(name, "train" if key == "train" else "validation")
      except RequestError as error:
        lines.append(f"config.data.{key}: {error}")
  return lines


def fingerprint(sources: tuple[str, ...], split: str) -> list[str]:
  """Return one line for each file or hub data set; it changes with the content."""
  lines = []
  for source in sources:
    if source.startswith("hub:"):
      lines.append("hub " + _open_hub(source, split)._fingerprint)
      continue
    for file in find_files(source, split):
      with _errors_named_after(file), file.open("rb") as stream:
        lines.append(f"{file_format(file)} {hashlib.file_digest(stream, 'sha256').hexdigest()}")
  return lines


def read_rows(
  sources: tuple[str, ...],
  split: str,
  options: ReaderOptions | Callable[[str], ReaderOptions],
  notes: Counter[str],
) -> Iterator[RawRow]:
  """Yield all rows of the sources, in order.

  A row that does not parse has an error.

  Args:
    sources: paths, globs, folders, and hub:NAME.
    split: the split to read if the name of a hub data set does not include one.
    options: one for all files, or a function that is called with the name of each file or hub data
      set before it is opened.
    notes: counts what data_report.json notes: files with a byte order mark, with CRLF.

  Raises:
    RequestError: a file as a whole cannot be read.
  """
  options_for = options if callable(options) else lambda name: options
  for source in sources:
    if source.startswith("hub:"):
      hub_options = options_for(source)
      with _errors_named_after(source):
        yield from _read_hub(source, split, hub_options)
      continue
    files = find_files(source, split, notes)
    # If folders name the labels, a file outside of them has no label.
    in_folders = any(file.parent != Path(source) for file in files)
    for file in files:
      file_options = options_for(str(file))
      unlabelled = in_folders and file_options.label_column and file.parent == Path(source)
      if unlabelled and file_format(file) in readers.TEXT_FORMATS:
        yield RawRow(str(file), {}, "not in one of the folders that name the labels")
        continue
      with _errors_named_after(file):
        yield from readers.read_rows(file, file_options, notes)


def _read_hub(source: str, split: str, options: ReaderOptions) -> Iterator[RawRow]:
  table: Any = _open_hub(source, split)  # Any: its methods lack return types
  blank = dict.fromkeys(table.column_names)
  names = readers.class_names(table.features or {})
  selected = options.select(blank)
  rows = table.select_columns(selected) if selected else [{}] * len(table)
  for number, columns in enumerate(rows, 1):
    yield RawRow(f"{source}, row {number}", readers.with_class_names(blank | columns, names))


@contextlib.contextmanager
def _errors_named_after(source: Path | str) -> Generator[None]:
  """Turn any read error into a RequestError that names the source."""
  try:
    yield
  except readers.READ_ERRORS as error:
    raise RequestError(f"{source}: {first_line(error)}") from error


def _open_hub(source: str, split: str) -> "datasets.Dataset":
  import datasets  # takes a second to import, so only runs that read from the hub do

  name, _, own_split = source.removeprefix("hub:").partition(":")
  if not name:
    way_out = "give hub:NAME, hub:NAME:SPLIT or hub:NAME/CONFIGURATION:SPLIT"
    raise RequestError(f"data source {source!r}: has no name; {way_out}")
  name, configuration = _split_configuration(name)
  try:
    with _offline_if_unreachable(name):
      return _load_dataset(datasets, name, configuration, own_split or split)
  # Hub, network and format errors share no base class; all mean that this source cannot be read.
  except Exception as error:
    problem = (
      f"{first_line(error)}; check the name and the split, or download the files and name them"
    )
    if match := re.search(r"vailable(?: configs)?: \[(.*?)\]", str(error)):
      names = match[1].replace("'", "")
      problem = f"name one of its configurations as hub:{name}/CONFIGURATION[:SPLIT]: {names}"
    raise RequestError(f"data source {source!r}: {problem}") from error


def has_split(source: str, split: str) -> bool:
  """Return whether a hub data set has this split.

  False also if the hub cannot be asked; reading the data set then raises the error.
  """
  import datasets

  name, configuration = _split_configuration(source.removeprefix("hub:"))
  try:
    with _offline_if_unreachable(name):
      return split in datasets.get_dataset_split_names(name, configuration)
  except Exception:  # hub, network and format errors share no base class
    return False


def _split_configuration(name: str) -> tuple[str, str | None]:
  """Split NAME/CONFIGURATION of a data set. A hub id itself has at most one slash."""
  head, _, tail = name.rpartition("/")
  if exists(Path(name)) or not head:
    return name, None
  return (head, tail) if exists(Path(head)) or head.count("/") == 1 else (name, None)


def _load_dataset(
  datasets: ModuleType, name: str, configuration: str | None, split: str
) -> "datasets.Dataset":
  try:
    return datasets.load_dataset(name, configuration, split=split)
  except datasets.exceptions.DatasetNotFoundError:
    head, _, tail = name.rpartition("/")  # an id without an owner: glue/sst2
    if configuration or not head:
      raise
    with contextlib.suppress(datasets.exceptions.DatasetNotFoundError):
      return datasets.load_dataset(head, tail, split=split)
    raise


@contextlib.contextmanager
def _offline_if_unreachable(name: str) -> Generator[None]:
  """Use only the cache if the hub does not answer.

  Otherwise the libraries would retry for a minute.
  """
  import datasets.config
  from huggingface_hub import constants

  host = urllib.parse.urlsplit(constants.ENDPOINT)
  local = constants.HF_HUB_OFFLINE or exists(Path(name))
  if local or urllib.request.getproxies() or _is_reachable(host):
    yield
    return
  saved = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
  constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
  try:
    yield
  except OSError as error:  # not in the cache
    raise OSError(
      f"{host.hostname} does not answer, and the data set is not in the cache"
    ) from error
  finally:
    constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = saved


@functools.cache  # once per process: a data set is opened several times
def _is_reachable(host: urllib.parse.SplitResult) -> bool:
  """Return whether a server accepts connections.

  This runs in a thread with a timeout, because a DNS lookup may take long.
  """

  def connect() -> bool:
    port = host.port or (80 if host.scheme == "http" else 443)
    try:
      socket.create_connection((host.hostname, port), HUB_TIMEOUT).close()
    except OSError:
      return False
    return True

  worker = ThreadPoolExecutor(1)
  try:
    return worker.submit(connect).result(HUB_TIMEOUT)
  except TimeoutError:
    return False
  finally:
    worker.shutdown(wait=False)
