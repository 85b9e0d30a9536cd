"""Offload changes no number: losses and weights are those of a run with all on the device."""

import dataclasses
import functools
import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import tiny
from flax import nnx

import jaxft.config
import jaxft.sharding.mesh
import jaxft.training.build
from jaxft.hf import model_config
from jaxft.model.decoder import init_model
from jaxft.pretrained import load, load_workdir
from jaxft.train import finetune
from jaxft.training import offload
from jaxft.training.train_state import TrainState

STEPS, ROWS, T = 20, 8, 13
# And a GPT-2 whose layers differ by more than their weights.
FAMILIES = tiny.FAMILIES | {
  "gpt2 by depth": tiny.FAMILIES["gpt2"] | {"scale_attn_by_inverse_layer_idx": True}
}


def build(family, mode, accumulation=1, fsdp=1, tensor=1, **more):
  config = jaxft.config.default()
  config.mesh.fsdp, config.mesh.tensor, config.memory.offload = fsdp, tensor, mode
  config.train.batch_size, config.train.micro_batch_size = ROWS, ROWS // accumulation // fsdp
  config.optim.update(learning_rate=1e-3, weight_decay=0.1, eps=1e-4, clip_norm=0.5)
  for name, value in more.items():
    section, key = name.split("__")
    config[section][key] = value
  vocabulary = {
    "model_type": family.split()[0],
    "vocab_size": 293,
    "bos_token_id": 0,
    "eos_token_id": 0,
  }
  cfg = model_config.from_hf_config(vocabulary | FAMILIES[family]).with_dropout(0.1)
  row = {"ids": np.zeros(T, np.int32), "targets": np.zeros(T, np.int32), "mask": np.zeros(T, bool)}
  mesh = jaxft.sharding.mesh.make_mesh(config.mesh, jax.devices()[: fsdp * tensor])
  return cfg, jaxft.training.build.build_train_program(config, cfg, mesh, STEPS, row)


@functools.cache
def weights(family):
  cfg, run = build(family, "none")
  return jax.device_get(nnx.to_pure_dict(nnx.state(init_model(cfg, run.compute))))


def begin(run, family):
  shardings = jax.tree.map(lambda leaf: leaf.sharding, run.state)
  params = jax.tree.map(lambda x, like: x.astype(like.dtype), weights(family), run.state.params)
  opt_state = jax.device_get(run.tx.init(params))
  state = TrainState(step=jnp.int32(0), params=params, opt_state=opt_state)
  return jax.device_put(state, shardings)


def batch(run, step):
  rng = np.random.default_rng(step)
  A, B, _ = run.batch["ids"].shape
  ids = rng.integers(293, size=(ROWS, T + 1)).astype(np.int32)
  mask = rng.random((ROWS, T)) < np.linspace(0.2, 1, ROWS)[:, None]
  made = {"ids": ids[..., :-1], "targets": ids[..., 1:], "mask": mask}
  return jax.device_put({name: x.reshape(A, B, T) for name, x in made.items()}, run.batch_sharding)


def train(family, mode, steps=STEPS, **how):
  _, run = build(family, mode, **how)
  state, losses, norms = begin(run, family), [], []
  for step in range(steps):
    state, numbers = run.train_step(state, batch(run, step))
    assert not numbers["bad"]
    losses.append(float(numbers["loss"]))
    norms.append(float(numbers["grad_norm"]))
  assert min(norms) > 0.5  # clipping is at work
  return losses, state, run


@functools.cache
def resident(family):
  losses, state, _ = train(family, "none")
  return losses, jax.device_get(state)


def close(found, wanted, rtol):
  """All weights as one vector within `rtol`; a leaf alone within three times that.

  Biases are but a sum of small updates.
  """
  apart, whole = [], []
  for path, leaf in jax.tree_util.tree_flatten_with_path(found)[0]:
    other = functools.reduce(lambda node, key: node[key.key], path, wanted)
    apart.append(np.linalg.norm(leaf - other))
    whole.append(np.linalg.norm(other))
    assert apart[-1] <= 3 * rtol * whole[-1], (path, apart[-1] / whole[-1])
  assert np.linalg.norm(apart) <= rtol * np.linalg.norm(whole)


def every_case():
  """All of them; four always run."""
  always = [
    ("gpt2", "all", 4),
    ("gptj", "all", 1),
    ("gpt_neo", "optimizer", 4),
    ("gpt2 by depth", "all", 1),
  ]
  for case in itertools.product(FAMILIES, ("optimizer", "all"), (1, 4)):
    yield pytest.param(*case, marks=() if case in always else pytest.mark.wide)


@pytest.mark.slow
@pytest.mark.parametrize("family, mode, accumulation", [*every_case()])
def test_offloaded_training_matches_on_device(family, mode, accumulation):
  """Over twenty steps."""
  losses, state, run = train(family, mode, accumulation=accumulation)
  wanted, theirs = resident(family)
  np.testing.assert_allclose(losses, wanted, rtol=1e-6)
  close(jax.device_get(state.params), theirs.params, 1e-6)
  for leaf in jax.tree.leaves((state.params, state.opt_state)):
    assert leaf.sharding.memory_kind == ("pinned_host" if leaf.ndim > 1 else "device")
  assert run.train_step._cache_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize(
  "mode, fsdp, tensor",
  [
    pytest.param("optimizer", 4, 1, marks=pytest.mark.wide),
    pytest.param("all", 4, 1, marks=pytest.mark.wide),
    pytest.param("optimizer", 2, 2, marks=pytest.mark.wide),
    ("all", 2, 2),
  ],
)
def test_offload_matches_on_device_over_a_mesh(monkeypatch, mode, fsdp, tensor):
  # tables in parts, cut along the axis that devices share
  monkeypatch.setattr(offload, "TABLE_CHUNK_BYTES", 4 * 40 * 50)
  losses, state, _ = train("gptj", mode, accumulation=2, fsdp=fsdp, tensor=tensor)
  wanted, theirs = resident("gptj")
  np.testing.assert_allclose(losses, wanted, rtol=1e-5)
  close(jax.device_get(state.params), theirs.params, 1e-5)


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize("name", ["lion", "sgd", "adafactor", "muon"])
@pytest.mark.parametrize("mode", ["optimizer", "all"])
def test_offload_matches_for_every_optimizer(mode, name):
  how = dict(steps=6, optim__name=name, optim__learning_rate=1e-3)
  losses, state, _ = train("gpt2", mode, **how)
  wanted, theirs, _ = train("gpt2", "none", **how)
  np.testing.assert_allclose(losses, wanted, rtol=1e-6)
  if name != "lion":  # which goes by the signs of numbers near zero
    ours, theirs = jax.device_get(state.params), jax.device_get(theirs.params)
    # a key's bias has no gradient but rounding, which is scaled up to a usual step
    if name == "adafactor":
      for params in (ours, theirs):
        del params["blocks"]["attention"]["qkv"]["bias"]
    close(ours, theirs, 1e-5)


@pytest.mark.parametrize("mode", [pytest.param("optimizer", marks=pytest.mark.slow), "all"])
def test_offloaded_step_matches_and_skips_nonfinite(mode):
  """A step that is not finite changes nothing."""
  found = {}
  for where in ("none", mode):
    _, run = build("gpt2", where)
    after, numbers = run.train_step(begin(run, "gpt2"), batch(run, 0))
    found[where] = float(numbers["grad_norm"]), jax.device_get(after.params)
  np.testing.assert_allclose(found[mode][0], found["none"][0], rtol=1e-5)
  # 1e-6, which allows three times as much, was too little for a bias on one kind of processor
  # (3.4e-6, 2026-11-29).
  close(found[mode][1], found["none"][1], 2e-6)
  state = begin(run, "gpt2")
  params = jax.tree.map(np.array, state.params)
  params["blocks"]["mlp"]["up"]["kernel"][1, 2, 3] = np.inf
  state = dataclasses.replace(
    state, params=jax.device_put(params, jax.tree.map(lambda x: x.sharding, run.state.params))
  )
  before = jax.device_get(state)
  after, numbers = run.train_step(state, batch(run, 0))
  assert numbers["bad"] and int(after.step) == 1
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(after.params), before.params)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(after.opt_state), before.opt_state)


@pytest.mark.slow
def test_tables_are_updated_in_row_chunks(monkeypatch):
  monkeypatch.setattr(offload, "TABLE_CHUNK_BYTES", 4 * 40 * 100)
  cut = offload.LeafChunks.of((jax.tree_util.DictKey("embed"),), np.zeros((384, 40), np.float32), 1)
  assert cut == (False, 4, 1)
  losses, state, _ = train("gpt2", "all", steps=4)
  wanted, theirs, _ = train("gpt2", "none", steps=4)
  np.testing.assert_allclose(losses, wanted, rtol=1e-6)
  close(jax.device_get(state.params), jax.device_get(theirs.params), 1e-6)


@pytest.fixture(scope="module")
def plain(folder, stories, tmp_path_factory):
  """A run with everything on the device."""
  config = tiny.config(folder, stories)
  config.model.dropout, config.train.save_every, config.train.micro_batch_size = 0.1, 5, 4
  return config, finetune(config, tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize("mode", ["optimizer", "all"])
def test_offloaded_run_resumes_and_exports(plain, tmp_path, mode):
  """It is evaluated and saved too."""
  config, wanted = plain[0].copy_and_resolve_references(), plain[1]
  config.memory.offload = mode
  run = finetune(config, tmp_path / "run")
  for a, b in zip(run.metrics, wanted.metrics, strict=True):
    for name in ("train/loss", "eval/loss"):
      np.testing.assert_allclose(
        a.get(name, 0), b.get(name, 0), rtol=1e-5, err_msg=f"{name} of step {a['step']}"
      )
  assert [it["text"] for it in run.samples] == [it["text"] for it in wanted.samples]
  weights = (run.export / "model.safetensors").read_bytes()
  # On from the middle, from a checkpoint of its own, and from that of the run on the device.
  shutil.rmtree(run.workdir / "checkpoints" / "12")
  again = finetune(config, run.workdir)
  assert processes.losses(again.workdir) == {
    (line["step"], key): line[key]
    for line in run.metrics
    for key in ("train/loss", "eval/loss", "train/tokens")
    if key in line
  }
  assert (again.export / "model.safetensors").read_bytes() == weights
  # Its checkpoint, in the way it was trained, says what the exported folder says on the device.
  opened, exported = load_workdir(again.workdir), load(again.export)
  assert {
    leaf.sharding.memory_kind for leaf in jax.tree.leaves(opened.params) if leaf.ndim > 1
  } == {"pinned_host" if mode == "all" else "device"}
  text = list(config.data.validation or config.data.train)
  ours, theirs = (it.evaluate(*text, sequence_length=13)["loss"] for it in (opened, exported))
  np.testing.assert_allclose(ours, theirs, rtol=1e-6)
  prompts = ["The cat", "A dog was"]
  texts = [
    [it.text for it in of.generate(prompts, max_new_tokens=5, temperature=0)]
    for of in (opened, exported)
  ]
  assert texts[0] == texts[1]
  shutil.copytree(wanted.workdir, tmp_path / "other")
  shutil.rmtree(tmp_path / "other" / "checkpoints" / "12")
  config.export.out = ""
  other = finetune(config, tmp_path / "other")
  np.testing.assert_allclose(
    other.metrics[-1]["eval/loss"], wanted.metrics[-1]["eval/loss"], rtol=1e-5
  )


def test_gradient_accumulation_is_in_float32():
  """The copy on the device is in bfloat16, and so is the gradient of one accumulation step."""
  _, run = build("gpt2", "optimizer", accumulation=4, model__compute_dtype="bfloat16")
  _, gradient, _ = jax.eval_shape(run.grad_fn, run.state, run.batch)
  assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
