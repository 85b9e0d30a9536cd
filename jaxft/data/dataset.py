"""prepare_data: from the sources in the settings to token datasets, every row and token of them accounted for."""

import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxft.data import columns, formats, readers, sources, token_cache, tokenize
from jaxft.data.accounting import Manifest, build_report, num_rows_and_steps
from jaxft.data.formats import BadRowError, Example
from jaxft.data.packing import (
  ClassificationDataset,
  ConcatDataset,
  PackedDataset,
  TokenDataset,
)
from jaxft.errors import RequestError
from jaxft.utils.files import cache_dir
from jaxft.utils.units import format_count

ProgressFn = Callable[[int, int], None]  # examples tokenised, and how many there will be
DROPPED, TRAIN, VALIDATION = 0, 1, 2
SPLITS = {"train": TRAIN, "validation": VALIDATION}
# The settings that decide which tokens there are; the others decide how they lie in rows.
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
  entropy_floor: (
    float | None
  )  # nats per validation token that no model can go below, where the source knows it
  fingerprint: str  # of the training examples and how they lie in rows
  validation_fingerprint: str  # fingerprint of the validation examples
  unrelated_fingerprint: str  # fingerprint of the unrelated text
  unrelated: TokenDataset | None  # of text to evaluate too
  report: dict[str, Any]

  def with_class_ids(self, classes: list[str]) -> "PreparedData":
    """The same rows with the numbers that the labels have among `classes`; raises RequestError for a label that is none."""
    number = np.array(formats.class_ids(self.labels, classes), np.int32)
    renumbered = lambda rows: ClassificationDataset(
      dataclasses.replace(rows.tokens, labels_N=number[np.asarray(rows.tokens.labels_N)]),
      rows.seq_len,
    )
    validation = renumbered(self.validation) if self.validation else None
    return self._replace(train=renumbered(self.train), validation=validation, labels=list(classes))

  def to_json(self, train: ConfigDict) -> str:
    """The content of data_report.json, for a run of `config.train`."""
    _, in_all = num_rows_and_steps(self.train, train)
    steps = -(-len(self.train) // train.batch_size)
    last = len(self.train) - (steps - 1) * train.batch_size
    full = last == train.batch_size
    rest = "; the next epoch fills the rest, and after the last one it is masked"
    rest = rest if steps > 1 else "; the rest is masked"
    epoch = {
      "steps_per_epoch": steps,
      "steps_in_all": in_all,
      "last_step_of_an_epoch": f"{last} of {train.batch_size} sequences" + ("" if full else rest),
    }
    return json.dumps(self.report | epoch, indent=2) + "\n"


def prepare_data(
  data: ConfigDict,
  tokenizer: Any,
  tokenizer_fingerprint: str,
  tell: ProgressFn = lambda done, total: None,
  log: Callable[[str], None] = lambda line: None,
) -> PreparedData:
  """Reads, splits, samples, tokenises and lays out what `config.data` names, or opens what an earlier run has kept of it.

  Raises RequestError when a row is bad (unless they are skipped) or nothing is left to train on, StorageError when the cache
  folder cannot be written.
  """
  key = {
    "sources": _source_fingerprints(data),
    "tokenizer": tokenizer_fingerprint,
    "settings": {name: data[name] for name in CACHE_KEY_SETTINGS},
    "manifest": sorted(Manifest.__annotations__),
  }
  folder = Path(data.cache_dir) if data.cache_dir else cache_dir("tokens")

  def make(to: Path) -> Manifest:
    made = _build_cache(to, data, tokenizer, tell)
    if _source_fingerprints(data) != key["sources"]:
      raise RequestError("config.data: a source has changed while it was read; run again")
    return made

  entry, manifest = token_cache.load_or_build(folder, key, make, log)
  for line in manifest["said"]:
    log(line)
  if manifest["lost"]:
    log(
      f"{manifest['lost']:,} of {manifest['characters']:,} characters have no token in the model's tokenizer: they are left "
      "out, or read as its unknown token"
    )
  stored = {name: token_cache.open_arrays(entry, name, manifest) for name in SPLITS}
  laid_out = {name: build_dataset(stored[name], data, tokenizer.eos_token_id) for name in SPLITS}
  for name, rows in laid_out.items():
    if not len(rows) and len(stored[name]):
      raise RequestError(
        f"config.data: the {name} examples leave no row of {data.sequence_length} tokens with anything to learn in it; "
        "raise config.data.sequence_length"
      )
  held_out = stored["validation"]
  known = len(held_out) and len(held_out.nats_N) == len(held_out)
  floor = float(held_out.nats_N.sum() / len(held_out.ids)) if known else None
  layout = f"{data.layout} {data.sequence_length} {manifest['labels']} {token_cache.fingerprint('train', manifest)}"
  return PreparedData(
    laid_out["train"],
    laid_out["validation"] if len(held_out) else None,
    [
      readers.ClassName(label, number) if number is not None else label
      for label, number in zip(manifest["labels"], manifest["numbers"], strict=True)
    ],
    floor,
    hashlib.sha256(layout.encode()).hexdigest(),
    token_cache.fingerprint("validation", manifest),
    " ".join(sources.fingerprint(data.unrelated, "validation")),
    _load_unrelated(data, tokenizer) if data.unrelated else None,
    build_report(manifest, stored, laid_out, data.sequence_length),
  )


def _load_unrelated(data: ConfigDict, tokenizer: Any) -> TokenDataset:
  """What `data.unrelated` names as text, in rows like those of the run, which one program evaluates."""
  how = ConfigDict(
    data.to_dict() | {"format": "text", "nats_column": "", "template": formats.DEFAULT_TEMPLATE}
  )
  nothing = collections.Counter()
  stored = tokenize.encode_in_memory(
    read_examples(data.unrelated, "validation", how, nothing, nothing), tokenizer
  )
  if not len(stored):
    raise RequestError(f"config.data.unrelated={data.unrelated!r}: no text in it")
  return build_dataset(stored, how, tokenizer.eos_token_id)


def _source_fingerprints(data: ConfigDict) -> dict[str, list]:
  """What the sources hold now."""
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
  data: ConfigDict,
  dropped: collections.Counter,
  notes: collections.Counter,
  log: Callable[[str], None] = lambda line: None,
) -> Iterator[Example]:
  """The examples of all rows. Bad ones are counted in `dropped`, or raise RequestError.

  Args:
    log: told of each column that is read in place of one that is not there.
  """
  of_file, printed = data, set()

  def how(name: str) -> readers.ReaderOptions:
    nonlocal of_file
    of_file, lines = columns.resolve(name, split, data)
    for line in lines:
      if line not in printed:  # of the files of a folder the first alone
        log(f"{name}: {line}")
        printed.add(line)
    return readers.ReaderOptions(
      formats.required_columns(of_file),
      data.text_column,
      data.separator,
      data.encoding,
      formats.label_column(of_file),
    )

  for row in sources.read_rows(names, split, how, notes):
    try:
      yield formats.to_example(row, of_file)
    except BadRowError as fault:
      if data.on_bad_row == "error":
        raise formats.as_request_error(row, fault) from fault
      dropped[formats.error_category(str(fault))] += 1


class DataSource(NamedTuple):
  name: str
  split: str  # of the setting that names it
  weight: float


def _build_cache(folder: Path, data: ConfigDict, tokenizer: Any, tell: ProgressFn) -> Manifest:
  """Writes the token files: a first pass counts the examples, for the second to know which of them are wanted."""
  rng = np.random.default_rng(data.shuffle_seed)
  dropped, notes, labels, seen = collections.Counter(), collections.Counter(), set(), set()
  all_sources = [
    DataSource(name, "train", weight) for name, weight in map(sources.parse_weight, data.train)
  ]
  all_sources += [DataSource(name, "validation", 1.0) for name in data.validation]
  said, counts, read_before = [], [], bytearray()
  for source in all_sources:
    counts.append(0)
    for example in read_examples((source.name,), source.split, data, dropped, notes, said.append):
      counts[-1] += 1
      labels.add(example.label)
      digest = hash((example.label, example.text))  # of 64 bits
      read_before.append(digest in seen)
      seen.add(digest)
  seen.clear()
  bad = sum(dropped.values())
  duplicates = np.frombuffer(read_before, bool)
  places, share = _assign_splits(all_sources, counts, duplicates, data, rng, dropped)
  if share:
    whole = sum(int((of == TRAIN).sum()) for of in places)
    said.append(
      f"{format_count(whole, 'document')}: the last {100 * share:g} % of each is held out, as a separate document "
      "(config.data.validation_fraction)"
      + (", whatever config.data.limit_validation is" * bool(data.limit_validation))
    )
  passes = [
    _repeat_counts(source.weight, of, rng, dropped) for source, of in zip(all_sources, places)
  ]
  if not any((of == TRAIN).any() and often[of == TRAIN].any() for of, often in zip(places, passes)):
    raise RequestError(
      f"config.data.train={data.train!r}: the weights leave no document to train on"
    )
  labels = labels - {None}
  numbered = all(isinstance(label, readers.ClassName) for label in labels)  # a data set's own order
  labels = sorted(labels, key=(lambda label: label.number) if numbered else _label_sort_key)
  if len(labels) == 1:
    raise RequestError(
      f"config.data.label_column={data.label_column!r}: all rows have the label {labels[0]!r}; give two or more"
    )
  number, total = {label: i for i, label in enumerate(labels)}, sum(int(of.sum()) for of in passes)

  dtype = tokenize.ids_dtype(tokenizer)
  writers = {name: token_cache.TokenWriter(folder, name, dtype) for name in SPLITS}
  done = merged = lost = characters = tails = 0
  again = (
    collections.Counter()
  )  # the second pass meets the same bad rows, which the first has counted
  for source, of, often in zip(all_sources, places, passes):
    for number_of_pass in range(often.max(initial=0)):
      wanted = often > number_of_pass
      chosen = itertools.compress(
        read_examples((source.name,), source.split, data, again, again), wanted
      )
      to = iter(of[wanted])
      if share:
        places_of_parts = collections.deque()
        chosen, to = (
          _split_documents(chosen, share, number_of_pass == 0, places_of_parts),
          iter(places_of_parts.popleft, None),
        )
      for batch, encoded in tokenize.encode_batches(chosen, tokenizer, dtype):
        batch_to = np.fromiter(itertools.islice(to, len(batch)), np.uint8, len(batch))
        tails += int((batch_to == VALIDATION).sum()) if share else 0
        for name, place in SPLITS.items():
          if len(mine := np.flatnonzero(batch_to == place)):
            nats = [batch[i].nats for i in mine if batch[i].nats is not None]
            label_ids = [number[batch[i].label] for i in mine if batch[i].label is not None]
            writers[name].examples(
              [encoded.ids[i] for i in mine], [encoded.prompts[i] for i in mine], label_ids, nats
            )
        merged, lost = merged + encoded.straddling, lost + encoded.unknown_chars
        characters += sum(len(example.text) for example in batch)
        done += len(batch)
        tell(done, total)
  if done != total + tails:
    raise RequestError("config.data: a source has changed while it was read; run again")
  more = sum(int(np.maximum(of, 1).sum()) - len(of) for of in passes)
  if more:
    notes["rows read again, as their weight says"] = more
  files = {name: about for writer in writers.values() for name, about in writer.close().items()}
  if 2 * lost > characters:
    raise RequestError(
      f"config.model.path: its tokenizer has no token for {lost:,} of the {characters:,} characters of config.data; "
      "take a model whose tokenizer was made for such text"
    )
  return Manifest(
    files=files,
    labels=labels,
    numbers=[getattr(label, "number", None) for label in labels],
    read=sum(counts) + bad + more,
    dropped=dict(dropped),
    duplicates=int(duplicates.sum()),
    merged=merged,
    characters=characters,
    lost=lost,
    notes={note: count for note, count in notes.items() if count},
    said=list(dict.fromkeys(said)),
    tails=tails,
  )


def _label_sort_key(label: str) -> tuple:
  """Sorts labels that are numbers by their size, before all others; without int(), which stops at 4300 digits."""
  digits = label.lstrip("0") if label.isascii() and label.isdecimal() else None
  return (digits is None, len(digits or ""), digits or "", label)


def _assign_splits(
  all_sources: list[DataSource],
  counts: list[int],
  duplicates: np.ndarray,
  data: ConfigDict,
  rng: np.random.Generator,
  dropped: collections.Counter,
) -> tuple[list[np.ndarray], float]:
  """For each source the split that each of its examples goes to, and the share that is held out at the end of each document.

  That share is 0 where whole documents are held out. Raises RequestError when there is nothing to train on, or to evaluate on
  although sources are named for it.
  """
  places = np.concatenate(
    [np.full(n, SPLITS[source.split], np.uint8) for source, n in zip(all_sources, counts)]
  )
  if data.duplicates == "drop" and duplicates.any():
    places[duplicates] = DROPPED
    dropped["duplicates"] = int(duplicates.sum())
  share = 0.0
  if not data.validation and data.validation_fraction:
    there = np.flatnonzero(places == TRAIN)
    some = round(len(there) * data.validation_fraction)
    if some in (0, len(there)):  # too few documents for whole ones
      share = data.validation_fraction if data.format == "text" else 0.0
      some = 0 if share or len(there) < 2 else max(1, some - 1)
    places[rng.permutation(there)[:some]] = VALIDATION
  for name, place in SPLITS.items():
    there, limit = np.flatnonzero(places == place), data[f"limit_{name}"]
    if not len(there) and (place == TRAIN or data.validation):
      raise RequestError(
        f"config.data: no {name} examples ({format_count(sum(counts), 'good row')}, {sum(dropped.values())} dropped"
        + "".join(f", {reason}: {count:,}" for reason, count in dropped.items())
        + "); give more data"
      )
    if limit and limit < len(there):
      places[rng.permutation(there)[limit:]] = DROPPED
      dropped[f"limit_{name}"] = len(there) - limit
  return np.split(places, np.cumsum(counts)[:-1]), share


def _split_documents(
  documents: Iterable[Example], share: float, with_end: bool, places: collections.deque[int]
) -> Iterator[Example]:
  """Each document without its end, to train on, and its end, to be held out, cut behind a blank where there is one near.

  Args:
    with_end: whether the ends are wanted.
    places: gets the split of each example that comes.
  """
  for document in documents:
    end = max(1, round(len(document.text) * share))
    at = max(len(document.text) - end, min(1, len(document.text) - 1))  # a letter is left at least
    at = document.text.rfind(" ", max(0, at - end), at) + 1 or at
    places.append(TRAIN)
    if not at:  # of one letter
      yield document
      continue
    yield document._replace(text=document.text[:at], nats=None)
    if with_end:
      places.append(VALIDATION)
      yield document._replace(text=document.text[at:], nats=None)


def _repeat_counts(
  weight: float, places: np.ndarray, rng: np.random.Generator, dropped: collections.Counter
) -> np.ndarray:
  """How often each example of a source is written. What is left of the weight after whole passes is a share, drawn anew."""
  often = np.where(places == TRAIN, int(weight), places != DROPPED)
  trained = np.flatnonzero(places == TRAIN)
  often[rng.permutation(trained)[: round(len(trained) * (weight % 1))]] += 1
  out = int((often[trained] == 0).sum())
  if out:
    dropped["weight of the source"] += out
  return often


def build_dataset(stored: tokenize.TokenArrays, data: ConfigDict, end: int) -> TokenDataset:
  """The examples in rows of `data.sequence_length` tokens."""
  if data.format == "classification":
    return ClassificationDataset(stored, data.sequence_length)
  if data.layout == "concat":
    return ConcatDataset(stored, data.sequence_length, end)
  texts = data.format == "text"
  return PackedDataset(stored, data.sequence_length, end, pack=data.layout == "pack", texts=texts)
