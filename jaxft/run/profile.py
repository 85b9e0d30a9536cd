"""A trace of some steps, by JAX's own profiler: what the devices did, and when they waited."""

from pathlib import Path
from typing import Any

import jax

from jaxft.run.tracking import say


class Profile:
  """Steps `first`, `first + 1`, ... of this start, `count` of them, into a folder. A context manager: a trace ends with it."""

  def __init__(self, folder: Path, first: int, count: int):
    self._folder, self._first, self._last, self._under_way = folder, first, first + count - 1, False

  def __enter__(self) -> "Profile":
    return self

  def __exit__(self, *_) -> None:
    if self._under_way:
      jax.profiler.stop_trace()

  def before(self, step: int) -> None:
    if self._first == step <= self._last:
      jax.profiler.start_trace(self._folder)
      self._under_way = True

  def after(self, step: int, numbers: Any) -> None:
    if self._under_way and step == self._last:
      jax.block_until_ready(numbers)
      jax.profiler.stop_trace()
      self._under_way = False
      say(f"steps {self._first} to {self._last} are traced in {self._folder}: `xprof {self._folder}` shows them")
