"""Pages of runs: written at any end, rebuilt from the files of a workdir, and safe to open."""

import html.parser
import json
import math
import re
import subprocess
from pathlib import Path

import processes
import pytest
import tiny

import jaxft.config
import jaxft.report_page.samples
from jaxft.errors import NumericsError, RequestError
from jaxft.plan.rendering import MEMORY_CATEGORIES
from jaxft.report_page import charts, comparison, formatting, markup, run_page, run_record
from jaxft.train import finetune
from jaxft.training import run_info

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"'\u202e\x1b[2J\x00"
VOID = {"meta", "link", "img", "br", "hr", "input", "wbr"}
OUTSIDE = re.compile(r"^(https?:)?//", re.IGNORECASE)


class Page(html.parser.HTMLParser):
  """Raises AssertionError where tags do not match, or where something would be loaded."""

  def __init__(self, text):
    super().__init__()
    self.open, self.words, self.found, self.attributes = [], [], [], []
    self.feed(text)
    self.close()
    assert not self.open
    self.text = " ".join("".join(self.words).split())

  def handle_starttag(self, tag, attributes):
    self.found.append(tag)
    self.attributes += attributes
    assert tag not in ("img", "iframe", "object", "embed", "base", "form")
    for name, value in attributes:
      assert not name.startswith("on"), (tag, name)
      assert name not in ("src", "srcset", "href", "poster", "action") or value == "data:,", (
        tag,
        name,
        value,
      )
      assert "url(" not in (value or ""), (tag, name, value)
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag, tag

  def handle_data(self, data):
    inside = self.open[-1] if self.open else ""
    if inside == "style":
      assert "url(" not in data and "@import" not in data
    elif inside != "script":
      self.words.append(data)


def write(folder: Path, steps=100, every=1, evals=(0, 50, 100), changes=(), **files) -> Path:
  """Writes a workdir as a run of GPT-2 leaves it; `files` replace its own."""
  folder.mkdir(parents=True)
  config = jaxft.config.default()
  config.model.path, config.data.train, config.train.steps = "gpt2", ("stories.jsonl",), steps
  for name, value in dict(changes).items():
    section, key = name.split(".")
    config[section][key] = value
  loss = lambda step: 1 + 3 * math.exp(-5 * step / steps)
  lines = [
    {"step": step, "eval/loss": loss(step), "eval/perplexity": math.exp(loss(step))}
    for step in evals
  ]
  lines += [
    {
      "step": step,
      "train/loss": loss(step) + 0.1 * math.sin(12.9 * step),
      "train/learning_rate": 1e-3 * (1 - step / steps),
      "train/grad_norm": 1 + step % 7 / 10,
      "train/tokens": 256 * step,
      "perf/tokens_per_second": 1000.0 + step % 13,
      "perf/mfu": 0.41,
      "memory/peak_bytes": 3 * 2**29,
    }
    for step in range(every, steps + 1, every)
  ]
  samples = [{"step": 0, "when": "before", "prompt": "Once", "text": " grey ships", "seed": 0}]
  samples += [{"step": steps, "when": "after", "prompt": "Once", "text": " upon a time", "seed": 0}]
  counts = {"read": 120, "trained": 100, "held_out": 15, "dropped": {"not text": 5}}
  facts = {
    "starts": [
      {
        "at": "2026-11-22T10:00:00Z",
        "step": 0,
        "devices": {"count": 1, "kind": "cpu"},
        "mesh": {"data": 1},
      }
    ],
    "command": "python -m jaxft.train --config 'my configs/x.py'",
    "environment": {"XLA_FLAGS": "--a --b"},
    "total_steps": steps,
    "model": {
      "type": "gpt2",
      "parameters": 124_439_808,
      "trained": 124_439_808,
      "compute_dtype": "bfloat16",
    },
    "devices": {"count": 1, "kind": "NVIDIA H100"},
    "memory": {
      "planned": {"parameters": 2**29, "activations": 2**28},
      "host": 0,
      "peak_of": "device",
    },
    "ending": {"at": "2026-11-22T11:02:03Z", "exit_code": 0, "why": ""},
  }
  contents = {
    "config.json": jaxft.config.to_json(config),
    "about.json": json.dumps(facts),
    "data_report.json": json.dumps({"rows": counts, "tokens": {it: n for it, n in counts.items()}}),
    "metrics.jsonl": "".join(
      json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["step"])
    ),
    "samples.jsonl": "".join(json.dumps(line) + "\n" for line in samples),
  }
  for name, content in (
    contents | {name.replace("__", "."): text for name, text in files.items()}
  ).items():
    if content is not None:
      (folder / name).write_text(content, encoding="utf-8")
  return folder


def load_page(workdir: Path) -> Page:
  return Page(run_page.render(run_record.load(workdir)))


def test_run_writes_report_and_about_json(finished):
  workdir, done = finished
  assert f"report: {workdir}/report.html" in done.stdout
  page = Page((workdir / "report.html").read_text())
  assert page.found.count("polyline") >= 4
  started = json.loads((workdir / "about.json").read_text())
  assert started["ending"]["exit_code"] == 0
  assert started["total_steps"] == 12 and len(started["starts"]) == 1
  assert started["command"].startswith("python -m jaxft.train --config ")
  assert started["command"] in page.text
  assert started["model"]["parameters"] > 10_000
  assert started["memory"]["planned"]["parameters"] > 40_000
  losses = [
    line["eval/loss"] for line in processes.lines(workdir / "metrics.jsonl") if "eval/loss" in line
  ]
  assert f"from {losses[0]:#.4g} to {losses[-1]:#.4g}" in page.text
  for sample in processes.lines(workdir / "samples.jsonl"):
    assert sample["when"] in page.text
  assert "The exported model" in page.text and f"from_pretrained('{workdir}/export')" in page.text
  report = json.loads((workdir / "data_report.json").read_text())
  assert f"{report['tokens']['trained']:,}" in page.text
  assert "to the last document and token" in page.text
  html = (workdir / "report.html").read_text()
  assert f"written to {workdir}/report.html" in processes.run("jaxft.report", workdir).stdout
  assert (workdir / "report.html").read_text() == html


@pytest.mark.slow
def test_report_does_not_change_how_a_run_ends(config, tmp_path, capsys):
  """Neither of a run that fails, nor where the page cannot be written."""
  config.optim.learning_rate, config.optim.warmup_steps, config.optim.clip_norm = 1e38, 0, 0.0
  with pytest.raises(NumericsError):
    finetune(config, tmp_path / "nan")
  page = Page((tmp_path / "nan" / "report.html").read_text())
  assert re.search(
    r"Stopped at step \d+ of 12, exit code 3 .*gradient not finite\).*changed no weight", page.text
  )
  assert "not finite, step skipped" in page.text
  assert ("class", "fault") in page.attributes
  config.optim.learning_rate = 1e-3
  (tmp_path / "full" / "report.html").mkdir(parents=True)
  (tmp_path / "full" / "about.json").mkdir()
  assert finetune(config, tmp_path / "full").metrics
  said = capsys.readouterr().out
  assert said.count("is not written") == 2 and "report.html is not written (" in said


def test_status_of_killed_and_finished_runs(tmp_path):
  killed = json.loads((write(tmp_path / "w") / "about.json").read_text())
  del killed["ending"]
  killed["total_steps"] = 400
  page = load_page(write(tmp_path / "killed", evals=(0,), about__json=json.dumps(killed)))
  assert "Stopped at step 100 of 400: the run was killed" in page.text
  assert "Eval loss before the first step: 4.000; not evaluated later" in page.text
  killed["ending"] = {
    "at": "2026-11-22T11:00:00Z",
    "exit_code": 75,
    "why": "SIGTERM: saved at step 100 of 400",
  }
  page = load_page(write(tmp_path / "stopped", about__json=json.dumps(killed)))
  assert "exit code 75" in page.text and "SIGTERM: saved at step 100 of 400" in page.text
  assert "Stopped" not in load_page(write(tmp_path / "done")).text


def test_page_without_evaluations(tmp_path):
  page = load_page(write(tmp_path / "w", evals=()))
  assert "Not evaluated; the training loss went from" in page.text and "Learning rate" in page.text
  page = load_page(write(tmp_path / "empty", metrics__jsonl="", samples__jsonl=""))
  assert "No steps were logged" in page.text and "svg" not in page.found


@pytest.mark.slow
def test_classification_headline_is_accuracy(folder, tmp_path):
  rows = [{"text": f"the {word} cat", "label": str(len(word) > 3)} for word in tiny.WORDS * 8]
  (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  config = tiny.config(folder, tmp_path / "rows.jsonl")
  config.model.head = config.data.format = "classification"
  config.data.layout, config.train.sample_prompts = "pad", ()
  lines = finetune(config, tmp_path / "w").metrics
  page = Page((tmp_path / "w" / "report.html").read_text())
  accuracy = [f"{100 * line['eval/accuracy']:.1f} %" for line in lines if "eval/accuracy" in line]
  assert re.search(
    f"Accuracy (rose|fell|hardly changed:) from {accuracy[0]} to {accuracy[-1]}", page.text
  )
  assert "F1" in page.text and "nats per text" in page.text and "Samples" not in page.text


def test_hostile_text_is_escaped(tmp_path):
  sample = {
    "step": 0,
    "when": HOSTILE,
    "prompt": HOSTILE,
    "text": HOSTILE + "\ud800",
    "seed": HOSTILE,
  }
  about_it = {
    "command": HOSTILE,
    "folder": HOSTILE,
    "model": {"type": HOSTILE},
    "versions": {HOSTILE: HOSTILE},
  }
  about_it |= {
    "ending": {"exit_code": 4, "why": HOSTILE},
    "mesh": {HOSTILE: HOSTILE},
    "devices": {"kind": HOSTILE},
  }
  counts = {"read": 1, "trained": 1, "held_out": 0, "dropped": {HOSTILE: 1}}
  workdir = write(
    tmp_path / '<b onclick="x">',
    changes={"data.train": (HOSTILE,), "model.path": HOSTILE},
    samples__jsonl="".join(json.dumps(sample | {"step": step}) + "\n" for step in (0, 9)),
    about__json=json.dumps(about_it),
    data_report__json=json.dumps(
      {"rows": counts, "tokens": counts, "notes": {HOSTILE: 3}, "labels": [HOSTILE]}
    ),
  )
  clean = load_page(write(tmp_path / "w")).found
  for text in (
    run_page.render(run_record.load(workdir)),
    comparison.render([run_record.load(workdir)] * 2),
  ):
    page = Page(text)
    assert page.found.count("script") == clean.count("script") == 1 and "b" in clean
    assert page.text.count("<script>alert(1)</script>") > 4 and "onerror=alert(2)" in page.text
    assert "\x00" not in text and "\x1b" not in text
    text.encode()


def test_content_security_policy_of_page(tmp_path):
  """It forbids every request, and every script but its own."""
  text = run_page.render(run_record.load(write(tmp_path / "w")))
  policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
  assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
  assert not re.search(r"https?://", text.replace(markup.read_asset("script.js"), ""))


def test_every_colour_is_in_a_style_sheet():
  style = markup.read_asset("style.css", "memory.css")
  for name in [*MEMORY_CATEGORIES, *(f"s{i}" for i in range(charts.NUM_COLOURS))]:
    assert re.search(rf"^\.{name} {{", style, re.MULTILINE), name


@pytest.mark.slow
def test_page_size_is_bounded(tmp_path):
  long = {"when": "during", "prompt": "<" * 5000, "text": '"' * 50_000, "seed": 0}
  texts = [
    json.dumps(long | {"step": step, "prompt": f"{step % 50}" + long["prompt"]})
    for step in range(400)
  ]
  every = range(0, 100_001, 20)
  workdir = write(tmp_path / "w", steps=100_000, evals=every, samples__jsonl="\n".join(texts))
  found = run_record.load(workdir)
  page = run_page.render(found)
  assert 100_000 < len(page.encode()) < 3_000_000
  Page(page)
  assert len(comparison.render([found] * 3).encode()) < 3_000_000


def test_downsample_keeps_ends_and_spikes():
  points = [(step, 1.0) for step in range(100_000)]
  points[77_777], points[33_333] = (77_777, 50.0), (33_333, -50.0)
  sampled = charts.downsample(points)
  assert len(sampled) <= 2 * charts.NUM_COLUMNS + 2 and sampled == sorted(sampled)
  assert {points[0], points[-1], points[77_777], points[33_333]} <= set(sampled)
  assert charts.downsample(points[:900]) == points[:900]
  means = charts.window_means([(step, step % 2) for step in range(12_000)])
  assert sum(y for _, y in means) / charts.NUM_WINDOWS == 0.5


@pytest.mark.parametrize(
  "low, high, expected",
  [(0, 715, [0, 200, 400]), (6, 7, [6]), (0, 12, [0, 2, 4, 6, 8]), (0, 4, [0, 1, 2, 3])],
)
def test_step_ticks_are_integers(low, high, expected):
  """And they leave room for the label of the last step."""
  assert charts.step_ticks(low, high) == expected
  drawn = charts.chart("Loss", "nats", [charts.Series("a", [(low, 1.0), (high, 2.0)])])
  assert f"step {high}</span>" in drawn and not re.search(r'class="x"[^>]*>[^<]*\.', drawn)


@pytest.mark.parametrize("values", [(0.0, 0.0), (0.2, 0.4), (1.0, 1.0)])
def test_share_axis_is_0_to_1(values):
  drawn = charts.chart(
    "Accuracy", "share", [charts.Series("accuracy", list(enumerate(values)))], share=True
  )
  assert re.findall(r'class="y"[^>]*>([^<]+)', drawn) == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
  drawn = charts.chart("Rate", "", [charts.Series("rate", [(0, 0.0), (1, 0.0)])], from_zero=True)
  assert "-" not in "".join(re.findall(r'class="y"[^>]*>([^<]+)', drawn))


def test_single_point_is_text_not_chart(tmp_path):
  page = load_page(write(tmp_path / "w", steps=1, evals=()))
  assert "svg" not in page.found
  assert re.search(
    r"Logged once: training loss \d\.\d+ at step 1, learning rate 0 at step 1, gradient norm",
    page.text,
  )


def test_last_step_may_be_after_last_line(tmp_path):
  stopped = {
    "reached": 90,
    "total_steps": 3000,
    "ending": {"exit_code": 75, "why": "SIGHUP: saved at step 90 of 3000"},
  }
  page = load_page(write(tmp_path / "w", steps=50, evals=(0,), about__json=json.dumps(stopped)))
  assert "Stopped at step 90 of 3,000, exit code 75" in page.text


def test_log_ticks_have_their_own_units():
  texts = {
    1e-5: "1e-5",
    1e-3: "0.001",
    0.5: "0.5",
    1000: "1,000",
    2e4: "20k",
    1e6: "1M",
    1e10: "10G",
    1e20: "1e20",
  }
  assert {number: charts.format_tick(number) for number in texts} == texts
  drawn = charts.chart("Loss", "nats", [charts.Series("a", [(0, 0.001), (1, 1e10)])])
  assert re.findall(r'class="y"[^>]*>([^<]+)', drawn)[0] == "0.01"


def test_nonfinite_metrics_are_shown(tmp_path):
  for perplexity, text in (("inf", "inf"), (1.0142e304, "1.01e+304")):  # too large to be drawn
    values = ((0, 4.0, 54.6), (9, 1e9, perplexity))
    lines = [
      {"step": step, "eval/loss": loss, "eval/perplexity": value} for step, loss, value in values
    ]
    page = load_page(write(tmp_path / text, metrics__jsonl="\n".join(map(json.dumps, lines))))
    assert f"perplexity54.60 → {text}" in page.text and f"1e+09{text}" in page.text


def test_classifier_page_counts_texts(tmp_path):
  page = load_page(write(tmp_path / "w", changes={"model.head": "classification"}))
  assert "texts trained on" in page.text
  assert "texts per second" in page.text and "tokens per second" not in page.text


def test_series_of_one_point_is_left_out():
  num_lines = lambda *series: charts.chart("Loss", "nats", list(series)).count("<polyline")
  held_out = charts.Series("held out", [(0, 1.0), (6, 0.5)], dots=True)
  assert num_lines(held_out, charts.Series("training", [(6, 0.7)], noisy=True)) == 1
  assert num_lines(held_out, charts.Series("a", [(0, 1.0), (6, 1.0)])) == 2


EXPORT = {
  "folder": "/models/out",
  "dtype": "bfloat16",
  "tensors": "bit for bit",
  "logits_max_abs_difference": 6e-8,
  "reference": "transformers 5.24.0, torch 2.13.0",
}


@pytest.mark.parametrize(
  "head, auto, usage",
  [
    ("lm", "CausalLM", "jaxft.generate --model /models/out"),
    ("classification", "SequenceClassification", "jaxft.load('/models/out').classify("),
  ],
)
def test_export_is_on_page(tmp_path, head, auto, usage):
  about_it = {"export": EXPORT | {"adapter": "/w/adapter"}, "exported_step": 50}
  changes = {"model.head": head}
  page = load_page(write(tmp_path / "w", changes=changes, about__json=json.dumps(about_it)))
  for text in (
    "The exported model",
    "of step 50, in bfloat16",
    "bit for bit",
    "within 6.0e-08",
    "transformers 5.24.0",
    "/w/adapter",
  ):
    assert text in page.text, text
  assert f"AutoModelFor{auto}.from_pretrained('/models/out')" in page.text and usage in page.text
  assert "The exported model" not in load_page(write(tmp_path / "failed", about__json="{}")).text


def test_clipped_text_ends_with_ellipsis(tmp_path):
  text = " ".join(f"word{i}" for i in range(1000))
  lines = [
    {"step": step, "when": when, "prompt": "Once", "text": " " + text}
    for step, when in ((0, "before"), (9, "after"))
  ]
  page = load_page(write(tmp_path / "w", samples__jsonl="\n".join(map(json.dumps, lines))))
  ends = re.findall(r"(\S+)…", page.text)
  assert len(ends) == 4 and all(re.fullmatch(r"word\d+", it) and f" {it} " in text for it in ends)
  assert jaxft.report_page.samples.clip_text("x" * 500, 420) == "x" * 420 + "…"
  assert jaxft.report_page.samples.clip_text("short", 420) == "short"


def test_short_sample_is_shown_once(tmp_path):
  """The first screen shows it already."""
  page = load_page(write(tmp_path / "w"))
  assert page.text.count("grey ships") == 1 and "Samples" not in page.text


@pytest.mark.parametrize(
  "number, text", [(1, "1 held-out document."), (2000, "2,000 held-out documents.")]
)
def test_numbers_are_formatted_for_people(tmp_path, number, text):
  counts = {"read": number, "trained": 0, "held_out": number, "dropped": {}}
  report = json.dumps({"rows": counts, "tokens": counts})
  assert text in load_page(write(tmp_path / "w", data_report__json=report)).text
  durations = [formatting.format_duration(it) for it in (59, 61, 3600)]
  assert durations == ["59 s", "1 min 1 s", "1 h 0 min"]
  assert [formatting.format_speed(it) for it in (66787.4, 941.0, 15.8)] == ["66,787", "941", "15.8"]
  assert formatting.format_metric("eval/f1", 0.0) == "0.0 %"


@pytest.mark.parametrize(
  "low, high, expected",
  [
    (0, 715, ["0", "200", "400", "600"]),
    (0, 2e-5, ["0", "5e-6", "1e-5", "1.5e-5", "2e-5"]),
    (0, 12_000, ["0", "2k", "4k", "6k", "8k", "10k", "12k"]),
    (-1, 0.2, ["-1", "-0.8", "-0.6", "-0.4", "-0.2", "0", "0.2"]),
    (3, 3.0004, ["3", "3.0001", "3.0002", "3.0003", "3.0004"]),
  ],
)
def test_ticks_are_round_numbers(low, high, expected):
  assert charts.format_ticks(charts.ticks(low, high)) == expected


def test_comparison_of_several_runs(tmp_path):
  workdirs = [
    write(tmp_path / "plain"),
    write(tmp_path / "fast", changes={"optim.learning_rate": 3e-3}),
  ]
  lines = [
    {"step": 0, "eval/loss": 4.0},
    {"step": 100, "eval/loss": 0.5, "eval/unrelated_loss": 7.25},
  ]
  workdirs.append(write(tmp_path / "best", metrics__jsonl="\n".join(map(json.dumps, lines))))
  done = processes.run("jaxft.report", *workdirs, cwd=tmp_path)
  assert done.stdout == "written to comparison.html\n"
  page = Page((tmp_path / "comparison.html").read_text())
  assert "best has the lowest eval loss: 0.5000" in page.text and "7.250" in page.text
  assert re.search(r"optim.learning_rate\s*5e-05\s*0.003\s*5e-05", " ".join(page.words))
  assert "train.steps" not in page.text and page.text.count("upon a time") == 3
  assert page.found.count("figure") == 5


def test_optional_metrics_are_shown(tmp_path):
  lines = [
    {"step": step, "eval/loss": 3.0 - step, "eval/unrelated_loss": 3.5 + step} for step in (0, 1)
  ]
  drawn = [
    {
      "step": step,
      "when": when,
      "prompt": prompt,
      "text": "x",
      "seed": 0,
      "memorised_8grams": step * share,
    }
    for step, when in ((0, "before"), (1, "after"))
    for prompt, share in (("a", 0.1), ("b", 0.4))
  ]
  files = {
    "metrics__jsonl": "\n".join(map(json.dumps, lines)),
    "samples__jsonl": "\n".join(map(json.dumps, drawn)),
  }
  page = load_page(write(tmp_path / "w", **files))
  assert (
    "loss, unrelated text3.500 → 4.500" in page.text and "step 1; 40.0 % memorized" in page.text
  )
  assert "memorized 8-grams0.0 % → 25.0 %" in page.text


@pytest.mark.parametrize(
  "drawn", [None, '{"step": 50, "when": "after", "prompt": "a", "text": "b"}']
)
def test_headline_uses_exported_step(tmp_path, drawn):
  """Where the best weights are exported, it is their loss that counts."""
  lines = [{"step": step, "eval/loss": loss} for step, loss in ((0, 4.0), (50, 2.0), (100, 3.0))]
  files = {"metrics__jsonl": "\n".join(map(json.dumps, lines)), "samples__jsonl": drawn}
  page = load_page(write(tmp_path / "w", changes={"train.keep_best_metric": "eval/loss"}, **files))
  assert "Eval loss fell from 4.000 to 2.000" in page.text
  assert "The weights of step 50 of 100 were exported, the best of the saved" in page.text


def test_page_says_if_training_made_it_worse(tmp_path):
  """The least loss is that of step 0, of which there is no checkpoint to export."""
  lines = [{"step": step, "eval/loss": loss} for step, loss in ((0, 2.0), (50, 3.0), (100, 2.5))]
  files = {"metrics__jsonl": "\n".join(map(json.dumps, lines)), "samples__jsonl": None}
  page = load_page(write(tmp_path / "w", changes={"train.keep_best_metric": "eval/loss"}, **files))
  assert (
    "Eval loss rose from 2.000 to 2.500" in page.text and "This is worse than before" in page.text
  )


@pytest.mark.parametrize(
  "files, message",
  [
    (
      {"metrics__jsonl": '{"step": 1, "train/loss": 2.0}\n{"step": 2, "tra'},
      "1 of 2 lines of metrics.jsonl",
    ),
    ({"metrics__jsonl": None}, "metrics.jsonl does not exist"),
    ({"samples__jsonl": "[]\n3\nnull\n{}\n"}, "4 of 4 lines of samples.jsonl"),
    ({"about__json": "{"}, "about.json cannot be read"),
    (
      {
        "about__json": '{"starts": 3, "ending": [], "model": 4, "memory": {"planned": 7}, '
        '"mesh": "x"}'
      },
      "Stopped",
    ),
    (
      {"data_report__json": '{"rows": 3, "tokens": {"read": "many", "dropped": 1}}'},
      "Run details",
    ),
    (
      {
        "data_report__json": '{"rows": {"read": 9, "trained": 2, "held_out": 3, '
        '"dropped": {"x": 1}}, "tokens": {}}'
      },
      "3 documents are not accounted for",
    ),
    (
      {"metrics__jsonl": '{"step": 1, "train/loss": "nan", "eval/loss": true, "perf/mfu": NaN}\n'},
      "No steps were logged",
    ),
    (
      {
        "metrics__jsonl": '{"step": 1e400}\n{"step": 3, "train/loss": 1e308}\n'
        '{"step": 4, "train/loss": -1e299}'
      },
      "1 of 3",
    ),
  ],
)
def test_damaged_files_are_noted(tmp_path, files, message):
  """And the rest is shown."""
  assert re.search(message, load_page(write(tmp_path / "w", **files)).text)


def test_report_of_no_workdir_is_one_line_error(tmp_path):
  for folder, problem in ((tmp_path / "none", "no such folder"), (tmp_path, "has no config.json")):
    done = processes.run("jaxft.report", folder, check=2)
    assert f"{folder}: {problem}" in done.stderr and done.stderr.count("\n") == 1
  (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
  with pytest.raises(RequestError, match="no settings of jaxft.train"):
    run_record.load(tmp_path)
  done = processes.run(
    "jaxft.report", write(tmp_path / "w"), "--out", tmp_path / "no" / "x.html", check=2
  )
  assert "--out=" in done.stderr and "no such folder" in done.stderr


def test_git_commit_of_checkout(tmp_path):
  git = lambda *words: (
    subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
  )
  assert run_info.git_commit(tmp_path) is None
  git("init", "-q", "-b", "main")
  author = ("-c", "user.name=x", "-c", "user.email=x@example.org")
  git(*author, "commit", "-q", "--allow-empty", "-m", "x")
  head = git("rev-parse", "HEAD").strip()
  assert run_info.git_commit(tmp_path) == head
  git("worktree", "add", "-q", "tree", "-b", "other")
  assert run_info.git_commit(tmp_path / "tree") == head
  git("pack-refs", "--all")
  assert run_info.git_commit(tmp_path) == run_info.git_commit(tmp_path / "tree") == head
  git("checkout", "-q", "--detach")
  assert run_info.git_commit(tmp_path) == head


def test_quotes_in_names_are_escaped(tmp_path):
  workdirs = [write(tmp_path / name) for name in ('a" onload="x', "b")]
  Page(comparison.render([run_record.load(it) for it in workdirs]))
