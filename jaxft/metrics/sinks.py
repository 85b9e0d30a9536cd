"""Where the metrics and samples of a run go: files in the workdir, the console; trackers.py."""

import json
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from jaxft.errors import StorageError
from jaxft.utils.console import log
from jaxft.utils.files import atomic_write, write_failure
from jaxft.utils.types import Json

Kind: TypeAlias = Literal["metrics", "samples"]


class Sink(Protocol):
  """Take what a run logs."""

  def write(self, kind: Kind, entry: Json, line: str) -> None:
    """Take an entry, which has a "step", and the same in a line for people."""


class JsonlLog:
  """A .jsonl file of objects that have a "step"; a resume removes the lines of lost steps."""

  def __init__(self, file: Path, last_step: int, writes: bool):
    """Read the file and drops lines that the run is about to write again.

    Args:
      last_step: entries after it are dropped, and those of the end; -1 drops all.
      writes: false in all processes of a run but one; they only remember.
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
          continue  # cut short by a kill in the middle of a write
    if writes:
      atomic_write(file, "".join(json.dumps(values) + "\n" for values in self.entries))

  def write(self, entry: Json) -> None:
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
  """metrics.jsonl and samples.jsonl in the workdir: all that the run has logged."""

  def __init__(self, workdir: Path, start: int, writes: bool):
    """`start`: step that the run goes on from; `writes`: as for `JsonlLog`."""
    last_step = start if start else -1  # a run that begins again evaluates and samples again
    self.metrics = JsonlLog(workdir / "metrics.jsonl", last_step, writes)
    self.samples = JsonlLog(workdir / "samples.jsonl", last_step, writes)

  def write(self, kind: Kind, entry: Json, line: str) -> None:
    (self.metrics if kind == "metrics" else self.samples).write(entry)


class ConsoleSink:
  """A line for each entry."""

  def write(self, kind: Kind, entry: Json, line: str) -> None:
    if line:
      log(line)
