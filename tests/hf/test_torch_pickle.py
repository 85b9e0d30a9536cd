"""pytorch_model*.bin: a pickle, read on request, by torch in the mode that runs nothing."""

import json
import os
import pickle
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxft import tokenizer
from jaxft.errors import RequestError
from jaxft.hf import load_weights, repo
from jaxft.model.compute import ComputeConfig
from jaxft.model.decoder import abstract_model

torch = pytest.importorskip("torch", reason="torch is what reads these files")
HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def load_folder(folder, torch_bin=True):
  checkpoint = repo.resolve(str(folder), torch_bin=torch_bin)
  _, shapes, _ = abstract_model(checkpoint.cfg, ComputeConfig())
  return load_weights.load_params(checkpoint, shapes, jax.tree.map(lambda _: HERE, shapes))


@pytest.fixture
def pickled(folder, tmp_path):
  """A function that writes the folder's weights with torch, changed."""

  def write(change=lambda tensors: tensors, **how):
    to = tmp_path / f"in{len(list(tmp_path.iterdir()))}"
    shutil.copytree(folder, to)
    (to / "model.safetensors").unlink()
    tensors = {
      name: torch.from_numpy(t) for name, t in load_file(folder / "model.safetensors").items()
    }
    torch.save(change(tensors), to / "pytorch_model.bin", **how)
    return to

  return write


def assert_trees_equal(ours, theirs):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(ours), jax.device_get(theirs))


def test_torch_bin_is_read_only_on_request(folder, pickled):
  with pytest.raises(RequestError, match="config.model.torch_bin=True"):
    repo.resolve(str(pickled()))
  # One storage, two names.
  with_head = pickled(lambda ts: ts | {"lm_head.weight": ts["transformer.wte.weight"]})
  assert_trees_equal(load_folder(with_head), load_folder(folder, torch_bin=False))


def test_torch_bin_narrow_transposed_and_sharded(folder, pickled):
  narrow = lambda ts: {name: t.bfloat16() for name, t in ts.items()}
  exact = jax.tree.map(
    lambda p: p.astype("bfloat16").astype("float32"), load_folder(folder, torch_bin=False)
  )
  assert_trees_equal(load_folder(pickled(narrow)), exact)
  crooked = lambda ts: {
    name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in ts.items()
  }
  assert_trees_equal(load_folder(pickled(crooked)), load_folder(folder, torch_bin=False))

  sharded = pickled()
  tensors = torch.load(sharded / "pytorch_model.bin", weights_only=True)
  (sharded / "pytorch_model.bin").unlink()
  weight_map = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(tensors)}
  for file in set(weight_map.values()):
    torch.save(
      {name: tensors[name] for name in weight_map if weight_map[name] == file}, sharded / file
    )
  (sharded / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
  assert_trees_equal(load_folder(sharded), load_folder(folder, torch_bin=False))


class Payload:
  def __init__(self, marker):
    self.marker = str(marker)

  def __reduce__(self):
    return os.mkdir, (self.marker,)


def test_torch_bin_runs_no_pickled_code(pickled, tmp_path):
  ran = tmp_path / "ran"
  with pytest.raises(
    RequestError, match="pytorch_model.bin: torch cannot read these weights with weights_only"
  ):
    load_folder(pickled(lambda ts: ts | {"x": Payload(ran)}))
  plain = pickled()
  (plain / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(ran)))
  with pytest.raises(RequestError, match="torch cannot read these weights"):
    load_folder(plain)
  assert not ran.exists()


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda ts: list(ts.values()), "it holds a list"),
    (lambda ts: ts | {"x": 1}, "its entry 'x' is not a plain tensor"),
    (lambda ts: ts | {"x": torch.zeros(2, device="meta")}, "its entry 'x' is not a plain tensor"),
    (
      lambda ts: ts | {"x": torch.zeros(2, dtype=torch.complex64).conj().imag},
      "its entry 'x' is not a plain tensor",
    ),
    (
      lambda ts: ts | {"x": torch.zeros(2, dtype=torch.float64)},
      "its tensor 'x' has dtype torch.float64",
    ),
    (
      lambda ts: ts | {"x": torch.zeros(1).expand(2**40)},
      "its tensor 'x' is larger than its stored data",
    ),
    (lambda ts: ts | {"x": torch.zeros(2)}, "has no tensor 'x'"),
    (lambda ts: ts | {"x": torch.eye(2).to_sparse()}, "its entry 'x' is not a plain tensor"),
  ],
)
def test_torch_bin_malformed_state_dict_is_named(pickled, change, message):
  with pytest.raises(RequestError, match=message):
    load_folder(pickled(change))


@pytest.mark.slow
def test_tokens_are_added_to_torch_bin_models(folder, pickled, tmp_path, monkeypatch):
  words = [
    "jaxft.tokenizer",
    "--model",
    str(pickled()),
    "--add",
    "<|new|>",
    "--out",
    str(tmp_path / "out"),
  ]
  monkeypatch.setattr("sys.argv", words)
  with pytest.raises(RequestError, match="--torch_bin"):
    tokenizer.main()
  monkeypatch.setattr("sys.argv", [*words, "--torch_bin"])
  tokenizer.main()
  assert repo.resolve(str(tmp_path / "out")).cfg.V == repo.resolve(str(folder)).cfg.V + 1


def test_torch_bin_before_torch_1_6_is_read(pickled, folder):
  """Most GPT-2s of 2019 and 2020: no zip, which cannot be mapped."""
  old = pickled(_use_new_zipfile_serialization=False)
  ours, expected = load_folder(old), load_folder(folder, torch_bin=False)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), ours, expected
  )
