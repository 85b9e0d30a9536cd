"""What a workdir tells of its run. Files that are missing or damaged are told in `notes`; what there is can be shown."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jaxft.config
from jaxft.errors import RequestError, first_line
from jaxft.utils.files import read_json_object

MAX_DRAWN = 1e300  # of what is drawn: sums and differences of such numbers are still finite


class RunRecord(NamedTuple):
  workdir: Path
  name: str
  config: dict[str, Any]  # {"train.steps": 715, ...}
  about: dict[str, Any]  # about.json; empty where a run left none
  data: dict[str, Any]  # data_report.json
  metrics: list[dict[str, Any]]  # in the order of their steps
  samples: list[dict[str, Any]]
  notes: list[str]  # what could not be read

  @property
  def classifies(self) -> bool:
    return self.config.get("model.head") == "classification"

  @property
  def last_step(self) -> int:
    """The last one that was taken, or as far as is known: not every step is logged."""
    return max([get_int(self.about, "reached") or 0, *(line["step"] for line in self.metrics)])

  @property
  def starts(self) -> list[dict[str, Any]]:
    """When, where and at which step the run was started and continued."""
    found = self.about.get("starts")
    return [it for it in found if isinstance(it, dict)] if isinstance(found, list) else []

  @property
  def total_steps(self) -> int | None:
    for place, key in (
      (self.about, "total_steps"),
      (self.data, "steps_in_all"),
      (self.config, "train.steps"),
    ):
      if total := get_int(place, key):
        return total
    return None

  @property
  def exported_step(self) -> int:
    """Of the weights that went out: the last step's or, where a metric chose them, the best."""
    if (exported := get_int(self.about, "exported_step")) is not None:
      return exported
    # A run of before 2026-11-28. There is no checkpoint of step 0.
    after = [it["step"] for it in self.samples if it["when"] == "after"]
    chosen = [it for it in self.points(self.config.get("train.keep_best_metric") or "") if it[0]]
    if not after and chosen and get_int(self.about, "ending", "exit_code") == 0:
      return min(chosen, key=lambda it: it[1])[0]
    return after[-1] if after else self.last_step

  def first_and_final(self, key: str) -> list[float]:
    """The first value of `key` and the one of the exported weights: one, if only the first was measured; none, if none was."""
    return [value for value in self.cells(key) if not isinstance(value, str)]

  def cells(self, key: str) -> list[float | str]:
    """`ends`, and as text what is no finite number: the perplexity of a large loss is "inf"."""
    exported = self.exported_step
    found = [
      (line["step"], cell)
      for line in self.metrics
      if line["step"] <= exported and (cell := metric_cell(line, key)) != ""
    ]
    return (
      [found[0][1], found[-1][1]]
      if found and found[-1][0] > found[0][0]
      else [it for _, it in found[:1]]
    )

  def memorized_share(self, when: str) -> float | None:
    """The mean share of 8-grams of the samples before or after that stand in the training text."""
    found = [get_float(it, "memorised_8grams") for it in self.samples if it["when"] == when]
    found = [it for it in found if it is not None]
    return sum(found) / len(found) if found else None

  @property
  def nonfinite_steps(self) -> list[int]:
    """Steps whose loss or gradient norm was no finite number: they are in metrics.jsonl as text."""
    return [
      line["step"]
      for line in self.metrics
      if any(type(line.get(key)) is str for key in NUMERIC_CHECK_KEYS)
    ]

  def points(self, key: str) -> list[tuple[int, float]]:
    """(step, value) of every line that has a number for `key`."""
    found = ((line["step"], get_float(line, key)) for line in self.metrics)
    return [(step, value) for step, value in found if value is not None]

  def without_outliers(self, key: str) -> list[tuple[int, float]]:
    """`points` of a speed, without those of steps that were read at one moment, which seem to have taken no time."""
    most = 4 * (self.median(key) or 0)
    return [(step, value) for step, value in self.points(key) if value <= most]

  def median(self, key: str) -> float | None:
    """The median of the values of `key`: a first step that compiles, or a pause, does not count."""
    values = sorted(value for _, value in self.points(key))
    return values[len(values) // 2] if values else None


NUMERIC_CHECK_KEYS = ("train/loss", "train/grad_norm")


def get_float(values: Any, *keys: str) -> float | None:
  """The number at values[key][key]...; None where there is none."""
  for key in keys:
    values = values.get(key) if isinstance(values, dict) else None
  if type(values) not in (int, float) or not abs(values) <= MAX_DRAWN:  # which NaN is not either
    return None
  return values


def metric_cell(line: dict[str, Any], key: str) -> float | str:
  """What a line of metrics.jsonl has for `key`: a number, a text for one that is not finite or cannot be drawn, or ""."""
  value, found = get_float(line, key), line.get(key)
  if value is not None:
    return value
  return (
    f"{found:.3g}"
    if type(found) in (int, float)
    else found
    if found in ("inf", "-inf", "nan")
    else ""
  )


def get_int(values: Any, *keys: str) -> int | None:
  found = get_float(values, *keys)
  return int(found) if found is not None else None


def get_dict(values: dict[str, Any], key: str) -> dict[str, Any]:
  """The object at `key`; an empty one where there is none."""
  found = values.get(key)
  return found if isinstance(found, dict) else {}


def load(workdir: Path) -> RunRecord:
  """Raises RequestError when the folder is not one that a run has begun to write."""
  file, notes = workdir / "config.json", []
  if not file.is_file():
    what = "has no config.json" if workdir.is_dir() else "no such folder"
    raise RequestError(
      f"{workdir}: {what}; name a folder that jaxft.train has written (its --workdir)"
    )
  try:
    config = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise RequestError(f"{file}: {first_line(error)}; it is not the config of a run") from error
  if not isinstance(config, dict) or not isinstance(config.get("train"), dict):
    raise RequestError(
      f"{file}: no settings of jaxft.train in it; name a folder that jaxft.train has written"
    )
  return RunRecord(
    workdir,
    workdir.resolve().name,
    jaxft.config.flatten(config),
    read_json_object(workdir / "about.json", notes),
    read_json_object(workdir / "data_report.json", notes),
    sorted(_read_jsonl(workdir / "metrics.jsonl", notes), key=lambda line: line["step"]),
    [
      it
      for it in _read_jsonl(workdir / "samples.jsonl", notes)
      if all(type(it.get(key)) is str for key in SAMPLE_KEYS)
    ],
    notes,
  )


SAMPLE_KEYS = ("when", "prompt", "text")


def _read_jsonl(file: Path, notes: list[str]) -> list[dict[str, Any]]:
  """The objects of a .jsonl file that have a step; the others are counted in `notes`."""
  try:
    texts = file.read_text(encoding="utf-8", errors="replace").splitlines()
  except OSError as error:
    told = "There is no" if isinstance(error, FileNotFoundError) else f"{error.strerror}:"
    notes.append(f"{told} {file.name}: what it tells is left out")
    return []
  found = []
  for text in texts:
    try:
      values = json.loads(text)
    except (ValueError, RecursionError):
      continue
    if (
      isinstance(values, dict)
      and type(values.get("step")) is int
      and 0 <= values["step"] <= jaxft.config.MAX_INT
    ):
      found.append(values)
  if lost := len(texts) - len(found):
    notes.append(
      f"{lost:,} of {len(texts):,} lines of {file.name} cannot be read; a kill cuts the last one short"
    )
  return found
