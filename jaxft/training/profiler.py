"""Profiles of some steps by JAX: when devices compute and when they wait."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import jax

from jaxft.errors import first_line
from jaxft.utils.logger import log
from jaxft.utils.types import PyTree


class Profiler:
  """A context that traces `count` steps from `first` on, at most up to `total`.

  Before a trace begins and before it ends, the profiler waits for the device. The trace then holds
  these steps and no others. Starting and writing a trace takes seconds, during which `paused` stops
  the clock of the run. If a trace cannot be made, this is logged and the run continues.
  """

  def __init__(
    self,
    *,
    folder: Path,
    first: int,
    count: int,
    total: int,
    paused: Callable[[], AbstractContextManager],
  ):
    self._folder = folder
    self._first = first
    self._last = min(first + count - 1, total)
    self._paused = paused
    self._is_tracing = False
    if count and first > total:
      last = f"and the run ends at step {total}"
      log(f"no step is traced: tracing would begin at step {first}, {last}")

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(self, *_: object) -> None:
    if self._is_tracing:
      self._stop()

  def on_step_begin(self, step: int, metrics: PyTree) -> None:
    """Start the trace if it begins here; `metrics` are those of the step before."""
    if self._first == step <= self._last:
      jax.block_until_ready(metrics)
      self._is_tracing = self._try(lambda: jax.profiler.start_trace(self._folder))

  def on_step_end(self, step: int, metrics: PyTree) -> None:
    """Write the trace if it ends with this step, once its `metrics` are ready."""
    if self._is_tracing and step == self._last:
      jax.block_until_ready(metrics)
      self._stop()

  def _stop(self) -> None:
    self._is_tracing = False
    if self._try(jax.profiler.stop_trace):
      steps = f"steps {self._first} to {self._last}"
      log(f"{steps} are traced in {self._folder}; to view them: `xprof {self._folder}`")

  def _try(self, action: Callable[[], object]) -> bool:
    try:
      with self._paused():
        action()
    except Exception as error:  # a full disk, or another trace in this process
      log(f"no trace in {self._folder}: {first_line(error)}")
      return False
    return True
