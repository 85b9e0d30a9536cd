"""The train step: the same numbers for every mesh and micro-batch, torch's, none of a bad batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft.config
import jaxft.sharding.mesh
from jaxft.hf import load_weights, repo
from jaxft.model.compute import ComputeConfig
from jaxft.model.decoder import abstract_model
from jaxft.sharding import rules
from jaxft.training.build import build_train_program
from jaxft.training.train_state import TrainState

ROWS, T = 8, 30


def batches(cfg, steps, seed=0):
  rng = np.random.default_rng(seed)
  for _ in range(steps):
    ids = rng.integers(cfg.V, size=(ROWS, T + 1)).astype(np.int32)
    # ragged: rows weigh differently
    mask = rng.random((ROWS, T)) < np.linspace(0.2, 1, ROWS)[:, None]
    yield {"ids": ids[:, :-1], "targets": ids[:, 1:], "mask": mask}


def train(folder, steps=3, *, mesh=None, accumulation=1, dropout=0.0, spoil=None, **optim_settings):
  """Losses, final state and the metrics of each step."""
  config = jaxft.config.default()
  config.optim.update(optim_settings)
  config.mesh.update({"fsdp": 1} | (mesh or {}))
  config.train.batch_size = ROWS
  on = jaxft.sharding.mesh.make_mesh(config.mesh)
  if accumulation > 1:
    config.train.micro_batch_size = ROWS // accumulation // rules.data_parallel_size(on)
  checkpoint = repo.resolve(str(folder))
  row = {"ids": np.zeros(T, np.int32), "targets": np.zeros(T, np.int32), "mask": np.zeros(T, bool)}
  run = build_train_program(config, checkpoint.cfg.with_dropout(dropout), on, steps, row)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, run.state)
  params = load_weights.load_params(checkpoint, run.state.params, shardings.params)
  init = lambda p: TrainState(step=jnp.int32(0), params=p, opt_state=run.tx.init(p))
  state = jax.jit(init, out_shardings=shardings)(params)
  metrics = []
  for batch in batches(checkpoint.cfg, steps):
    batch = {
      name: jax.device_put(x.reshape(accumulation, -1, T), run.batch_sharding)
      for name, x in batch.items()
    }
    if spoil and len(metrics) == 1:
      state = spoil(state)
    state, numbers = run.train_step(state, batch)
    metrics.append(jax.device_get(numbers))
  assert run.train_step._cache_size() == 1  # compiled once
  return [float(numbers["loss"]) for numbers in metrics], state, metrics


def assert_close(state, other, rtol=1e-5):
  """Weights are equal, but for the biases of keys.

  They move no softmax, their gradient is zero but for rounding, and Adam divides that rounding by
  its own size.
  """

  def comparable(state):
    params = jax.device_get(state.params)
    params["blocks"]["attention"]["qkv"]["bias"] = params["blocks"]["attention"]["qkv"]["bias"][
      :, ::2
    ]  # q and v
    return params

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max()),
    comparable(state),
    comparable(other),
  )


@pytest.mark.slow_for("4", "8")
@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_grad_accumulation_matches_one_batch(folder, accumulation):
  losses, state, _ = train(folder, dropout=0.1)
  again, other, _ = train(folder, accumulation=accumulation, dropout=0.1)
  np.testing.assert_allclose(again, losses, rtol=1e-6)
  assert_close(other, state)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.wide_for("2")
def test_dropout_is_the_same_on_any_mesh(folder, accumulation):
  losses, state, _ = train(folder, 20, dropout=0.1, accumulation=accumulation)
  again, other, _ = train(
    folder, 20, dropout=0.1, accumulation=accumulation, mesh=dict(data=2, fsdp=2)
  )
  np.testing.assert_allclose(again, losses, rtol=1e-5)
  assert_close(other, state, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor", "muon"])
@pytest.mark.wide_for("lion", "sgd", "adafactor")
def test_every_optimizer_learns_on_a_mesh(folder, name):
  rate = {"adamw": 3e-3, "lion": 3e-4, "sgd": 1e-2, "adafactor": 1e-2, "muon": 1e-3}[name]
  losses, state, _ = train(
    folder, 12, mesh=dict(fsdp=8), name=name, learning_rate=rate, schedule="constant"
  )
  one, _, _ = train(folder, 12, name=name, learning_rate=rate, schedule="constant")
  np.testing.assert_allclose(losses, one, rtol=2e-5)
  start = load_weights.load_params(*opened(folder))
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), *jax.device_get((state.params, start)))
  assert min(jax.tree.leaves(moved)) > 0


def opened(folder):
  checkpoint = repo.resolve(str(folder))
  shapes = abstract_model(checkpoint.cfg, ComputeConfig(vocab_multiple=rules.VOCAB_MULTIPLE))[1]
  return (
    checkpoint,
    shapes,
    jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes),
  )


def test_state_dtype_sets_first_moment_dtype(folder):
  _, state, _ = train(folder, 1, state_dtype="bfloat16")
  dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(state.opt_state)}
  assert dtypes == {"int32", "bfloat16", "float32"}


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("fsdp", [1, 8])
def test_nonfinite_step_changes_nothing(folder, fsdp, accumulation):
  if fsdp * accumulation > ROWS:
    accumulation = 1
  spoiled = []

  def spoil(state):
    kernel = state.params["blocks"]["mlp"]["up"]["kernel"]
    bad = jax.device_put(kernel.at[0, 0, 0].set(jnp.nan), kernel.sharding)
    params = jax.tree.map(lambda a: bad if a is kernel else a, state.params)
    state = dataclasses.replace(state, params=params)
    spoiled.append(jax.device_get(state))
    return state

  _, state, metrics = train(folder, 2, mesh=dict(fsdp=fsdp), accumulation=accumulation, spoil=spoil)
  assert [bool(numbers["bad"]) for numbers in metrics] == [False, True]
  assert np.isnan(metrics[1]["loss"]) and int(state.step) == 2
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get((state.params, state.opt_state)),
    (spoiled[0].params, spoiled[0].opt_state),
  )


def test_dropout_differs_between_steps(folder, monkeypatch):
  """The same rows and the same weights twice."""
  (first,) = batches(repo.resolve(str(folder)).cfg, 1)
  monkeypatch.setitem(globals(), "batches", lambda cfg, steps: [first] * steps)
  (once, again), (plain, same) = (
    train(folder, 2, dropout=p, learning_rate=1e-30)[0] for p in (0.3, 0.0)
  )
  assert plain == same and abs(once - again) > 1e-4


def test_out_of_vocabulary_ids_change_nothing(folder, monkeypatch):
  """Also those of rows that pad the table."""
  V, before = repo.resolve(str(folder)).cfg.V, []
  rows = list(batches(repo.resolve(str(folder)).cfg, 4))
  for batch, (name, id) in zip(
    rows[1:], (("ids", V), ("targets", V + 1), ("ids", -1)), strict=True
  ):
    batch["mask"] = np.ones((ROWS, T), bool)
    batch[name] = batch[name].copy()
    batch[name][5, 7] = id
  monkeypatch.setitem(globals(), "batches", lambda cfg, steps: rows[:steps])
  _, state, metrics = train(
    folder, 4, spoil=lambda state: before.append(jax.device_get(state)) or state
  )
  assert [bool(numbers["bad"]) for numbers in metrics] == [False, True, True, True]
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get((state.params, state.opt_state)),
    (before[0].params, before[0].opt_state),
  )


@pytest.mark.slow
@pytest.mark.wide
def test_dropout_depends_on_seed_and_step_alone(folder):
  assert train(folder, dropout=0.3)[0] == train(folder, dropout=0.3)[0] != train(folder)[0]
  same_batch = train(folder, 1, dropout=0.3)[2][0]["loss"]
  resumed = train(folder, 2, dropout=0.3, learning_rate=1e-30)[2][0]["loss"]
  assert same_batch == resumed


def test_adamw_steps_match_torch(folder):
  torch = pytest.importorskip("torch", reason="parity is measured where torch is installed")
  transformers = pytest.importorskip("transformers")
  how = dict(
    learning_rate=1e-3,
    weight_decay=0.1,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    clip_norm=1.0,
    schedule="linear",
  )
  losses, state, metrics = train(folder, 3, **how)
  theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").train()
  decayed = [p for name, p in theirs.named_parameters() if p.ndim == 2]
  rest = [p for name, p in theirs.named_parameters() if p.ndim == 1]
  adamw = torch.optim.AdamW(
    [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
    lr=1e-3,
    betas=(0.9, 0.95),
    eps=1e-8,
  )
  linear = transformers.get_linear_schedule_with_warmup(adamw, 0, 3)
  for batch, ours, numbers in zip(batches(repo.resolve(str(folder)).cfg, 3), losses, metrics):
    batch = {name: torch.from_numpy(x) for name, x in batch.items()}
    logits = theirs(batch["ids"].long()).logits[batch["mask"]]
    loss = torch.nn.functional.cross_entropy(logits, batch["targets"][batch["mask"]].long())
    adamw.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    adamw.step()
    linear.step()
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(numbers["grad_norm"], norm.item(), rtol=1e-5)
  ours = jax.device_get(state.params)
  weights = dict(theirs.named_parameters())
  np.testing.assert_allclose(
    ours["embed"]["tokens"][:293], weights["transformer.wte.weight"].detach().numpy(), atol=1e-4
  )
  np.testing.assert_allclose(
    ours["blocks"]["mlp"]["down"]["kernel"][2],
    weights["transformer.h.2.mlp.c_proj.weight"].detach().numpy(),
    atol=1e-4,
  )
