"""PreemptionHandler: the first signal asks a run to stop, the second ends the process."""

import os
import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils

from jaxft.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class PreemptionHandler:
  """A context in which a first signal ends the run at the next safe point, a second the process.

  Where nothing would be lost it is safe at once: Preempted is raised out of whatever goes on.
  Inside `with preemption.deferred():` the signal is only remembered, for `should_stop(step)` to
  find. A terminal that goes away sends SIGHUP more than once: the kernel does, and the shell.
  """

  def __init__(self):
    self.received: str | None = None
    self._deferred = False

  def __enter__(self) -> "PreemptionHandler":
    is_multi_process = jax.process_count() > 1
    on_signal = self._forward if is_multi_process else self._on_signal
    handlers = dict.fromkeys(SIGNALS, on_signal)
    if is_multi_process:  # JAX listens for SIGTERM, and finds a step at which all processes stop
      del handlers[signal.SIGTERM]
    try:
      # nohup ignores SIGHUP: the run is to outlive its terminal.
      if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        del handlers[signal.SIGHUP]
      self._previous = {number: signal.signal(number, it) for number, it in handlers.items()}
    except ValueError:  # not the main thread (a notebook's worker, say): its handlers stay
      self._previous = {}
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  @contextmanager
  def deferred(self) -> Generator[None]:
    self._deferred = True
    try:
      yield
    finally:
      self._deferred = False

  def defer(self) -> None:
    """Only remembers signals from now on."""
    self._deferred = True

  def should_stop(self, step: int) -> bool:
    """Whether the run is to stop after this step: the same answer in all processes."""
    if jax.process_count() == 1:
      return self.received is not None
    if not multihost_utils.reached_preemption_sync_point(step):
      return False  # this process may know of a signal that the others have not received
    self.received = self.received or "SIGTERM"
    return True

  def _is_repeated(self, number: int) -> bool:
    """Whether this is not the first signal; a second one, but for SIGHUP, ends the process."""
    if self.received and number != signal.SIGHUP:
      signal.signal(number, signal.SIG_DFL)
      os.kill(os.getpid(), number)
    return self.received is not None

  def _on_signal(self, number: int, _: FrameType | None) -> None:
    if self._is_repeated(number):
      return
    self.received = signal.Signals(number).name
    if not self._deferred:
      raise Preempted(f"{self.received}: no work was lost; the same command continues")

  def _forward(self, number: int, _: FrameType | None) -> None:
    if self._is_repeated(number):
      return
    self.received = signal.Signals(number).name
    os.kill(os.getpid(), signal.SIGTERM)
