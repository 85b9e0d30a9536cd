"""The page of one run: did fine-tuning do anything, how did it go, and how to do it again."""

import itertools
import shlex
from pathlib import Path
from typing import Any

import jaxft.config
from jaxft.plan.rendering import MEMORY_COLOURS, format_bytes
from jaxft.report_page import formatting, markup, run_record, samples
from jaxft.report_page.charts import Series, chart
from jaxft.report_page.markup import Html, element, section, table
from jaxft.report_page.run_record import RunRecord, get_dict, get_float, get_int, metric_cell
from jaxft.utils.files import atomic_write
from jaxft.utils.units import format_count

MAX_EVALUATIONS = 24  # rows of the table
TEASER_CHARS = 420  # letters of each of the two samples on the first screen


def render(record: RunRecord) -> str:
  """The HTML of the run."""
  pairs = [element("div", _evaluations(record), _memory(record), class_="pair")]
  parts = [
    _header(record),
    _export_section(record),
    _curves(record),
    _samples(record),
    *pairs,
    _data(record),
    _run_details(record),
    _reproduce(record),
  ]
  return markup.render_page(f"{record.name}: {formatting.model_name(record)}", *parts)


def write(workdir: Path) -> None:
  """Write report.html of the run in this workdir."""
  atomic_write(workdir / "report.html", render(run_record.load(workdir)))


def _header(record: RunRecord) -> Html:
  finished, state = formatting.run_status(record)
  over = [
    record.name,
    formatting.model_name(record),
    state if finished else None,
    formatting.time_span(record),
  ]
  return element(
    "header",
    element("p", " · ".join(filter(None, over)), class_="over"),
    element("h1", formatting.headline(record, finished)),
    element("p", _lead(record), class_="lead"),
    None if finished else element("p", state, class_="state bad"),
    [element("p", note + ".", class_="state") for note in record.notes],
    _tiles(record),
    _before_and_after(record),
  )


def _lead(record: RunRecord) -> list[Any]:
  """What the headline means: of which text, and how far it could have gone."""
  found, floor, held_out = (
    formatting.headline_metric(record),
    _entropy_floor(record),
    get_int(record.data, "rows", "held_out"),
  )
  if found is None:
    nothing = get_int(record.data, "tokens", "held_out") == 0
    return [
      "Nothing was held out, so there is no eval loss."
      if nothing
      else "There is no evaluation in metrics.jsonl."
    ]
  noun = "text" if record.classifies else "document"
  text = (
    f"Measured on {format_count(held_out, f'held-out {noun}')}."
    if held_out
    else "Measured on held-out text."
  )
  said = (
    [element("span", "It is worse than before. ", class_="bad"), text]
    if found.better is False
    else [text]
  )
  if (
    found.key == "eval/loss"
    and floor is not None
    and found.after is not None
    and found.before > floor
  ):
    gained, all_of_it = found.before - found.after, found.before - floor
    said.append(
      f" The run gained {formatting.format_percent(gained / all_of_it)} of the {formatting.format_number(all_of_it)} nats a token that lie between the "
      "loss before it and the text's own entropy, below which no model can go."
    )
  if found.after is not None and record.exported_step < record.last_step:
    said.append(
      f" The weights of step {record.exported_step:,} of {record.last_step:,} were exported, the best that were kept."
    )
  return said


def _entropy_floor(record: RunRecord) -> float | None:
  return next(
    (line["eval/floor"] for line in record.metrics if get_float(line, "eval/floor") is not None),
    None,
  )


def _tiles(record: RunRecord) -> Html:
  """The figures that people look for first."""
  tiles = []
  for key in formatting.measured_metrics([record]):
    tiles.append(
      (
        formatting.METRIC_NAMES[key],
        " → ".join(formatting.format_metric(key, value) for value in record.cells(key)),
        None,
      )
    )
  if known := [
    formatting.format_percent(it)
    for when in ("before", "after")
    if (it := record.memorized_share(when)) is not None
  ]:
    tiles.append(("8-grams by heart", " → ".join(known), "of the samples"))
  if (floor := _entropy_floor(record)) is not None:
    tiles.append(("the text's own entropy", formatting.format_number(floor), None))
  if tokens := record.points("train/tokens"):
    tiles.append(
      (
        f"{formatting.unit_name(record)}s trained on",
        f"{int(tokens[-1][1]):,}",
        f"in {format_count(record.last_step, 'step')}",
      )
    )
  if (speed := record.median("perf/tokens_per_second")) is not None:
    mfu = record.median("perf/mfu")
    tiles.append(
      (
        f"{formatting.unit_name(record)}s a second",
        formatting.format_speed(speed),
        None if mfu is None else f"MFU {formatting.format_percent(mfu)}",
      )
    )
  items = [
    element(
      "div", element("dt", it[0]), element("dd", it[1], element("small", it[2]) if it[2] else None)
    )
    for it in tiles
  ]
  return element("dl", items, class_="tiles") if items else markup.escape_children()


def _before_and_after(record: RunRecord) -> Html | None:
  """One prompt, at the beginning and at the end."""
  for found in samples.by_prompt(record).values():
    if len(found) > 1:
      return samples.side_by_side([found[0], found[-1]], most_text=TEASER_CHARS)
  return None


def _export_section(record: RunRecord) -> Html | None:
  """The folder that went out, how it was verified, and how to load it."""
  export = get_dict(record.about, "export")
  folder = export.get("folder")
  if not isinstance(folder, str):
    return None
  difference = get_float(export, "logits_max_abs_difference")
  logits = None
  if difference is not None:
    logits = f"within {difference:.1e} of the trained model's, in float32, computed by {export.get('reference')}"
  facts = [
    ("folder", folder),
    ("weights", f"of step {record.exported_step:,}, in {export.get('dtype')}"),
    ("read back", f"all tensors are {export.get('tensors')} what was trained"),
    ("logits", logits or export.get("reference")),
    ("LoRA adapter", export.get("adapter")),
  ]
  auto = "AutoModelForCausalLM"
  ours = shlex.join(["python", "-m", "jaxft.generate", "--model", folder, "--prompt", "..."])
  if record.classifies:
    auto = "AutoModelForSequenceClassification"
    ours = f"import jaxft\njaxft.load({folder!r}).classify(['...'])"
  lines = [
    f"from transformers import {auto}, AutoTokenizer",
    f"model = {auto}.from_pretrained({folder!r})",
    f"tokenizer = AutoTokenizer.from_pretrained({folder!r})",
  ]
  return section(
    "The exported model",
    _facts_table(facts),
    element("pre", markup.breakable("\n".join(lines))),
    element("pre", markup.breakable(ours)),
  )


def _curves(record: RunRecord) -> Html | None:
  evaluated = [Series("training text", record.points("train/loss"), 0, noisy=True)]
  evaluated += [Series("held-out text", record.points("eval/loss"), 1, dots=True)]
  evaluated += [Series("unrelated text", record.points("eval/unrelated_loss"), 3, dots=True)]
  floor, speed = (
    _entropy_floor(record),
    lambda name, key: [Series(name, record.without_outliers(key), noisy=True)],
  )
  of = formatting.unit_name(record)
  figures = [
    chart(
      "Loss",
      f"nats a {of}",
      evaluated,
      floor=floor and ("entropy", floor),
      nonfinite_steps=record.nonfinite_steps,
      wide=True,
    ),
    chart(
      "Held-out texts classified",
      "share",
      [
        Series(name, record.points(key), i + 1, dots=True)
        for i, (name, key) in enumerate(CLASSIFICATION_METRICS)
      ],
      share=True,
    ),
    chart(
      "Learning rate", "", [Series("rate", record.points("train/learning_rate"))], from_zero=True
    ),
    chart(
      "Gradient norm",
      "before clipping",
      [Series("norm", record.points("train/grad_norm"), noisy=True)],
    ),
    chart("Speed", f"{of}s a second", speed(f"{of}s/s", "perf/tokens_per_second"), from_zero=True),
    chart("MFU", "share of the peak", speed("MFU", "perf/mfu"), from_zero=True),
  ]
  drawn = [it for it in figures if it]
  parts = [element("div", drawn, class_="charts") if drawn else None, _logged_once(record)]
  return section("How it went", *parts) if any(parts) else None


CLASSIFICATION_METRICS = (("accuracy", "eval/accuracy"), ("F1", "eval/f1"))


def _logged_once(record: RunRecord) -> Html | None:
  """What a chart would show as a lone dot."""
  lone = {name: points[0] for name, key in LOGGED_METRICS if len(points := record.points(key)) == 1}
  if not lone:
    return None
  values = ", ".join(
    f"{name} {formatting.format_number(value)} at step {step:,}"
    for name, (step, value) in lone.items()
  )
  return element("p", f"Logged once: {values}.", class_="once")


LOGGED_METRICS = (
  ("training loss", "train/loss"),
  ("learning rate", "train/learning_rate"),
  ("gradient norm", "train/grad_norm"),
)


def _samples(record: RunRecord) -> Html | None:
  found = samples.by_prompt(record)
  shown = [side for sides in found.values() for side in sides]
  if (
    not found
    or len(found) == 1
    and len(shown) == 2
    and all(len(side.text) <= TEASER_CHARS for side in shown)
  ):
    return None  # the first screen shows all of them
  seeds = sorted({str(it["seed"]) for it in record.samples if "seed" in it})
  told = f"The same prompts (grey) and the same seed ({formatting.format_setting(', '.join(seeds))}), drawn by the same rules."
  if any("memorised_8grams" in it for it in record.samples):
    told += (
      " By heart: the share of a sample's runs of eight tokens that stand in the training text."
    )
  return section("Samples", element("p", told, class_="note"), *samples.render_all(found))


def _evaluations(record: RunRecord) -> Html | None:
  keys = formatting.measured_metrics([record])
  lines = [line for line in record.metrics if any(get_float(line, key) is not None for key in keys)]
  if not lines:
    return None
  rows = [
    [f"{line['step']:,}", *(formatting.format_metric(key, metric_cell(line, key)) for key in keys)]
    for line in samples.evenly_spaced(lines, MAX_EVALUATIONS)
  ]
  more = (
    f"{len(lines) - len(rows):,} more evaluations are in metrics.jsonl."
    if len(lines) > len(rows)
    else None
  )
  return section(
    "Evaluations",
    table(["step", *(formatting.METRIC_NAMES[key] for key in keys)], rows, "numbers"),
    element("p", more, class_="note") if more else None,
  )


def _memory(record: RunRecord) -> Html | None:
  memory = get_dict(record.about, "memory")
  planned = {
    name: nbytes for name in MEMORY_COLOURS if (nbytes := get_float(memory, "planned", name))
  }
  peaks, rows, bar = record.points("memory/peak_bytes"), [], None
  if planned:
    whole_of = max(
      sum(planned.values()),
      max((peak for _, peak in peaks), default=0) if _is_device_peak(memory) else 0,
    )
    bar = element(
      "div",
      [_bar_segment(name, nbytes / whole_of) for name, nbytes in planned.items()],
      class_="bar",
    )
    rows = [[[_dot(name), name], format_bytes(nbytes)] for name, nbytes in planned.items()]
    rows.append(["planned, a device", element("b", format_bytes(sum(planned.values())))])
  if host := get_float(memory, "host"):
    rows.append(["planned, of the host for each device", format_bytes(host)])
  if peaks:
    of = (
      "a device" if _is_device_peak(memory) else "the whole process: Python, JAX and the data too"
    )
    rows.append(
      [f"measured at most, {of}", element("b", format_bytes(max(peak for _, peak in peaks)))]
    )
  if not rows:
    return None
  told = "Planned by the compiler before any memory was taken; measured while the run went on."
  return section("Memory", element("p", told, class_="note"), bar, table([], rows, "numbers"))


def _is_device_peak(memory: dict[str, Any]) -> bool:
  return memory.get("peak_of") == "device"


def _bar_segment(name: str, share: float) -> Html:
  return element("div", style=f"width:{share:.2%}", class_=name, title=name)


def _dot(name: str) -> Html:
  return element("span", class_=f"dot {name}")


def _data(record: RunRecord) -> Html | None:
  report, kinds = record.data, ("rows", "tokens")
  if not any(get_dict(report, kind) for kind in kinds):
    return None
  counts = lambda key: [
    f"{n:,}" if (n := get_int(report, kind, key)) is not None else "" for kind in kinds
  ]
  reasons = sorted(
    {reason for kind in kinds for reason in get_dict(get_dict(report, kind), "dropped")}
  )[:50]
  dropped = [
    [f"dropped: {it}", *(f"{get_int(report, kind, 'dropped', it) or 0:,}" for kind in kinds)]
    for it in reasons
  ]
  rows = [
    ["read", *counts("read")],
    ["trained on", *counts("trained")],
    ["held out", *counts("held_out")],
  ]
  rows += dropped or [["dropped", "0", "0"]]
  facts = [
    ("read from", formatting.format_setting(record.config.get("data.train"), 2000)),
    ("held out", _held_out(record)),
    (
      "rows of tokens",
      _labelled_counts(
        report, "sequences", ", ", (("trained", "trained on"), ("held_out", "held out"))
      ),
    ),
    (
      "tokens a document",
      _labelled_counts(report, "tokens_per_row", ", ", ((it, it) for it in LENGTH_KEYS)),
    ),
    (
      "padding",
      formatting.format_percent(share)
      if (share := get_float(report, "padding_share")) is not None
      else None,
    ),
    ("duplicates", f"{n:,}" if (n := get_int(report, "duplicates")) is not None else None),
    (
      "classes",
      formatting.format_setting(tuple(labels))
      if isinstance(labels := report.get("labels"), list)
      else None,
    ),
    *(
      (note, f"{n:,}")
      for note in list(get_dict(report, "notes"))[:50]
      if (n := get_int(report, "notes", note))
    ),
  ]
  return section(
    "Data",
    element("p", _accounting_note(report), class_="note"),
    table(["", "documents", "tokens"], rows, "numbers"),
    _facts_table(facts),
  )


def _held_out(record: RunRecord) -> str:
  sources, fraction = (
    record.config.get("data.validation"),
    get_float(record.config, "data.validation_fraction"),
  )
  if sources or fraction is None:
    return formatting.format_setting(sources, 2000)
  if not fraction:
    return "nothing"
  ends = get_int(record.data, "notes", "documents whose end is held out")
  return (
    f"the last {formatting.format_percent(fraction)} of each"
    if ends
    else f"{formatting.format_percent(fraction)} of the documents, drawn"
  )


LENGTH_KEYS = ("shortest", "median", "mean", "longest")


def _labelled_counts(report: dict[str, Any], key: str, between: str, names) -> str:
  return between.join(
    f"{told} {n:,}" for name, told in names if (n := get_float(report, key, name)) is not None
  )


def _accounting_note(report: dict[str, Any]) -> Html:
  """Whether everything that was read is accounted for."""
  off = []
  for kind, name in (("rows", "documents"), ("tokens", "tokens")):
    dropped = get_dict(get_dict(report, kind), "dropped")
    kept = [get_int(report, kind, key) or 0 for key in ("trained", "held_out")]
    kept += [get_int(dropped, reason) or 0 for reason in dropped]
    if difference := (get_int(report, kind, "read") or 0) - sum(kept):
      off.append(f"{difference:,} {name} are not accounted for")
  if off:
    return element("span", "; ".join(off) + ".", class_="bad")
  return markup.escape_children(
    "Read = trained on + held out + dropped, to the last document and token."
  )


def _run_details(record: RunRecord) -> Html:
  about, config = record.about, record.config
  model, devices, mesh = (get_dict(about, key) for key in ("model", "devices", "mesh"))
  parameters, trained = get_int(model, "parameters"), get_int(model, "trained")
  some = f", {trained:,} of them trained" if trained and trained != parameters else ""
  kind = " ".join(str(model[key]) for key in ("type",) if key in model)
  facts = [
    ("model", formatting.format_setting(f"{kind} from {config.get('model.path')}".strip(), 500)),
    (
      "parameters",
      f"{parameters:,}{some}, computed in {model.get('compute_dtype', '?')}"
      if parameters
      else None,
    ),
    ("devices", _devices(about) if devices else None),
    (
      "processes",
      get_int(devices, "processes") if (get_int(devices, "processes") or 1) > 1 else None,
    ),
    ("mesh", " x ".join(f"{name}={count}" for name, count in mesh.items())),
    *(("started", it) for it in _starts(record)),
    (
      "versions",
      ", ".join(f"{name} {it}" for name, it in sorted(get_dict(about, "versions").items())),
    ),
    ("commit", _short_commit(about.get("commit"))),
  ]
  chosen = [
    (name, formatting.format_setting(value))
    for name, value in sorted(config.items())
    if value is not None
    and (name not in jaxft.config.BY_NAME or value != jaxft.config.BY_NAME[name].default)
  ]
  return section(
    "What was run",
    _facts_table(facts),
    element("h3", "Settings that are not at their default"),
    _facts_table(chosen),
    element("p", "All of them are in config.json.", class_="note"),
  )


def _short_commit(commit: Any) -> str | None:
  """As much of a commit's name as tells it apart."""
  return str(commit)[:12] if commit else None


def _facts_table(facts: list[tuple[str, Any]]) -> Html:
  """A table of names and values, without those that are not known; a path breaks behind its slashes."""
  return table(
    [],
    [
      [name, markup.breakable(formatting.format_setting(str(value), 2000))]
      for name, value in facts
      if value
    ],
    "facts",
  )


def _starts(record: RunRecord) -> list[str]:
  """Where a run that was continued has been; nothing of one that ran through."""
  return [
    f"at step {get_int(it, 'step') or 0:,}, {it.get('at')}, on {_devices(it)}"
    for it in (samples.evenly_spaced(record.starts, 8) if len(record.starts) > 1 else [])
  ]


def _devices(of: dict[str, Any]) -> str:
  return f"{get_int(of, 'devices', 'count')} x {get_dict(of, 'devices').get('kind')}"


def _reproduce(record: RunRecord) -> Html:
  """What to type to get the same run."""
  about, lines = record.about, []
  if about.get("command"):
    if folder := about.get("folder"):
      lines.append(f"cd {shlex.quote(str(folder))}")
    if commit := about.get("commit"):
      lines.append(f"# jaxft at commit {_short_commit(commit)}")
    given = itertools.starmap(
      "{}={}".format, ((k, shlex.quote(str(v))) for k, v in get_dict(about, "environment").items())
    )
    lines.append(" ".join([*given, str(about["command"])]))
    told = "The command as it was given; with another --workdir it begins from the start."
  else:
    file = str(record.workdir / "config.json")
    lines += [
      "python - <<'END'",
      "from pathlib import Path",
      "import jaxft",
      "from jaxft import config",
    ]
    lines += [f'jaxft.finetune(config.read(Path({file!r})), "runs/again")', "END"]
    told = "This run was not started by a command that is known; its config.json starts the same."
  return section(
    "Again", element("p", told, class_="note"), element("pre", markup.breakable("\n".join(lines)))
  )
