"""Files: atomic writes, caches, paths, and text that UTF-8 can hold."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from jaxft.errors import RequestError, StorageError, first_line
from jaxft.utils.types import Json

# The address of a model or a data set on the hub, or of one of its pages or files.
HUB_URL = re.compile(
  r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)(?P<datasets>datasets/)?"
  r"(?P<id>[\w.-]+(?:/(?!(?:tree|blob|resolve|viewer)(?:/|$))[\w.-]+)?)(?:[/?#].*)?",
  re.IGNORECASE,
)
LFS_HEADER = b"version https://git-lfs.github.com/spec/"


def atomic_write(file: Path, text: str) -> None:
  """Write under a temporary name, sync to disk, and rename.

  A kill or a full disk leaves the previous file. Raises StorageError.
  """
  partial = file.with_name(file.name + ".partial")
  try:
    with partial.open("w", encoding="utf-8") as stream:
      stream.write(text)
      stream.flush()
      os.fsync(stream.fileno())
    os.replace(partial, file)
  except OSError as error:
    partial.unlink(missing_ok=True)
    raise StorageError(f"{file}: {write_failure(file, error)}") from error


def write_json(file: Path, content: Json) -> None:
  """Write a JSON object with `atomic_write`; raises StorageError."""
  atomic_write(file, json.dumps(content, indent=2) + "\n")


def json_sha256(content: Mapping[str, object]) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_failure(file: Path, error: Exception) -> str:
  """Say why a file could not be written, and how much room its disk has."""
  folder = next((folder for folder in file.absolute().parents if folder.exists()), Path("/"))
  free = shutil.disk_usage(folder).free
  return f"{getattr(error, 'strerror', None) or error}; {free:,} bytes are free there"


def cache_dir(name: str) -> Path:
  """Return XDG_CACHE_HOME/jaxft/NAME, or ~/.cache/jaxft/NAME.

  Raises RequestError if the user has no home.
  """
  try:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxft" / name
  except RuntimeError as error:
    raise RequestError(
      f"this user has no home to keep caches in; set XDG_CACHE_HOME to a folder ({error})"
    ) from error


def expand_user(path: str) -> str:
  """Expand ~, which no shell expands in --x=~/y, unless a file has this very name."""
  return os.path.expanduser(path) if path.startswith("~") and not os.path.lexists(path) else path


def reject_lfs_pointer(file: Path) -> None:
  """Raise RequestError for a git-lfs pointer, which stands for a file that was not fetched."""
  try:
    with file.open("rb") as stream:
      is_pointer = stream.read(len(LFS_HEADER)) == LFS_HEADER
  except OSError:
    return  # whoever reads it reports the error
  if is_pointer:
    raise RequestError(
      f"{file}: a git-lfs pointer, not the file itself; run git lfs pull in its folder"
    )


def exists(path: Path) -> bool:
  """Return whether a path exists; False too for a name that the file system cannot have."""
  try:
    return path.exists()
  except OSError:
    return False


def is_encodable(text: str) -> bool:
  """Return whether UTF-8 can hold the text; not so for lone surrogates, of JSON escapes or stray bytes."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def read_json_object(file: Path, notes: list[str]) -> Json:
  """Read the object in a .json file; if there is none, return {} and add a line to `notes`."""
  try:
    content = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(content, dict):
      return content
    notes.append(f"{file.name} holds no JSON object: what it tells is left out")
  except FileNotFoundError:
    notes.append(f"There is no {file.name}: what it tells is left out")
  except (OSError, ValueError, RecursionError) as error:
    notes.append(f"{file.name} cannot be read ({first_line(error)}): what it tells is left out")
  return {}
