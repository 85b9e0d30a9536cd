"""Rows to batches. A batch is a pure function of (seed, step): nothing has to be remembered to resume.

A accumulation steps, B rows a step, T columns
"""

import functools
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from grain.experimental import index_shuffle
from jax.sharding import Sharding

Batch = dict[str, Any]


class BatchSource:
  """What this process holds of the batch of each optimizer step: {"ids", ...}, each (A, B / processes, T).

  Rows come in a new order each epoch; a batch may straddle two epochs. The global batch is the same rows in the same order for
  any number of processes, each of which takes the places `local_rows` of every accumulation step. From the row `total_rows` on
  everything is masked: it fills the last batch of a run whose length was given in epochs. Of fewer rows than a batch each step
  takes all, and what is left of the batch is masked.
  """

  def __init__(
    self,
    rows: Any,
    *,
    batch_size: int,
    accumulation: int,
    seed: int,
    total_rows: int,
    local_rows: np.ndarray,
  ):
    self._rows, self._seed, self._rows_in_all = rows, seed, total_rows
    self._batch_size, self._accumulation, self._mine = batch_size, accumulation, local_rows
    self._each = min(batch_size, len(rows))  # rows of a step

  def __len__(self) -> int:
    return -(-self._rows_in_all // self._each)

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    places = np.arange(self._batch_size).reshape(self._accumulation, -1)[:, self._mine]
    there = places < self._each
    places = places + step * self._each
    rows = [self._rows[self._shuffled(int(place))] for place in places.reshape(-1)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    batch["mask"] &= (there & (places < self._rows_in_all)).reshape(-1, 1)
    return {name: x.reshape(*places.shape, -1) for name, x in batch.items()}

  def _shuffled(self, place: int) -> int:
    """The row at a place in the endless sequence of epochs: Grain's stateless permutation, keyed by seed and epoch."""
    epoch, place = divmod(place, len(self._rows))
    return index_shuffle(
      place, max_index=len(self._rows) - 1, seed=_epoch_seed(self._seed, epoch), rounds=4
    )


@functools.lru_cache(maxsize=16)
def _epoch_seed(seed: int, epoch: int) -> int:
  """32 bits of both: seed + epoch would give each run the epochs of the run before it."""
  return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def train_batches(
  rows: Any,
  *,
  batch_size: int,
  accumulation: int,
  seed: int,
  total_rows: int,
  start: int,
  sharding: Sharding,
) -> Iterator[Batch]:
  """Batches of the optimizer steps `start`, `start + 1`, ..., each {"ids", ...} of shape (A, B, T), on the devices."""
  B = batch_size // accumulation
  local_rows = local_row_indices(sharding, B)
  steps = BatchSource(
    rows,
    batch_size=batch_size,
    accumulation=accumulation,
    seed=seed,
    total_rows=total_rows,
    local_rows=local_rows,
  )
  # Threads, not processes: rows are slices of one array, and copying them releases the GIL soon enough.
  options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
  for batch in grain.MapDataset.source(steps)[start:].to_iter_dataset(options):
    yield _make_global_batch(batch, sharding, B, local_rows)


def eval_batches(
  rows: Any, *, batch_size: int, sharding: Sharding, limit: int = 0
) -> Iterator[Batch]:
  """All rows once, in order, or those of the first `limit` batches; the last batch is filled up with masked rows."""
  local_rows, blank = local_row_indices(sharding, batch_size), jax.tree.map(np.zeros_like, rows[0])
  for start in range(0, min(len(rows), limit * batch_size or len(rows)), batch_size):
    picked = [rows[start + i] if start + i < len(rows) else blank for i in local_rows.tolist()]
    yield _make_global_batch(
      jax.tree.map(lambda *columns: np.stack(columns)[None], *picked),
      sharding,
      batch_size,
      local_rows,
    )


def batch_shapes(row: dict[str, Any], A: int, B: int, sharding: Sharding) -> Batch:
  """The shapes of a batch of such rows, to compile for."""
  return {
    name: jax.ShapeDtypeStruct((A, B, *x.shape), x.dtype, sharding=sharding)
    for name, x in row.items()
  }


def local_row_indices(sharding: Sharding, B: int) -> np.ndarray:
  """Which of B rows the devices of this process hold, in rising order."""
  held = sharding.addressable_devices_indices_map((1, B, 1)).values()
  return np.unique(np.concatenate([np.arange(B)[index[1]] for index in held]))


def _make_global_batch(
  batch: dict[str, np.ndarray], sharding: Sharding, B: int, local_rows: np.ndarray
) -> Batch:
  """The parts of all processes as one batch of B rows a step, on the devices."""

  def array(x: np.ndarray) -> jax.Array:
    part = lambda index: x[:, np.searchsorted(local_rows, np.arange(B)[index[1]])]
    return jax.make_array_from_callback((x.shape[0], B, x.shape[2]), sharding, part)

  return {name: array(x) for name, x in batch.items()}
