"""Batch the rows of a dataset.

A batch is a pure function of (seed, step), so resuming needs no saved state.

Shapes: A accumulation steps, B rows per step, T columns.
"""

import functools
from collections.abc import Iterator
from typing import TypeAlias

import grain
import jax
import numpy as np
from grain.experimental import index_shuffle
from jax.sharding import Sharding

from jaxft.data.packing import PackedRow, TokenDataset

# "ids" and "targets" (int32), "mask" (bool: the targets that count in the loss). Packed sequences
# also have "segments" and "positions" (int32). Each is (A, B, T), or (B, T) for one micro-batch.
Batch: TypeAlias = dict[str, jax.Array]


class BatchSource:
  """This process's share of the batch of each step.

  An item is {"ids", ...}, with arrays of shape (A, B / processes, T).

  Rows come in a new order each epoch; a batch may straddle two epochs. The global batch has the
  same rows in the same order for any number of processes. Each process takes the rows `local_rows`
  of every accumulation step. Rows from `total_rows` on are masked: they fill the last batch of a
  run whose length is given in epochs. If the data has fewer rows than a batch, each step takes all
  rows and masks the rest.
  """

  def __init__(
    self,
    rows: TokenDataset,
    *,
    batch_size: int,
    accumulation: int,
    seed: int,
    total_rows: int,
    local_rows: np.ndarray,
  ):
    self._rows = rows
    self._seed = seed
    self._total_rows = total_rows
    self._rows_per_step = min(batch_size, len(rows))
    # (A, B / processes): the rows of the global batch that this process takes.
    self._indices = np.arange(batch_size).reshape(accumulation, -1)[:, local_rows]

  def __len__(self) -> int:
    return -(-self._total_rows // self._rows_per_step)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Return the batch of step `index` (Grain's name for the argument)."""
    indices = self._indices + index * self._rows_per_step
    rows = [self._rows[self._shuffled(int(i))] for i in indices.reshape(-1)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    is_real = (self._indices < self._rows_per_step) & (indices < self._total_rows)
    batch["mask"] &= is_real.reshape(-1, 1)
    return {name: x.reshape(*indices.shape, -1) for name, x in batch.items()}

  def _shuffled(self, index: int) -> int:
    """Map an index over all epochs to a row.

    Uses Grain's stateless shuffle, keyed by (seed, epoch).
    """
    epoch, index = divmod(index, len(self._rows))
    seed = _epoch_seed(self._seed, epoch)
    return index_shuffle(index, max_index=len(self._rows) - 1, seed=seed, rounds=4)


@functools.lru_cache(maxsize=16)
def _epoch_seed(seed: int, epoch: int) -> int:
  """Mix both into 32 bits.

  With seed + epoch, seed 1 would repeat the epochs of seed 0.
  """
  return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def train_batches(
  rows: TokenDataset,
  *,
  batch_size: int,
  accumulation: int,
  seed: int,
  total_rows: int,
  start: int,
  sharding: Sharding,
) -> Iterator[Batch]:
  """Yield the batches of steps `start`, `start + 1`, ... on the devices.

  Each array of a batch is (A, B, T).

  Args:
    rows: the training rows.
    batch_size: rows per optimizer step, over all devices and accumulation steps.
    accumulation: micro-batches per step, A.
    seed: decides the order of the rows.
    total_rows: rows of the whole run; later ones are masked.
    start: the first step, above 0 for a resumed run.
    sharding: of each batch, over the devices of all processes.
  """
  B = batch_size // accumulation
  local_rows = local_row_indices(sharding, B)
  steps = BatchSource(
    rows=rows,
    batch_size=batch_size,
    accumulation=accumulation,
    seed=seed,
    total_rows=total_rows,
    local_rows=local_rows,
  )
  # Threads suffice: rows are slices of one array, and copying them releases the GIL soon enough.
  options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
  for batch in grain.MapDataset.source(steps)[start:].to_iter_dataset(options):
    yield _make_global_batch(batch, sharding, B, local_rows)


def eval_batches(
  rows: TokenDataset, *, batch_size: int, sharding: Sharding, limit: int = 0
) -> Iterator[Batch]:
  """Yield all rows once, in order, or only the first `limit` batches.

  Masked rows fill the last batch.
  """
  local_rows = local_row_indices(sharding, batch_size)
  blank = jax.tree.map(np.zeros_like, rows[0])  # its mask is false, so it does not count
  for start in range(0, min(len(rows), limit * batch_size or len(rows)), batch_size):
    local = [rows[start + i] if start + i < len(rows) else blank for i in local_rows.tolist()]
    batch = jax.tree.map(lambda *columns: np.stack(columns)[None], *local)
    yield _make_global_batch(batch, sharding, batch_size, local_rows)


def batch_shapes(
  row: PackedRow, A: int, B: int, sharding: Sharding
) -> dict[str, jax.ShapeDtypeStruct]:
  """Return the shapes of a batch of rows like `row`, for compilation."""
  return {
    name: jax.ShapeDtypeStruct((A, B, *x.shape), x.dtype, sharding=sharding)
    for name, x in row.items()
  }


def local_row_indices(sharding: Sharding, B: int) -> np.ndarray:
  """Return which of B rows this process's devices hold, as ascending indices."""
  slices = sharding.addressable_devices_indices_map((1, B, 1)).values()
  return np.unique(np.concatenate([np.arange(B)[index[1]] for index in slices if index]))


def _make_global_batch(
  batch: dict[str, np.ndarray], sharding: Sharding, B: int, local_rows: np.ndarray
) -> Batch:
  """Join the local rows of all processes into one batch on the devices.

  The batch has B rows per accumulation step.
  """

  def make_array(x: np.ndarray) -> jax.Array:
    # JAX asks for each local shard by its rows in the global batch; x has only this process's rows.
    shard = lambda index: x[:, np.searchsorted(local_rows, np.arange(B)[index[1]])]
    return jax.make_array_from_callback((x.shape[0], B, x.shape[2]), sharding, shard)

  return {name: make_array(x) for name, x in batch.items()}
