"""Cache tokens on disk, memory-mapped.

Tokens are written once per text, tokenizer and settings.

A cache folder has one folder per entry, named by a hash of its key. One process writes an entry
under a temporary name while others wait, and renames it when it is complete. Every open verifies
the checksums.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import ArrayLike, DTypeLike

from jaxft.data.tokenize import TokenArrays
from jaxft.errors import StorageError
from jaxft.utils.files import atomic_write, json_sha256, write_failure

VERSION = 4  # of the file format; part of the key, so another version has separate entries
ARRAYS: dict[str, DTypeLike] = {
  "ids": np.uint32,  # or uint16, if that holds every id
  "starts_N1": np.int64,
  "prompts_N": np.int32,
  "labels_N": np.int32,
  "nats_N": np.float64,
}


class FileInfo(TypedDict):
  """Type, size and checksum of a file of an entry."""

  dtype: str
  bytes: int
  sha256: str


class Manifest(TypedDict):
  """The manifest of an entry. Its field names are part of the cache key."""

  files: dict[str, FileInfo]
  labels: list[str]
  numbers: list[int | None]  # of the labels, if the data has names and numbers
  read: int  # rows
  dropped: dict[str, int]  # reason -> rows
  duplicates: int
  merged: int  # prompts that end inside a token
  characters: int
  lost: int  # characters without a token
  notes: dict[str, int]
  said: list[str]  # lines to log: choices that the settings left open
  tails: int  # documents whose end is held out


class TokenWriter:
  """Writes the files of one set of examples, batch by batch."""

  def __init__(self, folder: Path, name: str, ids_dtype: DTypeLike):
    self._name = name
    self._end = 0
    self._dtypes = ARRAYS | {"ids": ids_dtype}
    self._files = {array: (folder / f"{name}.{array}").open("wb") for array in ARRAYS}
    self._hashes = {array: hashlib.sha256() for array in ARRAYS}
    self._append("starts_N1", [0])

  def _append(self, array: str, values: ArrayLike) -> None:
    content = np.asarray(values, self._dtypes[array]).tobytes()
    self._files[array].write(content)
    self._hashes[array].update(content)

  def add_examples(
    self, ids: list[np.ndarray], prompts: list[int], labels: list[int], nats: list[float]
  ) -> None:
    """Append a batch of examples; the arguments are the fields of `TokenArrays`."""
    stops = self._end + np.cumsum([len(array) for array in ids], dtype=np.int64)
    self._end = int(stops[-1])
    columns = (np.concatenate(ids), stops, prompts, labels, nats)
    for array, values in zip(ARRAYS, columns, strict=True):
      self._append(array, values)

  def close(self) -> dict[str, FileInfo]:
    """Sync and close the files; return their entries for the manifest."""
    entries: dict[str, FileInfo] = {}
    for array, file in self._files.items():
      file.flush()
      os.fsync(file.fileno())
      entries[f"{self._name}.{array}"] = {
        "dtype": np.dtype(self._dtypes[array]).name,
        "bytes": file.tell(),
        "sha256": self._hashes[array].hexdigest(),
      }
      file.close()
    return entries


def load_or_build(
  folder: Path,
  key: Mapping[str, object],
  build: Callable[[Path], Manifest],
  log: Callable[[str], None],
) -> tuple[Path, Manifest]:
  """Return the entry of `key` and its manifest; build the entry if needed.

  Args:
    folder: of all entries; created if it does not exist.
    key: everything that the tokens depend on.
    build: writes the files of an entry into a folder and returns its manifest.
    log: called with a line if another process holds the lock, or if the entry is damaged.

  Raises:
    StorageError: the folder cannot be written.
  """
  key_json = json.dumps({"version": VERSION} | dict(key), sort_keys=True)
  name = hashlib.sha256(key_json.encode()).hexdigest()[:32]
  entry = folder / name
  partial = folder / f"{name}.partial"
  lock = FileLock(folder / f"{name}.lock")
  try:
    if entry.exists() and not os.access(folder, os.W_OK):  # shared and read-only
      if manifest := _read_manifest(entry, key_json)[0]:
        return entry, manifest
    folder.mkdir(parents=True, exist_ok=True)
    try:
      lock.acquire(timeout=1)  # log only a wait that a user would notice
    except Timeout:
      log(f"waiting for another process that tokenizes the same text ({lock.lock_file})")
      lock.acquire()
    if entry.exists():
      manifest, problem = _read_manifest(entry, key_json)
      if manifest:
        return entry, manifest
      log(f"token cache {entry}: {problem}; tokenizing again")
      _remove(entry)
    _remove(partial)  # left by a process that was killed
    partial.mkdir()
    manifest = build(partial)
    content = {"made_from": json.loads(key_json), **manifest}
    content = {"sha256": json_sha256(content)} | content
    atomic_write(partial / "manifest.json", json.dumps(content, indent=1))
    partial.rename(entry)
    return entry, manifest
  except OSError as error:
    raise StorageError(
      f"token cache {folder}: {write_failure(folder, error)}; "
      "set --config.data.cache_dir to another folder"
    ) from error
  finally:
    if lock.is_locked:
      # After an error only: a complete entry has its final name by now.
      shutil.rmtree(partial, ignore_errors=True)
      lock.release()


def _remove(path: Path) -> None:
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def open_arrays(entry: Path, name: str, manifest: Manifest) -> TokenArrays:
  """Return the examples of one set, memory-mapped."""
  files = {array: f"{name}.{array}" for array in ARRAYS}
  return TokenArrays(**{a: _memmap(entry / f, manifest["files"][f]) for a, f in files.items()})


def fingerprint(name: str, manifest: Manifest) -> str:
  """Return a hash of one set of examples."""
  checksums = [manifest["files"][f"{name}.{array}"]["sha256"] for array in ARRAYS]
  return hashlib.sha256("".join(checksums).encode()).hexdigest()


def _memmap(file: Path, about: FileInfo) -> np.ndarray:
  dtype = np.dtype(about["dtype"])
  return (
    np.memmap(file, dtype, "r") if about["bytes"] else np.zeros(0, dtype)
  )  # mmap rejects empty files


def _read_manifest(entry: Path, key_json: str) -> tuple[Manifest | None, str]:
  """Return the manifest of an entry, or None and the problem."""
  try:
    manifest = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
    if manifest.pop("sha256") != json_sha256(manifest):
      return None, "manifest.json differs from its checksum"
    if manifest.pop("made_from") != json.loads(key_json):
      return None, "its manifest belongs to another text"
    for name, about in manifest["files"].items():
      file = entry / name
      size = file.stat().st_size
      if size != about["bytes"]:
        return None, f"{name} has {size} bytes, not {about['bytes']}"
      with file.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != about["sha256"]:
          return None, f"{name} differs from its checksum"
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    return None, f"damaged ({type(error).__name__}: {error})"
  return manifest, ""
