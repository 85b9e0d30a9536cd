"""Files: atomic writes, cache folders, paths, and checks of text."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from jaxft.errors import RequestError, StorageError, first_line
from jaxft.utils.types import Json

# The URL of a model or data set on the hub, or of one of its pages or files.
HUB_URL = re.compile(
  r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)(?P<datasets>datasets/)?"
  r"(?P<id>[\w.-]+(?:/(?!(?:tree|blob|resolve|viewer)(?:/|$))[\w.-]+)?)(?:[/?#].*)?",
  re.IGNORECASE,
)
LFS_HEADER = b"version https://git-lfs.github.com/spec/"


def atomic_write(file: Path, text: str) -> None:
  """Write under a temporary name, sync to disk, and rename.

  A kill or a full disk leaves the previous file intact.

  Raises:
    StorageError: the file cannot be written.
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
  """Write a JSON object with `atomic_write`; raise StorageError if that fails."""
  atomic_write(file, json.dumps(content, indent=2) + "\n")


def json_sha256(content: Mapping[str, object]) -> str:
  """Return the SHA-256 of an object as JSON with sorted keys."""
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_failure(file: Path, error: Exception) -> str:
  """Return why a file could not be written, and the free space of its disk."""
  folder = next((folder for folder in file.absolute().parents if folder.exists()), Path("/"))
  free = shutil.disk_usage(folder).free
  return f"{getattr(error, 'strerror', None) or error}; {free:,} bytes are free on its disk"


def cache_dir(name: str) -> Path:
  """Return XDG_CACHE_HOME/jaxft/NAME, or ~/.cache/jaxft/NAME.

  Raises:
    RequestError: the user has no home.
  """
  try:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxft" / name
  except RuntimeError as error:
    raise RequestError(
      f"this user has no home folder for caches; set XDG_CACHE_HOME to a folder ({error})"
    ) from error


def expand_user(path: str) -> str:
  """Expand ~, which shells do not expand in --x=~/y, unless a file has this name."""
  return os.path.expanduser(path) if path.startswith("~") and not os.path.lexists(path) else path


def reject_lfs_pointer(file: Path) -> None:
  """Raise RequestError if the file is a git-lfs pointer without the content."""
  try:
    with file.open("rb") as stream:
      is_pointer = stream.read(len(LFS_HEADER)) == LFS_HEADER
  except OSError:
    return  # the code that reads the file reports this error
  if is_pointer:
    raise RequestError(
      f"{file}: a git-lfs pointer, not the file itself; run git lfs pull in its folder"
    )


def exists(path: Path) -> bool:
  """Return whether a path exists; False if the file system cannot have such a name."""
  try:
    return path.exists()
  except OSError:
    return False


def is_encodable(text: str) -> bool:
  """Return whether UTF-8 can encode the text.

  Lone surrogates, from JSON escapes or invalid bytes, cannot be encoded.
  """
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def read_json_object(file: Path, notes: list[str]) -> Json:
  """Read the object in a .json file; on failure return {} and add to `notes`.

  A note is a sentence for the page of a run.
  """
  try:
    content = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(content, dict):
      return content
    notes.append(f"{file.name} is not a JSON object; the page omits its content")
  except FileNotFoundError:
    notes.append(f"{file.name} does not exist; the page omits its content")
  except (OSError, ValueError, RecursionError) as error:
    notes.append(f"{file.name} cannot be read ({first_line(error)}); the page omits its content")
  return {}
