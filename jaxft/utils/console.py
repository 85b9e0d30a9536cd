"""The console: progress bars, and escaping of control characters."""

import errno
import logging
import os
import sys
import unicodedata

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class RunConsole(Console):
  """A console that survives the loss of its terminal; rich would end the run."""

  @property
  def live(self) -> bool:
    """Whether progress bars can be drawn.

    `isatty` is checked too: with FORCE_COLOR, which many CI services set, rich treats a file as a
    terminal.
    """
    return self.is_terminal and not self.is_dumb_terminal and self.file.isatty()

  def __exit__(self, exc_type: object, exc_value: object, traceback: object) -> None:
    """Write buffered output; rich calls this for everything that it prints."""
    try:
      super().__exit__(exc_type, exc_value, traceback)
    except OSError as error:
      if error.errno != errno.EIO:  # EIO: the terminal is gone; other errors may be temporary
        raise
      self.on_broken_pipe()

  def on_broken_pipe(self) -> None:
    """Discard all further output; rich calls this when the reader of a pipe is gone."""
    self.quiet = True
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = RunConsole(soft_wrap=True, highlight=False)


def escape_controls(text: str) -> str:
  """Escape control characters except newline and tab; some control a terminal."""
  return "".join(
    c if c in "\n\t" or unicodedata.category(c) != "Cc" else c.encode("unicode_escape").decode()
    for c in text
  )


class ProgressBar:
  """A progress bar on a terminal; prints nothing to a file."""

  def __init__(self, label: str, total: int, done: int = 0):
    columns = (
      TextColumn("{task.description}"),
      BarColumn(),
      MofNCompleteColumn(),
      TimeRemainingColumn(),
      TextColumn("{task.fields[note]}"),
    )
    hidden = not console.live or not logging.getLogger("jaxft").isEnabledFor(logging.INFO)
    self._bar = Progress(*columns, console=console, transient=True, disable=hidden)
    self._task = self._bar.add_task(label, total=total, completed=done, note="")

  def __enter__(self) -> "ProgressBar":
    self._bar.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._bar.stop()

  def update(self, done: int, note: str = "", total: int | None = None) -> None:
    """Show the number of completed items, and a note after the bar."""
    self._bar.update(self._task, completed=done, note=note, total=total)
