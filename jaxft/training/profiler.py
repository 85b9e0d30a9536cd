"""A trace of some steps, by JAX's own profiler: what the devices did, and when they waited."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax

from jaxft.errors import first_line
from jaxft.utils.console import log


class Profiler:
  """Steps `first`, `first + 1`, ... of this start, `count` of them or up to the last, into a folder. A context manager: a trace
  ends with it.

  The device is done with what was before when a trace begins, and with the last step when it ends: it holds these steps and no
  part of others. `paused` stops the clock of the run while a trace is begun or written, which takes seconds. A trace that
  cannot be made costs a line, not the run.
  """

  def __init__(
    self,
    folder: Path,
    first: int,
    count: int,
    total: int,
    paused: Callable[[], AbstractContextManager],
  ):
    self._folder, self._first, self._last, self._paused = (
      folder,
      first,
      min(first + count - 1, total),
      paused,
    )
    self._under_way = False
    if count and first > total:
      log(
        f"nothing is traced: the first step that would be is {first}, and the last of the run is {total}"
      )

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(self, *_) -> None:
    if self._under_way:
      self._stop()

  def on_step_begin(self, step: int, numbers: Any) -> None:
    """`numbers`: what the step before it gives."""
    if self._first == step <= self._last:
      jax.block_until_ready(numbers)
      self._under_way = self._tried(lambda: jax.profiler.start_trace(self._folder))

  def on_step_end(self, step: int, numbers: Any) -> None:
    if self._under_way and step == self._last:
      jax.block_until_ready(numbers)
      self._stop()

  def _stop(self) -> None:
    self._under_way = False
    if self._tried(jax.profiler.stop_trace):
      log(
        f"steps {self._first} to {self._last} are traced in {self._folder}: `xprof {self._folder}` shows them"
      )

  def _tried(self, call: Callable[[], None]) -> bool:
    try:
      with self._paused():
        call()
    except Exception as error:  # a full disk, or a trace that somebody else has begun
      log(f"no trace in {self._folder}: {first_line(error)}")
      return False
    return True
