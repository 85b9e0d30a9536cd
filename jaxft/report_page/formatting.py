"""How pages say numbers and settings, and what a run came to."""

import datetime
from typing import Any, NamedTuple

from jaxft.report_page.run_record import RunRecord, get_dict, get_int
from jaxft.utils.redact import redact

# Exit codes of a run that did not finish.
EXIT_REASONS = {
  2: "the request is wrong",
  3: "loss or gradient not finite",
  4: "storage",
  5: "another process of the run was lost",
  75: "asked to stop",
  130: "interrupted",
}
MIN_CHANGE = 0.005  # a change of the eval loss by a smaller share is no news


def format_number(value: float) -> str:
  """11.11, 0.4701, 66,787: four digits, and all before the point."""
  if abs(value) >= 1e7 or value and abs(value) < 1e-3:
    return f"{value:.3g}"
  return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}" if value else "0"


def format_speed(tokens: float) -> str:
  """Tokens a second: 66,787, 941, 15.8."""
  return f"{tokens:,.0f}" if tokens >= 100 else f"{tokens:.3g}"


def format_duration(seconds: int) -> str:
  """59 s, 3 min 20 s, 1,000 h 5 min."""
  hours, minutes = seconds // 3600, seconds // 60 % 60
  if hours:
    return f"{hours:,} h {minutes} min"
  return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"


def unit_name(record: RunRecord) -> str:
  """What a run learns from, and counts: the labels of texts, or tokens."""
  return "text" if record.classifies else "token"


def format_percent(share: float) -> str:
  return f"{100 * share:.1f} %"


def format_setting(value: Any, most: int = 300) -> str:
  """The value of a setting, cut short where it is long."""
  text = (
    ", ".join(map(str, value))
    if isinstance(value, tuple)
    else "not set"
    if value is None
    else str(value)
  )
  text = redact(text) or "empty"
  return text if len(text) <= most else f"{text[:most]} ... ({len(text):,} characters)"


def model_name(record: RunRecord) -> str:
  """A hub id, or the last two parts of a path."""
  return format_setting(
    "/".join(str(record.config.get("model.path") or "a model").rstrip("/").split("/")[-2:]), 80
  )


def run_status(record: RunRecord) -> tuple[bool, str]:
  """Whether the run came to its end, and how it stands, in a line or, of a failure, more."""
  ending, total, last = get_dict(record.about, "ending"), record.total_steps, record.last_step
  code, why = get_int(ending, "exit_code"), ending.get("why")
  at = f"step {last:,}" + (f" of {total:,}" if total else "")
  if code == 0:
    early = total and last < total
    return (
      True,
      f"ended early at {at}: no lower eval loss" if early else f"finished at step {last:,}",
    )
  if code is not None:
    said = f"\n{format_setting(why, 2000)}" if why else ""
    return (
      False,
      f"Stopped at {at}, exit code {code} ({EXIT_REASONS.get(code, 'a fault of the program')}).{said}",
    )
  if not record.about and total and last >= total:
    return True, f"finished at step {last:,}"
  return (
    False,
    f"Stopped at {at}: the run was killed, or is still going on. The same command continues it.",
  )


# What a page tells of an evaluation, where it was measured.
METRIC_NAMES = {
  "eval/accuracy": "accuracy",
  "eval/f1": "F1",
  "eval/loss": "eval loss",
  "eval/perplexity": "perplexity",
  "eval/bits_per_byte": "bits a byte",
  "eval/unrelated_loss": "loss, unrelated text",
  "eval/unrelated_perplexity": "perplexity, unrelated text",
}


FRACTION_METRICS = ("eval/accuracy", "eval/f1")


def measured_metrics(records: list[RunRecord]) -> list[str]:
  """The keys of MEASURES that any of the runs has; the perplexity of labels says nothing."""
  apart = {"eval/perplexity"} if any(record.classifies for record in records) else set()
  return [
    key
    for key in METRIC_NAMES
    if key not in apart and any(record.points(key) for record in records)
  ]


class HeadlineMetric(NamedTuple):
  """The measure that the page is about."""

  name: str
  key: str
  before: float
  after: (
    float | None
  )  # of the exported weights; None where nothing was evaluated after the first step
  better: bool | None  # None where it hardly changed, or is not known


def headline_metric(record: RunRecord) -> HeadlineMetric | None:
  """Accuracy of a model that classifies, else the eval loss; None where nothing was evaluated."""
  by_accuracy = record.classifies and bool(record.points("eval/accuracy"))
  key, name = ("eval/accuracy", "accuracy") if by_accuracy else ("eval/loss", "eval loss")
  ends = record.first_and_final(key)
  if len(ends) < 2:
    return HeadlineMetric(name, key, ends[0], None, None) if ends else None
  change = ends[1] - ends[0]
  return HeadlineMetric(
    name,
    key,
    *ends,
    None if abs(change) < MIN_CHANGE * abs(ends[0]) else (change > 0) == by_accuracy,
  )


def format_metric(key: str, value: float | str) -> str:
  """A value of metrics.jsonl, as people say it."""
  if isinstance(value, str):
    return value
  return format_percent(value) if key in FRACTION_METRICS else format_number(value)


def headline(record: RunRecord, finished: bool) -> str:
  """Did fine-tuning do anything? In one line."""
  found = headline_metric(record)
  if found is None:
    losses = record.points("train/loss")
    if not losses:
      return "No step was logged and nothing was evaluated"
    first, last = (format_number(loss) for _, loss in (losses[0], losses[-1]))
    return f"Not evaluated; the training loss went from {first} to {last}"
  value = lambda it: format_metric(found.key, it)
  if found.after is None:
    return f"{found.name.capitalize()} before the first step: {value(found.before)}" + (
      "" if finished else "; none after"
    )
  rose = found.after > found.before
  verb = ("rose" if rose else "fell") if found.better is not None else "hardly changed:"
  return f"{found.name.capitalize()} {verb} from {value(found.before)} to {value(found.after)}"


def time_span(record: RunRecord) -> str | None:
  """When the run was started, and how long its only start took."""
  starts, ended = record.starts, get_dict(record.about, "ending").get("at")
  if not starts:
    return None
  try:
    begun = datetime.datetime.fromisoformat(starts[0]["at"])
    said = begun.strftime("%d %B %Y, %H:%M UTC").lstrip("0")
    if len(starts) > 1:
      return f"{said}; started {len(starts)} times"
    took = (
      int((datetime.datetime.fromisoformat(ended) - begun).total_seconds())
      if isinstance(ended, str)
      else None
    )
  except (KeyError, TypeError, ValueError):
    return None
  if took is None:
    return said
  return f"{said}; took {format_duration(took)}"
