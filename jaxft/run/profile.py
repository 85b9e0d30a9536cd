"""A trace of some steps, by JAX's own profiler: what the devices did, and when they waited."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax

from jaxft.run.tracking import say


class Profile:
  """Steps `first`, `first + 1`, ... of this start, `count` of them, into a folder. A context manager: a trace ends with it.

  The device is done with what was before when a trace begins, and with the last step when it ends: it holds these steps and no
  part of others. `paused` stops the clock of the run while a trace is begun or written, which takes seconds.
  """

  def __init__(self, folder: Path, first: int, count: int, paused: Callable[[], AbstractContextManager]):
    self._folder, self._first, self._last, self._under_way = folder, first, first + count - 1, False
    self._paused = paused

  def __enter__(self) -> "Profile":
    return self

  def __exit__(self, *_) -> None:
    if self._under_way:
      jax.profiler.stop_trace()

  def before(self, step: int, numbers: Any) -> None:
    """`numbers`: what the step before it gives."""
    if self._first == step <= self._last:
      jax.block_until_ready(numbers)
      with self._paused():
        jax.profiler.start_trace(self._folder)
      self._under_way = True

  def after(self, step: int, numbers: Any) -> None:
    if self._under_way and step == self._last:
      jax.block_until_ready(numbers)
      with self._paused():
        jax.profiler.stop_trace()
      self._under_way = False
      say(f"steps {self._first} to {self._last} are traced in {self._folder}: `xprof {self._folder}` shows them")
