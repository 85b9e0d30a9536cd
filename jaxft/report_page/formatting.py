"""Texts of the pages: numbers, settings and the outcome of a run."""

import datetime
from typing import NamedTuple

from jaxft.report_page.run_record import RunRecord, get_dict, get_int
from jaxft.utils.redact import redact

# Exit code of an unfinished run -> its reason.
EXIT_REASONS = {
  2: "invalid request",
  3: "loss or gradient not finite",
  4: "storage error",
  5: "another process of the run was lost",
  75: "stopped by a signal",
  130: "interrupted",
}
MIN_CHANGE = 0.005  # a smaller relative change of the eval loss counts as unchanged
# Metric of an evaluation -> its name on a page, in the order of display.
METRIC_NAMES = {
  "eval/accuracy": "accuracy",
  "eval/f1": "F1",
  "eval/loss": "eval loss",
  "eval/perplexity": "perplexity",
  "eval/bits_per_byte": "bits per byte",
  "eval/unrelated_loss": "loss, unrelated text",
  "eval/unrelated_perplexity": "perplexity, unrelated text",
}
FRACTION_METRICS = ("eval/accuracy", "eval/f1")


def format_number(value: float) -> str:
  """Return a number with at least four digits, such as 11.11, 0.4701 or 66,787."""
  if abs(value) >= 1e7 or value and abs(value) < 1e-3:
    return f"{value:.3g}"
  return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}" if value else "0"


def format_speed(tokens: float) -> str:
  """Return tokens per second, such as 66,787, 941 or 15.8."""
  return f"{tokens:,.0f}" if tokens >= 100 else f"{tokens:.3g}"


def format_duration(seconds: int) -> str:
  """Return a duration, such as 59 s, 3 min 20 s or 1,000 h 5 min."""
  hours, minutes = seconds // 3600, seconds // 60 % 60
  if hours:
    return f"{hours:,} h {minutes} min"
  return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"


def unit_name(record: RunRecord) -> str:
  """Return the unit that a run counts: "text" for a classifier, else "token"."""
  return "text" if record.classifies else "token"


def format_percent(share: float) -> str:
  """Return a share, such as 0.123, as 12.3 %."""
  return f"{100 * share:.1f} %"


def format_setting(value: object, max_chars: int = 300) -> str:
  """Return the value of a setting as text, truncated to `max_chars`."""
  values = value if isinstance(value, tuple) else ("not set" if value is None else value,)
  text = redact(", ".join(map(str, values))) or "empty"
  return text if len(text) <= max_chars else f"{text[:max_chars]} ... ({len(text):,} characters)"


def model_name(record: RunRecord) -> str:
  """Return a hub id, or the last two components of a path."""
  path = str(record.config.get("model.path") or "a model")
  return format_setting("/".join(path.rstrip("/").split("/")[-2:]), 80)


def run_status(record: RunRecord) -> tuple[bool, str]:
  """Return whether the run finished, and a text: several lines for a failure."""
  ending = get_dict(record.about, "ending")
  total = record.total_steps
  last = record.last_step
  code = get_int(ending, "exit_code")
  why = ending.get("why")
  step = f"step {last:,}" + (f" of {total:,}" if total else "")
  if code == 0 and total and last < total:
    return True, f"stopped early at {step}: the eval loss did not improve"
  if code is not None and code != 0:
    details = f"\n{format_setting(why, 2000)}" if why else ""
    reason = EXIT_REASONS.get(code, "an unexpected error")
    return False, f"Stopped at {step}, exit code {code} ({reason}).{details}"
  if code == 0 or not record.about and total and last >= total:
    return True, f"finished at step {last:,}"
  reason = "the run was killed or is still running. The same command continues it."
  return False, f"Stopped at {step}: {reason}"


def measured_metrics(records: list[RunRecord]) -> list[str]:
  """Return the metrics of any of the runs; without the perplexity of classifiers."""
  keys = [key for key in METRIC_NAMES if any(record.points(key) for record in records)]
  if any(record.classifies for record in records):
    keys = [key for key in keys if key != "eval/perplexity"]
  return keys


class HeadlineMetric(NamedTuple):
  """The main metric of a page."""

  name: str
  key: str
  before: float
  after: float | None = None  # value of the exported weights; None if only the start was evaluated
  better: bool | None = None  # None if it hardly changed, or is unknown


def headline_metric(record: RunRecord) -> HeadlineMetric | None:
  """Return a classifier's accuracy or else the eval loss; None without evaluations."""
  by_accuracy = record.classifies and bool(record.points("eval/accuracy"))
  key = "eval/accuracy" if by_accuracy else "eval/loss"
  values = record.first_and_final(key)
  if not values:
    return None
  metric = HeadlineMetric(METRIC_NAMES[key], key, values[0])
  if len(values) < 2:
    return metric
  before, after = values
  changed = abs(after - before) >= MIN_CHANGE * abs(before)
  better = (after - before > 0) == by_accuracy if changed else None
  return metric._replace(after=after, better=better)


def format_metric(key: str, value: float | str) -> str:
  """Format the value of a metric."""
  if isinstance(value, str):
    return value
  return format_percent(value) if key in FRACTION_METRICS else format_number(value)


def format_cells(record: RunRecord, key: str) -> str:
  """Format the first value of a metric and that of the exported weights."""
  return " → ".join(format_metric(key, value) for value in record.cells(key))


def headline(record: RunRecord, finished: bool) -> str:
  """Return one line about how training changed the main metric."""
  metric = headline_metric(record)
  if metric is None:
    losses = record.points("train/loss")
    if not losses:
      return "No steps were logged and no evaluation was run"
    first, last = (format_number(loss) for _, loss in (losses[0], losses[-1]))
    return f"Not evaluated; the training loss went from {first} to {last}"
  name = metric.name.capitalize()
  before = format_metric(metric.key, metric.before)
  if metric.after is None:
    return f"{name} before the first step: {before}" + ("" if finished else "; not evaluated later")
  verb = "hardly changed:"
  if metric.better is not None:
    verb = "rose" if metric.after > metric.before else "fell"
  return f"{name} {verb} from {before} to {format_metric(metric.key, metric.after)}"


def time_span(record: RunRecord) -> str | None:
  """Return the start time of the run and, if it has only one start, its duration."""
  starts = record.starts
  ended = get_dict(record.about, "ending").get("at")
  if not starts:
    return None
  parse = datetime.datetime.fromisoformat
  try:
    started = parse(starts[0]["at"])
    text = "started " + started.strftime("%d %B %Y, %H:%M UTC").lstrip("0")
    if len(starts) > 1:
      return f"{text}, and {len(starts) - 1} more times"
    if not isinstance(ended, str):
      return text
    return f"{text}; took {format_duration(int((parse(ended) - started).total_seconds()))}"
  except (KeyError, TypeError, ValueError):
    return None
