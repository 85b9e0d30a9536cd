"""Account for the data: read = trained + held out + dropped.

The equation holds for rows and for tokens.
"""

from collections import Counter

import numpy as np

from jaxft.config import TrainSection
from jaxft.data.packing import LayoutDataset, TokenDataset
from jaxft.data.token_cache import Manifest
from jaxft.data.tokenize import TokenArrays
from jaxft.utils.types import Json

HELD_OUT_TAILS = "documents whose end is held out"  # a note of data_report.json


def build_report(
  manifest: Manifest, arrays: dict[str, TokenArrays], datasets: dict[str, LayoutDataset], T: int
) -> Json:
  """Return the part of data_report.json that is independent of the batch size.

  Args:
    manifest: counts of the first pass, from the token cache.
    arrays: the tokens of each split.
    datasets: the same tokens, laid out in rows.
    T: tokens per row.
  """
  train, validation = arrays["train"], arrays["validation"]
  train_stats, validation_stats = datasets["train"].stats, datasets["validation"].stats
  dropped = Counter(train_stats.dropped) + Counter(validation_stats.dropped)
  empty = train_stats.empty + validation_stats.empty
  tails = manifest["tails"]
  lengths_N = np.asarray(train.lengths_N)
  return {
    "rows": {
      "read": manifest["read"],
      "trained": len(train) - train_stats.empty,
      "held_out": len(validation) - validation_stats.empty - tails,
      "dropped": manifest["dropped"] | ({"the prompt fills the sequence": empty} if empty else {}),
    },
    "tokens": {
      "read": len(train.ids) + len(validation.ids),
      "trained": len(train.ids) - sum(train_stats.dropped.values()),
      "held_out": len(validation.ids) - sum(validation_stats.dropped.values()),
      "dropped": dict(dropped),
    },
    "characters": {"read": manifest["characters"], "without_a_token": manifest["lost"]},
    "end_tokens": {
      "trained": train_stats.eos_targets,
      "held_out": validation_stats.eos_targets,
    },
    "sequence_length": T,
    "sequences": {"trained": len(datasets["train"]), "held_out": len(datasets["validation"])},
    "tokens_per_row": {
      "shortest": int(lengths_N.min()),
      "median": int(np.median(lengths_N)),
      "mean": round(float(lengths_N.mean()), 1),
      "longest": int(lengths_N.max()),
    },
    "longer_than_a_sequence": {
      "rows": train_stats.overlong,
      "share": round(train_stats.overlong / len(train), 4),
    },
    "padding_share": round(1 - train_stats.filled / (len(datasets["train"]) * T), 4),
    "duplicates": manifest["duplicates"],
    "prompt_ends_inside_a_token": manifest["merged"],
    "notes": manifest["notes"] | ({HELD_OUT_TAILS: tails} if tails else {}),
  } | ({"labels": manifest["labels"]} if manifest["labels"] else {})


def num_rows_and_steps(rows: TokenDataset, train: TrainSection) -> tuple[int, int]:
  """Return the number of rows and of optimizer steps of a run.

  With train.steps, the run repeats the rows until the steps are done. With train.epochs, the rest
  of the last step is masked. If the data has fewer rows than a batch, each step takes all rows and
  masks the rest.
  """
  rows_per_step = min(train.batch_size, len(rows))
  total_rows = train.steps * rows_per_step or max(1, round(train.epochs * len(rows)))
  return total_rows, -(-total_rows // rows_per_step)
