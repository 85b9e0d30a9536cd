"""The page that compares several runs: the best one, curves and differences."""

import os
from pathlib import Path

from jaxft.plan.rendering import format_bytes
from jaxft.report_page import formatting, markup, samples
from jaxft.report_page.charts import NUM_COLOURS, Series, chart
from jaxft.report_page.formatting import METRIC_NAMES, format_metric
from jaxft.report_page.markup import Html, element, section, table
from jaxft.report_page.run_record import RunRecord, get_int

MAX_PROMPTS = 5
# Settings that are output paths and do not affect training.
PATH_SETTINGS = ("data.cache_dir", "export.out")


def render(records: list[RunRecord]) -> str:
  """Return the HTML that compares two or more runs, in this order."""
  named = list(zip(_unique_names(records), records, strict=True))
  title = f"{len(records)} runs compared"
  parts = [_header(title, named), _curves(named), _differences(named), _samples(named)]
  return markup.render_page(title, *parts)


def _unique_names(records: list[RunRecord]) -> list[str]:
  """Return the shortest path suffixes that distinguish the runs."""
  paths = [record.workdir.resolve() for record in records]
  for length in range(1, max(len(path.parts) for path in paths) + 1):
    names = [str(Path(*path.parts[-length:])) for path in paths]
    if len(set(names)) == len(names):
      return names
  return [f"{name} ({i})" for i, name in enumerate(map(os.fspath, paths), 1)]


def _header(title: str, named: list[tuple[str, RunRecord]]) -> Html:
  metrics = ((name, formatting.headline_metric(record)) for name, record in named)
  finals = [(it.after, name, it) for name, it in metrics if it and it.after is not None]
  headline = title
  if len(finals) > 1 and len({it.key for _, _, it in finals}) == 1:
    by_accuracy = finals[0][2].key == "eval/accuracy"
    after, name, best = (max if by_accuracy else min)(finals, key=lambda item: item[0])
    word = "highest" if by_accuracy else "lowest"
    headline = f"{name} has the {word} {best.name}: {format_metric(best.key, after)}"
  held_out = {get_int(record.data, "tokens", "held_out") for _, record in named}
  warning = "The runs were evaluated on different texts, so their eval losses are not comparable."
  notes = [f"{name}: {note}." for name, record in named for note in record.notes]
  return element(
    "header",
    element("p", title, class_="over"),
    element("h1", headline),
    element("p", warning, class_="state bad") if len(held_out) > 1 else None,
    [element("p", note, class_="state") for note in notes],
    _results_table(named),
  )


def _results_table(named: list[tuple[str, RunRecord]]) -> Html:
  keys = formatting.measured_metrics([record for _, record in named])
  rows = []
  for i, (name, record) in enumerate(named):
    cells = [formatting.format_cells(record, key) for key in keys]
    peak = max((v for _, v in record.points("memory/peak_bytes")), default=None)
    median = record.median("perf/tokens_per_second")
    speed = "?" if median is None else formatting.format_speed(median)
    finished, status = formatting.run_status(record)
    short = status.splitlines()[0].split(":")[0]
    run = [_swatch(i), name, element("small", short, class_=None if finished else "bad")]
    rows.append([run, *cells, speed, format_bytes(peak)])
  head = ["run", *(METRIC_NAMES[key] for key in keys), "tokens/s", "peak memory"]
  return table(head, rows, "numbers runs")


def _swatch(i: int) -> Html:
  line = element("path", d="M0 5 h18", class_=f"line s{i % NUM_COLOURS}")
  return element("svg", line, viewBox="0 0 26 10", width=26, height=10, aria_hidden="true")


def _curves(named: list[tuple[str, RunRecord]]) -> Html | None:
  def lines(key: str, points=RunRecord.points, **style: bool) -> list[Series]:
    runs = enumerate(named)
    return [
      Series(name=name, points=points(record, key), colour=i, **style) for i, (name, record) in runs
    ]

  noisy = {"noisy": True, "only_mean": True}
  speed = lines("perf/tokens_per_second", RunRecord.without_outliers, **noisy)
  figures = [
    chart("Eval loss", "nats per token", lines("eval/loss", dots=True), wide=True),
    chart("Training loss", "means over steps", lines("train/loss", **noisy), wide=True),
    chart("Accuracy", "share of the held-out texts", lines("eval/accuracy", dots=True), share=True),
    chart("Learning rate", "", lines("train/learning_rate"), from_zero=True),
    chart("Gradient norm", "before clipping", lines("train/grad_norm", **noisy)),
    chart("Speed", "tokens per second", speed, from_zero=True),
  ]
  figures = [it for it in figures if it]
  return section("Training curves", element("div", figures, class_="charts")) if figures else None


def _differences(named: list[tuple[str, RunRecord]]) -> Html:
  names = sorted({key for _, record in named for key in record.config} - set(PATH_SETTINGS))
  rows = []
  for key in names:
    values = [record.config.get(key) for _, record in named]
    if any(value != values[0] for value in values):
      rows.append([key, *map(formatting.format_setting, values)])
  same = element("p", "None: the runs have the same settings.", class_="note") if not rows else None
  return section("Settings that differ", same or table(["", *(name for name, _ in named)], rows))


def _samples(named: list[tuple[str, RunRecord]]) -> Html | None:
  """Render the last samples of each prompt that at least two runs share."""
  by_prompt: dict[str, list[samples.Sample]] = {}
  for name, record in named:
    for prompt, (*_, last) in samples.by_prompt(record).items():
      by_prompt.setdefault(prompt, []).append(last._replace(title=f"{name}: {last.title}"))
  groups = [samples.side_by_side(group) for group in by_prompt.values() if len(group) > 1]
  if not groups:
    return None
  more = None
  if len(groups) > MAX_PROMPTS:
    text = f"{len(groups) - MAX_PROMPTS:,} more prompts are in samples.jsonl."
    more = element("p", text, class_="note")
  return section("The last samples", *groups[:MAX_PROMPTS], more)
