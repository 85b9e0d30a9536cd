"""The data of a run, read and accounted for: every document and every token is trained on, held out or dropped."""

import json
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxft.data import sources, tokens
from jaxft.data.pack import ConcatRows
from jaxft.data.sources import Document
from jaxft.errors import RequestError


class Data(NamedTuple):
  train: ConcatRows
  validation: ConcatRows
  floor: float | None  # nats per validation token that no model can go below, where the source knows it
  report: dict[str, Any]

  def to_json(self, batch_size: int) -> str:
    """The content of data_report.json."""
    return json.dumps(self.report | {"steps_per_epoch": -(-len(self.train) // batch_size)}, indent=2) + "\n"


def prepare(data: ConfigDict, tokenizer: Any, tell=lambda done, total: None) -> Data:
  """Reads, splits, samples and tokenises what `config.data` names; raises RequestError when nothing is left to train on."""
  rng = np.random.default_rng(data.shuffle_seed)
  train = list(sources.read(tuple(data.train), "train", data.text_column, data.nats_column))
  read = {"train": len(train)}
  if data.validation:
    validation = list(sources.read(tuple(data.validation), "validation", data.text_column, data.nats_column))
    read["validation"] = len(validation)
  else:
    order = rng.permutation(len(train))
    cut = round(len(train) * data.validation_fraction)
    validation, train = _pick(train, order[:cut]), _pick(train, order[cut:])
  train, over_train = _limit(train, data.limit_train, rng)
  validation, over_validation = _limit(validation, data.limit_validation, rng)
  for name, documents in (("training", train), ("validation", validation)):
    if not documents:
      raise RequestError(
        f"config.data: no {name} documents ({read} read, validation_fraction={data.validation_fraction}); "
        "give more data, or name some in config.data.validation"
      )

  # Documents over a limit are counted but not tokenised: of two million stories a run may want a hundred thousand.
  dropped = {
    name: count for name, count in (("limit_train", over_train), ("limit_validation", over_validation)) if count
  }
  total = len(train) + len(validation)
  train_stream, train_lengths = tokens.encode(train, tokenizer, lambda done: tell(done, total))
  stream, lengths = tokens.encode(validation, tokenizer, lambda done: tell(len(train) + done, total))
  rows, T = ConcatRows(train_stream, data.sequence_length), data.sequence_length
  floor = sum(document.nats for document in validation) / int(lengths.sum()) if data.nats_column else None
  trained, held_out = int(train_lengths.sum()), int(lengths.sum())
  report = {
    "rows": {"read": sum(read.values()), "trained": len(train), "held_out": len(validation), "dropped": dropped},
    "tokens": {"read": trained + held_out, "trained": trained, "held_out": held_out, "dropped": {}},
    "sequence_length": T,
    "sequences": {"trained": len(rows), "held_out": len(ConcatRows(stream, T))},
    "tokens_per_document": {"mean": round(float(train_lengths.mean()), 1), "longest": int(train_lengths.max())},
  }
  return Data(rows, ConcatRows(stream, T), floor, report)


def _pick(documents: list[Document], chosen: np.ndarray) -> list[Document]:
  return [documents[i] for i in sorted(chosen)]


def _limit(documents: list[Document], limit: int, rng: np.random.Generator) -> tuple[list[Document], int]:
  """A seeded sample of `limit` documents in their order, and how many were left out; everything when `limit` is 0."""
  if not limit or limit >= len(documents):
    return documents, 0
  return _pick(documents, rng.permutation(len(documents))[:limit]), len(documents) - limit
