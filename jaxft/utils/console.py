"""The console: log lines, progress bars, and text from files made safe to print."""

import contextlib
import errno
import os
import sys
import unicodedata

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class RunConsole(Console):
  """A console that survives the loss of its reader, where rich would end the run."""

  @property
  def live(self) -> bool:
    """Return whether progress bars can be drawn.

    rich takes a file for a terminal where FORCE_COLOR is set, as many CI services do.
    """
    return self.is_terminal and not self.is_dumb_terminal and self.file.isatty()

  def __exit__(self, exc_type: object, exc_value: object, traceback: object) -> None:
    """End a piece of output, which is then written; all of rich's goes through here."""
    try:
      super().__exit__(exc_type, exc_value, traceback)
    except OSError as error:
      if error.errno != errno.EIO:  # only a lost terminal: a full disk may have room again
        raise
      self.on_broken_pipe()

  def on_broken_pipe(self) -> None:
    self.quiet = True
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = RunConsole(soft_wrap=True, highlight=False)


def log(text: str) -> None:
  """Print a line, without rich's markup and control characters: text comes from users' files."""
  # The log may be on a full disk: the run goes on as long as its own files can be written.
  with contextlib.suppress(OSError):
    console.print(escape_controls(text), markup=False)


def escape_controls(text: str) -> str:
  """Escape control characters other than newlines and tabs: some of them steer a terminal."""
  return "".join(
    c if c in "\n\t" or unicodedata.category(c) != "Cc" else c.encode("unicode_escape").decode()
    for c in text
  )


class ProgressBar:
  """A progress bar on a terminal; nothing in a log."""

  def __init__(self, label: str, total: int, done: int = 0):
    columns = (
      TextColumn("{task.description}"),
      BarColumn(),
      MofNCompleteColumn(),
      TimeRemainingColumn(),
      TextColumn("{task.fields[note]}"),
    )
    self._bar = Progress(*columns, console=console, transient=True, disable=not console.live)
    self._task = self._bar.add_task(label, total=total, completed=done, note="")

  def __enter__(self) -> "ProgressBar":
    self._bar.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._bar.stop()

  def update(self, done: int, note: str = "", total: int | None = None) -> None:
    self._bar.update(self._task, completed=done, note=note, total=total)
