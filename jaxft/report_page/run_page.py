"""The page of one run: outcome, curves, samples, and commands to reproduce it."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import jaxft.config
from jaxft.plan.rendering import MEMORY_CATEGORIES, format_bytes
from jaxft.report_page import formatting, markup, run_record, samples
from jaxft.report_page.charts import Series, chart
from jaxft.report_page.formatting import METRIC_NAMES, format_number, format_percent, format_setting
from jaxft.report_page.markup import Child, Html, element, section, table
from jaxft.report_page.run_record import RunRecord, get_dict, get_float, get_int, metric_cell
from jaxft.utils.files import atomic_write
from jaxft.utils.types import Json
from jaxft.utils.units import format_count

MAX_EVALUATIONS = 24  # rows of the table of evaluations
TEASER_CHARS = 420  # characters of each of the two samples on the first screen
MAX_VALUE_CHARS = 2000  # characters of a value in a table
MAX_ITEMS = 50  # shown items of a list from a file
CLASSIFICATION_METRICS = (("accuracy", "eval/accuracy"), ("F1", "eval/f1"))
LOGGED_METRICS = (
  ("training loss", "train/loss"),
  ("learning rate", "train/learning_rate"),
  ("gradient norm", "train/grad_norm"),
)
LENGTH_KEYS = ("shortest", "median", "mean", "longest")


def render(record: RunRecord) -> str:
  """Return the HTML page of the run."""
  sections = [
    _header(record),
    _curves(record),
    _export_section(record),
    _samples(record),
    element("div", _evaluations(record), _memory(record), class_="pair"),
    _data(record),
    _run_details(record),
    _reproduce(record),
  ]
  return markup.render_page(f"{record.name}: {formatting.model_name(record)}", *sections)


def write(workdir: Path) -> None:
  """Write report.html of the run in this workdir."""
  atomic_write(workdir / "report.html", render(run_record.load(workdir)))


def _header(record: RunRecord) -> Html:
  finished, status = formatting.run_status(record)
  facts = [record.name, formatting.model_name(record), status if finished else None]
  facts.append(formatting.time_span(record))
  return element(
    "header",
    element("p", " · ".join(filter(None, facts)), class_="over"),
    element("h1", formatting.headline(record, finished)),
    element("p", _lead(record), class_="lead"),
    None if finished else element("p", status, class_="state bad"),
    [element("p", note + ".", class_="state") for note in record.notes],
    _tiles(record),
    _before_and_after(record),
  )


def _lead(record: RunRecord) -> list[Child]:
  """Explain the headline: the evaluated text, and the best possible value."""
  metric = formatting.headline_metric(record)
  floor = _entropy_floor(record)
  held_out = get_int(record.data, "rows", "held_out")
  if metric is None:
    if get_int(record.data, "tokens", "held_out") == 0:
      return ["No text was held out, so the run has no eval loss."]
    return ["metrics.jsonl contains no evaluation."]
  noun = "held-out text" if record.classifies else "held-out document"
  text = f"Measured on {format_count(held_out, noun) if held_out else 'held-out text'}."
  worse = element("span", "This is worse than before training. ", class_="bad")
  parts: list[Child] = [worse, text] if metric.better is False else [text]
  if metric.after is None:
    return parts
  if metric.key == "eval/loss" and floor is not None and metric.before > floor:
    possible = metric.before - floor
    gained = format_percent((metric.before - metric.after) / possible)
    parts.append(
      f" The run gained {gained} of the possible {format_number(possible)} nats per token: the "
      "loss before training minus the entropy of the text, which no model can beat."
    )
  if record.exported_step < record.last_step:
    steps = f"step {record.exported_step:,} of {record.last_step:,}"
    parts.append(f" The weights of {steps} were exported, the best of the saved checkpoints.")
  return parts


def _entropy_floor(record: RunRecord) -> float | None:
  floors = (get_float(line, "eval/floor") for line in record.metrics)
  return next((floor for floor in floors if floor is not None), None)


def _tiles(record: RunRecord) -> Html | None:
  """Render the main numbers of the run."""
  unit = formatting.unit_name(record)
  tiles: list[tuple[str, str, str | None]] = [
    (METRIC_NAMES[key], formatting.format_cells(record, key), None)
    for key in formatting.measured_metrics([record])
  ]
  shares = [record.memorized_share(when) for when in ("before", "after")]
  if percents := [format_percent(it) for it in shares if it is not None]:
    tiles.append(
      ("memorized 8-grams", " → ".join(percents), "of the samples, also in the training text")
    )
  if (floor := _entropy_floor(record)) is not None:
    tiles.append(("entropy floor", format_number(floor), None))
  if tokens := record.points("train/tokens"):
    steps = format_count(record.last_step, "step")
    tiles.append((f"{unit}s trained on", f"{int(tokens[-1][1]):,}", f"in {steps}"))
  if (speed := record.median("perf/tokens_per_second")) is not None:
    mfu = record.median("perf/mfu")
    note = None if mfu is None else f"MFU {format_percent(mfu)}"
    tiles.append((f"{unit}s per second", formatting.format_speed(speed), note))
  items = []
  for name, value, note in tiles:
    small = element("small", note) if note else None
    items.append(element("div", element("dt", name), element("dd", value, small)))
  return element("dl", items, class_="tiles") if items else None


def _before_and_after(record: RunRecord) -> Html | None:
  """Render the first and last sample of one prompt."""
  for group in samples.by_prompt(record).values():
    if len(group) > 1:
      return samples.side_by_side([group[0], group[-1]], TEASER_CHARS)
  return None


def _export_section(record: RunRecord) -> Html | None:
  """Render facts about the export, its verification, and code that loads it."""
  export = get_dict(record.about, "export")
  folder = export.get("folder")
  if not isinstance(folder, str):
    return None
  difference = get_float(export, "logits_max_abs_difference")
  reference = export.get("reference")
  logits = reference
  if difference is not None:
    distance = f"within {difference:.1e} of the trained model's, in float32"
    logits = f"{distance}, computed by {reference}"
  facts = [
    ("folder", folder),
    ("weights", f"of step {record.exported_step:,}, in {export.get('dtype')}"),
    ("read back", f"all tensors equal those of the trained model, {export.get('tensors')}"),
    ("logits", logits),
    ("LoRA adapter", export.get("adapter")),
  ]
  auto = "AutoModelForCausalLM"
  usage = shlex.join(["python", "-m", "jaxft.generate", "--model", folder, "--prompt", "..."])
  if record.classifies:
    auto = "AutoModelForSequenceClassification"
    usage = f"import jaxft\njaxft.load({folder!r}).classify(['...'])"
  lines = [
    f"from transformers import {auto}, AutoTokenizer",
    f"model = {auto}.from_pretrained({folder!r})",
    f"tokenizer = AutoTokenizer.from_pretrained({folder!r})",
  ]
  return section("The exported model", _facts_table(facts), _code("\n".join(lines)), _code(usage))


def _note(content: Child) -> Html:
  return element("p", content, class_="note")


def _code(text: str) -> Html:
  return element("pre", markup.breakable(text))


def _curves(record: RunRecord) -> Html | None:
  def series(name: str, key: str, colour: int = 0, **style: bool) -> Series:
    return Series(name=name, points=record.points(key), colour=colour, **style)

  def speed(name: str, key: str) -> list[Series]:
    return [Series(name=name, points=record.without_outliers(key), noisy=True)]

  unit = formatting.unit_name(record)
  floor = _entropy_floor(record)
  losses = [
    series("training text", "train/loss", noisy=True),
    series("held-out text", "eval/loss", 1, dots=True),
    series("unrelated text", "eval/unrelated_loss", 3, dots=True),
  ]
  accuracy = [
    series(name, key, i, dots=True) for i, (name, key) in enumerate(CLASSIFICATION_METRICS, 1)
  ]
  norm = [series("norm", "train/grad_norm", noisy=True)]
  tokens = speed(f"{unit}s/s", "perf/tokens_per_second")
  figures = [
    chart(
      "Loss",
      f"nats per {unit}",
      losses,
      floor=("entropy", floor) if floor else None,
      nonfinite_steps=record.nonfinite_steps,
      wide=True,
    ),
    chart("Held-out texts classified", "share", accuracy, share=True),
    chart("Learning rate", "", [series("rate", "train/learning_rate")], from_zero=True),
    chart("Gradient norm", "before clipping", norm),
    chart("Speed", f"{unit}s per second", tokens, from_zero=True),
    chart("MFU", "share of the peak", speed("MFU", "perf/mfu"), from_zero=True),
  ]
  figures = [it for it in figures if it]
  parts = [element("div", figures, class_="charts") if figures else None, _logged_once(record)]
  return section("Training curves", *parts) if any(parts) else None


def _logged_once(record: RunRecord) -> Html | None:
  """Render values that were logged once, as text: a chart would show a single dot."""
  points = {name: record.points(key) for name, key in LOGGED_METRICS}
  single = {name: it[0] for name, it in points.items() if len(it) == 1}
  if not single:
    return None
  text = ", ".join(f"{name} {format_number(y)} at step {x:,}" for name, (x, y) in single.items())
  return element("p", f"Logged once: {text}.", class_="once")


def _samples(record: RunRecord) -> Html | None:
  groups = samples.by_prompt(record)
  shown = [sample for group in groups.values() for sample in group]
  is_short = all(len(sample.text) <= TEASER_CHARS for sample in shown)
  if not groups or len(groups) == 1 and len(shown) == 2 and is_short:
    return None  # the header already shows all samples
  seeds = format_setting(
    ", ".join(sorted({str(it["seed"]) for it in record.samples if "seed" in it}))
  )
  text = f"All samples use the same prompts (gray), seed ({seeds}) and sampling settings."
  if any("memorised_8grams" in it for it in record.samples):
    share = "the share of a sample's sequences of eight tokens that occur in the training text"
    text += f" Memorized: {share}."
  return section("Samples", _note(text), *samples.render_all(groups))


def _evaluations(record: RunRecord) -> Html | None:
  keys = formatting.measured_metrics([record])
  lines = [line for line in record.metrics if any(get_float(line, key) is not None for key in keys)]
  if not lines:
    return None
  rows = []
  for line in samples.evenly_spaced(lines, MAX_EVALUATIONS):
    cells = (formatting.format_metric(key, metric_cell(line, key)) for key in keys)
    rows.append([f"{line['step']:,}", *cells])
  more = None
  if len(lines) > len(rows):
    more = _note(f"{len(lines) - len(rows):,} more evaluations are in metrics.jsonl.")
  head = ["step", *(METRIC_NAMES[key] for key in keys)]
  return section("Evaluations", table(head, rows, "numbers"), more)


def _memory(record: RunRecord) -> Html | None:
  memory = get_dict(record.about, "memory")
  planned = {name: get_float(memory, "planned", name) for name in MEMORY_CATEGORIES}
  planned = {name: nbytes for name, nbytes in planned.items() if nbytes}
  total = sum(planned.values())
  of_device = memory.get("peak_of") == "device"
  peak = max((nbytes for _, nbytes in record.points("memory/peak_bytes")), default=None)
  rows: list[list[Child]] = []
  bar = []
  if planned:
    width = max(total, peak or 0) if of_device else total
    for name, nbytes in planned.items():
      share = f"width:{nbytes / width:.2%}"
      bar.append(element("div", style=share, class_=name, title=name))
      rows.append([[element("span", class_=f"dot {name}"), name], format_bytes(nbytes)])
    rows.append(["planned, per device", element("b", format_bytes(total))])
  if host := get_float(memory, "host"):
    rows.append(["planned, host memory per device", format_bytes(host)])
  if peak is not None:
    source = "per device" if of_device else "whole process, with Python, JAX and data"
    rows.append([f"measured peak, {source}", element("b", format_bytes(peak))])
  if not rows:
    return None
  text = "Planned: by the compiler, before memory was allocated. Measured: during the run."
  shown = element("div", bar, class_="bar") if bar else None
  return section("Memory", _note(text), shown, table([], rows, "numbers"))


def _data(record: RunRecord) -> Html | None:
  report = record.data
  kinds = ("rows", "tokens")
  if not any(get_dict(report, kind) for kind in kinds):
    return None

  def counts(*keys: str) -> list[int | None]:
    return [get_int(report, kind, *keys) for kind in kinds]

  rows = []
  for name, key in (("read", "read"), ("trained on", "trained"), ("held out", "held_out")):
    rows.append([name, *("" if n is None else f"{n:,}" for n in counts(key))])
  reasons = sorted({it for kind in kinds for it in get_dict(report, kind, "dropped")})
  for reason in reasons[:MAX_ITEMS]:
    rows.append([f"dropped: {reason}", *(f"{n or 0:,}" for n in counts("dropped", reason))])
  if not reasons:
    rows.append(["dropped", "0", "0"])
  padding = get_float(report, "padding_share")
  duplicates = get_int(report, "duplicates")
  labels = report.get("labels")
  sequences = {"trained": "trained on", "held_out": "held out"}
  facts = [
    ("read from", format_setting(record.config.get("data.train"), MAX_VALUE_CHARS)),
    ("held out", _held_out(record)),
    ("sequences", _labelled_counts(report, "sequences", sequences)),
    (
      "tokens per document",
      _labelled_counts(report, "tokens_per_row", {k: k for k in LENGTH_KEYS}),
    ),
    ("padding", None if padding is None else format_percent(padding)),
    ("duplicates", None if duplicates is None else f"{duplicates:,}"),
    ("classes", format_setting(tuple(labels)) if isinstance(labels, list) else None),
  ]
  for note in list(get_dict(report, "notes"))[:MAX_ITEMS]:
    count = get_int(report, "notes", note)
    facts.append((note, f"{count:,}" if count else None))
  counted = table(["", "documents", "tokens"], rows, "numbers")
  return section("Data", _note(_accounting_note(report)), counted, _facts_table(facts))


def _held_out(record: RunRecord) -> str:
  sources = record.config.get("data.validation")
  fraction = get_float(record.config, "data.validation_fraction")
  if sources or fraction is None:
    return format_setting(sources, MAX_VALUE_CHARS)
  if not fraction:
    return "nothing"
  if get_int(record.data, "notes", "documents whose end is held out"):
    return f"the last {format_percent(fraction)} of each"
  return f"{format_percent(fraction)} of the documents, at random"


def _labelled_counts(report: Json, key: str, labels: dict[str, str]) -> str:
  counts = {label: get_float(report, key, name) for name, label in labels.items()}
  return ", ".join(f"{label} {count:,}" for label, count in counts.items() if count is not None)


def _accounting_note(report: Json) -> Child:
  """Return whether all documents and tokens that were read are accounted for."""
  problems = []
  for kind, name in (("rows", "documents"), ("tokens", "tokens")):
    dropped = get_dict(report, kind, "dropped")
    counts = [get_int(report, kind, key) or 0 for key in ("trained", "held_out")]
    counts += [get_int(dropped, reason) or 0 for reason in dropped]
    if difference := (get_int(report, kind, "read") or 0) - sum(counts):
      problems.append(f"{difference:,} {name} are not accounted for")
  if problems:
    return element("span", "; ".join(problems) + ".", class_="bad")
  return "Read = trained on + held out + dropped, to the last document and token."


def _run_details(record: RunRecord) -> Html:
  about = record.about
  config = record.config
  model, devices, mesh = (get_dict(about, key) for key in ("model", "devices", "mesh"))
  num_params = get_int(model, "parameters")
  trained = get_int(model, "trained")
  processes = get_int(devices, "processes") or 1
  source = f"{model.get('type', '')} from {config.get('model.path')}".strip()
  params = None
  if num_params:
    some = f", {trained:,} of them trained" if trained and trained != num_params else ""
    params = f"{num_params:,}{some}, computed in {model.get('compute_dtype', '?')}"
  versions = sorted(get_dict(about, "versions").items())
  facts = [
    ("model", format_setting(source, 500)),
    ("parameters", params),
    ("devices", _devices(about) if devices else None),
    ("processes", processes if processes > 1 else None),
    ("mesh", " x ".join(f"{name}={count}" for name, count in mesh.items())),
    *(("started", it) for it in _starts(record)),
    ("versions", ", ".join(f"{name} {version}" for name, version in versions)),
    ("commit", _short_commit(about.get("commit"))),
  ]
  defaults = {name: setting.default for name, setting in jaxft.config.BY_NAME.items()}
  changed = []
  for name, value in sorted(config.items()):
    if value is not None and (name not in defaults or value != defaults[name]):
      changed.append((name, format_setting(value)))
  return section(
    "Run details",
    _facts_table(facts),
    element("h3", "Changed settings"),
    _facts_table(changed),
    _note("config.json contains all settings."),
  )


def _short_commit(commit: object) -> str | None:
  return str(commit)[:12] if commit else None


def _facts_table(facts: Sequence[tuple[str, object]]) -> Html:
  """Return a table of the known values; paths may break after slashes."""
  cell = lambda value: markup.breakable(format_setting(str(value), MAX_VALUE_CHARS))
  return table([], [[name, cell(value)] for name, value in facts if value], "facts")


def _starts(record: RunRecord) -> list[str]:
  """Return a line for each start of a resumed run; [] for a single start."""
  return [
    f"at step {get_int(it, 'step') or 0:,}, {it.get('at')}, on {_devices(it)}"
    for it in (samples.evenly_spaced(record.starts, 8) if len(record.starts) > 1 else [])
  ]


def _devices(about: Json) -> str:
  return f"{get_int(about, 'devices', 'count')} x {get_dict(about, 'devices').get('kind')}"


def _reproduce(record: RunRecord) -> Html:
  """Render the commands that repeat this run."""
  about = record.about
  lines: list[str] = []
  if about.get("command"):
    if folder := about.get("folder"):
      lines.append(f"cd {shlex.quote(str(folder))}")
    if commit := about.get("commit"):
      lines.append(f"# jaxft at commit {_short_commit(commit)}")
    variables = get_dict(about, "environment").items()
    words = [f"{name}={shlex.quote(str(value))}" for name, value in variables]
    lines.append(" ".join([*words, str(about["command"])]))
    note = "The command of this run. With another --workdir it starts from step 0."
  else:
    file = str(record.workdir / "config.json")
    lines += ["python - <<'END'", "from pathlib import Path", "import jaxft"]
    lines += ["from jaxft import config", f"config = config.load_run_config(Path({file!r}))"]
    lines += ['jaxft.finetune(config, "runs/again")', "END"]
    note = "The command of this run is unknown. This code starts the same run from its config.json."
  return section("Reproduce", _note(note), _code("\n".join(lines)))
