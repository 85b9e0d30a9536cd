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


class Steps:
  """What this process holds of the batch of each optimizer step: {"ids", ...}, each (A, B / processes, T).

  Rows come in a new order each epoch; a batch may straddle two epochs. The global batch is the same rows in the same order for
  any number of processes, each of which takes a contiguous part of every accumulation step. From the row `rows_in_all` on
  everything is masked: it fills the last batch of a run whose length was given in epochs.
  """

  def __init__(
    self, rows: Any, *, batch_size: int, accumulation: int, seed: int, rows_in_all: int, process: int, processes: int
  ):
    self._rows, self._seed, self._rows_in_all = rows, seed, rows_in_all
    self._batch_size, self._accumulation = batch_size, accumulation
    share = batch_size // accumulation // processes
    self._mine = slice(process * share, (process + 1) * share)

  def __len__(self) -> int:
    return -(-self._rows_in_all // self._batch_size)

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    first = step * self._batch_size
    places = np.arange(first, first + self._batch_size).reshape(self._accumulation, -1)[:, self._mine]
    rows = [self._rows[self._shuffled(int(place))] for place in places.reshape(-1)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    batch["mask"] &= places.reshape(-1, 1) < self._rows_in_all
    return {name: x.reshape(*places.shape, -1) for name, x in batch.items()}

  def _shuffled(self, place: int) -> int:
    """The row at a place in the endless sequence of epochs: Grain's stateless permutation, keyed by seed and epoch."""
    epoch, place = divmod(place, len(self._rows))
    return index_shuffle(place, max_index=len(self._rows) - 1, seed=_seed_of(self._seed, epoch), rounds=4)


@functools.lru_cache(maxsize=16)
def _seed_of(seed: int, epoch: int) -> int:
  """32 bits of both: seed + epoch would give each run the epochs of the run before it."""
  return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def training_batches(
  rows: Any, *, batch_size: int, accumulation: int, seed: int, rows_in_all: int, start: int, sharding: Sharding
) -> Iterator[Batch]:
  """Batches of the optimizer steps `start`, `start + 1`, ..., each {"ids", ...} of shape (A, B, T), on the devices."""
  steps = Steps(
    rows,
    batch_size=batch_size,
    accumulation=accumulation,
    seed=seed,
    rows_in_all=rows_in_all,
    process=jax.process_index(),
    processes=jax.process_count(),
  )
  # Threads, not processes: rows are slices of one array, and copying them releases the GIL soon enough.
  options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
  for batch in grain.MapDataset.source(steps)[start:].to_iter_dataset(options):
    yield _place(batch, sharding)


def evaluation_batches(rows: Any, *, batch_size: int, sharding: Sharding, limit: int = 0) -> Iterator[Batch]:
  """All rows once, in order, or those of the first `limit` batches; the last batch is filled up with masked rows."""
  for start in range(0, min(len(rows), limit * batch_size or len(rows)), batch_size):
    picked = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
    blank = jax.tree.map(np.zeros_like, picked[0])
    picked += [blank] * (batch_size - len(picked))
    yield _place(jax.tree.map(lambda *columns: np.stack(columns)[None], *picked), sharding)


def like(row: dict[str, Any], A: int, B: int, sharding: Sharding) -> Batch:
  """The shapes of a batch of such rows, to compile for."""
  return {name: jax.ShapeDtypeStruct((A, B, *x.shape), x.dtype, sharding=sharding) for name, x in row.items()}


def _place(batch: dict[str, np.ndarray], sharding: Sharding) -> Batch:
  return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}
