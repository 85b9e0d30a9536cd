"""What watches over a run: signals that ask it to stop."""

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
  """Inside `with StopRequest() as stop`, a signal is remembered in `stop.received`; a second one ends the process."""

  def __init__(self):
    self.received: str | None = None

  def __enter__(self) -> "StopRequest":
    try:
      self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
    except ValueError:  # not the main thread (a notebook's worker, say): the host program keeps its own handlers
      self._before = {}
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _note(self, number: int, _: FrameType | None) -> None:
    if self.received:
      signal.signal(number, signal.SIG_DFL)
      os.kill(os.getpid(), number)
    self.received = signal.Signals(number).name
