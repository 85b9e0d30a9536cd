"""Rows to batches. A batch is a pure function of (seed, step): nothing has to be remembered to resume.

A accumulation steps, B rows a step, T columns
"""

from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Sharding

from jaxft.data.pack import ConcatRows

Batch = dict[str, Any]


def training_batches(
  rows: ConcatRows, *, batch_size: int, accumulation: int, seed: int, rows_in_all: int, start: int, sharding: Sharding
) -> Iterator[Batch]:
  """Batches of the optimizer steps `start`, `start + 1`, ..., each {"ids", "targets", "mask"} of shape (A, B, T).

  Rows come in a new order each epoch; a batch may straddle two epochs. From the row `rows_in_all` on everything is masked:
  it fills the last batch of a run whose length was given in epochs.
  """

  def masked_past_the_end(index: int, row: dict) -> dict:
    return row if index < rows_in_all else row | {"mask": np.zeros_like(row["mask"])}

  steps = grain.MapDataset.source(rows).shuffle(seed).repeat().map_with_index(masked_past_the_end).batch(batch_size)
  # Threads, not processes: rows are slices of one array, and copying them releases the GIL soon enough.
  options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
  for batch in steps[start:].to_iter_dataset(options):
    yield _place(batch, accumulation, sharding)


def evaluation_batches(rows: ConcatRows, *, batch_size: int, sharding: Sharding, limit: int = 0) -> Iterator[Batch]:
  """All rows once, in order, or those of the first `limit` batches; the last batch is filled up with masked rows."""
  for start in range(0, min(len(rows), limit * batch_size or len(rows)), batch_size):
    picked = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
    blank = jax.tree.map(np.zeros_like, picked[0])
    picked += [blank] * (batch_size - len(picked))
    yield _place(jax.tree.map(lambda *columns: np.stack(columns), *picked), 1, sharding)


def like(A: int, B: int, T: int, sharding: Sharding) -> Batch:
  """The shapes of a batch, to compile for."""
  return {
    name: jax.ShapeDtypeStruct((A, B, T), dtype, sharding=sharding)
    for name, dtype in (("ids", np.int32), ("targets", np.int32), ("mask", np.bool_))
  }


def _place(batch: dict[str, np.ndarray], accumulation: int, sharding: Sharding) -> Batch:
  return {
    name: jax.make_array_from_process_local_data(sharding, x.reshape(accumulation, -1, x.shape[-1]))
    for name, x in batch.items()
  }
