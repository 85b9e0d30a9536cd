"""Turn the configured sources into datasets of tokens, and count every row."""

import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from jaxft.config import DataSection, TrainSection
from jaxft.data import columns, formats, packing, readers, sources, token_cache, tokenize
from jaxft.data.accounting import build_report, num_rows_and_steps
from jaxft.data.formats import BadRowError, Example
from jaxft.data.packing import ClassificationDataset, LayoutDataset
from jaxft.data.token_cache import Manifest
from jaxft.errors import RequestError
from jaxft.utils.files import cache_dir
from jaxft.utils.types import Json
from jaxft.utils.units import format_count

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

ProgressFn: TypeAlias = Callable[[int, int], None]  # examples tokenized so far, and in total
DROPPED, TRAIN, VALIDATION = 0, 1, 2
SPLITS = {"train": TRAIN, "validation": VALIDATION}
# The settings that the tokens depend on. The others only decide how tokens are laid out in rows.
CACHE_KEY_SETTINGS = (
  "format text_column prompt_column completion_column label_column nats_column template separator "
  "encoding validation_fraction limit_train limit_validation shuffle_seed on_bad_row duplicates"
).split()


class PreparedData(NamedTuple):
  """The training and held-out data of a run, ready to be batched."""

  train: LayoutDataset
  validation: LayoutDataset | None  # None without held-out data
  labels: list[str]  # for classification, in the order of their class numbers
  entropy_floor: float | None  # lowest possible loss in nats per validation token, if known
  fingerprint: str  # hash of the training examples and their layout in rows
  validation_fingerprint: str
  unrelated_fingerprint: str
  unrelated: LayoutDataset | None  # text that measures forgetting
  report: Json

  def with_class_ids(self, classes: list[str]) -> "PreparedData":
    """Return the same rows with labels numbered as in `classes`.

    Raises:
      RequestError: a label is not among the classes.
    """
    ids = np.array(formats.class_ids(self.labels, classes), np.int32)

    def renumber(rows: LayoutDataset) -> ClassificationDataset:
      labels_N = ids[np.asarray(rows.tokens.labels_N)]
      tokens = dataclasses.replace(rows.tokens, labels_N=labels_N)
      return ClassificationDataset(tokens, rows.seq_len)

    validation = renumber(self.validation) if self.validation else None
    return self._replace(train=renumber(self.train), validation=validation, labels=list(classes))

  def to_json(self, train: TrainSection) -> str:
    """Return the text of data_report.json for a run of `config.train`."""
    _, total_steps = num_rows_and_steps(self.train, train)
    steps = -(-len(self.train) // train.batch_size)
    last = len(self.train) - (steps - 1) * train.batch_size
    rest = "; the rest is masked"
    if steps > 1:
      rest = "; the next epoch fills the rest, and after the last one it is masked"
    rest = "" if last == train.batch_size else rest
    epoch = {
      "steps_per_epoch": steps,
      "steps_in_all": total_steps,
      "last_step_of_an_epoch": f"{last} of {train.batch_size} sequences{rest}",
    }
    return json.dumps(self.report | epoch, indent=2) + "\n"


def prepare_data(
  data: DataSection,
  tokenizer: "PreTrainedTokenizerBase",
  tokenizer_fingerprint: str,
  on_progress: ProgressFn = lambda done, total: None,
  log: Callable[[str], None] = lambda line: None,
) -> PreparedData:
  """Read, split, sample, tokenize and pack the data, or open its cached tokens.

  Args:
    data: `config.data`.
    tokenizer: the model's tokenizer.
    tokenizer_fingerprint: a hash of the tokenizer, part of the cache key.
    on_progress: called with the number of examples tokenized so far, and in total.
    log: called with each line for the user.

  Raises:
    RequestError: a row is bad (unless bad rows are skipped), or no example is left to train on.
    StorageError: the cache folder cannot be written.
  """
  key = {
    "sources": _source_fingerprints(data),
    "tokenizer": tokenizer_fingerprint,
    "settings": {name: getattr(data, name) for name in CACHE_KEY_SETTINGS},
    "manifest": sorted(Manifest.__annotations__),
  }
  folder = Path(data.cache_dir) if data.cache_dir else cache_dir("tokens")

  def build(to: Path) -> Manifest:
    manifest = _build_cache(to, data, tokenizer, on_progress)
    if _source_fingerprints(data) != key["sources"]:
      raise RequestError("config.data: a source has changed while it was read; run again")
    return manifest

  entry, manifest = token_cache.load_or_build(folder, key, build, log)
  for line in manifest["said"]:
    log(line)
  if manifest["lost"]:
    log(
      f"{manifest['lost']:,} of {manifest['characters']:,} characters have no token in the model's "
      "tokenizer: they are dropped, or become its unknown token"
    )
  arrays = {split: token_cache.open_arrays(entry, split, manifest) for split in SPLITS}
  datasets = {split: build_dataset(arrays[split], data, tokenizer.eos_token_id) for split in SPLITS}
  for split, rows in datasets.items():
    if not len(rows) and len(arrays[split]):
      raise RequestError(
        f"config.data: the {split} examples have no token to predict in sequences of "
        f"{data.sequence_length} tokens; raise config.data.sequence_length"
      )
  validation = arrays["validation"]
  has_nats = len(validation) and len(validation.nats_N) == len(validation)
  train_fingerprint = token_cache.fingerprint("train", manifest)
  layout = f"{data.layout} {data.sequence_length} {manifest['labels']} {train_fingerprint}"
  return PreparedData(
    train=datasets["train"],
    validation=datasets["validation"] if len(validation) else None,
    labels=[
      readers.ClassName(label, number) if number is not None else label
      for label, number in zip(manifest["labels"], manifest["numbers"], strict=True)
    ],
    entropy_floor=float(validation.nats_N.sum() / len(validation.ids)) if has_nats else None,
    fingerprint=hashlib.sha256(layout.encode()).hexdigest(),
    validation_fingerprint=token_cache.fingerprint("validation", manifest),
    unrelated_fingerprint=" ".join(sources.fingerprint(data.unrelated, "validation")),
    unrelated=_load_unrelated(data, tokenizer) if data.unrelated else None,
    report=build_report(manifest, arrays, datasets, data.sequence_length),
  )


def _load_unrelated(data: DataSection, tokenizer: "PreTrainedTokenizerBase") -> LayoutDataset:
  """Return the text of `data.unrelated`, laid out in rows.

  The rows have the run's shape, so that one compiled program evaluates both.
  """
  template = formats.DEFAULT_TEMPLATE
  data = dataclasses.replace(data, format="text", nats_column="", template=template)
  ignored = Counter()
  examples = read_examples(data.unrelated, "validation", data, ignored, ignored)
  arrays = tokenize.encode_in_memory(examples, tokenizer)
  if not len(arrays):
    raise RequestError(f"config.data.unrelated={data.unrelated!r}: has no text; name other sources")
  return build_dataset(arrays, data, tokenizer.eos_token_id)


def _source_fingerprints(data: DataSection) -> dict[str, list]:
  """Return the fingerprints of the current content of the sources."""
  return {
    "train": [
      [sources.fingerprint((name,), "train"), weight]
      for name, weight in map(sources.parse_weight, data.train)
    ],
    "validation": sources.fingerprint(data.validation, "validation"),
  }


def read_examples(
  names: tuple[str, ...],
  split: str,
  data: DataSection,
  dropped: Counter[str],
  notes: Counter[str],
  log: Callable[[str], None] = lambda line: None,
) -> Iterator[Example]:
  """Yield the examples of all rows.

  Args:
    names: sources to read, in this order.
    split: the split to read if the name of a hub data set does not include one.
    data: `config.data`.
    dropped: counts bad rows by reason, if `data.on_bad_row` is "skip".
    notes: counts files and rows worth a note in data_report.json.
    log: called with a line for each column that replaces a missing one.

  Raises:
    RequestError: a source cannot be read, or a row is bad and bad rows are not skipped.
  """
  file_data = data
  logged = set()

  def options_for(name: str) -> readers.ReaderOptions:
    nonlocal file_data
    file_data, lines = columns.resolve(name, split, data)
    for line in lines:
      if line not in logged:  # once, not for each file of a folder
        log(f"{name}: {line}")
        logged.add(line)
    return readers.ReaderOptions.from_config(
      data, formats.required_columns(file_data), formats.label_column(file_data)
    )

  for row in sources.read_rows(names, split, options_for, notes):
    try:
      yield formats.to_example(row, file_data)
    except BadRowError as error:
      if data.on_bad_row == "error":
        raise formats.as_request_error(row, error) from error
      dropped[formats.error_category(str(error))] += 1


class DataSource(NamedTuple):
  """One source of the settings."""

  name: str
  split: str  # "train" or "validation": the setting that names it
  weight: float


class Survey(NamedTuple):
  """The result of a first pass over all examples."""

  sources: list[DataSource]
  counts: list[int]  # examples of each source
  duplicates: np.ndarray  # whether each example repeats an earlier one
  labels: list[str]
  dropped: Counter[str]  # rows, by reason; only bad rows at first
  read: int  # rows, including bad ones
  notes: Counter[str]
  log_lines: list[str]


def _build_cache(
  folder: Path, data: DataSection, tokenizer: "PreTrainedTokenizerBase", on_progress: ProgressFn
) -> Manifest:
  """Write the token files.

  The sources are read twice: the first pass counts examples and decides which ones the second pass
  writes. Between the passes, memory holds counts and hashes of the examples, not their text.
  """
  survey = _survey(data)
  splits, repeats, tail_share = _select(survey, data)
  selected = zip(survey.sources, splits, repeats)
  total = sum(int(repeats_N.sum()) for repeats_N in repeats)
  log_done = lambda done: on_progress(done, total)
  examples = _read_selected(selected, tail_share, data)
  files, written = _write_tokens(folder, examples, survey.labels, tokenizer, log_done)
  tails = written["held_out"] if tail_share else 0
  if written["examples"] != total + tails:
    raise RequestError("config.data: a source has changed while it was read; run again")
  lost, characters = written["lost"], written["characters"]
  if 2 * lost > characters:
    raise RequestError(
      f"config.model.path: its tokenizer has no token for {lost:,} of the {characters:,} "
      "characters of config.data; use a model whose tokenizer was trained on such text"
    )
  extra = sum(int(np.maximum(repeats_N - 1, 0).sum()) for repeats_N in repeats)
  survey.notes["rows repeated because of their weight"] = extra
  return Manifest(
    files=files,
    labels=survey.labels,
    numbers=[getattr(label, "number", None) for label in survey.labels],
    read=survey.read + extra,
    dropped=dict(survey.dropped),
    duplicates=int(survey.duplicates.sum()),
    merged=written["merged"],
    characters=characters,
    lost=lost,
    notes={note: count for note, count in survey.notes.items() if count},
    said=list(dict.fromkeys(survey.log_lines)),
    tails=tails,
  )


def _survey(data: DataSection) -> Survey:
  """Count the examples of each source, and find labels and duplicates."""
  weighted = map(sources.parse_weight, data.train)
  all_sources = [DataSource(name, "train", weight) for name, weight in weighted]
  all_sources += [DataSource(name, "validation", 1.0) for name in data.validation]
  dropped, notes = Counter(), Counter()
  log_lines, counts = [], []
  labels, seen = set(), set()
  is_duplicate = bytearray()
  for source in all_sources:
    counts.append(0)
    names = (source.name,)
    for example in read_examples(names, source.split, data, dropped, notes, log_lines.append):
      counts[-1] += 1
      labels.add(example.label)
      digest = hash((example.label, example.text))  # 64 bits instead of the text, to save memory
      is_duplicate.append(digest in seen)
      seen.add(digest)
  return Survey(
    sources=all_sources,
    counts=counts,
    duplicates=np.frombuffer(is_duplicate, bool),
    labels=_sort_labels({label for label in labels if label is not None}),
    dropped=dropped,
    read=sum(counts) + dropped.total(),
    notes=notes,
    log_lines=log_lines,
  )


def _select(survey: Survey, data: DataSection) -> tuple[list[np.ndarray], list[np.ndarray], float]:
  """Decide the split of each example and how often it is written.

  Returns:
    The split of each example, per source; how often each is written, per source; the share of each
    document to hold out, as `_assign_splits` returns it.

  Raises:
    RequestError: no example is left to train on, or all labels are the same.
  """
  rng = np.random.default_rng(data.shuffle_seed)
  splits, tail_share = _assign_splits(survey, data, rng)
  repeats = [
    _repeat_counts(source.weight, split_N, rng, survey.dropped)
    for source, split_N in zip(survey.sources, splits)
  ]
  if not any(repeats_N[split_N == TRAIN].any() for split_N, repeats_N in zip(splits, repeats)):
    raise RequestError(
      f"config.data.train={data.train!r}: these weights leave no document to train on; raise one"
    )
  if len(survey.labels) == 1:
    raise RequestError(
      f"config.data.label_column={data.label_column!r}: all rows have the label "
      f"{survey.labels[0]!r}; give data with two or more labels"
    )
  return splits, repeats, tail_share


def _read_selected(
  selected: Iterable[tuple[DataSource, np.ndarray, np.ndarray]],
  tail_share: float,
  data: DataSection,
) -> Iterator[tuple[Example, int]]:
  """Yield the examples to write, each with its split."""
  ignored = Counter()  # the first pass has counted the bad rows already
  for source, split_N, repeats_N in selected:
    for repeat in range(repeats_N.max(initial=0)):
      selected_N = repeats_N > repeat
      examples = read_examples((source.name,), source.split, data, ignored, ignored)
      examples = itertools.compress(examples, selected_N)
      if tail_share:
        yield from _split_documents(examples, tail_share, with_tails=repeat == 0)
      else:
        yield from zip(examples, split_N[selected_N])


def _write_tokens(
  folder: Path,
  examples: Iterable[tuple[Example, int]],
  labels: list[str],
  tokenizer: "PreTrainedTokenizerBase",
  on_progress: Callable[[int], None],
) -> tuple[dict[str, token_cache.FileInfo], Counter[str]]:
  """Write separate token files for each split.

  Returns the files with their sizes and checksums, and counts of examples and characters.
  """
  dtype = tokenize.ids_dtype(tokenizer)
  writers = {name: token_cache.TokenWriter(folder, name, dtype) for name in SPLITS}
  label_ids = {label: i for i, label in enumerate(labels)}
  written = Counter()
  examples, again = itertools.tee(examples)
  texts = (example for example, _ in examples)
  for batch, encoded in tokenize.encode_batches(texts, tokenizer, dtype):
    batch_splits = np.array([split for _, split in itertools.islice(again, len(batch))])
    for name, split in SPLITS.items():
      if len(indices := np.flatnonzero(batch_splits == split)):
        rows = [batch[i] for i in indices]
        writers[name].add_examples(
          ids=[encoded.ids[i] for i in indices],
          prompts=[encoded.prompts[i] for i in indices],
          labels=[label_ids[row.label] for row in rows if row.label is not None],
          nats=[row.nats for row in rows if row.nats is not None],
        )
    written.update(
      examples=len(batch),
      held_out=int((batch_splits == VALIDATION).sum()),
      merged=encoded.straddling,
      lost=encoded.unknown_chars,
      characters=sum(len(example.text) for example in batch),
    )
    on_progress(written["examples"])
  files = {name: info for writer in writers.values() for name, info in writer.close().items()}
  return files, written


def _sort_labels(labels: set[str]) -> list[str]:
  """Sort labels by class number if the data set has these, else by name."""
  named = [label for label in labels if isinstance(label, readers.ClassName)]
  if len(named) == len(labels):
    return [*sorted(named, key=lambda label: label.number)]
  return sorted(labels, key=_label_sort_key)


def _label_sort_key(label: str) -> tuple:
  """Return a sort key that orders numeric labels by value, before all others.

  int() rejects more than 4300 digits, so digits are compared as text.
  """
  digits = label.lstrip("0") if label.isascii() and label.isdecimal() else None
  return (digits is None, len(digits or ""), digits or "", label)


def _assign_splits(
  survey: Survey, data: DataSection, rng: np.random.Generator
) -> tuple[list[np.ndarray], float]:
  """Assign each example to a split.

  Returns:
    The split of each example, per source, and the share of each document to hold out. That share is
    0 if whole documents are held out.

  Raises:
    RequestError: no example is left to train on, or none to evaluate on although the settings name
      validation sources.
  """
  dropped = survey.dropped
  source_splits = np.array([SPLITS[source.split] for source in survey.sources], np.uint8)
  split_N = np.repeat(source_splits, survey.counts)
  if data.duplicates == "drop" and survey.duplicates.any():
    split_N[survey.duplicates] = DROPPED
    dropped["duplicates"] = int(survey.duplicates.sum())
  tail_share = 0.0
  if not data.validation and data.validation_fraction:
    indices = np.flatnonzero(split_N == TRAIN)
    num_held_out = round(len(indices) * data.validation_fraction)
    if num_held_out in (0, len(indices)):  # too few documents to hold out whole ones
      tail_share = data.validation_fraction if data.format == "text" else 0.0
      num_held_out = 0 if tail_share or len(indices) < 2 else max(1, num_held_out - 1)
    split_N[rng.permutation(indices)[:num_held_out]] = VALIDATION
  for name, split in SPLITS.items():
    indices = np.flatnonzero(split_N == split)
    limit = getattr(data, f"limit_{name}")
    if not len(indices) and (split == TRAIN or data.validation):
      reasons = "".join(f", {reason}: {count:,}" for reason, count in dropped.items())
      raise RequestError(
        f"config.data: no {name} examples ({format_count(sum(survey.counts), 'good row')}, "
        f"{dropped.total()} dropped{reasons}); give more data"
      )
    if limit and limit < len(indices):
      split_N[rng.permutation(indices)[limit:]] = DROPPED
      dropped[f"limit_{name}"] = len(indices) - limit
  if tail_share:
    num_train = int((split_N == TRAIN).sum())
    survey.log_lines.append(
      f"{format_count(num_train, 'document')}: the last {100 * tail_share:g} % of each is held "
      "out, as a separate document (config.data.validation_fraction)"
      + ("; config.data.limit_validation is ignored" * bool(data.limit_validation))
    )
  return np.split(split_N, np.cumsum(survey.counts)[:-1]), tail_share


def _split_documents(
  documents: Iterable[Example], share: float, with_tails: bool
) -> Iterator[tuple[Example, int]]:
  """Yield each document without its end for training, and its end for validation.

  A document is cut after a blank if one is nearby.

  Args:
    documents: examples of plain text.
    share: the share of each document's characters to hold out.
    with_tails: whether to yield the ends.
  """
  for document in documents:
    text = document.text
    tail = max(1, round(len(text) * share))
    at = max(len(text) - tail, min(1, len(text) - 1))  # leaves at least one letter
    at = text.rfind(" ", max(0, at - tail), at) + 1 or at
    if not at:  # a document of one letter
      yield document, TRAIN
      continue
    yield document._replace(text=text[:at], nats=None), TRAIN
    if with_tails:
      yield document._replace(text=text[at:], nats=None), VALIDATION


def _repeat_counts(
  weight: float, split_N: np.ndarray, rng: np.random.Generator, dropped: Counter
) -> np.ndarray:
  """Return how often each example of a source is written.

  Each example is written as often as the integer part of the weight. A random share of them, the
  weight's fraction, is written once more.
  """
  repeats_N = np.where(split_N == TRAIN, int(weight), split_N != DROPPED)
  trained = np.flatnonzero(split_N == TRAIN)
  repeats_N[rng.permutation(trained)[: round(len(trained) * (weight % 1))]] += 1
  num_dropped = int((repeats_N[trained] == 0).sum())
  if num_dropped:
    dropped["weight of the source"] += num_dropped
  return repeats_N


def build_dataset(arrays: tokenize.TokenArrays, data: DataSection, eos_id: int) -> LayoutDataset:
  """Lay out the examples in rows of `data.sequence_length` tokens."""
  T = data.sequence_length
  if data.format == "classification":
    return ClassificationDataset(arrays, T)
  if data.layout == "concat":
    return packing.ConcatDataset(arrays, T, eos_id)
  return packing.PackedDataset(
    tokens=arrays,
    T=T,
    eos_id=eos_id,
    pack=data.layout == "pack",
    texts=data.format == "text",
  )
