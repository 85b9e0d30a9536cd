"""Paths of workdir, export and data: any that the file system has works, or fails at once."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxft
import jaxft.hf.tokenizer
from jaxft.checkpoint.manager import CheckpointManager
from jaxft.data import dataset, sources
from jaxft.errors import RequestError
from jaxft.hf import added_tokens, export, repo
from jaxft.pretrained import load_workdir
from jaxft.train import finetune, validate_run

NAMES = [
  "lr[1e-4]", "plain", "a b", " c", "d ", "e#f", "g?h", "i%20j", "k%l", "[1]", "{x}", "a:b", "é",
  "e\u0301", "日本", "🐈", "a+b", "a&b", "a=b", "a'b", 'a"b', "a,b", "a;b", "a@b", "a@2", "a|b",
  "~x", "$HOME", "a\\b", "new\nline", "tab\tx", "*", "**", "-x", "--workdir", "..a", ".hidden",
  "a!b", "a^b`c", "x" * 200,
]  # fmt: skip
REFUSED = ("[", "**", "\\")
STATE = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.int32(7)}
LIKE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE)


@pytest.fixture(scope="module")
def ready(folder):
  return jaxft.load(folder)


@pytest.mark.parts(5, 5)
def test_awkward_folder_names(ready, folder, tmp_path, part):
  for i, name in enumerate(NAMES[part::5]):
    root = tmp_path / str(i) / name
    root.mkdir(parents=True)
    config = tiny.config(folder, tiny.write_stories(root / "stories.jsonl", 20, seed=0))
    config.data.cache_dir = str(root / "cache")
    tokenizer = jaxft.hf.tokenizer.load_tokenizer(folder, 293)
    source = str(root) if name == "*" else config.data.train[0]
    config.data.train = (source,)
    if "*" in name or "?" in name or "[" in name:
      config.data.train = (str(root),)  # a file of this name would be a pattern
    data = dataset.prepare_data(config.data, tokenizer, "")
    assert data.report["rows"]["read"] == 20
    ready.export(root / "out")
    assert (root / "out" / "parity.json").is_file()
    jaxft.hf.tokenizer.verify_tokenizer(root / "out", tokenizer, folder)
    before = sorted(path.name for path in root.iterdir())
    if any(part in name for part in REFUSED):
      with pytest.raises(
        RequestError, match="--workdir: .* Orbax .* reads the .* as part of a pattern"
      ):
        validate_run(jaxft.config.resolve(config), root / "run")
      assert sorted(path.name for path in root.iterdir()) == before
      continue
    validate_run(jaxft.config.resolve(config), root / "run")
    checkpoints = CheckpointManager(root / "run" / "checkpoints", 1, writes=True)
    checkpoints.save(1, STATE, {"x": 1})
    checkpoints.close()
    again = CheckpointManager(root / "run" / "checkpoints", 1)
    jax.tree.map(np.testing.assert_array_equal, again.restore(1, LIKE), STATE)
    again.close()


def test_finished_run_needs_no_base_model(finished, folder, stories, tmp_path, monkeypatch):
  """The workdir has the model's config and tokenizer; relative paths start at the run's folder."""
  workdir = shutil.copytree(finished[0], tmp_path / "w")
  about = json.loads((workdir / "config.json").read_text())
  about["model"]["path"] = "no/such/model"
  (workdir / "config.json").write_text(json.dumps(about))
  monkeypatch.chdir("/")
  there, here = load_workdir(workdir), load_workdir(finished[0])
  assert there.generate(["the"], max_new_tokens=3, temperature=0) == here.generate(
    ["the"], max_new_tokens=3, temperature=0
  )
  there.export(tmp_path / "out")
  here.export(tmp_path / "as_stored", dtype="source")
  folders = (finished[0] / "export", tmp_path / "out", tmp_path / "as_stored")
  assert len({(at / "model.safetensors").read_bytes() for at in folders}) == 1
  (tmp_path / "[1]").mkdir()
  with pytest.raises(RequestError, match="Orbax .* reads the .* as part of a pattern"):
    load_workdir(shutil.copytree(finished[0], tmp_path / "[1]" / "w"))
  with pytest.raises(RequestError, match="no/such/model"):  # whose dtypes nobody knows now
    there.export(tmp_path / "not", dtype="source")


def test_foreign_files_in_workdir_stay_untouched(folder, stories, tmp_path):
  """The run has its model's config in the workdir; a user's model, or anything else, stays."""
  config = tiny.config(folder, stories)
  (tmp_path / "model").mkdir()
  (tmp_path / "model" / "my_code.py").write_text("import this")
  validate_run(jaxft.config.resolve(config), tmp_path)
  source, tokenizer = repo.resolve(str(folder)), jaxft.hf.tokenizer.load_tokenizer(folder, 293)
  export.save_run_model(tmp_path, source, tokenizer)
  assert (tmp_path / "model" / "my_code.py").is_file() and export.find_run_model(
    tmp_path
  ) == tmp_path / "run.model"
  export.save_run_model(tmp_path, source, tokenizer)  # its own is replaced
  (tmp_path / "run.model" / "model.safetensors").write_text("mine")
  with pytest.raises(RequestError, match="the folder holds 'model.safetensors'"):
    validate_run(jaxft.config.resolve(config), tmp_path)
  with pytest.raises(RequestError, match="the folder holds 'model.safetensors'"):
    export.save_run_model(tmp_path, source, tokenizer)
  assert (tmp_path / "run.model" / "model.safetensors").read_text() == "mine"
  mine = shutil.copytree(folder, tmp_path / "mine")
  config.model.path = str(mine)
  with pytest.raises(RequestError, match="--workdir: .* is config.model.path"):
    validate_run(jaxft.config.resolve(config), tmp_path / "mine" / ".." / "mine")


def test_killed_overwrite_leaves_old_config(folder, tmp_path, monkeypatch):
  """Killed between two renames."""
  source, tokenizer = repo.resolve(str(folder)), jaxft.hf.tokenizer.load_tokenizer(folder, 293)
  export.save_run_model(tmp_path, source, tokenizer)
  rename = Path.rename

  def killed(path, to):
    if path.name.endswith("jaxft-partial"):
      raise KeyboardInterrupt
    return rename(path, to)

  with monkeypatch.context() as dying, pytest.raises(KeyboardInterrupt):
    dying.setattr(Path, "rename", killed)
    export.save_run_model(tmp_path, source, tokenizer)
  assert export.find_run_model(tmp_path) and jaxft.hf.tokenizer.load_tokenizer(
    export.find_run_model(tmp_path), 293
  )
  export.save_run_model(tmp_path, source, tokenizer)
  assert [path.name for path in tmp_path.iterdir()] == ["run.model"]


def test_export_through_a_symlink(ready, tmp_path):
  disk = tmp_path / "disk" / "out"
  disk.mkdir(parents=True)
  (tmp_path / "export").symlink_to(disk)
  for _ in range(2):
    ready.export(tmp_path / "export")
    assert (tmp_path / "export").is_symlink() and (disk / "parity.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "export"]


def test_unwritable_export_fails_before_training(folder, stories, tmp_path):
  """For each path where no export can be written."""
  config = tiny.config(folder, stories)
  (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
  (tmp_path / "file").touch()
  for out, message in (
    (tmp_path / ("x" * 245), "File name too long"),
    (tmp_path / "file" / "out", "is not a folder"),
    (tmp_path / "gone", "a broken link"),
    *(
      (tmp_path / "run" / name, "the run itself is written there")
      for name in sources.RUN_FOLDERS
      if name != "export"
    ),
    (tmp_path / "run" / "checkpoints" / "x", "the run itself is written there"),
  ):
    config.export.out = str(out)
    with pytest.raises(RequestError, match=f"config.export.out.*{message}"):
      validate_run(jaxft.config.resolve(config), tmp_path / "run")
  config.export.out, strange = "", tmp_path / os.fsdecode(b"caf\xe9")
  with pytest.raises(RequestError, match="--workdir: .*: its name is not UTF-8"):
    validate_run(jaxft.config.resolve(config), strange)
  assert "its name is not UTF-8" in export.validate_export(strange)[0]


def test_evaluate_held_out_data_or_fail(finished, stories, tmp_path):
  """A text that has grown would be split anew, and text that was trained on would be measured."""
  workdir = shutil.copytree(finished[0], tmp_path / "w")
  about = json.loads((workdir / "config.json").read_text())
  mine = shutil.copyfile(stories, tmp_path / "stories.jsonl")
  about["data"]["train"] = [str(mine)]
  (workdir / "config.json").write_text(json.dumps(about))
  ready = load_workdir(workdir)
  metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  last = [line["eval/loss"] for line in metrics if "eval/loss" in line][-1]
  assert ready.evaluate_held_out()["loss"] == pytest.approx(last, rel=1e-4)
  mine.write_text(mine.read_text() + '{"text": "zzz plugh"}\n' * 60)
  refused = "text that the run trained on; name a text with --data"
  with pytest.raises(RequestError, match=refused):
    load_workdir(workdir).evaluate_held_out()
  ready = load_workdir(workdir)
  del ready._record["held_out"]  # a run of before 2026-11-28
  for length in (0, 24, 32):
    with pytest.raises(RequestError, match=refused):
      ready.evaluate_held_out(sequence_length=length)


def test_relative_paths_work_from_another_folder(folder, stories, tmp_path, monkeypatch):
  """Its model and texts are those of the folder it was started in, not others of the same names."""
  here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
  shutil.copytree(folder, here / "mine" / "model")
  tiny.write_gpt2(elsewhere / "mine" / "model", seed=5)
  for root, seed in ((here, 1), (elsewhere, 2)):
    tiny.write_stories(root / "stories.jsonl", 40, seed=0)
    tiny.write_stories(root / "held_out.jsonl", 9, seed=seed)
  config = tiny.config(Path("mine/model"), Path("stories.jsonl"))
  config.data.validation, config.data.cache_dir = ("held_out.jsonl",), "tokens"
  config.train.steps, config.train.sample_prompts, config.lora.rank = 2, (), 2
  monkeypatch.chdir(here)
  run = finetune(config, "run")
  last = [line["eval/loss"] for line in run.metrics if "eval/loss" in line][-1]
  card = (here / "run" / "export" / "README.md").read_text()
  assert (
    "base_model" not in card
    and "base_model" not in (here / "run" / "adapter" / "README.md").read_text()
  )
  assert json.loads((here / "run" / "about.json").read_text())["exported_step"] == 2

  monkeypatch.chdir(elsewhere)
  workdir = here / "run"
  of_run, adapted = load_workdir(workdir), jaxft.load(workdir / "adapter")
  assert of_run.evaluate_held_out()["loss"] == pytest.approx(last, rel=1e-5)
  assert adapted.evaluate(here / "held_out.jsonl", sequence_length=32) == of_run.evaluate(
    here / "held_out.jsonl", sequence_length=32
  )
  exported = (workdir / "export" / "model.safetensors").read_bytes()
  for i, (ready, dtype) in enumerate([(of_run, None), (of_run, "source"), (adapted, None)]):
    ready.export(elsewhere / f"out{i}", dtype=dtype)
    assert (elsewhere / f"out{i}" / "model.safetensors").read_bytes() == exported
  assert "base_model" not in (elsewhere / "out0" / "README.md").read_text()

  # All of it moved: what was beside the workdir is still beside it.
  shutil.copytree(here, tmp_path / "moved", ignore=shutil.ignore_patterns("tokens"))
  here.rename(tmp_path / "away")
  assert load_workdir(tmp_path / "moved" / "run").evaluate_held_out()["loss"] == pytest.approx(
    last, rel=1e-5
  )
  (tmp_path / "away").rename(here)

  # A tokenizer among the adapters is the one that they were trained with.
  for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copyfile(workdir / "export" / name, workdir / "adapter" / name)
  named = (workdir / "adapter" / "tokenizer_config.json").read_text().replace("<|endoftext|>", "e")
  (workdir / "adapter" / "tokenizer_config.json").write_text(named)
  assert jaxft.load(workdir / "adapter").tokenizer.eos_token == "e"
  # Beside the base's config.json, and with a base that is named from the folder, they are adapters
  # still.
  shutil.copyfile(here / "mine" / "model" / "config.json", workdir / "adapter" / "config.json")
  about = json.loads((workdir / "adapter" / "adapter_config.json").read_text())
  about["base_model_name_or_path"] = "../../mine/model"
  (workdir / "adapter" / "adapter_config.json").write_text(json.dumps(about))
  monkeypatch.chdir("/")
  assert repo.resolve(str(workdir / "adapter")).folder.samefile(here / "mine" / "model")
  added_tokens.add_tokens(repo.resolve(str(workdir / "adapter")), ["<|new|>"], elsewhere / "added")
  assert jaxft.load(elsewhere / "added").tokenizer.eos_token == "e"

  # What has changed since is refused, not measured and not trained on.
  monkeypatch.chdir(here)
  config.model.path = "run/adapter"
  with pytest.raises(
    RequestError, match="a folder of adapters, and new adapters .* merge them first"
  ):
    finetune(config, "another")
  config.model.path = "mine/model"
  shutil.copyfile(elsewhere / "held_out.jsonl", here / "held_out.jsonl")
  with pytest.raises(RequestError, match="the held-out text has changed since the run was started"):
    finetune(config, "run")
  with pytest.raises(RequestError, match="name a text with --data"):
    load_workdir(workdir).evaluate_held_out()


def test_text_folder_skips_runs_and_models(finished, folder, tmp_path):
  """Runs and models in a folder of text are not read as text."""
  (tmp_path / "sub").mkdir()
  tiny.write_stories(tmp_path / "a.jsonl", 7, seed=0)
  tiny.write_stories(tmp_path / "sub" / "b.jsonl", 5, seed=1)
  shutil.copytree(finished[0], tmp_path / "runs" / "mine")
  shutil.copytree(finished[0] / "export", tmp_path / "sub" / "export")
  shutil.copytree(folder, tmp_path / "model")
  (tmp_path / "model" / "merges.txt").write_text("#version: 0.2\n")
  (tmp_path / "half" / "checkpoints").mkdir(parents=True)
  for name in ("run.lock", "metrics.jsonl"):  # of a run that has just begun
    (tmp_path / "half" / name).touch()
  for name in (
    "lora/adapter_config.json",
    "lora/merges.txt",
    "tf/config.json",
    "tf/tf_model.h5",
    "tf/merges.txt",
  ):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
  (tmp_path / "bpe").mkdir()
  for name in ("tokenizer.json", "merges.txt"):
    (tmp_path / "bpe" / name).write_text("{}")
  data = tiny.config(folder, tmp_path).data
  data.cache_dir = str(tmp_path / "cache")
  tokenizer = jaxft.hf.tokenizer.load_tokenizer(folder, 293)
  first = dataset.prepare_data(data, tokenizer, "")
  assert first.report["rows"]["read"] == 12
  assert (
    first.report["notes"]["folders of runs, skipped"] == 2
    and first.report["notes"]["folders of models, skipped"] == 4
  )
  assert {path.name for path in sources.find_files(f"{tmp_path}/**/*.jsonl", "train")} == {
    "a.jsonl",
    "b.jsonl",
  }
  with pytest.raises(RequestError, match="no such file"):  # nothing but the run's own
    sources.find_files(f"{tmp_path}/runs/mine/m*.jsonl", "train")
  # whoever names it wants it
  assert sources.find_files(f"{tmp_path}/runs/mine/metrics.jsonl", "train")
  for name in ("metrics.jsonl", "samples.jsonl", "run.lock"):  # the folder is now a workdir itself
    shutil.copyfile(finished[0] / name, tmp_path / name)
  assert (
    dataset.prepare_data(data, tokenizer, "").validation_fingerprint == first.validation_fingerprint
  )
