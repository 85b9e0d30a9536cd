"""Files that are there whole or not at all."""

import os
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
  """Writes under a temporary name, syncs to disk, renames: a kill or a full disk leaves what was there before."""
  partial = file.with_name(file.name + ".partial")
  with partial.open("w", encoding="utf-8") as stream:
    stream.write(text)
    stream.flush()
    os.fsync(stream.fileno())
  os.replace(partial, file)


def cache_folder(name: str) -> Path:
  """Where jaxft keeps what it can make again: XDG_CACHE_HOME/jaxft/NAME, or ~/.cache/jaxft/NAME."""
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxft" / name


def exists(path: Path) -> bool:
  """Whether there is something; False too for a name that the file system cannot have."""
  try:
    return path.exists()
  except OSError:
    return False


def is_text(text: str) -> bool:
  """False for what no UTF-8 file can hold: halves of surrogate pairs, which JSON's \\u escapes and stray bytes give."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True
