"""Accounting: read = trained + held out + dropped, in rows and in tokens."""

import collections
from typing import Any, TypedDict

import numpy as np
from ml_collections import ConfigDict

from jaxft.data.packing import TokenDataset
from jaxft.data.tokenize import TokenArrays

HELD_OUT_TAILS = "documents whose end is held out"  # a note of data_report.json


class Manifest(TypedDict):
  """What an entry of the token cache says of itself. An entry with other fields, of an older jaxft, is not opened."""

  files: dict[str, dict[str, Any]]  # of cache.Writer.close
  labels: list[str]
  numbers: list[int | None]  # of the labels, where the data gives names and numbers
  read: int  # rows
  dropped: dict[str, int]  # reason -> rows
  duplicates: int
  merged: int  # prompts whose end lies inside a token
  characters: int
  lost: int  # characters without a token
  notes: dict[str, int]
  said: list[str]  # what was done where the settings do not say it
  tails: int  # documents whose end is held out


def build_report(
  manifest: Manifest,
  stored: dict[str, TokenArrays],
  laid_out: dict[str, TokenDataset],
  T: int,
) -> dict[str, Any]:
  """data_report.json, less what depends on the batch."""
  train, held_out = stored["train"], stored["validation"]
  accounts = {name: rows.stats for name, rows in laid_out.items()}
  dropped = collections.Counter()
  for account in accounts.values():
    dropped.update(account.dropped)
  empty = sum(account.empty for account in accounts.values())
  kept = {name: len(of.ids) - sum(accounts[name].dropped.values()) for name, of in stored.items()}
  lengths_N = np.asarray(train.lengths_N)
  return {
    "rows": {
      "read": manifest["read"],
      "trained": len(train) - accounts["train"].empty,
      "held_out": len(held_out) - accounts["validation"].empty - manifest["tails"],
      "dropped": manifest["dropped"]
      | ({"the prompt leaves no room in a row": empty} if empty else {}),
    },
    "tokens": {
      "read": len(train.ids) + len(held_out.ids),
      "trained": kept["train"],
      "held_out": kept["validation"],
      "dropped": dict(dropped),
    },
    "characters": {"read": manifest["characters"], "without_a_token": manifest["lost"]},
    "end_tokens": {
      "trained": accounts["train"].eos_targets,
      "held_out": accounts["validation"].eos_targets,
    },
    "sequence_length": T,
    "sequences": {
      name: len(laid_out[split])
      for name, split in (("trained", "train"), ("held_out", "validation"))
    },
    "tokens_per_row": {
      "shortest": int(lengths_N.min()),
      "median": int(np.median(lengths_N)),
      "mean": round(float(lengths_N.mean()), 1),
      "longest": int(lengths_N.max()),
    },
    "longer_than_a_sequence": {
      "rows": accounts["train"].overlong,
      "share": round(accounts["train"].overlong / len(train), 4),
    },
    "padding_share": round(1 - accounts["train"].filled / (len(laid_out["train"]) * T), 4),
    "duplicates": manifest["duplicates"],
    "prompt_ends_inside_a_token": manifest["merged"],
    "notes": manifest["notes"] | ({HELD_OUT_TAILS: manifest["tails"]} if manifest["tails"] else {}),
  } | ({"labels": manifest["labels"]} if manifest["labels"] else {})


def num_rows_and_steps(rows: TokenDataset, train: ConfigDict) -> tuple[int, int]:
  """Rows and optimizer steps of a run of `config.train`.

  A run of so many steps goes through the rows as often as it takes; one of so many epochs masks the rest of its last step.
  Where all rows are fewer than a batch, a step takes all of them and masks the rest.
  """
  a_step = min(train.batch_size, len(rows))
  total_rows = train.steps * a_step or max(1, round(train.epochs * len(rows)))
  return total_rows, -(-total_rows // a_step)
