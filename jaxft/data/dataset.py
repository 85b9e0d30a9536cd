"""prepare_data: from the sources in the settings to datasets of tokens, with everything counted."""

import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft.config import DataSection, TrainSection
from jaxft.data import columns, formats, packing, readers, sources, token_cache, tokenize
from jaxft.data.accounting import Manifest, build_report, num_rows_and_steps
from jaxft.data.formats import BadRowError, Example
from jaxft.data.packing import ClassificationDataset, TokenDataset
from jaxft.errors import RequestError
from jaxft.utils.files import cache_dir
from jaxft.utils.units import format_count

ProgressFn = Callable[[int, int], None]  # examples tokenised so far, and in total
DROPPED, TRAIN, VALIDATION = 0, 1, 2
SPLITS = {"train": TRAIN, "validation": VALIDATION}
# The settings that the tokens depend on; the others only decide how they are laid out in rows.
CACHE_KEY_SETTINGS = (
  "format",
  "text_column",
  "prompt_column",
  "completion_column",
  "label_column",
  "nats_column",
  "template",
  "separator",
  "encoding",
  "validation_fraction",
  "limit_train",
  "limit_validation",
  "shuffle_seed",
  "on_bad_row",
  "duplicates",
)


class PreparedData(NamedTuple):
  train: TokenDataset
  validation: TokenDataset | None  # None: nothing is held out
  labels: list[str]  # of the classification format, in the order of their numbers
  entropy_floor: float | None  # nats per validation token that no model can beat, if known
  fingerprint: str  # of the training examples and their layout in rows
  validation_fingerprint: str
  unrelated_fingerprint: str
  unrelated: TokenDataset | None  # further text to evaluate on
  report: dict[str, Any]

  def with_class_ids(self, classes: list[str]) -> "PreparedData":
    """Return the same rows with labels numbered as in `classes`.

    Raises RequestError for a label that is not among them.
    """
    ids = np.array(formats.class_ids(self.labels, classes), np.int32)

    def renumber(rows: ClassificationDataset) -> ClassificationDataset:
      labels_N = ids[np.asarray(rows.tokens.labels_N)]
      return ClassificationDataset(
        dataclasses.replace(rows.tokens, labels_N=labels_N), rows.seq_len
      )

    validation = renumber(self.validation) if self.validation else None
    return self._replace(train=renumber(self.train), validation=validation, labels=list(classes))

  def to_json(self, train: TrainSection) -> str:
    """Return the content of data_report.json, for a run of `config.train`."""
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
  tokenizer: Any,
  tokenizer_fingerprint: str,
  on_progress: ProgressFn = lambda done, total: None,
  log: Callable[[str], None] = lambda line: None,
) -> PreparedData:
  """Read, split, sample, tokenise and pack the data of `config.data`, or open its cached tokens.

  Raises RequestError when a row is bad (unless they are skipped) or nothing is left to train on,
  StorageError when the cache folder cannot be written.
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
      "tokenizer: they are left out, or read as its unknown token"
    )
  arrays = {split: token_cache.open_arrays(entry, split, manifest) for split in SPLITS}
  datasets = {split: build_dataset(arrays[split], data, tokenizer.eos_token_id) for split in SPLITS}
  for split, rows in datasets.items():
    if not len(rows) and len(arrays[split]):
      raise RequestError(
        f"config.data: the {split} examples leave no row of {data.sequence_length} tokens with "
        "anything to learn in it; raise config.data.sequence_length"
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


def _load_unrelated(data: DataSection, tokenizer: Any) -> TokenDataset:
  """Return the text of `data.unrelated`, in rows like the run's: one program evaluates both."""
  template = formats.DEFAULT_TEMPLATE
  data = dataclasses.replace(data, format="text", nats_column="", template=template)
  ignored = collections.Counter()
  examples = read_examples(data.unrelated, "validation", data, ignored, ignored)
  arrays = tokenize.encode_in_memory(examples, tokenizer)
  if not len(arrays):
    raise RequestError(f"config.data.unrelated={data.unrelated!r}: no text in it")
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
  dropped: collections.Counter,
  notes: collections.Counter,
  log: Callable[[str], None] = lambda line: None,
) -> Iterator[Example]:
  """Yield the examples of all rows. Bad rows are counted in `dropped`, or raise RequestError.

  Args:
    log: gets a line for each column that is read instead of a missing one.
  """
  file_data = data
  logged = set()

  def options_for(name: str) -> readers.ReaderOptions:
    nonlocal file_data
    file_data, lines = columns.resolve(name, split, data)
    for line in lines:
      if line not in logged:  # of the files of a folder only the first
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
  name: str
  split: str  # of the setting that names it
  weight: float


def _build_cache(
  folder: Path, data: DataSection, tokenizer: Any, on_progress: ProgressFn
) -> Manifest:
  """Write the token files. A first pass over the examples decides which the second one takes."""
  rng = np.random.default_rng(data.shuffle_seed)
  dropped = collections.Counter()
  notes = collections.Counter()
  all_sources = [
    DataSource(name, "train", weight) for name, weight in map(sources.parse_weight, data.train)
  ]
  all_sources += [DataSource(name, "validation", 1.0) for name in data.validation]
  log_lines: list[str] = []
  label_set = set()
  seen = set()
  counts = []
  is_duplicate = bytearray()
  for source in all_sources:
    counts.append(0)
    names = (source.name,)
    for example in read_examples(names, source.split, data, dropped, notes, log_lines.append):
      counts[-1] += 1
      label_set.add(example.label)
      digest = hash((example.label, example.text))  # of 64 bits
      is_duplicate.append(digest in seen)
      seen.add(digest)
  seen.clear()
  num_bad = sum(dropped.values())
  duplicates = np.frombuffer(is_duplicate, bool)
  splits, tail_share = _assign_splits(all_sources, counts, duplicates, data, rng, dropped)
  if tail_share:
    num_train = sum(int((split_N == TRAIN).sum()) for split_N in splits)
    log_lines.append(
      f"{format_count(num_train, 'document')}: the last {100 * tail_share:g} % of each is held "
      "out, as a separate document (config.data.validation_fraction)"
      + (", whatever config.data.limit_validation is" * bool(data.limit_validation))
    )
  repeats = [
    _repeat_counts(source.weight, split_N, rng, dropped)
    for source, split_N in zip(all_sources, splits)
  ]
  if not any(repeats_N[split_N == TRAIN].any() for split_N, repeats_N in zip(splits, repeats)):
    raise RequestError(
      f"config.data.train={data.train!r}: the weights leave no document to train on"
    )
  labels = _sort_labels(label_set - {None})
  if len(labels) == 1:
    raise RequestError(
      f"config.data.label_column={data.label_column!r}: all rows have the label {labels[0]!r}; "
      "give two or more"
    )
  label_ids = {label: i for i, label in enumerate(labels)}
  total = sum(int(repeats_N.sum()) for repeats_N in repeats)

  dtype = tokenize.ids_dtype(tokenizer)
  writers = {name: token_cache.TokenWriter(folder, name, dtype) for name in SPLITS}
  done = merged = lost = characters = tails = 0
  ignored = collections.Counter()  # the second pass meets the bad rows that the first has counted
  for source, split_N, repeats_N in zip(all_sources, splits, repeats):
    for repeat in range(repeats_N.max(initial=0)):
      selected_N = repeats_N > repeat
      examples = read_examples((source.name,), source.split, data, ignored, ignored)
      examples = itertools.compress(examples, selected_N)
      example_splits = iter(split_N[selected_N])
      if tail_share:
        queue = collections.deque()
        examples = _split_documents(examples, tail_share, repeat == 0, queue)
        example_splits = iter(queue.popleft, None)
      for batch, encoded in tokenize.encode_batches(examples, tokenizer, dtype):
        batch_splits = np.fromiter(
          itertools.islice(example_splits, len(batch)), np.uint8, len(batch)
        )
        tails += int((batch_splits == VALIDATION).sum()) if tail_share else 0
        for name, split in SPLITS.items():
          if len(indices := np.flatnonzero(batch_splits == split)):
            rows = [batch[i] for i in indices]
            writers[name].add_examples(
              ids=[encoded.ids[i] for i in indices],
              prompts=[encoded.prompts[i] for i in indices],
              labels=[label_ids[row.label] for row in rows if row.label is not None],
              nats=[row.nats for row in rows if row.nats is not None],
            )
        merged += encoded.straddling
        lost += encoded.unknown_chars
        characters += sum(len(example.text) for example in batch)
        done += len(batch)
        on_progress(done, total)
  if done != total + tails:
    raise RequestError("config.data: a source has changed while it was read; run again")
  extra = sum(int(np.maximum(repeats_N, 1).sum()) - len(repeats_N) for repeats_N in repeats)
  if extra:
    notes["rows read again, as their weight says"] = extra
  files = {name: about for writer in writers.values() for name, about in writer.close().items()}
  if 2 * lost > characters:
    raise RequestError(
      f"config.model.path: its tokenizer has no token for {lost:,} of the {characters:,} "
      "characters of config.data; take a model whose tokenizer was made for such text"
    )
  return Manifest(
    files=files,
    labels=labels,
    numbers=[getattr(label, "number", None) for label in labels],
    read=sum(counts) + num_bad + extra,
    dropped=dict(dropped),
    duplicates=int(duplicates.sum()),
    merged=merged,
    characters=characters,
    lost=lost,
    notes={note: count for note, count in notes.items() if count},
    said=list(dict.fromkeys(log_lines)),
    tails=tails,
  )


def _sort_labels(labels: set[str]) -> list[str]:
  """Sort labels by the numbers that their data set gives them, else by name."""
  if all(isinstance(label, readers.ClassName) for label in labels):
    return sorted(labels, key=lambda label: label.number)
  return sorted(labels, key=_label_sort_key)


def _label_sort_key(label: str) -> tuple:
  """Sort numeric labels by value, before all others; int() would stop at 4300 digits."""
  digits = label.lstrip("0") if label.isascii() and label.isdecimal() else None
  return (digits is None, len(digits or ""), digits or "", label)


def _assign_splits(
  all_sources: list[DataSource],
  counts: list[int],
  duplicates: np.ndarray,
  data: DataSection,
  rng: np.random.Generator,
  dropped: collections.Counter,
) -> tuple[list[np.ndarray], float]:
  """Return the split of each example, per source, and the share of each document to hold out.

  That share is 0 where whole documents are held out. Raises RequestError when there is nothing to
  train on, or nothing to evaluate on although sources are named for it.
  """
  split_N = np.concatenate(
    [np.full(n, SPLITS[source.split], np.uint8) for source, n in zip(all_sources, counts)]
  )
  if data.duplicates == "drop" and duplicates.any():
    split_N[duplicates] = DROPPED
    dropped["duplicates"] = int(duplicates.sum())
  tail_share = 0.0
  if not data.validation and data.validation_fraction:
    indices = np.flatnonzero(split_N == TRAIN)
    num_held_out = round(len(indices) * data.validation_fraction)
    if num_held_out in (0, len(indices)):  # too few documents for whole ones
      tail_share = data.validation_fraction if data.format == "text" else 0.0
      num_held_out = 0 if tail_share or len(indices) < 2 else max(1, num_held_out - 1)
    split_N[rng.permutation(indices)[:num_held_out]] = VALIDATION
  for name, split in SPLITS.items():
    indices = np.flatnonzero(split_N == split)
    limit = getattr(data, f"limit_{name}")
    if not len(indices) and (split == TRAIN or data.validation):
      reasons = "".join(f", {reason}: {count:,}" for reason, count in dropped.items())
      raise RequestError(
        f"config.data: no {name} examples ({format_count(sum(counts), 'good row')}, "
        f"{sum(dropped.values())} dropped{reasons}); give more data"
      )
    if limit and limit < len(indices):
      split_N[rng.permutation(indices)[limit:]] = DROPPED
      dropped[f"limit_{name}"] = len(indices) - limit
  return np.split(split_N, np.cumsum(counts)[:-1]), tail_share


def _split_documents(
  documents: Iterable[Example], share: float, with_tails: bool, splits: collections.deque[int]
) -> Iterator[Example]:
  """Yield each document without its end, for training, and its end, for validation.

  Documents are cut after a blank if there is one nearby.

  Args:
    with_tails: whether to yield the ends.
    splits: gets the split of each example that is yielded.
  """
  for document in documents:
    text = document.text
    tail = max(1, round(len(text) * share))
    at = max(len(text) - tail, min(1, len(text) - 1))  # leaves at least one letter
    at = text.rfind(" ", max(0, at - tail), at) + 1 or at
    splits.append(TRAIN)
    if not at:  # of one letter
      yield document
      continue
    yield document._replace(text=text[:at], nats=None)
    if with_tails:
      splits.append(VALIDATION)
      yield document._replace(text=text[at:], nats=None)


def _repeat_counts(
  weight: float, split_N: np.ndarray, rng: np.random.Generator, dropped: collections.Counter
) -> np.ndarray:
  """Return how often each example of a source is written: the weight's integer part, for all of
  them, and once more for a random share of them, its fraction.
  """
  repeats_N = np.where(split_N == TRAIN, int(weight), split_N != DROPPED)
  trained = np.flatnonzero(split_N == TRAIN)
  repeats_N[rng.permutation(trained)[: round(len(trained) * (weight % 1))]] += 1
  num_dropped = int((repeats_N[trained] == 0).sum())
  if num_dropped:
    dropped["weight of the source"] += num_dropped
  return repeats_N


def build_dataset(arrays: tokenize.TokenArrays, data: DataSection, eos_id: int) -> TokenDataset:
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
