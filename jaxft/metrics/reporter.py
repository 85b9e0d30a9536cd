"""Metrics of a run: console lines, metrics.jsonl and samples.jsonl in the workdir."""

import contextlib
import functools
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxft.config import Config
from jaxft.errors import NumericsError, StorageError
from jaxft.metrics.system import SystemMetrics
from jaxft.utils.console import ProgressBar, console, log
from jaxft.utils.files import atomic_write, write_failure


class JsonlLog:
  """A .jsonl file of objects that have a "step"; a resume removes the lines of lost steps."""

  def __init__(self, file: Path, last_step: int, writes: bool):
    """Reads the file and drops lines that the run is about to write again.

    Args:
      last_step: entries after it are dropped, and those of the end; -1 drops all.
      writes: false in all processes of a run but one; they only remember.
    """
    self.entries: list[dict[str, Any]] = []
    self.dropped: list[dict[str, Any]] = []
    self._file = file
    self._writes = writes
    if file.exists():
      for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
          values = json.loads(line)
          is_valid = values["step"] <= last_step and values.get("when") != "after"
          (self.entries if is_valid else self.dropped).append(values)
        except (ValueError, KeyError, TypeError):
          continue  # cut short by a kill in the middle of a write
    if writes:
      atomic_write(file, "".join(json.dumps(values) + "\n" for values in self.entries))

  def write(self, step: int, values: dict[str, Any]) -> None:
    self.entries.append({"step": step} | values)
    if not self._writes:
      return
    try:
      with self._file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(self.entries[-1], allow_nan=False) + "\n")
    except OSError as error:
      raise StorageError(f"{self._file}: {write_failure(self._file, error)}") from error

  def values(self, key: str) -> list[Any]:
    """Returns all values of `key`, oldest first."""
    return [line[key] for line in self.entries if key in line]


class StepTimer:
  """Wall time of steps since the last reset, without what happens inside `paused`."""

  def __init__(self):
    self.restart()

  def restart(self) -> None:
    self._step_end = time.monotonic()
    self.reset()

  def count(self, tokens: int) -> None:
    """Counts a step that has just ended."""
    self._step_end = time.monotonic()
    self._steps += 1
    self._tokens += tokens

  def reset(self) -> None:
    """Starts again at the end of the last step.

    Devices have worked at the next step since then, so this time is part of that step.
    """
    self._started = self._step_end
    self._steps = self._tokens = 0

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    paused_at = time.monotonic()
    yield
    self._started += time.monotonic() - paused_at

  @property
  def tokens_per_second(self) -> float:
    return self._tokens / max(self._step_end - self._started, 1e-9)

  @property
  def step_seconds(self) -> float:
    return (self._step_end - self._started) / max(self._steps, 1)


class Reporter:
  """Logs steps, evaluations and samples, and ends a run whose numbers are no longer finite."""

  def __init__(
    self,
    config: Config,
    workdir: Path,
    start: int,
    total_steps: int,
    tokens_seen: int,
    entropy_floor: float | None,
    device: jax.Device,
    ideal_step_seconds: float | None = None,
    system: SystemMetrics | None = None,
    num_rows: int = 1,
  ):
    """Opens metrics.jsonl and samples.jsonl in the workdir.

    Args:
      ideal_step_seconds: of a step at peak FLOP/s, for the MFU; None where the peak is not known.
      num_rows: rows of an epoch.
    """
    self.tokens_seen = tokens_seen
    self.clock = StepTimer()
    self._train = config.train
    self._total_steps = total_steps
    self._entropy_floor = entropy_floor
    self._device = device
    self._num_nonfinite = 0  # steps in a row
    self._ideal_step_seconds = ideal_step_seconds
    self._is_due = functools.partial(
      due_at, config.train.log_every, rows=num_rows, batch_size=config.train.batch_size
    )
    last_step = start if start else -1  # a run that begins again evaluates and samples again
    writes = jax.process_index() == 0
    self.metrics, self.samples = (
      JsonlLog(workdir / name, last_step, writes) for name in ("metrics.jsonl", "samples.jsonl")
    )
    # Gets each entry that was written.
    self.on_entry: Callable[[str, dict[str, Any]], None] = lambda kind, entry: None
    self._system = system

  def log_step(
    self,
    step: int,
    metrics: dict[str, Any],
    progress: ProgressBar,
    nonfinite_names: Callable[[Any], list[str]],
  ) -> None:
    """Logs the metrics of a train step.

    Raises NumericsError after `train.max_bad_steps` steps in a row with a loss or gradient that is
    not finite.
    """
    loss, norm, rate = (float(metrics[key]) for key in ("loss", "grad_norm", "learning_rate"))
    self.tokens_seen += int(metrics["tokens"])
    self.clock.count(int(metrics["tokens"]))
    speed = f"{self.clock.tokens_per_second:,.0f} tokens/s"
    mfu = {}
    if self._ideal_step_seconds:
      mfu = {"perf/mfu": round(self._ideal_step_seconds / self.clock.step_seconds, 4)}
      speed += f"  MFU {mfu['perf/mfu']:.0%}"
    progress.update(step, f"loss {loss:.4f}  {speed}")
    if self._is_due(step) or step == self._total_steps or metrics["bad"]:
      self._write(
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
      )
      if not console.live:
        minutes, seconds = divmod(round((self._total_steps - step) * self.clock.step_seconds), 60)
        values = f"loss {loss:.4f}  lr {rate:.2e}  {speed}"
        log(f"step {step}/{self._total_steps}  {values}  {minutes}:{seconds:02} left")
      self.clock.reset()
    self._num_nonfinite = self._num_nonfinite + 1 if metrics["bad"] else 0
    if metrics["bad"]:
      leaves = nonfinite_names(metrics["bad_leaves"])
      more = f" and {len(leaves) - 1} more" if leaves[1:] else ""
      nonfinite = f"; not finite: {leaves[0]}{more}" if leaves else ""
      what = f"step {step}: loss {loss}, gradient norm {norm}{nonfinite}"
      log(f"{what}: not applied, the weights are as before")
      if self._num_nonfinite >= self._train.max_bad_steps:
        raise NumericsError(
          f"{what}, for {self._num_nonfinite} step(s) in a row; they changed no weight. "
          "Try a lower config.optim.learning_rate, or look at the data of this step"
        )

  def _write(self, step: int, values: dict[str, Any]) -> None:
    self.metrics.write(step, values)
    self.on_entry("metrics", self.metrics.entries[-1])

  def log_eval(
    self, step: int, when: str, result: Any, nbytes: int = 0, unrelated: Any | None = None
  ) -> dict[str, float]:
    """Logs an `EvalResult` of the validation text, and one of `data.unrelated`.

    Raises NumericsError when the first has no finite loss.

    Args:
      nbytes: of the validation text; 0 where that is not known.
    """
    if not math.isfinite(result.loss):
      problem = "the weights give no finite numbers on the validation text"
      raise NumericsError(f"{when}: eval loss {result.loss}: {problem}")
    metrics = {"eval/loss": result.loss, "eval/perplexity": result.perplexity}
    if nbytes:
      metrics["eval/bits_per_byte"] = bits_per_byte(result.loss, result.tokens, nbytes)
    details = f"perplexity {result.perplexity:.2f}"
    if result.confusion_CC is not None:
      metrics |= {"eval/accuracy": result.accuracy, "eval/f1": result.f1}
      details = f"accuracy {result.accuracy:.1%}, F1 {result.f1:.3f}"
    if unrelated:
      metrics |= _unrelated_metrics(unrelated)
      details += f"; on unrelated text {unrelated.loss:.4f}"
    entropy = ""
    floor = {}
    if self._entropy_floor is not None:
      entropy = f" (the text's own entropy: {self._entropy_floor:.4f})"
      floor = {"eval/floor": self._entropy_floor}
    self._write(step, metrics | floor)
    log(f"{when}: eval loss {result.loss:.4f}{entropy}, {details}")
    return metrics

  def log_unrelated(self, step: int, when: str, result: Any) -> None:
    """Logs an `EvalResult` of `data.unrelated`, where nothing else is held out."""
    self._write(step, _unrelated_metrics(result))
    log(f"{when}: on unrelated text {result.loss:.4f}")

  def evals_since_best(self) -> int:
    """Returns the number of evaluations since the one with the least loss."""
    losses = self.metrics.values("eval/loss")
    return len(losses) - 1 - min(range(len(losses)), key=losses.__getitem__) if losses else 0

  def log_sample(
    self, step: int, when: str, prompt: str, text: str, memorized: float | None
  ) -> None:
    """Logs a sample.

    Args:
      memorized: share of its 8-grams of tokens that the training text has; None for a shorter text.
    """
    entry = {"when": when, "prompt": prompt, "text": text, "seed": self._train.seed}
    if memorized is not None:
      entry["memorised_8grams"] = round(memorized, 4)
    self.samples.write(step, entry)
    self.on_entry("samples", self.samples.entries[-1])
    log(f"  [{when}] {prompt}|{text}".replace("\n", "\n    "))

  def summary(self, step: int) -> str:
    """Returns the eval loss before and at this step, and its floor, in one line."""
    entries = [entry for entry in self.metrics.entries if entry["step"] <= step]
    losses = [entry["eval/loss"] for entry in entries if "eval/loss" in entry]
    if not losses:  # a finished run whose metrics.jsonl is gone
      return "no eval loss: metrics.jsonl of this run is gone"
    floor = self._entropy_floor
    entropy = "" if floor is None else f"; the text's own entropy: {floor:.4f}"
    change = f"{100 * (losses[-1] / losses[0] - 1):+.1f} %"
    return f"eval loss {losses[0]:.4f} -> {losses[-1]:.4f} ({change}){entropy}"


def _unrelated_metrics(result: Any) -> dict[str, float | str]:
  perplexity = json_float(result.perplexity)
  return {"eval/unrelated_loss": json_float(result.loss), "eval/unrelated_perplexity": perplexity}


def due_at(every: int | str, step: int, rows: int, batch_size: int) -> bool:
  """Returns whether something is due after a step.

  Args:
    every: number of steps (0: never), or "epoch" for the end of each epoch of `rows`.
  """
  if every == "epoch":
    step_rows = min(batch_size, rows)
    return step * step_rows // rows > (step - 1) * step_rows // rows
  return every > 0 and step % every == 0


def bits_per_byte(loss: float, tokens: int, nbytes: int) -> float:
  """Converts a mean loss in nats per token of `tokens` tokens, or `nbytes` bytes of text."""
  return loss * tokens / (math.log(2) * nbytes)


def json_float(number: float) -> float | str:
  """Returns a finite number as it is, and "nan" or "inf" as text, because JSON has neither."""
  return number if math.isfinite(number) else str(number)


def peak_memory_bytes(device: jax.Device) -> int:
  """Returns the peak memory so far: of the device if it reports one, else of this process."""
  if peak_memory_source(device) == "device":
    return device.memory_stats()["peak_bytes_in_use"]
  kib = 1 if sys.platform == "darwin" else 1024  # getrusage counts KiB on Linux and bytes on macOS
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib


def peak_memory_source(device: jax.Device) -> str:
  """Returns what `peak_memory_bytes` is of: "device" or "process"."""
  return "device" if (device.memory_stats() or {}).get("peak_bytes_in_use") else "process"
