"""A non-finite number is caught on its own step and changes no bit of weights or optimizer."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxft.config
from jaxft.errors import NumericsError
from jaxft.hf import model_config
from jaxft.model.decoder import init_model
from jaxft.sharding.mesh import make_mesh
from jaxft.train import finetune
from jaxft.training.build import build_train_program
from jaxft.training.train_state import TrainState
from jaxft.training.train_step import nonfinite_leaf_names

ROWS, T, V = 32, 7, 293
PER_PART = 6
CONFIGS = {
  "gpt2": dict(n_embd=24, n_layer=2, n_head=3, n_inner=40, n_positions=11),
  "gptj": dict(n_embd=24, n_layer=2, n_head=3, n_inner=40, n_positions=11, rotary_dim=4),
}


@functools.cache
def built(family, accumulation, devices):
  """(program, state after a step): compiled once for all faults."""
  config = jaxft.config.default()
  config.mesh.fsdp = devices
  config.train.batch_size, config.train.micro_batch_size = ROWS, ROWS // accumulation // devices
  config.optim.weight_decay, config.optim.learning_rate = 0.1, 1e-3
  vocabulary = {"model_type": family, "vocab_size": V, "bos_token_id": 0, "eos_token_id": 0}
  cfg = model_config.from_hf_config(vocabulary | CONFIGS[family]).with_dropout(0.0)
  row = {"ids": np.zeros(T, np.int32), "targets": np.zeros(T, np.int32), "mask": np.zeros(T, bool)}
  run = build_train_program(config, cfg, make_mesh(config.mesh, jax.devices()[:devices]), 9, row)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, run.state)

  def new():
    params = nnx.to_pure_dict(nnx.state(init_model(cfg, run.compute)))
    return TrainState(step=jnp.int32(0), params=params, opt_state=run.tx.init(params))

  begin = jax.jit(new, out_shardings=shardings)
  state, numbers = run.train_step(begin(), batch(run, 0))
  assert not numbers["bad"]
  return run, jax.device_get(state)


def batch(run, seed, **change):
  rng = np.random.default_rng(seed)
  shape = run.batch["ids"].shape
  made = {
    "ids": rng.integers(V, size=shape, dtype=np.int32),
    "targets": rng.integers(V, size=shape, dtype=np.int32),
  }
  made |= {"mask": np.ones(shape, bool)}
  for name, (at, value) in change.items():
    made[name][at] = value
  return jax.device_put(made, run.batch_sharding)


def same_bits(a, b):
  return all(
    np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def poisoned(rng, tree, value):
  """The tree with one number of one leaf changed, and the leaf's index."""
  leaves, structure = jax.tree.flatten(jax.tree.map(np.array, tree))
  chosen = int(rng.choice([i for i, leaf in enumerate(leaves) if leaf.dtype.kind == "f"]))
  leaves[chosen].reshape(-1)[rng.integers(leaves[chosen].size)] = value
  return jax.tree.unflatten(structure, leaves), chosen


def names(tree):
  return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def test_run_ends_after_max_bad_steps_in_a_row(config, tmp_path, capsys):
  """A rate that overflows the weights in one step: the loss after it is no number."""
  config.optim.learning_rate, config.optim.warmup_steps, config.optim.clip_norm = 1e38, 0, 0.0
  config.train.max_bad_steps, config.train.save_every = 3, 0
  with pytest.raises(
    NumericsError, match=r"step 4: loss nan.*for 3 step\(s\) in a row; they changed no weight"
  ):
    finetune(config, tmp_path / "run")
  said = capsys.readouterr().out
  assert all(f"step {step}: loss nan" in said for step in (2, 3, 4)) and "step 5" not in said
  lines = [
    json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  ]
  assert [line["step"] for line in lines if line.get("train/loss") == "nan"] == [2, 3, 4]
  assert not list((tmp_path / "run" / "checkpoints").iterdir())  # never saved


@pytest.mark.slow
@pytest.mark.parts(2, 34)
def test_nonfinite_values_never_enter_the_state(part, record_property):
  rng = np.random.default_rng(part)
  for i in range(PER_PART):
    family, accumulation, devices = (
      rng.choice(list(CONFIGS)),
      [1, 4][part // 2 % 2],
      [1, 8][part % 2],
    )
    where, value = (
      ("weight", "optimizer", "ids", "targets", "gradient", "loss")[i % 6],
      rng.choice([np.nan, np.inf, -np.inf]),
    )
    run, state = built(family, accumulation, devices)
    change, at = {}, tuple(int(rng.integers(size)) for size in run.batch["ids"].shape)
    named = None
    if where == "weight":
      params, leaf = poisoned(rng, state.params, value)
      state, named = dataclasses.replace(state, params=params), f"params{names(params)[leaf]}"
    if where == "optimizer":
      opt, leaf = poisoned(rng, state.opt_state, value)
      state, named = dataclasses.replace(state, opt_state=opt), f"opt{names(opt)[leaf]}"
    if where in ("ids", "targets"):
      change = {where: (at, int(rng.choice([-1, V + 10**6, 2**31 - 1])))}
    if where == "gradient":  # finite weights, and activations that overflow on the way
      state = dataclasses.replace(
        state, params=jax.tree.map(lambda x: x * np.float32(1e30), state.params)
      )
    if where == "loss":  # finite hidden states, and logits that are not
      room, table = ("embed", "tokens") if family == "gpt2" else ("output", "kernel")
      params = state.params
      changed = params[room] | {table: params[room][table] * np.float32(1e38)}
      state = dataclasses.replace(state, params=params | {room: changed})
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, run.state)
    after, numbers = run.train_step(placed, batch(run, part, **change))
    assert numbers["bad"], (family, accumulation, devices, where, value)
    assert named is None or named in nonfinite_leaf_names(numbers["bad_leaves"], run.state), named
    assert same_bits(after.params, state.params) and same_bits(after.opt_state, state.opt_state)
    assert int(after.step) == int(state.step) + 1
  record_property("torture", {"what": "NaN, Inf or ids that are not there", "tried": PER_PART})
