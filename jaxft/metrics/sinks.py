"""Sinks of metrics and samples: files and the console (see also trackers.py)."""

import json
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from jaxft.errors import StorageError
from jaxft.utils.files import atomic_write, write_failure
from jaxft.utils.logger import log
from jaxft.utils.types import Json

Kind: TypeAlias = Literal["metrics", "samples"]


class Sink(Protocol):
  """Receives the entries that a run logs."""

  def write(self, kind: Kind, entry: Json, line: str) -> None:
    """Take an entry, which has a "step", and its content as a readable line."""


class JsonlLog:
  """A .jsonl file of objects with a "step"; a resume removes those of lost steps."""

  def __init__(self, file: Path, last_step: int, writes: bool):
    """Read the file and drop the lines that the run will write again.

    Args:
      file: the .jsonl file; it need not exist.
      last_step: entries after this step are dropped, as are those from the end of the run; -1
        drops all.
      writes: whether this process writes the file. One process of a run does; the others keep the
        entries in memory only.
    """
    self.entries: list[Json] = []
    self.dropped: list[Json] = []
    self._file = file
    self._writes = writes
    if file.exists():
      for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
          values = json.loads(line)
          is_valid = values["step"] <= last_step and values.get("when") != "after"
          (self.entries if is_valid else self.dropped).append(values)
        except (ValueError, KeyError, TypeError):
          continue  # incomplete: the process was killed during a write
    if writes:
      atomic_write(file, "".join(json.dumps(values) + "\n" for values in self.entries))

  def write(self, entry: Json) -> None:
    """Append an entry; raise StorageError if the file cannot be written."""
    self.entries.append(entry)
    if not self._writes:
      return
    try:
      with self._file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry, allow_nan=False) + "\n")
    except OSError as error:
      raise StorageError(f"{self._file}: {write_failure(self._file, error)}") from error

  def values(self, key: str) -> list[float]:
    """Return all values of `key`, oldest first."""
    return [line[key] for line in self.entries if key in line]


class JsonlSink:
  """Writes everything that the run logs to metrics.jsonl and samples.jsonl."""

  def __init__(self, workdir: Path, start: int, writes: bool):
    """Read both files.

    Args:
      workdir: folder of the run.
      start: step from which the run continues; 0 for a new run.
      writes: see `JsonlLog`.
    """
    last_step = start if start else -1  # a new run evaluates and samples step 0 again
    self.metrics = JsonlLog(workdir / "metrics.jsonl", last_step, writes)
    self.samples = JsonlLog(workdir / "samples.jsonl", last_step, writes)

  def write(self, kind: Kind, entry: Json, line: str) -> None:
    """Append an entry to the file of its kind."""
    (self.metrics if kind == "metrics" else self.samples).write(entry)


class ConsoleSink:
  """Prints a line for each entry."""

  def write(self, kind: Kind, entry: Json, line: str) -> None:
    """Print the line, unless it is empty."""
    if line:
      log(line)
