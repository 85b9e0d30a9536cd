"""The record of a run, read from its workdir."""

import json
from pathlib import Path
from typing import NamedTuple

import jaxft.config
from jaxft.errors import RequestError, first_line
from jaxft.utils.files import read_json_object
from jaxft.utils.types import Json

MAX_DRAWN = 1e300  # sums and differences of smaller numbers are finite
NUMERIC_CHECK_KEYS = ("train/loss", "train/grad_norm")
SAMPLE_KEYS = ("when", "prompt", "text")


class RunRecord(NamedTuple):
  """The files of a run; `notes` lists those that are missing or damaged."""

  workdir: Path
  name: str
  config: Json  # {"train.steps": 715, ...}
  about: Json  # about.json; empty if the file is missing
  data: Json  # data_report.json
  metrics: list[Json]  # ordered by step
  samples: list[Json]
  notes: list[str]  # sentences about unreadable files, without a full stop

  @property
  def classifies(self) -> bool:
    """Whether the model is a classifier."""
    return self.config.get("model.head") == "classification"

  @property
  def last_step(self) -> int:
    """The last known step of the run; not every step is logged."""
    return max([get_int(self.about, "reached") or 0, *(line["step"] for line in self.metrics)])

  @property
  def starts(self) -> list[Json]:
    """Time, devices and step of each start of the run."""
    starts = self.about.get("starts")
    return [it for it in starts if isinstance(it, dict)] if isinstance(starts, list) else []

  @property
  def total_steps(self) -> int | None:
    """The planned number of steps; None if unknown."""
    steps = get_int(self.about, "total_steps") or get_int(self.data, "steps_in_all")
    return steps or get_int(self.config, "train.steps") or None

  @property
  def exported_step(self) -> int:
    """The step of the exported weights: the last, or best by `keep_best_metric`."""
    if (exported := get_int(self.about, "exported_step")) is not None:
      return exported
    # Runs before 2026-11-28 lack this value. Step 0 has no checkpoint, so it is never exported.
    after = [it["step"] for it in self.samples if it["when"] == "after"]
    points = [it for it in self.points(self.config.get("train.keep_best_metric") or "") if it[0]]
    if not after and points and get_int(self.about, "ending", "exit_code") == 0:
      return min(points, key=lambda it: it[1])[0]
    return after[-1] if after else self.last_step

  def first_and_final(self, key: str) -> list[float]:
    """Return the values of `cells` that are finite numbers."""
    return [value for value in self.cells(key) if not isinstance(value, str)]

  def cells(self, key: str) -> list[float | str]:
    """Return the first value of `key` and that of the exported weights.

    The list is shorter if the run has fewer values. A number that is not finite is text: the
    perplexity of a large loss is "inf".
    """
    exported_step = self.exported_step
    lines = [line for line in self.metrics if line["step"] <= exported_step]
    steps = [line["step"] for line in lines if metric_cell(line, key) != ""]
    cells = [cell for line in lines if (cell := metric_cell(line, key)) != ""]
    return [cells[0], cells[-1]] if cells and steps[-1] > steps[0] else cells[:1]

  def memorized_share(self, when: str) -> float | None:
    """Return the mean share of the samples' 8-grams that occur in the training text.

    Args:
      when: "before" or "after" training.
    """
    shares = [get_float(it, "memorised_8grams") for it in self.samples if it["when"] == when]
    shares = [it for it in shares if it is not None]
    return sum(shares) / len(shares) if shares else None

  @property
  def nonfinite_steps(self) -> list[int]:
    """Steps whose loss or gradient norm is not finite: text in metrics.jsonl."""

    def is_text(line: Json) -> bool:
      return any(type(line.get(key)) is str for key in NUMERIC_CHECK_KEYS)

    return [line["step"] for line in self.metrics if is_text(line)]

  def points(self, key: str) -> list[tuple[int, float]]:
    """Return (step, value) of every line with a number for `key`."""
    points = ((line["step"], get_float(line, key)) for line in self.metrics)
    return [(step, value) for step, value in points if value is not None]

  def without_outliers(self, key: str) -> list[tuple[int, float]]:
    """Return the `points` of a speed, without steps that seem to take no time.

    The results of several steps were read at the same moment.
    """
    limit = 4 * (self.median(key) or 0)
    return [(step, value) for step, value in self.points(key) if value <= limit]

  def median(self, key: str) -> float | None:
    """Return the median of `key`; it ignores pauses and a first step that compiles."""
    values = sorted(value for _, value in self.points(key))
    return values[len(values) // 2] if values else None


def get_value(values: object, *keys: str) -> object:
  """Return values[key][key]..., or None."""
  for key in keys:
    values = values.get(key) if isinstance(values, dict) else None
  return values


def get_float(values: object, *keys: str) -> float | None:
  """Return the number at these keys, or None."""
  value = get_value(values, *keys)
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return value if is_number and abs(value) <= MAX_DRAWN else None  # false for NaN


def metric_cell(line: Json, key: str) -> float | str:
  """Return the number at `key`, text if it cannot be drawn, or "" without a value."""
  value = get_float(line, key)
  if value is not None:
    return value
  raw = line.get(key)
  if type(raw) in (int, float):
    return f"{raw:.3g}"
  return raw if raw in ("inf", "-inf", "nan") else ""


def get_int(values: object, *keys: str) -> int | None:
  """Return the number at these keys as an integer, or None."""
  value = get_float(values, *keys)
  return int(value) if value is not None else None


def get_dict(values: object, *keys: str) -> Json:
  """Return the object at these keys, or {}."""
  value = get_value(values, *keys)
  return value if isinstance(value, dict) else {}


def load(workdir: Path) -> RunRecord:
  """Read the files of a run.

  Raises:
    RequestError: the folder is not the workdir of a run.
  """
  file = workdir / "config.json"
  advice = "give the --workdir of a jaxft.train run"
  if not file.is_file():
    problem = "has no config.json" if workdir.is_dir() else "no such folder"
    raise RequestError(f"{workdir}: {problem}; {advice}")
  try:
    config = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise RequestError(f"{file}: {first_line(error)}; it is not the config of a run") from error
  if not isinstance(config, dict) or not isinstance(config.get("train"), dict):
    raise RequestError(f"{file} contains no settings of jaxft.train; {advice}")
  config = jaxft.config.rename_saved(config)
  notes: list[str] = []

  def is_sample(line: Json) -> bool:
    return all(type(line.get(key)) is str for key in SAMPLE_KEYS)

  return RunRecord(
    workdir=workdir,
    name=workdir.resolve().name,
    config=jaxft.config.flatten(config),
    about=read_json_object(workdir / "about.json", notes),
    data=read_json_object(workdir / "data_report.json", notes),
    metrics=sorted(_read_jsonl(workdir / "metrics.jsonl", notes), key=lambda line: line["step"]),
    samples=list(filter(is_sample, _read_jsonl(workdir / "samples.jsonl", notes))),
    notes=notes,
  )


def _read_jsonl(file: Path, notes: list[str]) -> list[Json]:
  """Return the objects of a .jsonl file that have a step; note the others.

  Args:
    file: the file.
    notes: gets a sentence if the file or some of its lines cannot be read.
  """
  try:
    texts = file.read_text(encoding="utf-8", errors="replace").splitlines()
  except OSError as error:
    missing = isinstance(error, FileNotFoundError)
    problem = "does not exist" if missing else f"cannot be read ({error.strerror})"
    notes.append(f"{file.name} {problem}; the page omits its content")
    return []
  lines = []
  for text in texts:
    try:
      line = json.loads(text)
    except (ValueError, RecursionError):
      continue
    step = line.get("step") if isinstance(line, dict) else None
    if type(step) is int and 0 <= step <= jaxft.config.MAX_INT:
      lines.append(line)
  if lost := len(texts) - len(lines):
    damage = f"{lost:,} of {len(texts):,} lines of {file.name} cannot be read"
    notes.append(f"{damage}; a killed run leaves its last line incomplete")
  return lines
