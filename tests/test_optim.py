"""Schedules against their formulas, and what decays."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import config as settings
from jaxft import optim


def course(total=20, **optim_settings):
  config = settings.default()
  config.optim.update(learning_rate=1e-3, **optim_settings)
  schedule = optim.schedule(config.optim, total)
  return [float(schedule(step)) for step in range(total + 1)]


@pytest.mark.parametrize("warmup", [0, 5])
def test_schedules_follow_transformers_formulas(warmup):
  up = [1e-3 * step / warmup for step in range(warmup)]
  left = [1 - step / (20 - warmup) for step in range(21 - warmup)]
  wave = [0.5 * (1 + math.cos(math.pi * (1 - x))) for x in left]
  np.testing.assert_allclose(course(schedule="constant", warmup_steps=warmup), up + [1e-3] * len(left), rtol=1e-6)
  np.testing.assert_allclose(
    course(schedule="linear", warmup_steps=warmup), up + [1e-3 * x for x in left], rtol=1e-5, atol=1e-12
  )
  np.testing.assert_allclose(
    course(schedule="cosine", warmup_steps=warmup), up + [1e-3 * x for x in wave], rtol=1e-5, atol=1e-9
  )
  ends = [course(schedule=name, warmup_steps=warmup, end_learning_rate=1e-4)[-1] for name in ("linear", "cosine")]
  np.testing.assert_allclose(ends, 1e-4, rtol=1e-5)


def test_matrices_decay_and_biases_and_norms_do_not():
  params = {"tokens": 1, "block": {"kernel": 1, "bias": 1, "scale": 1}}
  assert optim.decay_mask(params) == {"tokens": True, "block": {"kernel": True, "bias": False, "scale": False}}


def test_a_parameter_of_no_known_kind_is_refused():
  with pytest.raises(KeyError, match="gate.*DECAYED"):
    optim.decay_mask({"block": {"gate": jnp.zeros(3)}})
