"""Schedules against their formulas, and what decays."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft.config
from jaxft.training import optimizer


def course(total=20, **optim_settings):
  config = jaxft.config.default()
  config.optim.update(learning_rate=1e-3, **optim_settings)
  schedule = optimizer.make_schedule(config.optim, total)
  return [float(schedule(step)) for step in range(total + 1)]


@pytest.mark.parametrize("warmup", [0, 5])
def test_schedules_match_transformers(warmup):
  up = [1e-3 * step / warmup for step in range(warmup)]
  left = [1 - step / (20 - warmup) for step in range(21 - warmup)]
  wave = [0.5 * (1 + math.cos(math.pi * (1 - x))) for x in left]
  np.testing.assert_allclose(
    course(schedule="constant", warmup_steps=warmup), up + [1e-3] * len(left), rtol=1e-6
  )
  np.testing.assert_allclose(
    course(schedule="linear", warmup_steps=warmup),
    up + [1e-3 * x for x in left],
    rtol=1e-5,
    atol=1e-12,
  )
  np.testing.assert_allclose(
    course(schedule="cosine", warmup_steps=warmup),
    up + [1e-3 * x for x in wave],
    rtol=1e-5,
    atol=1e-9,
  )
  ends = [
    course(schedule=name, warmup_steps=warmup, end_learning_rate=1e-4)[-1]
    for name in ("linear", "cosine")
  ]
  np.testing.assert_allclose(ends, 1e-4, rtol=1e-5)


def updated(optim_settings, params, grads, steps=3):
  tx = optimizer.make_optimizer(optim_settings)
  state, update = tx.init(params), jax.jit(tx.update)
  for _ in range(steps):
    direction, state = update(grads, state, params)
    params = jax.tree.map(lambda p, d: p - 0.1 * d, params, direction)
  return params


def test_lion_and_sgd_match_their_formulas():
  """Lion (Chen et al., 2023): sign of a mean with b1, stored mean with b2; SGD: momentum b1."""
  settings_, rng = jaxft.config.default().optim, np.random.default_rng(0)
  grads = [rng.standard_normal((3, 4)).astype(np.float32) for _ in range(3)]
  settings_.update(b1=0.6, b2=0.95, weight_decay=0.0)
  lion, sgd, mean, summed = [], [], 0, 0
  for grad in grads:
    lion.append(np.sign(0.6 * mean + 0.4 * grad))
    mean, summed = 0.95 * mean + 0.05 * grad, grad + 0.6 * summed
    sgd.append(summed)
  for name, wanted in (("lion", lion), ("sgd", sgd)):
    settings_.name = name
    tx, params = optimizer.make_optimizer(settings_), {"block": {"kernel": jnp.ones((3, 4))}}
    state = tx.init(params)
    for grad, direction in zip(grads, wanted, strict=True):
      found, state = tx.update({"block": {"kernel": jnp.asarray(grad)}}, state, params)
      np.testing.assert_allclose(found["block"]["kernel"], direction, rtol=1e-5, atol=1e-7)


def test_weight_decay_skips_biases_and_norms():
  settings_ = jaxft.config.default().optim
  settings_.weight_decay = 0.5
  params = {
    "tokens": jnp.ones(3),
    "block": {"kernel": jnp.ones(3), "bias": jnp.ones(3), "scale": jnp.ones(3)},
  }
  after = updated(settings_, params, jax.tree.map(jnp.zeros_like, params), 1)
  assert jax.tree.map(lambda x: bool((x < 1).all()), after) == {
    "tokens": True,
    "block": {"kernel": True, "bias": False, "scale": False},
  }


def test_unknown_parameter_kind_is_refused():
  with pytest.raises(KeyError, match="gate.*DECAYED"):
    optimizer.make_optimizer(jaxft.config.default().optim).init({"block": {"gate": jnp.zeros(3)}})


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor", "muon"])
def test_stacked_layers_update_independently(name):
  """A layer of a stack is updated as it would be alone."""
  settings_ = jaxft.config.default().optim
  settings_.name, settings_.weight_decay = name, 0.1
  rng = np.random.default_rng(0)
  stack, grads = (
    {"kernel": 10**k * rng.standard_normal((3, 130, 150)).astype(np.float32)} for k in (0, 1)
  )
  together = updated(settings_, {"blocks": stack}, {"blocks": grads})["blocks"]["kernel"]
  for i in range(3):
    # Muon is for layers: its one layer is a stack too.
    stack_name, one = ("blocks", slice(i, i + 1)) if name == "muon" else ("other", i)
    alone = updated(
      settings_,
      {stack_name: {"kernel": stack["kernel"][one]}},
      {stack_name: {"kernel": grads["kernel"][one]}},
    )
    # Its matrix products round as the loop they are in has it; the others do the same sums.
    how = dict(rtol=1e-5, atol=1e-6) if name == "muon" else dict(rtol=1e-6)
    np.testing.assert_allclose(together[one], alone[stack_name]["kernel"], **how)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor", "muon"])
def test_every_optimizer_state_begins_at_zero(name):
  """`program.init_train_state` relies on it where the state is on the host."""
  settings_ = jaxft.config.default().optim
  settings_.name = name
  params = {
    "blocks": {"kernel": jnp.ones((3, 130, 150))},
    "embed": {"tokens": jnp.ones((130, 150))},
  }
  state = optimizer.make_optimizer(settings_).init(params)
  assert jax.tree.leaves(state) and not any(
    np.asarray(leaf).any() for leaf in jax.tree.leaves(state)
  )


def test_muon_orthogonalizes_q_k_v_separately():
  settings_ = jaxft.config.default().optim
  settings_.name = "muon"
  rng = np.random.default_rng(0)
  shapes = {"qkv": (2, 12, 3, 5, 4), "out": (2, 5, 4, 12), "up": (2, 12, 47)}
  grads = {
    "blocks": {name: {"kernel": rng.standard_normal(shape)} for name, shape in shapes.items()}
  }
  grads["blocks"]["qkv"]["kernel"][:, :, 2] *= 1e-3  # values have small gradients
  grads = jax.tree.map(jnp.float32, grads)
  zeros = jax.tree.map(jnp.zeros_like, grads)
  tx = optimizer.make_optimizer(settings_)
  found = jax.device_get(tx.update(grads, tx.init(zeros), zeros)[0])["blocks"]
  matrices = [(found["qkv"]["kernel"][0, :, i].reshape(12, 20), 20) for i in range(3)]
  matrices += [(found["out"]["kernel"][1].reshape(20, 12), 20), (found["up"]["kernel"][1], 47)]
  for matrix, longer in matrices:
    values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * longer**0.5)
    assert values.min() > 0.4 and values.max() < 1.3, values


@pytest.mark.parametrize(
  "warmup, ratio, steps, wanted",
  [
    (5, 0.0, 20, 5),
    (20, 0.0, 20, 20),
    (21, 0.0, 20, 2),
    (50, 0.0, 7, 0),
    (9, 0.0, 1, 0),
    (0, 0.1, 25, 3),
    (0, 0.0, 9, 0),
  ],
)
def test_warmup_steps_and_ratio(warmup, ratio, steps, wanted):
  config = jaxft.config.default().optim
  config.warmup_steps, config.warmup_ratio = warmup, ratio
  assert optimizer.warmup_steps(config, steps) == wanted
  rates = [float(optimizer.make_schedule(config, steps)(step)) for step in range(steps)]
  assert max(rates) > 0 and (rates[0] > 0) == (wanted == 0)
