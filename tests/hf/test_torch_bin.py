"""pytorch_model*.bin: a pickle, read by torch alone, in the mode that runs nothing, and only when it is asked for."""

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


def read(folder, torch_bin=True):
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


def same(ours, theirs):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(ours), jax.device_get(theirs))


def test_it_is_read_only_when_asked(folder, pickled):
  with pytest.raises(RequestError, match="config.model.torch_bin=True"):
    repo.resolve(str(pickled()))
  with_head = pickled(
    lambda ts: ts | {"lm_head.weight": ts["transformer.wte.weight"]}
  )  # one storage, two names
  same(read(with_head), read(folder, torch_bin=False))


def test_narrow_transposed_and_sharded_tensors(folder, pickled):
  narrow = lambda ts: {name: t.bfloat16() for name, t in ts.items()}
  exact = jax.tree.map(
    lambda p: p.astype("bfloat16").astype("float32"), read(folder, torch_bin=False)
  )
  same(read(pickled(narrow)), exact)
  crooked = lambda ts: {
    name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in ts.items()
  }
  same(read(pickled(crooked)), read(folder, torch_bin=False))

  sharded = pickled()
  tensors = torch.load(sharded / "pytorch_model.bin", weights_only=True)
  (sharded / "pytorch_model.bin").unlink()
  where = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(tensors)}
  for file in set(where.values()):
    torch.save({name: tensors[name] for name in where if where[name] == file}, sharded / file)
  (sharded / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
  same(read(sharded), read(folder, torch_bin=False))


class Payload:
  def __init__(self, marker):
    self.marker = str(marker)

  def __reduce__(self):
    return os.mkdir, (self.marker,)


def test_no_pickle_runs_anything(pickled, tmp_path):
  ran = tmp_path / "ran"
  with pytest.raises(
    RequestError, match="pytorch_model.bin: not weights that torch reads with weights_only"
  ):
    read(pickled(lambda ts: ts | {"x": Payload(ran)}))
  plain = pickled()
  (plain / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(ran)))
  with pytest.raises(RequestError, match="not weights that torch reads"):
    read(plain)
  assert not ran.exists()


@pytest.mark.parametrize(
  "change, told",
  [
    (lambda ts: list(ts.values()), "it holds a list"),
    (lambda ts: ts | {"x": 1}, "its entry 'x' is no plain tensor"),
    (lambda ts: ts | {"x": torch.zeros(2, device="meta")}, "its entry 'x' is no plain tensor"),
    (
      lambda ts: ts | {"x": torch.zeros(2, dtype=torch.complex64).conj().imag},
      "its entry 'x' is no plain tensor",
    ),
    (
      lambda ts: ts | {"x": torch.zeros(2, dtype=torch.float64)},
      "its tensor 'x' has dtype torch.float64",
    ),
    (
      lambda ts: ts | {"x": torch.zeros(1).expand(2**40)},
      "its tensor 'x' is larger than what is stored",
    ),
    (lambda ts: ts | {"x": torch.zeros(2)}, "tensor 'x' does not belong"),
    (lambda ts: ts | {"x": torch.eye(2).to_sparse()}, "its entry 'x' is no plain tensor"),
  ],
)
def test_what_is_no_state_dict_is_named(pickled, change, told):
  with pytest.raises(RequestError, match=told):
    read(pickled(change))


@pytest.mark.slow
def test_tokens_are_added_to_it_too(folder, pickled, tmp_path, monkeypatch):
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


def test_files_of_before_torch_1_6_are_read(pickled, folder):
  """Most GPT-2s of 2019 and 2020: no zip, which cannot be mapped."""
  old = pickled(_use_new_zipfile_serialization=False)
  ours, wanted = read(old), read(folder, torch_bin=False)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), ours, wanted
  )
