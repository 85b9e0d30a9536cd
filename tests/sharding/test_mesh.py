"""Every mesh of eight devices trains as one device does, and stores what the formula says."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

import jaxft.config
import jaxft.sharding.mesh
import jaxft.training.build
from jaxft.hf import model_config
from jaxft.model.compute import ComputeConfig
from jaxft.model.decoder import abstract_model, init_model
from jaxft.sharding import rules
from jaxft.training.memory import bytes_per_device
from jaxft.training.train_state import TrainState
from jaxft.training.trainable import param_name

STEPS, ROWS, T = 20, 8, 13
SIZES = dict(L=3, N=8, D=40, F=88)
# (data, fsdp, tensor): every way to write 8 as a product of three.
MESHES = [(d, f, 8 // d // f) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8]
CASES = (
  [(mesh, 3) for mesh in MESHES]
  + [((1, 8, 1), stage) for stage in (0, 1, 2)]
  + [((2, 2, 2), 1), ((2, 2, 2), 2)]
)
MORE = [(mesh, stage) for mesh in MESHES for stage in range(4) if (mesh, stage) not in CASES]


@functools.cache
def cfg_of(family):
  vocabulary = {"model_type": family, "vocab_size": 293, "bos_token_id": 0, "eos_token_id": 0}
  return model_config.from_hf_config(vocabulary | tiny.FAMILIES[family]).with_dropout(0.0)


@functools.cache
def weights(family):
  """New weights, with noise in every bias and norm too."""
  compute = ComputeConfig(vocab_multiple=rules.VOCAB_MULTIPLE)
  rng = np.random.default_rng(0)
  params = jax.device_get(nnx.to_pure_dict(nnx.state(init_model(cfg_of(family), compute))))
  noisy = lambda path, x: (
    x
    if x.shape[0] == compute.padded_vocab(cfg_of(family))
    else x + 0.1 * rng.standard_normal(x.shape)
  )
  return jax.tree_util.tree_map_with_path(lambda path, x: noisy(path, x).astype(np.float32), params)


def build(family, mesh, stage):
  config = jaxft.config.default()
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
  config.mesh.zero_stage = stage
  config.train.batch_size = ROWS
  config.optim.update(learning_rate=1e-3, weight_decay=0.1, eps=1e-4)
  row = {"ids": np.zeros(T, np.int32), "targets": np.zeros(T, np.int32), "mask": np.zeros(T, bool)}
  return jaxft.training.build.build_train_program(
    config, cfg_of(family), jaxft.sharding.mesh.make_mesh(config.mesh), STEPS, row
  )


def begin(run, family):
  shardings = jax.tree.map(lambda leaf: leaf.sharding, run.state)
  params = jax.device_put(weights(family), shardings.params)
  init = lambda p: TrainState(step=jnp.int32(0), params=p, opt_state=run.tx.init(p))
  return jax.jit(init, out_shardings=shardings)(params)


def batch(run, step):
  rng = np.random.default_rng(step)
  ids = rng.integers(293, size=(1, ROWS, T + 1)).astype(np.int32)
  mask = rng.random((1, ROWS, T)) < np.linspace(0.2, 1, ROWS)[:, None]
  return jax.device_put(
    {"ids": ids[..., :-1], "targets": ids[..., 1:], "mask": mask}, run.batch_sharding
  )


def train(family, mesh, stage):
  run = build(family, mesh, stage)
  state, losses = begin(run, family), []
  for step in range(STEPS):
    state, numbers = run.train_step(state, batch(run, step))
    losses.append(float(numbers["loss"]))
  assert run.train_step._cache_size() == 1
  return losses, jax.device_get(state.params)


@functools.cache
def on_one_device(family):
  return train(family, (1, 1, 1), 3)


def every_case():
  """All families, meshes and stages; some of them always run."""
  always = [("gpt2", mesh, 3) for mesh in ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2))]
  always += [("gpt2", (1, 8, 1), stage) for stage in (0, 1, 2)]
  always += [(family, mesh, 3) for family in ("gpt_neo", "gptj") for mesh in ((1, 8, 1), (2, 2, 2))]
  for family in tiny.FAMILIES:
    for case in CASES + MORE:
      first = (family, *case) == ("gpt2", (2, 2, 2), 3)
      marks = [pytest.mark.slow] * (not first) + [pytest.mark.wide] * (
        (family, *case) not in always
      )
      yield pytest.param(family, *case, marks=marks)


@pytest.mark.parametrize("family, mesh, stage", list(every_case()))
def test_train_steps_match_one_device(family, mesh, stage):
  wanted, weights = on_one_device(family)
  losses, trained = train(family, mesh, stage)
  np.testing.assert_allclose(losses, wanted, rtol=1e-5)
  for ours, theirs in zip(jax.tree.leaves(trained), jax.tree.leaves(weights), strict=True):
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


# What the docs say of each weight, by hand: tensor parallelism splits these, and fsdp all with a
# model axis.
CUT_BY_TENSOR = {"embed.tokens", "output.kernel", "output.bias"}
CUT_BY_TENSOR |= {f"blocks.attention.{name}" for name in ("qkv.kernel", "qkv.bias", "out.kernel")}
CUT_BY_TENSOR |= {f"blocks.mlp.{name}" for name in ("up.kernel", "up.bias", "down.kernel")}
WITHOUT_A_MODEL_AXIS = {"output.bias", "blocks.attention.qkv.bias", "blocks.mlp.up.bias"}


def bytes_by_formula(family, mesh, stage):
  """{"parameters", "gradients", "optimizer"}: bytes a device (docs/sharding.md)."""
  _, fsdp, tensor = mesh
  compute = ComputeConfig(vocab_multiple=rules.VOCAB_MULTIPLE)
  _, shapes, _ = abstract_model(cfg_of(family), compute)
  leaves = {
    param_name(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]
  }

  def total(cut):
    parts = lambda name: (
      (tensor if name in CUT_BY_TENSOR else 1)
      * (fsdp if cut and name not in WITHOUT_A_MODEL_AXIS else 1)
    )
    return sum(4 * math.prod(shape) // parts(name) for name, shape in leaves.items())

  # A step count for each leaf, and for each layer of one that is stacked.
  counts = sum(shape[0] if name.startswith("blocks") else 1 for name, shape in leaves.items())
  return {
    "parameters": total(stage >= 3),
    "gradients": total(stage >= 2),
    "optimizer": 2 * total(stage >= 1) + 4 * counts,
  }


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
  "family", ["gptj", *(pytest.param(it, marks=pytest.mark.wide) for it in ("gpt2", "gpt_neo"))]
)
def test_sharded_bytes_match_formula(family, mesh, stage):
  run = build(family, mesh, stage)
  held = {
    "parameters": run.state.params,
    "gradients": run.grad_shapes,
    "optimizer": run.state.opt_state,
  }
  assert {what: bytes_per_device(tree) for what, tree in held.items()} == bytes_by_formula(
    family, mesh, stage
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh, stage", [((1, 8, 1), stage) for stage in range(4)] + [((2, 2, 2), 3), ((1, 2, 4), 2)]
)
@pytest.mark.parametrize(
  "family", ["gpt2", *(pytest.param(it, marks=pytest.mark.wide) for it in ("gpt_neo", "gptj"))]
)
def test_measured_bytes_match_formula(family, mesh, stage):
  run = build(family, mesh, stage)
  state = begin(run, family)
  held = {
    "parameters": state.params,
    "gradients": run.grad_fn(state, batch(run, 0))[1],
    "optimizer": state.opt_state,
  }
  for device in range(8):
    measured = {
      what: sum(leaf.addressable_shards[device].data.nbytes for leaf in jax.tree.leaves(tree))
      for what, tree in held.items()
    }
    assert measured == bytes_by_formula(family, mesh, stage)
