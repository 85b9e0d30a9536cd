"""flax_model.msgpack, as the last transformers with Flax classes writes it."""

import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxft.errors import RequestError
from jaxft.hf import load_weights, repo, verify
from jaxft.model.compute import ComputeConfig
from jaxft.model.decoder import abstract_model

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
# Flax classes are gone from transformers 5; these versions work together on Python 3.11 and 3.12.
PINS = ("transformers==4.53.3", "flax==0.10.4", "jax==0.4.38", "jaxlib==0.4.38", "numpy<2.3")
WRITE = """
import sys, numpy as np, jax
from pathlib import Path
from transformers import FlaxGPT2LMHeadModel, FlaxGPTJForCausalLM, FlaxGPTNeoForCausalLM
from transformers import GPT2Config, GPTJConfig, GPTNeoConfig
out = Path(sys.argv[1])
models = {
  "gpt2": FlaxGPT2LMHeadModel(GPT2Config(
      vocab_size=97, n_positions=31, n_embd=12, n_layer=2, n_head=3, n_inner=20)),
  "gpt_neo": FlaxGPTNeoForCausalLM(GPTNeoConfig(
      vocab_size=97, max_position_embeddings=31, hidden_size=12, num_layers=2, num_heads=3,
      intermediate_size=20, attention_types=[[["global", "local"], 1]], window_size=7)),
  "gptj": FlaxGPTJForCausalLM(GPTJConfig(
      vocab_size=97, n_positions=31, n_embd=12, n_layer=2, n_head=3, n_inner=20, rotary_dim=2)),
}
ids = np.random.default_rng(0).integers(97, size=(2, 31))
for name, flax_model in models.items():
  key = iter(jax.random.split(jax.random.key(0), 100))
  random = lambda a: 0.3 * jax.random.normal(next(key), a.shape)
  flax_model.params = jax.tree.map(random, flax_model.params)
  flax_model.save_pretrained(out / name)
  flax_model.save_pretrained(out / (name + "-sharded"), max_shard_size="6KB")
  np.save(out / f"{name}.npy", flax_model(ids).logits)
"""


@pytest.fixture(scope="module")
def flax_models():
  """The families in one file and sharded, with Flax's own logits; reused by later runs."""
  home = (
    Path(tempfile.gettempdir())
    / f"jaxft-test-flax-{sys.version_info.major}.{sys.version_info.minor}"
  )
  if not (home / "gptj.npy").exists():
    python = home / "venv" / "bin" / "python"
    for command in (
      [sys.executable, "-m", "venv", str(python.parent.parent)],
      [str(python), "-m", "pip", "install", "--quiet", *PINS],
      [str(python), "-c", WRITE, str(home)],
    ):
      done = subprocess.run(command, capture_output=True, text=True)
      if done.returncode:
        pytest.skip(
          f"transformers 4 does not install or run here: {done.stderr.strip().splitlines()[-1]}"
        )
  return home


@pytest.mark.wide
@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "gptj"])
def test_msgpack_logits_match_flax_model(flax_models, family):
  ids = np.random.default_rng(0).integers(97, size=(2, 31)).astype(np.int32)
  for folder in (flax_models / family, flax_models / f"{family}-sharded"):
    checkpoint = repo.resolve(str(folder))
    graph, shapes, _ = abstract_model(checkpoint.cfg, ComputeConfig())
    params = load_weights.load_params(checkpoint, shapes, jax.tree.map(lambda _: HERE, shapes))
    expected = np.load(flax_models / f"{family}.npy")
    np.testing.assert_allclose(
      verify.compute_logits(graph, params, ids), expected, atol=2e-5 * np.abs(expected).max()
    )
  assert len(list((flax_models / f"{family}-sharded").glob("*.msgpack"))) > 1


@pytest.fixture
def flax_folder(folder, tmp_path):
  """The tiny GPT-2 as Flax would store it, written by flax.serialization."""
  import shutil

  from flax import serialization, traverse_util
  from safetensors.numpy import load_file

  nested = {}
  for name, tensor in load_file(folder / "model.safetensors").items():
    path = name.split(".")
    kind = (
      "embedding"
      if path[-2] in ("wte", "wpe")
      else "scale"
      if path[-2].startswith("ln_")
      else "kernel"
    )
    if path[-1] == "weight":
      path[-1], tensor = kind, tensor.T if kind == "kernel" else tensor
    nested[tuple(path)] = np.ascontiguousarray(tensor)
  to = tmp_path / "flax"
  shutil.copytree(folder, to)
  (to / "model.safetensors").unlink()
  (to / "flax_model.msgpack").write_bytes(
    serialization.msgpack_serialize(traverse_util.unflatten_dict(nested))
  )
  return to


def load_params_of(folder):
  checkpoint = repo.resolve(str(folder))
  _, shapes, _ = abstract_model(checkpoint.cfg, ComputeConfig())
  return load_weights.load_params(checkpoint, shapes, jax.tree.map(lambda _: HERE, shapes))


def test_msgpack_weights_equal_safetensors(folder, flax_folder):
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get(load_params_of(flax_folder)),
    jax.device_get(load_params_of(folder)),
  )


@pytest.mark.slow
def test_damaged_msgpack_is_one_error_line(flax_folder):
  """Every other header byte changed, and every truncation: refused by name, or the same shapes."""
  file = flax_folder / "flax_model.msgpack"
  good, rng = file.read_bytes(), np.random.default_rng(0)
  refused = 0
  for at in [*range(0, 400, 2), *rng.integers(len(good), size=50)]:
    bad = bytearray(good)
    bad[at] ^= 1 << int(rng.integers(8))
    file.write_bytes(bad if at % 3 else good[:at])
    try:
      load_params_of(flax_folder)
    except RequestError as error:
      refused += 1
      assert str(flax_folder) in str(error) and len(str(error).splitlines()) == 1
  assert refused > 100


@pytest.mark.parametrize(
  "bomb",
  [
    b"\xdf\xff\xff\xff\xff" * 3,
    b"\x81\xa1a" * 4000,
    b"\x81\xa1a\xc9\xff\xff\xff\xff\x01",
    b"",
    b"\x81\xdb\xff\xff\xff\xff",
    b"\x81\xa1a\xc7\x10\x01\x93\x91\xce\xff\xff\xff\xff\xa7float32\xc4\x00",
    b"\x80\x80",
    b"\xc0",
  ],
)
def test_msgpack_bombs_are_refused(flax_folder, bomb):
  (flax_folder / "flax_model.msgpack").write_bytes(bomb)
  with pytest.raises(RequestError, match="flax_model.msgpack: not a valid Flax file"):
    load_weights.list_tensors(flax_folder)


def test_msgpack_symlinks_out_are_refused(folder, tmp_path):
  """Links that lead out of the folder are refused."""
  (tmp_path / "m").mkdir()
  for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
    (tmp_path / "m" / name).write_bytes((folder / name).read_bytes())
  (tmp_path / "m" / "model.safetensors").symlink_to(folder / "model.safetensors")
  with pytest.raises(RequestError, match="a link to a file outside this folder"):
    repo.resolve(str(tmp_path / "m"))
  cache = tmp_path / "hub" / "models--x"  # as huggingface_hub lays out its cache
  (cache / "blobs").mkdir(parents=True)
  (cache / "snapshots" / "abc").mkdir(parents=True)
  for name in ("config.json", "model.safetensors"):
    (cache / "blobs" / name).write_bytes((folder / name).read_bytes())
    (cache / "snapshots" / "abc" / name).symlink_to(Path("../../blobs") / name)
  found = repo.resolve(str(cache / "snapshots" / "abc"))
  assert load_weights.list_tensors(found.folder).keys() == load_weights.list_tensors(folder).keys()
