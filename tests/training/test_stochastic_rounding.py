"""bfloat16 weights: rounded without bias, the same on every path, as good as float32 in a run."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import test_offload

from jaxft.pretrained import load, load_workdir
from jaxft.train import finetune
from jaxft.training import stochastic_rounding

BFLOAT16 = jnp.dtype("bfloat16")


def test_stochastic_rounding_is_unbiased():
  """A number becomes one of its neighbours, and on average itself."""
  values = np.float32([1.001, -3.1415927, 1e-30, 12345.678, -0.1, 3e-39])
  rows = stochastic_rounding.stochastic_round(
    jnp.asarray(np.tile(values, (20000, 1))), BFLOAT16, jax.random.key(0)
  )
  rounded = np.asarray(rows.astype(jnp.float32), np.float64)
  for value, column in zip(values, rounded.T, strict=True):
    step = max(abs(float(value)) * 2**-7, 1e-40)
    assert len(np.unique(column)) == 2 and np.all(np.abs(column - value) <= step)
    assert abs(column.mean() - value) < 5 * step / np.sqrt(20000)


def test_exact_bfloat16_values_stay():
  values = jnp.asarray([0.0, -0.0, 1.0, -1.5, 3.3895314e38, 1e-40], BFLOAT16).astype(jnp.float32)
  for seed in range(20):
    rounded = stochastic_rounding.stochastic_round(values, BFLOAT16, jax.random.key(seed))
    np.testing.assert_array_equal(rounded.astype(jnp.float32), values)
  assert (
    stochastic_rounding.stochastic_round(values, jnp.dtype("float32"), jax.random.key(0)) is values
  )


def test_nonfinite_values_stay_nonfinite():
  bits = np.array(
    [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000, 0x7F800000, 0xFF800000], np.uint32
  )
  for seed in range(20):
    rounded = stochastic_rounding.stochastic_round(
      jnp.asarray(bits.view(np.float32)), BFLOAT16, jax.random.key(seed)
    )
    assert not np.isfinite(np.asarray(rounded.astype(jnp.float32))).any()


def test_small_updates_add_up_in_bfloat16():
  """Rounding to the nearest would leave the weights as they are."""

  def turn(i, x):
    return stochastic_rounding.stochastic_round(
      x.astype(jnp.float32) - jnp.float32(2**-12), BFLOAT16, jax.random.key(i)
    )

  end = jax.lax.fori_loop(0, 1000, turn, jnp.ones(4096, BFLOAT16))
  np.testing.assert_allclose(end.astype(jnp.float32).mean(), 1 - 1000 / 4096, atol=2e-3)
  assert jnp.bfloat16(1) - jnp.bfloat16(2**-12) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
  "mode, mesh",
  [
    pytest.param("none", {"fsdp": 4}, marks=pytest.mark.wide),
    ("all", {}),
    pytest.param("optimizer", {}, marks=pytest.mark.wide),
  ],
)
def test_every_offload_mode_rounds_alike(mode, mesh):
  """A weight that is rounded to the other side is 1/256 of itself away: few of them may be."""
  how = dict(steps=4, model__param_dtype="bfloat16", optim__weight_decay=0.0)
  losses, state, _ = test_offload.train("gpt2", mode, **how, **mesh)
  wanted, theirs, _ = test_offload.train("gpt2", "none", **how)
  np.testing.assert_allclose(losses, wanted, rtol=1e-3)
  ours, theirs = (jax.device_get(it.params) for it in (state, theirs))
  for path, leaf in jax.tree_util.tree_flatten_with_path(theirs)[0]:
    is_matrix = path[0].key == "blocks" and path[-1].key == "kernel"
    assert leaf.dtype == (BFLOAT16 if is_matrix else np.float32), path
  kernels = [tree["blocks"]["mlp"]["up"]["kernel"] for tree in (ours, theirs)]
  assert np.mean(kernels[0] != kernels[1]) < 0.05
  moved = test_offload.weights("gpt2")["blocks"]["mlp"]["up"]["kernel"].astype(BFLOAT16)
  assert np.mean(kernels[0] != moved) > 0.3


@pytest.mark.slow
def test_bfloat16_run_learns_resumes_and_exports(config, config_file, tmp_path):
  """It learns as in float32, and is resumed bit for bit."""
  config.train.sample_prompts = ()
  precise = finetune(config.copy_and_resolve_references(), tmp_path / "float32")
  config.model.param_dtype, config.export.out = "bfloat16", ""
  run = finetune(config, tmp_path / "bfloat16")
  ends = [of.metrics[-1]["eval/loss"] for of in (precise, run)]
  begun = precise.metrics[0]["eval/loss"]
  assert begun - ends[0] > 0.1 and abs(ends[1] - ends[0]) < 0.1 * (begun - ends[0]), (begun, ends)
  # The exported folder has what was trained, every bit of it.
  text = list(config.data.train)
  exported, checkpointed = (
    it.evaluate(*text, sequence_length=32)["loss"]
    for it in (load(run.export), load_workdir(run.workdir))
  )
  np.testing.assert_allclose(exported, checkpointed, rtol=1e-6)
  kernel = load(run.export).params["blocks"]["mlp"]["up"]["kernel"]
  np.testing.assert_array_equal(kernel, kernel.astype(BFLOAT16).astype(np.float32))
  flags = ("--config.model.param_dtype=bfloat16",)
  processes.train(config_file, tmp_path / "again", *flags)
  weights = (tmp_path / "again" / "export" / "model.safetensors").read_bytes()
  shutil.rmtree(tmp_path / "again" / "checkpoints" / "12")
  done = processes.train(config_file, tmp_path / "again", *flags)
  assert "continuing at step 10" in done.stdout
  assert (tmp_path / "again" / "export" / "model.safetensors").read_bytes() == weights
