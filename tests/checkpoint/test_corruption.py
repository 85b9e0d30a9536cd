"""Damage to any file of a run is detected: what is loaded is what was written, or nothing is."""

import collections
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

import jaxft.hf.tokenizer
from jaxft import pretrained
from jaxft.checkpoint.manager import CheckpointManager
from jaxft.data import dataset
from jaxft.errors import RequestError, StorageError
from jaxft.hf import repo
from jaxft.sharding.mesh import make_mesh
from jaxft.train import finetune
from jaxft.training.build import build_train_program
from jaxft.training.resume import restore_latest

PER_PART = 10


@pytest.fixture(scope="module")
def run(folder, stories, tmp_path_factory):
  """A finished run with three checkpoints, and a cache of its own: (config, workdir)."""
  config, home = tiny.config(folder, stories), tmp_path_factory.mktemp("damaged")
  config.train.save_every, config.train.keep = 4, 3
  config.data.cache_dir = str(home / "cache")
  finetune(config, home / "run")
  return config, home / "run"


def files_in(folder: Path) -> list[Path]:
  return sorted(file for file in folder.rglob("*") if file.is_file())


def damage(rng: np.random.Generator, folder: Path, file: Path) -> str:
  """Damages a file as disks, kills and people do; returns how, or "" if its bytes are as before."""
  before, kind = file.read_bytes(), rng.choice(["flip", "zeros", "cut", "delete", "swap"])
  if kind == "delete":
    file.unlink()
    return kind
  if kind == "swap":
    other = Path(rng.choice([it for it in files_in(folder) if it != file] or [file]))
    theirs = other.read_bytes()
    other.write_bytes(before)
    file.write_bytes(theirs)
    return kind if theirs != before else ""
  after, at = bytearray(before), int(rng.integers(max(len(before), 1)))
  if kind == "flip" and before:
    after[at] ^= 1 << int(rng.integers(8))
  elif kind == "zeros":
    after[at : at + 4096] = bytes(len(after[at : at + 4096]))
  elif kind == "cut":
    del after[at:]
  file.write_bytes(after)
  return kind if bytes(after) != before else ""


class Tried(collections.Counter):
  """Counts what became of damage: refused or replaced, or harmless."""

  def row(self, what):
    harmless = {"without effect on the data read": self["harmless"]} if self["harmless"] else {}
    return {"what": f"damage to {what}", "tried": self.total(), "sums": harmless}


@pytest.fixture(scope="module")
def like(run, folder):
  config, _ = run
  cfg = repo.resolve(str(folder)).cfg
  row = {
    "ids": np.zeros(32, np.int32),
    "targets": np.zeros(32, np.int32),
    "mask": np.zeros(32, bool),
  }
  return build_train_program(config, cfg, make_mesh(config.mesh), 12, row).state.checkpointable


@pytest.fixture(scope="module")
def states(run, like):
  opened = CheckpointManager(run[1] / "checkpoints", 3)
  assert opened.steps() == [4, 8, 12]
  return {step: jax.device_get(opened.restore(step, like)) for step in opened.steps()}


@pytest.mark.parts(8, 250)
def test_damaged_checkpoint_is_never_restored(
  run, like, states, tmp_path, part, record_property, capsys
):
  rng, tried = np.random.default_rng(part), Tried()
  newest = run[1] / "checkpoints" / "12"
  names = [file.relative_to(newest) for file in files_in(newest)]
  for i in range(PER_PART):
    shutil.copytree(run[1] / "checkpoints", tmp_path / "c")
    name = names[(part * PER_PART + i) % len(names)]
    if not (kind := damage(rng, tmp_path / "c" / "12", tmp_path / "c" / "12" / name)):
      tried["harmless"] += 1
      shutil.rmtree(tmp_path / "c")
      continue
    opened = CheckpointManager(tmp_path / "c", 3)
    state, _ = restore_latest(opened, like, 12, strict=False)
    step = int(state.step)
    assert step in (8, 12), (kind, name)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), states[step])
    if step == 8:  # the run will come to step 12 again, and must be able to save there
      assert opened.steps() == [4, 8]
      if i % 5 == 0:
        opened.save(
          12,
          jax.tree.map(lambda x, at: jax.device_put(x, at.sharding), states[12], like),
          {"config": {}},
        )
        opened.wait()
        assert 12 in opened.steps()
    opened.close()
    tried["harmless" if step == 12 else "found"] += 1
    shutil.rmtree(tmp_path / "c")
  capsys.readouterr()
  record_property("torture", tried.row("every file of a checkpoint"))


def test_all_checkpoints_damaged_is_storage_error(run, like, tmp_path):
  """The run says so and removes nothing."""
  rng = np.random.default_rng(0)
  shutil.copytree(run[1] / "checkpoints", tmp_path / "c")
  for step in ("4", "8", "12"):
    (tmp_path / "c" / step / "meta" / "metadata").write_bytes(rng.bytes(100))
  with pytest.raises(
    StorageError, match="(?s)12: damaged.*4: damaged.*no sound checkpoint is left"
  ):
    restore_latest(CheckpointManager(tmp_path / "c", 3), like, 12, strict=False)
  assert all((tmp_path / "c" / step).exists() for step in ("4", "8", "12"))


@pytest.mark.parts(6, 150)
def test_damaged_token_cache_is_rebuilt(run, tmp_path, part, record_property):
  rng, tried, config = np.random.default_rng(part), Tried(), run[0].copy_and_resolve_references()
  tokenizer = jaxft.hf.tokenizer.load_tokenizer(Path(config.model.path), 293)
  prepare = lambda: dataset.prepare_data(
    config.data, tokenizer, jaxft.hf.tokenizer.fingerprint(tokenizer)
  )
  wanted = prepare().train
  names = [
    file.relative_to(run[0].data.cache_dir) for file in files_in(Path(run[0].data.cache_dir))
  ]
  for i in range(PER_PART):
    config.data.cache_dir = str(tmp_path / f"cache{i}")
    shutil.copytree(run[0].data.cache_dir, config.data.cache_dir)
    damaged = damage(
      rng, Path(config.data.cache_dir), Path(config.data.cache_dir) / names[i % len(names)]
    )
    found = prepare().train
    assert len(found) == len(wanted)
    for a, b in zip(
      map(found.__getitem__, range(len(found))),
      map(wanted.__getitem__, range(len(found))),
      strict=True,
    ):
      jax.tree.map(np.testing.assert_array_equal, a, b)
    tried["found" if damaged else "harmless"] += 1
    shutil.rmtree(config.data.cache_dir)
  record_property("torture", tried.row("every file of the token cache"))


def opened(folder: Path):
  """All that a user of an export gets: weights, configuration, and the tokens of a text."""
  found = pretrained.load(str(folder))
  return (
    jax.device_get(found.params),
    found.source.cfg,
    found.tokenizer("Once upon a naïve 東京")["input_ids"],
  )


@pytest.mark.parts(4, 100)
def test_damaged_export_is_refused(run, tmp_path, part, record_property):
  rng, tried = np.random.default_rng(part), Tried()
  names = [file.name for file in files_in(run[1] / "export")]
  wanted = opened(run[1] / "export")
  for i in range(PER_PART):
    copy = tmp_path / "export"
    shutil.copytree(run[1] / "export", copy)
    damaged = damage(rng, copy, copy / names[(part * PER_PART + i) % len(names)])
    try:
      found = opened(copy)
      jax.tree.map(np.testing.assert_array_equal, found[0], wanted[0])
      assert found[1:] == wanted[1:]
      tried["harmless"] += 1  # the card, or the file of checksums itself
    except RequestError as error:
      assert damaged and str(copy) in str(error)
      tried["refused"] += 1
    shutil.rmtree(copy)
  record_property("torture", tried.row("every file of an exported folder"))
