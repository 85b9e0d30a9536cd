"""Rows out of files and hub data sets, one at a time: nothing is in memory whole, but for each .txt and .json file."""

import collections
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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxft.data import readers
from jaxft.data.readers import READABLE_FORMATS, RawRow, ReaderOptions, file_format
from jaxft.errors import RequestError, first_line
from jaxft.utils.files import HUB_URL, exists

# Of a run or a model, in whose folder text may lie too.
RUN_FOLDERS = (
  "checkpoints",
  "profile",
  "export",
  "adapter",
  "run.model",
  "tensorboard",
  "mlartifacts",
  "wandb",
  "trackio",
)
RUN_FILES = ("metrics.jsonl", "samples.jsonl", "merges.txt", "vocab.txt")
MODEL_FILES = (".safetensors", ".msgpack", ".bin", ".h5", "tokenizer.json", "tokenizer_config.json")
TOKENIZER_FILES = {
  "tokenizer.json",
  "tokenizer_config.json",
  "vocab.json",
  "special_tokens_map.json",
}
HUB_TIMEOUT = 5  # seconds for the hub to answer
SEEN_NOTE = "links to folders that are read anyway, or that hold this one, left out"
# What datasets.Dataset.save_to_disk writes, and DatasetDict.save_to_disk.
SAVED_STATE, SAVED_SPLITS = "state.json", "dataset_dict.json"


def find_files(source: str, split: str, notes: collections.Counter | None = None) -> list[Path]:
  """The files that a path, a glob or a folder stands for, sorted; raises RequestError when there are none.

  Args:
    split: of a folder that datasets.DatasetDict.save_to_disk has written.
    notes: counts what is left out of folders.
  """
  path = Path(source)
  if exists(path) and path.is_dir():
    return _folder_files(path, split, collections.Counter() if notes is None else notes)
  if exists(path):
    files, what = [path] if path.is_file() else [], "not an ordinary file"
  else:
    files, what = (
      _match_glob(source, collections.Counter() if notes is None else notes),
      "no such file or folder",
    )
  if not files and (address := HUB_URL.fullmatch(source)) and address["datasets"]:
    raise RequestError(f"data source {source!r}: an address; give hub:{address['id']}")
  if not files:
    raise RequestError(f"data source {source!r}: {what}; give a file, a glob, a folder or hub:NAME")
  for file in files:
    if not file_format(file):
      raise RequestError(
        f"data source {str(file)!r}: cannot read {file.suffix or 'a file without a suffix'}; it must be one of "
        f"{', '.join(READABLE_FORMATS)}, and may be compressed ({', '.join(readers.COMPRESSION_SUFFIXES)}) if it is text, JSON or CSV"
      )
  return files


def _folder_files(folder: Path, split: str, notes: collections.Counter) -> list[Path]:
  """The files of a folder that are read: those of the usual kinds, or all of one kind where there are none of them."""
  if _has_list(folder / SAVED_SPLITS, "splits"):
    if not (folder / split).is_dir():
      there = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "none"
      raise RequestError(
        f"data source {str(folder)!r}: no split {split!r} in it ({there}); name one as {folder}/SPLIT"
      )
    folder = folder / split
  if _has_list(folder / SAVED_STATE, "_data_files"):
    return _saved_files(folder)
  files = _list_files(folder, notes)
  kinds = {file: of for file in files if (of := file_format(file))}
  found = readers.select_files(
    f"data source {str(folder)!r}", kinds, f"name those, such as {folder}/*.SUFFIX,"
  )
  if not found:
    raise RequestError(
      f"data source {str(folder)!r}: no {', '.join(READABLE_FORMATS)} file in this folder; give a file, a glob, a folder or hub:NAME"
    )
  read = set(found)
  if left := collections.Counter(file_format(file) for file in files if file not in read):
    notes["files in folders that are of no kind that is read"] += left.pop("", 0)
    notes["files in folders that are read only if they are named (.json, .md, .zip, ...)"] += (
      left.total()
    )
  return found


def _has_list(file: Path, key: str) -> bool:
  """Whether this is a JSON object with a list at `key`: other tools write files of the same names."""
  try:
    found = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):
    return False
  return isinstance(found, dict) and isinstance(found.get(key), list)


def _saved_files(folder: Path) -> list[Path]:
  """The files of a folder that datasets.Dataset.save_to_disk has written, in their order."""
  try:
    state = json.loads((folder / SAVED_STATE).read_text(encoding="utf-8"))
    names = [file["filename"] for file in state["_data_files"]]
    if state.get("_indices_data_files") or not all(
      isinstance(name, str) and Path(name).name == name for name in names
    ):
      raise ValueError("not written by datasets 2.0 or newer")
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise RequestError(
      f"data source {str(folder)!r}: {SAVED_STATE}: {first_line(error)}"
    ) from error
  for name in names:
    if not (folder / name).is_file():
      raise RequestError(
        f"data source {str(folder)!r}: {name}, which {SAVED_STATE} names, is not there"
      )
  return [folder / name for name in names]


def _list_files(folder: Path, notes: collections.Counter) -> list[Path]:
  """The files of a folder and of the folders in it, but for hidden ones, and for runs and models, which hold no text to learn.

  Links to folders are followed, and each folder is read once. The folder itself may be a run's or a model's, with text beside:
  of that the text is taken. Raises RequestError for a folder that may not be read.
  """
  files = []
  with _as_request_error(str(folder)):
    for at, folders, names in _walk(folder, notes):
      folders[:] = sorted(name for name in folders if not name.startswith("."))
      this = _non_text_kind(at)
      holds = {name: what for name in folders if (what := _non_text_kind(at / name))}
      holds |= {
        name: "folders of runs"
        for name in folders
        if this == "folders of runs" and name in RUN_FOLDERS
      }
      notes.update(f"{what}, left out" for what in holds.values())
      folders[:] = [name for name in folders if name not in holds]
      own = _run_files(this, names)
      notes["files of a run or a model, left out"] += len(own)
      files += [at / name for name in names if not name.startswith(".") and name not in own]
    return sorted(file for file in files if _is_accessible(file, notes) and file.is_file())


@contextlib.contextmanager
def _as_request_error(source: str) -> Iterator[None]:
  """A folder that may not be read becomes one line."""
  try:
    yield
  except OSError as error:
    raise RequestError(f"data source {source!r}: {error.filename}: {error.strerror}") from error


def _walk(folder: Path, notes: collections.Counter) -> Iterator[tuple[Path, list[str], list[str]]]:
  """os.walk, which follows links, enters each folder once, and raises OSError for one that may not be read."""

  def refuse(error: OSError) -> None:
    raise error

  seen = {_inode(above) for above in folder.resolve().parents}
  for at, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
    if (which := _inode(Path(at))) in seen:
      notes[SEEN_NOTE] += 1
      folders.clear()
      continue
    seen.add(which)
    yield Path(at), folders, names


def _is_accessible(file: Path, notes: collections.Counter) -> bool:
  """Whether a name in a folder leads to something; raises PermissionError where nobody may know."""
  try:
    file.stat()
  except PermissionError:
    raise
  except OSError:  # a link to nothing, or to itself
    notes["links that lead nowhere, left out"] += 1
    return False
  return True


def _match_glob(pattern: str, notes: collections.Counter) -> list[Path]:
  """The files that match a pattern, but for those of runs and models in folders that it does not name itself."""
  parts = Path(pattern).parts
  plain = list(itertools.takewhile(lambda part: not glob.has_magic(part), parts[:-1]))
  base, files = Path(*plain), []
  identity = functools.cache(_inode)

  @functools.cache
  def holds_none(folder: Path) -> bool:
    if folder == base:
      return False
    run = _non_text_kind(folder.parent) == "folders of runs" and folder.name in RUN_FOLDERS
    return run or bool(_non_text_kind(folder)) or holds_none(folder.parent)

  start = Path(parts[0]) if Path(pattern).is_absolute() else Path()
  with _as_request_error(pattern):
    matching = sorted(_expand_glob(start, parts[start.is_absolute() :], notes))
    matching = [file for file in matching if _is_accessible(file, notes) and file.is_file()]
  seen = set()
  for file in matching:
    if (which := (identity(file.parent), file.name)) in seen:
      notes[SEEN_NOTE] += 1
      continue
    seen.add(which)
    # Few names are a run's or a model's own: only for those the folder is looked at.
    maybe_own = glob.has_magic(parts[-1]) and file.name in RUN_FILES
    if holds_none(file.parent) or maybe_own and _is_run_file(file):
      notes["files of a run or a model, left out"] += 1
    else:
      files.append(file)
  return files


def _expand_glob(
  folder: Path, parts: tuple[str, ...], notes: collections.Counter
) -> Iterator[Path]:
  """What a pattern stands for in a folder, as glob.glob(recursive=True) has it, but that ** enters each folder once, and that a
  folder that may not be read is not passed over, but raises OSError. A link that leads nowhere is among it."""
  part, rest = parts[0], parts[1:]
  if part == "**":
    for at, folders, names in _walk(folder, notes):
      folders[:] = sorted(name for name in folders if not name.startswith("."))
      yield from (
        _expand_glob(at, rest, notes)
        if rest
        else (at / name for name in names if not name.startswith("."))
      )
  elif not glob.has_magic(part):
    found = folder / part
    if rest and found.is_dir():
      yield from _expand_glob(found, rest, notes)
    elif not rest and os.path.lexists(found):
      yield found
  else:
    for name in fnmatch.filter(sorted(os.listdir(folder)), part):
      if name.startswith(".") and not part.startswith("."):
        continue
      if not rest:
        yield folder / name
      elif (folder / name).is_dir():
        yield from _expand_glob(folder / name, rest, notes)


def _is_run_file(file: Path) -> bool:
  return file.name in _run_files(
    _non_text_kind(file.parent), [path.name for path in file.parent.iterdir()]
  )


def _run_files(what: str, names: list[str]) -> set[str]:
  """Which files of a folder, which is of this kind, are a run's or a model's, and no text."""
  return {name for name in names if name in RUN_FILES and (what or TOKENIZER_FILES & {*names})}


def _inode(folder: Path) -> tuple[int, int]:
  found = folder.stat()
  return found.st_dev, found.st_ino


def _non_text_kind(folder: Path) -> str:
  """What a folder is that holds no text to learn, though it has files of kinds that are read; "" for any other."""
  names = (
    {path.name for path in folder.iterdir()} if os.access(folder, os.R_OK | os.X_OK) else set()
  )
  if "run.lock" in names or {"config.json", "metrics.jsonl"} <= names:
    return "folders of runs"
  if (
    names & {"parity.json", "adapter_config.json"}
    or "config.json" in names
    and any(name.endswith(MODEL_FILES) for name in names)
  ):
    return "folders of models"
  return "Python environments" if "pyvenv.cfg" in names else ""


def parse_weight(source: str) -> tuple[str, float]:
  """A source of training data, and how often an epoch passes over its documents: SOURCE@0.5, SOURCE@3; 1 where it says nothing.

  Raises RequestError for a weight that no epoch can have.
  """
  name, at, text = source.rpartition("@")
  if (
    not at or "/" in text or file_format(Path(source)) or exists(Path(source))
  ):  # a file or a folder may have an @ in its name
    return source, 1.0
  try:
    weight = float(text)
  except ValueError:
    weight = math.nan
  if not 0 < weight <= 100:
    raise RequestError(
      f"data source {source!r}: what follows the @ must be a number above 0 and at most 100"
    )
  return name, weight


def validate_sources(data: Mapping[str, Any]) -> list[str]:
  """One line for each local source in `config.data` that cannot be found."""
  named = [
    (key, source) for key in ("train", "validation", "unrelated") for source in data.get(key) or ()
  ]
  lines = []
  for key, source in named:
    try:
      name = parse_weight(source)[0] if key == "train" else source
      if not name.startswith("hub:"):
        find_files(name, "train" if key == "train" else "validation")
    except RequestError as error:
      lines.append(f"config.data.{key}: {error}")
  return lines


def fingerprint(sources: tuple[str, ...], split: str) -> list[str]:
  """One line for each file or hub data set, which changes when anything in it does."""
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
  how: ReaderOptions | Callable[[str], ReaderOptions],
  notes: collections.Counter,
) -> Iterator[RawRow]:
  """All rows of the sources, in order.

  Rows that do not parse come as rows with a fault; a file that cannot be read at all raises RequestError.

  Args:
    how: to read all of them, or a function that is called with the name of each file, or hub data set, before it is opened.
    split: of hub data sets that name none.
    notes: counts what was seen on the way: files with a byte order mark, .txt files with \\r\\n.
  """
  for source in sources:
    if source.startswith("hub:"):
      of_this = how(source) if callable(how) else how
      with _errors_named_after(source):
        yield from _read_hub(source, split, of_this)
      continue
    files = find_files(source, split, notes)
    # Where folders name the labels, a file that lies in none of them has none.
    in_folders = any(file.parent != Path(source) for file in files)
    for file in files:
      of_this = how(str(file)) if callable(how) else how
      beside = in_folders and of_this.label_column and file.parent == Path(source)
      if beside and file_format(file) in readers.TEXT_FORMATS:
        yield RawRow(str(file), {}, "not in one of the folders that name the labels")
        continue
      with _errors_named_after(file):
        yield from readers.read_rows(file, of_this, notes)


def _read_hub(source: str, split: str, how: ReaderOptions) -> Iterator[RawRow]:
  rows = _open_hub(source, split)
  nothing, names = dict.fromkeys(rows.column_names), readers.class_names(rows.features or {})
  wanted = how.of(nothing)
  for number, columns in enumerate(rows.select_columns(wanted) if wanted else [{}] * len(rows), 1):
    yield RawRow(f"{source}, row {number}", readers.with_class_names(nothing | columns, names))


class _errors_named_after:
  """Whatever goes wrong with a source becomes one line that names it."""

  def __init__(self, source: Path | str):
    self.source = source

  def __enter__(self) -> None:
    pass

  def __exit__(self, _, error: BaseException | None, __) -> None:
    if isinstance(error, readers.READ_ERRORS):
      raise RequestError(f"{self.source}: {first_line(error)}") from error


def _open_hub(source: str, split: str) -> Any:
  import datasets  # a second to import: only runs that read from the hub pay for it

  name, _, chosen = source.removeprefix("hub:").partition(":")
  if not name:
    raise RequestError(
      f"data source {source!r}: no name; give hub:NAME, hub:NAME:SPLIT or hub:NAME/CONFIGURATION:SPLIT"
    )
  name, configuration = _split_configuration(name)
  try:
    with _offline_if_unreachable(name):
      return _load_dataset(datasets, name, configuration, chosen or split)
  except Exception as error:  # hub, network and format errors share no class; all mean that this source cannot be read
    if there := re.search(r"vailable(?: configs)?: \[(.*?)\]", str(error)):
      names = there[1].replace("'", "")
      raise RequestError(
        f"data source {source!r}: name one of its configurations as hub:{name}/CONFIGURATION[:SPLIT]: {names}"
      ) from error
    raise RequestError(
      f"data source {source!r}: {first_line(error)}; check the name and the split, or download it and give the files"
    ) from error


def has_split(source: str, split: str) -> bool:
  """Whether a hub data set has a split of that name; False where that cannot be known: reading it says why."""
  import datasets

  name, configuration = _split_configuration(source.removeprefix("hub:"))
  try:
    with _offline_if_unreachable(name):
      return split in datasets.get_dataset_split_names(name, configuration)
  except Exception:  # hub, network and format errors share no class
    return False


def _split_configuration(name: str) -> tuple[str, str | None]:
  """The name of a data set and, after a slash, of one of its configurations: a hub id has at most one slash of its own."""
  head, _, tail = name.rpartition("/")
  if exists(Path(name)) or not head:
    return name, None
  return (head, tail) if exists(Path(head)) or head.count("/") == 1 else (name, None)


def _load_dataset(datasets: Any, name: str, configuration: str | None, split: str) -> Any:
  try:
    return datasets.load_dataset(name, configuration, split=split)
  except datasets.exceptions.DatasetNotFoundError:
    head, _, tail = name.rpartition("/")  # of an id without an owner: glue/sst2
    if configuration or not head:
      raise
    try:
      return datasets.load_dataset(head, tail, split=split)
    except datasets.exceptions.DatasetNotFoundError:
      pass
    raise


@contextlib.contextmanager
def _offline_if_unreachable(name: str) -> Iterator[None]:
  """Where the hub does not answer: look at what is cached, and nowhere else. The libraries would try again for a minute."""
  import datasets
  from huggingface_hub import constants

  host = urllib.parse.urlsplit(constants.ENDPOINT)
  as_it_is = (
    constants.HF_HUB_OFFLINE
    or exists(Path(name))
    or urllib.request.getproxies()
    or _is_reachable(host)
  )
  if as_it_is:
    yield
    return
  before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
  constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
  try:
    yield
  except OSError as error:  # not found, or offline
    raise OSError(
      f"{host.hostname} does not answer, and the data set is not in the cache"
    ) from error
  finally:
    constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@functools.cache  # once in a process: a data set is opened several times
def _is_reachable(host: urllib.parse.SplitResult) -> bool:
  """Whether a server takes connections; asked in a thread, as looking up a name may take long."""

  def ask() -> bool:
    try:
      socket.create_connection(
        (host.hostname, host.port or (80 if host.scheme == "http" else 443)), HUB_TIMEOUT
      ).close()
    except OSError:
      return False
    return True

  asked = ThreadPoolExecutor(1)
  try:
    return asked.submit(ask).result(HUB_TIMEOUT)
  except TimeoutError:
    return False
  finally:
    asked.shutdown(wait=False)
