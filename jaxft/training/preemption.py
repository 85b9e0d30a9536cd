"""Signals: the first asks a run to stop, the second kills the process."""

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
  """A context in which the first signal stops the run, and a second kills it.

  By default any point is safe, and the handler raises Preempted in the main thread. Inside
  `with preemption.deferred():` it only records the signal, and `should_stop(step)` reports it.

  Repeated SIGHUPs count as one: a closed terminal sends several, from the kernel and the shell.
  With several processes, signals are forwarded to JAX, which finds a step at which all can stop.
  """

  def __init__(self):
    self.received: str | None = None
    self._deferred = False

  def __enter__(self) -> "PreemptionHandler":
    is_multi_process = jax.process_count() > 1
    on_signal = self._forward if is_multi_process else self._on_signal
    handlers = dict.fromkeys(SIGNALS, on_signal)
    if is_multi_process:  # JAX handles SIGTERM and finds a common step to stop at
      del handlers[signal.SIGTERM]
    try:
      # Under nohup SIGHUP is ignored: the run must outlive its terminal.
      if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        del handlers[signal.SIGHUP]
      self._previous = {number: signal.signal(number, it) for number, it in handlers.items()}
    except ValueError:  # not the main thread (a notebook's worker, for example): keep its handlers
      self._previous = {}
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  @contextmanager
  def deferred(self) -> Generator[None]:
    """Only record signals inside this context; the caller polls `should_stop`."""
    self._deferred = True
    try:
      yield
    finally:
      self._deferred = False

  def defer(self) -> None:
    """Only record signals from now on."""
    self._deferred = True

  def should_stop(self, step: int) -> bool:
    """Return whether the run must stop after this step, the same in all processes."""
    if jax.process_count() == 1:
      return self.received is not None
    if not multihost_utils.reached_preemption_sync_point(step):
      return False  # this process may have a signal that the others have not received yet
    self.received = self.received or "SIGTERM"
    return True

  def _is_repeated(self, number: int) -> bool:
    """Return whether a signal came before; then kill the process, except on SIGHUP."""
    if self.received and number != signal.SIGHUP:
      signal.signal(number, signal.SIG_DFL)
      os.kill(os.getpid(), number)
    return self.received is not None

  def _on_signal(self, number: int, _: FrameType | None) -> None:
    """Handle a signal of a single-process run."""
    if self._is_repeated(number):
      return
    self.received = signal.Signals(number).name
    if not self._deferred:
      raise Preempted(f"{self.received}: no work was lost; the same command continues")

  def _forward(self, number: int, _: FrameType | None) -> None:
    """Handle a signal of a multi-process run: send SIGTERM, which JAX handles."""
    if self._is_repeated(number):
      return
    self.received = signal.Signals(number).name
    os.kill(os.getpid(), signal.SIGTERM)
