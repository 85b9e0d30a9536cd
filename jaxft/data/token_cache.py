"""Token files: written once for the same text, tokenizer and settings, memory-mapped from then on.

A cache folder has one folder an entry, named by what it was made from. It is written under another name and renamed when it is
whole, by one process while others wait, and its checksums are compared whenever it is opened.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from jaxft.data.tokenize import TokenArrays
from jaxft.errors import StorageError
from jaxft.utils.files import atomic_write, write_failure

VERSION = 4  # of the files; another one is another entry
ARRAYS = {
  "ids": None,
  "starts_N1": np.int64,
  "prompts_N": np.int32,
  "labels_N": np.int32,
  "nats_N": np.float64,
}


class TokenWriter:
  """The files of one set of examples, written as they come."""

  def __init__(self, folder: Path, name: str, ids_dtype: np.dtype):
    self._name, self._folder, self._end = name, folder, 0
    self._dtypes = ARRAYS | {"ids": ids_dtype}
    self._files = {part: (folder / f"{name}.{part}").open("wb") for part in ARRAYS}
    self._hashes = {part: hashlib.sha256() for part in ARRAYS}
    self.add("starts_N1", [0])

  def add(self, part: str, values: Any) -> None:
    piece = np.asarray(values, self._dtypes[part]).tobytes()
    self._files[part].write(piece)
    self._hashes[part].update(piece)

  def examples(
    self, ids: list[np.ndarray], prompts: list[int], labels: list[int], nats: list[float]
  ) -> None:
    ends = self._end + np.cumsum([len(array) for array in ids], dtype=np.int64)
    self._end = int(ends[-1])
    for part, values in (("ids", np.concatenate(ids)), ("starts_N1", ends), ("prompts_N", prompts)):
      self.add(part, values)
    self.add("labels_N", labels)
    self.add("nats_N", nats)

  def close(self) -> dict[str, dict[str, Any]]:
    """Syncs the files; returns size, type and checksum of each, for the manifest."""
    about = {}
    for part, file in self._files.items():
      file.flush()
      os.fsync(file.fileno())
      about[f"{self._name}.{part}"] = {
        "dtype": np.dtype(self._dtypes[part]).name,
        "bytes": file.tell(),
        "sha256": self._hashes[part].hexdigest(),
      }
      file.close()
    return about


def load_or_build(
  folder: Path,
  key: Mapping[str, Any],
  make: Callable[[Path], dict[str, Any]],
  log: Callable[[str], None],
) -> tuple[Path, dict[str, Any]]:
  """The entry of `key` and its manifest: the one that is there and sound, else one that `make` writes.

  Args:
    folder: of all entries; made if need be.
    key: everything that the tokens depend on.
    make: writes the files of an entry into a folder and returns its manifest, with the "files" of `TokenWriter.close`.

  Raises:
    StorageError: the folder cannot be written.
  """
  text = json.dumps({"version": VERSION} | dict(key), sort_keys=True)
  name = hashlib.sha256(text.encode()).hexdigest()[:32]
  entry, partial = folder / name, folder / f"{name}.partial"
  lock = FileLock(folder / f"{name}.lock")
  try:
    if entry.exists() and not os.access(
      folder, os.W_OK
    ):  # one that others have made, for readers alone
      manifest, fault = _verify_entry(entry, text)
      if not fault:
        return entry, manifest
    folder.mkdir(parents=True, exist_ok=True)
    try:
      lock.acquire(timeout=1)
    except Timeout:
      log(f"another process is tokenising the same text; waiting for it ({lock.lock_file})")
      lock.acquire()
    if entry.exists():
      manifest, fault = _verify_entry(entry, text)
      if not fault:
        return entry, manifest
      log(f"token cache {entry}: {fault}; tokenising again")
      _remove(entry)
    _remove(partial)  # of a process that was killed
    partial.mkdir()
    manifest = {"made_from": json.loads(text)} | make(partial)
    atomic_write(
      partial / "manifest.json",
      json.dumps({"sha256": _manifest_checksum(manifest)} | manifest, indent=1),
    )
    partial.rename(entry)
    return entry, manifest
  except OSError as error:
    raise StorageError(
      f"token cache {folder}: {write_failure(folder, error)}; --config.data.cache_dir names another folder"
    ) from error
  finally:
    if lock.is_locked:
      shutil.rmtree(partial, ignore_errors=True)
      lock.release()


def _remove(path: Path) -> None:
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def open_arrays(entry: Path, name: str, manifest: Mapping[str, Any]) -> TokenArrays:
  """The examples of one set, memory-mapped."""
  return TokenArrays(
    *(_memmap(entry / f"{name}.{part}", manifest["files"][f"{name}.{part}"]) for part in ARRAYS)
  )


def fingerprint(name: str, manifest: Mapping[str, Any]) -> str:
  """Tells one set of examples from another."""
  checksums = [manifest["files"][f"{name}.{part}"]["sha256"] for part in ARRAYS]
  return hashlib.sha256("".join(checksums).encode()).hexdigest()


def _memmap(file: Path, about: Mapping[str, Any]) -> np.ndarray:
  dtype = np.dtype(about["dtype"])
  return (
    np.memmap(file, dtype, "r") if about["bytes"] else np.zeros(0, dtype)
  )  # nothing cannot be mapped


def _manifest_checksum(manifest: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _verify_entry(entry: Path, text: str) -> tuple[dict[str, Any], str]:
  """The manifest of an entry, and what is wrong with the entry."""
  try:
    manifest = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
    if manifest.pop("sha256") != _manifest_checksum(manifest):
      return {}, "manifest.json differs from its checksum"
    if manifest["made_from"] != json.loads(text):
      return {}, "its manifest is of another text"
    for name, about in manifest["files"].items():
      file = entry / name
      if file.stat().st_size != about["bytes"]:
        return {}, f"{name} has {file.stat().st_size} bytes, not {about['bytes']}"
      with file.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != about["sha256"]:
          return {}, f"{name} differs from its checksum"
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    return {}, f"damaged ({type(error).__name__}: {error})"
  return manifest, ""
