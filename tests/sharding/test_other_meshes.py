"""A checkpoint restores on any number of devices: the same bits, and the same losses after it."""

import itertools

import jax
import numpy as np
import pytest
import test_mesh

from jaxft.checkpoint.manager import CheckpointManager

pytestmark = [pytest.mark.slow, pytest.mark.wide]
COUNTS, SAVED_AT = (1, 2, 4, 8), 3


def steps(run, state, first, count):
  losses = []
  for step in range(first, first + count):
    state, numbers = run.train_step(state, test_mesh.batch(run, step))
    losses.append(float(numbers["loss"]))
  return state, losses


def test_checkpoint_restores_on_any_device_count(tmp_path, record_property):
  runs = {n: test_mesh.build("gpt2", (1, n, 1), 3) for n in COUNTS}
  saved, follow = {}, {}
  for n, run in runs.items():
    state, _ = steps(run, test_mesh.begin(run, "gpt2"), 0, SAVED_AT)
    checkpoints = CheckpointManager(tmp_path / str(n), 2)
    checkpoints.save(SAVED_AT, state, {})
    checkpoints.close()
    saved[n] = jax.device_get(state)
    _, follow[n] = steps(run, state, SAVED_AT, test_mesh.STEPS)
  for before, after in itertools.permutations(COUNTS, 2):
    state = CheckpointManager(tmp_path / str(before), 2).restore(SAVED_AT, runs[after].state)
    assert all(
      leaf.sharding == like.sharding
      for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(runs[after].state))
    )
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), saved[before])
    _, losses = steps(runs[after], state, SAVED_AT, test_mesh.STEPS)
    np.testing.assert_allclose(losses, follow[before], rtol=1e-5)
  record_property("torture", {"what": "ordered pairs of 1, 2, 4 and 8 devices", "tried": 12})
