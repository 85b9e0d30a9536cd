"""The page of several runs: which is the best, how they went, and what was different."""

import os
from pathlib import Path

from jaxft.plan.rendering import format_bytes
from jaxft.report_page import formatting, markup, samples
from jaxft.report_page.charts import Series, chart
from jaxft.report_page.markup import Html, element, section, table
from jaxft.report_page.run_record import RunRecord, get_int
from jaxft.report_page.style import LIGHT_COLOURS

MAX_PROMPTS = 5
# Settings that say where something lies, not what is done.
PATH_SETTINGS = ("data.cache_dir", "export.out")


def render(records: list[RunRecord]) -> str:
  """The HTML of two runs or more, in the order given."""
  named = list(zip(_unique_names(records), records, strict=True))
  title = f"{len(records)} runs compared"
  parts = [_header(title, named), _curves(named), _differences(named), _samples(named)]
  return markup.render_page(title, *parts)


def _unique_names(records: list[RunRecord]) -> list[str]:
  """The folders' own names, with as many of the folders they are in as it takes to tell the runs apart."""
  paths = [record.workdir.resolve() for record in records]
  for parts in range(1, max(len(path.parts) for path in paths) + 1):
    names = [str(Path(*path.parts[-parts:])) for path in paths]
    if len(set(names)) == len(names):
      return names
  return [f"{name} ({i})" for i, name in enumerate(map(os.fspath, paths), 1)]


def _header(title: str, named: list[tuple[str, RunRecord]]) -> Html:
  found = {
    name: it
    for name, record in named
    if (it := formatting.headline_metric(record)) and it.after is not None
  }
  headline, measures = title, {it.key for it in found.values()}
  if len(found) > 1 and len(measures) == 1:
    key = measures.pop()
    pick = max if key == "eval/accuracy" else min
    best = pick(found, key=lambda name: found[name].after)
    word = "highest" if key == "eval/accuracy" else "lowest"
    headline = f"{best} has the {word} {found[best].name}: {formatting.format_metric(key, found[best].after)}"
  held_out = {get_int(record.data, "tokens", "held_out") for _, record in named}
  unlike = (
    "The runs were evaluated on different texts: their eval losses cannot be compared."
    if len(held_out) > 1
    else None
  )
  return element(
    "header",
    element("p", title, class_="over"),
    element("h1", headline),
    element("p", unlike, class_="state bad") if unlike else None,
    [
      element("p", f"{name}: {note}.", class_="state")
      for name, record in named
      for note in record.notes
    ],
    _results_table(named),
  )


def _results_table(named: list[tuple[str, RunRecord]]) -> Html:
  keys = formatting.measured_metrics([record for _, record in named])
  rows = []
  for i, (name, record) in enumerate(named):
    cells = [
      " → ".join(formatting.format_metric(key, value) for value in record.cells(key))
      for key in keys
    ]
    peak, speed = (
      max((v for _, v in record.points("memory/peak_bytes")), default=None),
      record.median("perf/tokens_per_second"),
    )
    finished, state = formatting.run_status(record)
    state = element(
      "small", state.splitlines()[0].split(":")[0], class_=None if finished else "bad"
    )
    rows.append(
      [
        [_swatch(i), name, state],
        *cells,
        formatting.format_speed(speed) if speed is not None else "?",
        format_bytes(peak),
      ]
    )
  return table(
    ["run", *(formatting.METRIC_NAMES[key] for key in keys), "tokens/s", "most memory"],
    rows,
    "numbers runs",
  )


def _swatch(i: int) -> Html:
  line = element("path", d="M0 5 h18", class_=f"line s{i % len(LIGHT_COLOURS)}")
  return element("svg", line, viewBox="0 0 26 10", width=26, height=10, aria_hidden="true")


def _curves(named: list[tuple[str, RunRecord]]) -> Html | None:
  def lines(key: str, points=RunRecord.points, **how) -> list[Series]:
    return [Series(name, points(record, key), i, **how) for i, (name, record) in enumerate(named)]

  noisy, speed = {"noisy": True, "only_mean": True}, "perf/tokens_per_second"
  figures = [
    chart("Eval loss", "nats a token", lines("eval/loss", dots=True), wide=True),
    chart("Training loss", "means over steps", lines("train/loss", **noisy), wide=True),
    chart("Accuracy", "share of the held-out texts", lines("eval/accuracy", dots=True), share=True),
    chart("Learning rate", "", lines("train/learning_rate"), from_zero=True),
    chart("Gradient norm", "before clipping", lines("train/grad_norm", **noisy)),
    chart(
      "Speed", "tokens a second", lines(speed, RunRecord.without_outliers, **noisy), from_zero=True
    ),
  ]
  drawn = [it for it in figures if it]
  return section("How they went", element("div", drawn, class_="charts")) if drawn else None


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
  """What each run made in the end of the prompts that it shares with another."""
  last = {
    name: {prompt: sides[-1] for prompt, sides in samples.by_prompt(record).items()}
    for name, record in named
  }
  prompts = [it for it in dict.fromkeys(prompt for of in last.values() for prompt in of)]
  shared = [it for it in prompts if sum(it in of for of in last.values()) > 1]
  if not shared:
    return None
  groups = [
    samples.side_by_side(
      [
        of[prompt]._replace(title=f"{name}: {of[prompt].title}")
        for name, of in last.items()
        if prompt in of
      ]
    )
    for prompt in shared[:MAX_PROMPTS]
  ]
  more = (
    f"{len(shared) - MAX_PROMPTS:,} more prompts are in samples.jsonl."
    if len(shared) > MAX_PROMPTS
    else None
  )
  return section("The last samples", *groups, element("p", more, class_="note") if more else None)
