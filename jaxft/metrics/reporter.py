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
from ml_collections import ConfigDict

from jaxft.errors import NumericsError, StorageError
from jaxft.metrics.system import SystemMetrics
from jaxft.utils.console import ProgressBar, console, log
from jaxft.utils.files import atomic_write, write_failure


class JsonlLog:
  """A .jsonl file of one object a line, each with a "step", which after a resume holds no line of a lost step."""

  def __init__(self, file: Path, last_step: int, writes: bool):
    """Drops lines after `last_step` and those of the end, which the run is about to write again; -1 drops all.

    writes: false in all processes of a run but one; they only remember.
    """
    self.entries: list[dict[str, Any]] = []
    self.dropped: list[dict[str, Any]] = []
    self._file, self._writes = file, writes
    if file.exists():
      for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
          values = json.loads(line)
          kept = values["step"] <= last_step and values.get("when") != "after"
          (self.entries if kept else self.dropped).append(values)
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
    """All values of `key`, oldest first."""
    return [line[key] for line in self.entries if key in line]


class StepTimer:
  """Wall time of steps since the last restart, without what happens inside `paused`."""

  def __init__(self):
    self.restart()

  def restart(self) -> None:
    self._counted = time.monotonic()
    self.reset()

  def count(self, tokens: int) -> None:
    """A step is over."""
    self._steps, self._tokens, self._counted = (
      self._steps + 1,
      self._tokens + tokens,
      time.monotonic(),
    )

  def reset(self) -> None:
    """Counts from the end of the last step, so what was done since, while devices worked at the next one, is part of that."""
    self._started, self._steps, self._tokens = self._counted, 0, 0

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    away = time.monotonic()
    yield
    self._started += time.monotonic() - away

  @property
  def tokens_per_second(self) -> float:
    return self._tokens / max(self._counted - self._started, 1e-9)

  @property
  def step_seconds(self) -> float:
    return (self._counted - self._started) / max(self._steps, 1)


class Reporter:
  """Tells of steps, evaluations and samples, and ends a run whose numbers are no longer finite."""

  def __init__(
    self,
    config: ConfigDict,
    workdir: Path,
    start: int,
    total_steps: int,
    tokens_seen: int,
    floor: float | None,
    device: jax.Device,
    seconds_at_peak: float | None = None,
    system: SystemMetrics | None = None,
    rows: int = 1,
  ):
    """`seconds_at_peak`: of a step, for its MFU; None where the device's peak is not known. `rows`: of an epoch."""
    self.tokens_seen, self.clock = tokens_seen, StepTimer()
    self._train, self._seed, self._total, self._floor, self._device = (
      config.train,
      config.train.seed,
      total_steps,
      floor,
      device,
    )
    self._bad_in_a_row, self._seconds_at_peak = 0, seconds_at_peak
    self._is_due = functools.partial(
      due_at, config.train.log_every, rows=rows, batch_size=config.train.batch_size
    )
    last_kept = start if start else -1  # a run that begins again evaluates and samples again
    writes = jax.process_index() == 0
    self.metrics, self.samples = (
      JsonlLog(workdir / name, last_kept, writes) for name in ("metrics.jsonl", "samples.jsonl")
    )
    self.on_entry: Callable[[str, dict[str, Any]], None] = lambda kind, line: (
      None
    )  # gets each line that was written
    self._system = system

  def log_step(
    self,
    step: int,
    numbers: dict[str, Any],
    meter: ProgressBar,
    name_bad_leaves: Callable[[Any], list[str]],
  ) -> None:
    """Takes the metrics of a train step; raises NumericsError after `train.max_bad_steps` bad ones in a row."""
    loss, norm, rate = (float(numbers[key]) for key in ("loss", "grad_norm", "learning_rate"))
    self.tokens_seen += int(numbers["tokens"])
    self.clock.count(int(numbers["tokens"]))
    speed, mfu = f"{self.clock.tokens_per_second:,.0f} tokens/s", {}
    if self._seconds_at_peak:
      mfu = {"perf/mfu": round(self._seconds_at_peak / self.clock.step_seconds, 4)}
      speed += f"  MFU {mfu['perf/mfu']:.0%}"
    meter.update(step, f"loss {loss:.4f}  {speed}")
    if self._is_due(step) or step == self._total or numbers["bad"]:
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
        left = round((self._total - step) * self.clock.step_seconds)
        log(
          f"step {step}/{self._total}  loss {loss:.4f}  lr {rate:.2e}  {speed}  {left // 60}:{left % 60:02} left"
        )
      self.clock.reset()
    self._bad_in_a_row = self._bad_in_a_row + 1 if numbers["bad"] else 0
    if numbers["bad"]:
      leaves = name_bad_leaves(numbers["bad_leaves"])
      where = (
        f"; not finite: {leaves[0]}" + (f" and {len(leaves) - 1} more" if leaves[1:] else "")
        if leaves
        else ""
      )
      what = f"step {step}: loss {loss}, gradient norm {norm}{where}"
      log(f"{what}: not applied, the weights are as before")
      if self._bad_in_a_row >= self._train.max_bad_steps:
        raise NumericsError(
          f"{what}, for {self._bad_in_a_row} step(s) in a row; they changed no weight. "
          "Try a lower config.optim.learning_rate, or look at the data of this step"
        )

  def _write(self, step: int, values: dict[str, Any]) -> None:
    self.metrics.write(step, values)
    self.on_entry("metrics", self.metrics.entries[-1])

  def log_eval(
    self, step: int, when: str, what: Any, nbytes: int = 0, unrelated: Any | None = None
  ) -> dict[str, float]:
    """Takes a `step.EvalResult` of text of so many bytes (0: not known), and one of `data.unrelated`.

    Raises NumericsError when the first has no finite loss.
    """
    if not math.isfinite(what.loss):
      raise NumericsError(
        f"{when}: eval loss {what.loss}: the weights give no finite numbers on the validation text"
      )
    floor = {} if self._floor is None else {"eval/floor": self._floor}
    found = {"eval/loss": what.loss, "eval/perplexity": what.perplexity}
    if nbytes:
      found["eval/bits_per_byte"] = bits_per_byte(what.loss, what.tokens, nbytes)
    beside = "" if self._floor is None else f" (the text's own entropy: {self._floor:.4f})"
    rest = f"perplexity {what.perplexity:.2f}"
    if what.confusion_CC is not None:
      found |= {"eval/accuracy": what.accuracy, "eval/f1": what.f1}
      rest = f"accuracy {what.accuracy:.1%}, F1 {what.f1:.3f}"
    if unrelated:
      found |= _unrelated_metrics(unrelated)
      rest += f"; on unrelated text {unrelated.loss:.4f}"
    self._write(step, found | floor)
    log(f"{when}: eval loss {what.loss:.4f}{beside}, {rest}")
    return found

  def log_unrelated(self, step: int, when: str, what: Any) -> None:
    """Takes a `step.EvalResult` of `data.unrelated`, where nothing else is held out."""
    self._write(step, _unrelated_metrics(what))
    log(f"{when}: on unrelated text {what.loss:.4f}")

  def evals_since_best(self) -> int:
    """How many evaluations there were since the one with the least loss."""
    losses = self.metrics.values("eval/loss")
    return len(losses) - 1 - min(range(len(losses)), key=losses.__getitem__) if losses else 0

  def log_sample(self, step: int, when: str, prompt: str, text: str, known: float | None) -> None:
    """`known`: share of the text's runs of 8 tokens that stand in the training text; None where it is shorter."""
    about = {"when": when, "prompt": prompt, "text": text, "seed": self._seed}
    self.samples.write(
      step, about if known is None else about | {"memorised_8grams": round(known, 4)}
    )
    self.on_entry("samples", self.samples.entries[-1])
    log(f"  [{when}] {prompt}|{text}".replace("\n", "\n    "))

  def summary(self, step: int) -> str:
    """Eval loss before and at this step, and the floor, in one line."""
    losses = [
      line["eval/loss"]
      for line in self.metrics.entries
      if "eval/loss" in line and line["step"] <= step
    ]
    if not losses:  # a finished run whose metrics.jsonl is gone
      return "no eval loss: metrics.jsonl of this run is gone"
    floor = "" if self._floor is None else f"; the text's own entropy: {self._floor:.4f}"
    return f"eval loss {losses[0]:.4f} -> {losses[-1]:.4f} ({100 * (losses[-1] / losses[0] - 1):+.1f} %){floor}"


def _unrelated_metrics(what: Any) -> dict[str, float | str]:
  perplexity = json_float(what.perplexity)
  return {"eval/unrelated_loss": json_float(what.loss), "eval/unrelated_perplexity": perplexity}


def due_at(every: int | str, step: int, rows: int, batch_size: int) -> bool:
  """Whether what happens every so many steps (0: never), or at the end of each epoch of so many rows, is due after a step."""
  if every == "epoch":
    a_step = min(batch_size, rows)
    return step * a_step // rows > (step - 1) * a_step // rows
  return every > 0 and step % every == 0


def bits_per_byte(loss: float, tokens: int, nbytes: int) -> float:
  """Of a loss in nats a token over so many tokens, which stand for so many bytes of text."""
  return loss * tokens / (math.log(2) * nbytes)


def json_float(number: float) -> float | str:
  """JSON has no NaN: "nan" and "inf" are written as text, so that they are seen for what they are."""
  return number if math.isfinite(number) else str(number)


def peak_memory_bytes(device: jax.Device) -> int:
  """Most memory in use so far: of the device where it keeps count, else of this process."""
  if peak_memory_source(device) == "device":
    return device.memory_stats()["peak_bytes_in_use"]
  kib = 1 if sys.platform == "darwin" else 1024  # getrusage counts KiB on Linux and bytes on macOS
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib


def peak_memory_source(device: jax.Device) -> str:
  """What `peak_memory_bytes` is of: "device" or "process"."""
  return "device" if (device.memory_stats() or {}).get("peak_bytes_in_use") else "process"
