"""Batches are a function of (seed, step): any step, any number of hosts, any accumulation."""

import jax
import numpy as np
import pytest

from jaxft.data import loader, tokenize
from jaxft.data.packing import ConcatDataset

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
EOS = 0


@pytest.fixture(scope="module")
def rows():
  """17 rows of 5, with distinct first targets."""
  ids = np.arange(1, 1 + 17 * 5, dtype=np.uint16)
  return ConcatDataset(
    tokenize.TokenArrays(ids, np.array([0, 85]), np.zeros(1, np.int32), np.zeros(0), np.zeros(0)),
    5,
    EOS,
  )


def collect(rows, steps, **options):
  options = (
    dict(batch_size=6, accumulation=1, seed=3, total_rows=10**6, start=0, sharding=HERE) | options
  )
  batches = loader.train_batches(rows, **options)
  return [jax.device_get(next(batches)) for _ in range(steps)]


def test_epoch_shuffles_each_row_exactly_once(rows):
  """Each epoch has its own order."""
  # 6 x 17 rows: 6 epochs.
  firsts = np.concatenate([batch["targets"][0, :, 0] for batch in collect(rows, 17)])
  epochs = firsts.reshape(6, 17)
  for epoch in epochs:
    assert sorted(epoch) == list(range(1, 86, 5))
  assert len({tuple(epoch) for epoch in epochs}) == 6
  other = np.concatenate(
    [batch["targets"][0, :, 0] for batch in collect(rows, 17, seed=4)]
  ).reshape(6, 17)
  # the next seed's are others
  assert not {tuple(epoch) for epoch in epochs} & {tuple(epoch) for epoch in other}


@pytest.mark.parametrize("start", [0, 1, 2, 3, 7, 15, 166_660])
def test_resume_at_step_equals_iteration(rows, start):
  """Seeking to a step gives the batches of going there."""
  resumed = collect(rows, 3, start=start)
  if start < 100:
    jax.tree.map(np.testing.assert_array_equal, resumed, collect(rows, start + 3)[start:])
  jax.tree.map(np.testing.assert_array_equal, resumed[1:], collect(rows, 2, start=start + 1))


def test_global_batch_is_independent_of_hosts():
  """For random (seed, step, accumulation, hosts), the hosts' parts join to one host's batch."""
  rng = np.random.default_rng(0)
  many = tokenize.TokenArrays(
    np.arange(10**5) % 5000, np.array([0, 10**5]), np.zeros(1, np.int32), np.zeros(0), np.zeros(0)
  )
  rows = ConcatDataset(many, 5, EOS)
  for _ in range(1000):
    accumulation, hosts = int(rng.choice([1, 2, 3])), int(rng.choice([2, 4]))
    options = dict(
      batch_size=12 * accumulation,
      accumulation=accumulation,
      seed=int(rng.integers(2**32)),
      total_rows=10**6,
    )
    step = int(rng.integers(1000))
    whole = loader.BatchSource(rows, **options, local_rows=np.arange(12))[step]
    parts = [
      loader.BatchSource(rows, **options, local_rows=mine)[step]
      for mine in np.split(np.arange(12), hosts)
    ]
    for name, x in whole.items():
      np.testing.assert_array_equal(np.concatenate([part[name] for part in parts], axis=1), x)


def test_accumulation_splits_the_same_batch(rows):
  for a, b in zip(collect(rows, 3), collect(rows, 3, accumulation=3)):
    assert b["ids"].shape == (3, 2, 5)
    np.testing.assert_array_equal(a["ids"].reshape(6, 5), b["ids"].reshape(6, 5))


def test_rows_past_the_last_epoch_are_masked(rows):
  masks = np.concatenate(
    [batch["mask"].reshape(6, 5) for batch in collect(rows, 6, total_rows=2 * 17)]
  )
  assert masks[:34].all() and not masks[34:].any()


def test_eval_batches_have_each_row_once(rows):
  batches = list(loader.eval_batches(rows, batch_size=6, sharding=HERE))
  counted = np.concatenate(
    [np.asarray(batch["targets"])[np.asarray(batch["mask"])] for batch in batches]
  )
  np.testing.assert_array_equal(counted, rows.tokens.ids)
  assert len(list(loader.eval_batches(rows, batch_size=6, limit=2, sharding=HERE))) == 2
