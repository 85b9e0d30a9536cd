"""Files that are there whole or not at all."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from jaxft.errors import RequestError, StorageError, first_line

# An address of a model or a data set of the hub, or of a page or a file of it.
HUB_URL = re.compile(
  r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)(?P<datasets>datasets/)?"
  r"(?P<id>[\w.-]+(?:/(?!(?:tree|blob|resolve|viewer)(?:/|$))[\w.-]+)?)(?:[/?#].*)?",
  re.IGNORECASE,
)
LFS_HEADER = b"version https://git-lfs.github.com/spec/"


def atomic_write(file: Path, text: str) -> None:
  """Writes under a temporary name, syncs to disk, renames: a kill or a full disk leaves what was there before.

  Raises StorageError.
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


def write_json(file: Path, content: dict[str, Any]) -> None:
  """`atomic_write` of a JSON object; raises StorageError."""
  atomic_write(file, json.dumps(content, indent=2) + "\n")


def write_failure(file: Path, error: Exception) -> str:
  """Why a file could not be written, and how much room there is."""
  there = next((folder for folder in file.absolute().parents if folder.exists()), Path("/"))
  return f"{getattr(error, 'strerror', None) or error}; {shutil.disk_usage(there).free:,} bytes are free there"


def cache_dir(name: str) -> Path:
  """Where jaxft keeps what it can make again: XDG_CACHE_HOME/jaxft/NAME, or ~/.cache/jaxft/NAME.

  Raises RequestError where there is no home.
  """
  try:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxft" / name
  except RuntimeError as error:
    raise RequestError(
      f"this user has no home to keep caches in; set XDG_CACHE_HOME to a folder ({error})"
    ) from error


def expand_user(path: str) -> str:
  """A path with the user's home for its ~, which no shell makes of --x=~/y; but for a file that is called so."""
  return os.path.expanduser(path) if path.startswith("~") and not os.path.lexists(path) else path


def reject_lfs_pointer(file: Path) -> None:
  """Raises RequestError for a git-lfs pointer, which stands for a file that was not fetched."""
  try:
    with file.open("rb") as stream:
      pointer = stream.read(len(LFS_HEADER)) == LFS_HEADER
  except OSError:
    return  # whoever reads it says so
  if pointer:
    raise RequestError(
      f"{file}: a git-lfs pointer, not the file itself; run git lfs pull in its folder"
    )


def exists(path: Path) -> bool:
  """Whether there is something; False too for a name that the file system cannot have."""
  try:
    return path.exists()
  except OSError:
    return False


def is_encodable(text: str) -> bool:
  """False for what no UTF-8 file can hold: halves of surrogate pairs, which JSON's \\u escapes and stray bytes give."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def read_json_object(file: Path, notes: list[str]) -> dict[str, Any]:
  """The object in a .json file; an empty one, and a line in `notes`, where there is none."""
  try:
    found = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(found, dict):
      return found
    notes.append(f"{file.name} holds no JSON object: what it tells is left out")
  except FileNotFoundError:
    notes.append(f"There is no {file.name}: what it tells is left out")
  except (OSError, ValueError, RecursionError) as error:
    notes.append(f"{file.name} cannot be read ({first_line(error)}): what it tells is left out")
  return {}
