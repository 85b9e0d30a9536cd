"""The metrics logger: sends each step, evaluation and sample to every sink."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TypeAlias

import jax
import numpy as np

from jaxft.config import TrainSection
from jaxft.errors import NumericsError
from jaxft.metrics.sinks import Kind, Sink
from jaxft.metrics.system import SystemMetrics, peak_memory_bytes
from jaxft.utils.console import ProgressBar, console
from jaxft.utils.logger import log
from jaxft.utils.types import Json

OnStep: TypeAlias = Callable[[int, dict[str, float]], None]  # a user's function: step, metrics


class StepTimer:
  """Wall time of steps since the last reset, excluding the time inside `paused`."""

  def __init__(self):
    self.restart()

  def restart(self) -> None:
    """Start at zero, now."""
    self._step_end = time.monotonic()
    self.reset()

  def count(self, tokens: int) -> None:
    """Count a step that has just ended, with this many tokens."""
    self._step_end = time.monotonic()
    self._steps += 1
    self._tokens += tokens

  def reset(self) -> None:
    """Start again at the end of the last step, not now.

    The devices began the next step then, so the time since belongs to that step.
    """
    self._started = self._step_end
    self._steps = self._tokens = 0

  @contextlib.contextmanager
  def paused(self) -> Generator[None]:
    """Exclude the time inside this context, such as that of an evaluation."""
    paused_at = time.monotonic()
    yield
    self._started += time.monotonic() - paused_at

  @property
  def tokens_per_second(self) -> float:
    """Tokens per second since the last reset."""
    return self._tokens / max(self._step_end - self._started, 1e-9)

  @property
  def step_seconds(self) -> float:
    """Mean seconds of a step since the last reset."""
    return (self._step_end - self._started) / max(self._steps, 1)


class MetricsLogger:
  """Sends entries to the sinks, and ends a run whose steps are no longer finite."""

  def __init__(
    self,
    *,
    train: TrainSection,
    sinks: Sequence[Sink],
    total_steps: int,
    num_rows: int,
    device: jax.Device,
    nonfinite_names: Callable[[np.ndarray], list[str]],
    tokens_seen: int = 0,
    ideal_step_seconds: float | None = None,
    system: SystemMetrics | None = None,
    on_step: OnStep | None = None,
  ):
    """Start the clock.

    Args:
      train: `config.train`.
      sinks: get each entry, in this order.
      total_steps: steps of the whole run.
      num_rows: sequences of an epoch.
      device: the device whose peak memory is logged.
      nonfinite_names: returns the names of the leaves in `metrics["bad_leaves"]`.
      tokens_seen: tokens of the steps before this start of the run.
      ideal_step_seconds: time of a step at peak FLOP/s, for the MFU; None if the peak is unknown.
      system: its readings become part of each step's entry.
      on_step: called after each train step, whether it is logged or not.
    """
    self.tokens_seen = tokens_seen
    self.clock = StepTimer()
    self._sinks = sinks
    self._total_steps = total_steps
    self._device = device
    self._nonfinite_names = nonfinite_names
    self._max_bad_steps = train.max_bad_steps
    self._num_nonfinite = 0  # consecutive skipped steps
    self._ideal_step_seconds = ideal_step_seconds
    self._is_due = functools.partial(
      due_at, train.log_every, rows=num_rows, batch_size=train.batch_size
    )
    self._system = system
    self._on_step = on_step

  def write(self, kind: Kind, step: int, values: Json, line: str = "") -> None:
    """Send an entry to all sinks, with the same content as a readable line."""
    entry = {"step": step} | values
    for sink in self._sinks:
      sink.write(kind, entry, line)

  def log_step(self, step: int, metrics: Mapping[str, np.ndarray], progress: ProgressBar) -> None:
    """Log the metrics of a train step.

    Args:
      step: number of the step, from 1.
      metrics: outputs of the train step: loss, grad_norm, learning_rate, tokens, bad, bad_leaves.
      progress: the bar to update.

    Raises:
      NumericsError: after `train.max_bad_steps` consecutive steps whose loss or gradient is not
        finite.
    """
    loss, norm, rate = (float(metrics[key]) for key in ("loss", "grad_norm", "learning_rate"))
    self.tokens_seen += int(metrics["tokens"])
    if self._on_step:
      numbers = {"loss": loss, "grad_norm": norm, "learning_rate": rate}
      self._on_step(step, numbers | {"tokens": self.tokens_seen})
    self.clock.count(int(metrics["tokens"]))
    speed = f"{self.clock.tokens_per_second:,.0f} tokens/s"
    mfu = {}
    if self._ideal_step_seconds:
      mfu = {"perf/mfu": round(self._ideal_step_seconds / self.clock.step_seconds, 4)}
      speed += f"  MFU {mfu['perf/mfu']:.0%}"
    progress.update(step, f"loss {loss:.4f}  {speed}")
    if self._is_due(step) or step == self._total_steps or metrics["bad"]:
      minutes, seconds = divmod(round((self._total_steps - step) * self.clock.step_seconds), 60)
      line = f"loss {loss:.4f}  lr {rate:.2e}  {speed}  {minutes}:{seconds:02} left"
      self.write(
        "metrics",
        step,
        {
          "train/loss": json_float(loss),
          "train/learning_rate": rate,
          "train/grad_norm": json_float(norm),
          "train/tokens": self.tokens_seen,
          "perf/tokens_per_second": round(self.clock.tokens_per_second, 1),
          "perf/step_seconds": round(self.clock.step_seconds, 4),
          **mfu,
          "memory/peak_bytes": peak_memory_bytes(self._device),
          **(self._system.latest if self._system else {}),
        },
        "" if console.live else f"step {step}/{self._total_steps}  {line}",  # the bar shows it
      )
      self.clock.reset()
    self._check_finite(step, metrics, f"loss {loss}, gradient norm {norm}")

  def _check_finite(self, step: int, metrics: Mapping[str, np.ndarray], numbers: str) -> None:
    """Log a skipped step; raise NumericsError after too many in a row."""
    if not metrics["bad"]:
      self._num_nonfinite = 0
      return
    self._num_nonfinite += 1
    leaves = self._nonfinite_names(metrics["bad_leaves"])
    more = f" and {len(leaves) - 1} more" if leaves[1:] else ""
    nonfinite = f"; not finite: {leaves[0]}{more}" if leaves else ""
    what = f"step {step}: {numbers}{nonfinite}"
    log(f"{what}: step skipped, weights unchanged")
    if self._num_nonfinite >= self._max_bad_steps:
      raise NumericsError(
        f"{what}, for {self._num_nonfinite} step(s) in a row; they changed no weight. "
        "Try a lower config.optim.learning_rate, or inspect the data of this step"
      )


def due_at(every: int | str, step: int, rows: int, batch_size: int) -> bool:
  """Return whether a periodic action is due after a step.

  Args:
    every: number of steps (0: never), or "epoch" for the end of each epoch.
    step: number of the step, from 1.
    rows: sequences of an epoch.
    batch_size: sequences of a step.
  """
  if isinstance(every, str):
    step_rows = min(batch_size, rows)
    return step * step_rows // rows > (step - 1) * step_rows // rows
  return every > 0 and step % every == 0


def json_float(number: float) -> float | str:
  """Return a finite number unchanged, else text: JSON has no NaN and infinity."""
  return number if math.isfinite(number) else str(number)
