"""PreemptionHandler: the first signal asks a run to stop, the second ends the process."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils

from jaxft.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class PreemptionHandler:
  """Inside `with StopRequest() as stop` a first signal ends the run at the next safe point, a second one the process.

  Where nothing would be lost it is safe at once: Preempted is raised out of whatever goes on. Inside `with stop.deferred():` the
  signal is only remembered, for `should_stop(step)` to find. A terminal that goes away sends SIGHUP more than once: the kernel does, and
  the shell.
  """

  def __init__(self):
    self.received: str | None = None
    self._deferred = False

  def __enter__(self) -> "PreemptionHandler":
    several = jax.process_count() > 1
    try:
      # With several processes JAX listens for SIGTERM, and finds a step at which all of them stop.
      handlers = {number: self._pass_on if several else self._on_signal for number in SIGNALS}
      if several:
        del handlers[signal.SIGTERM]
      if (
        signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
      ):  # nohup: the run is to outlive its terminal
        del handlers[signal.SIGHUP]
      self._before = {
        number: signal.signal(number, handler) for number, handler in handlers.items()
      }
    except (
      ValueError
    ):  # not the main thread (a notebook's worker, say): the host program keeps its own handlers
      self._before = {}
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  @contextmanager
  def deferred(self) -> Iterator[None]:
    self._deferred = True
    try:
      yield
    finally:
      self._deferred = False

  def defer(self) -> None:
    """From now on a signal is only remembered."""
    self._deferred = True

  def should_stop(self, step: int) -> bool:
    """Whether the run is to stop after this step: the same answer in all processes."""
    if jax.process_count() == 1:
      return self.received is not None
    if not multihost_utils.reached_preemption_sync_point(step):
      return False  # this process may know of a signal that the others have not been told of
    self.received = self.received or "SIGTERM"
    return True

  def _again(self, number: int) -> bool:
    """Whether this is not the first signal. But for SIGHUP, which is not heard twice, the second ends the process."""
    if self.received and number != signal.SIGHUP:
      signal.signal(number, signal.SIG_DFL)
      os.kill(os.getpid(), number)
    return self.received is not None

  def _on_signal(self, number: int, _: FrameType | None) -> None:
    if self._again(number):
      return
    self.received = signal.Signals(number).name
    if not self._deferred:
      raise Preempted(f"{self.received}: nothing was lost; the same command continues")

  def _pass_on(self, number: int, _: FrameType | None) -> None:
    if self._again(number):
      return
    self.received = signal.Signals(number).name
    os.kill(os.getpid(), signal.SIGTERM)
