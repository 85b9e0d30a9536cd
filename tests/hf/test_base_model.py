"""What `config.model` names: another tokenizer, and the sizes of a model with new weights."""

import json
import shutil

import pytest
import tiny

import jaxft
import jaxft.config
from jaxft.errors import RequestError
from jaxft.hf import base_model, repo
from jaxft.train import finetune


def model(folder, **more):
  config = jaxft.config.default().model
  config.update(path=str(folder), **more)
  return config


def test_config_overrides_have_config_json_types(folder):
  found = base_model.resolve(
    model(folder, init="scratch", config_overrides="n_embd=20, n_layer=2,embd_pdrop=0.5")
  )
  assert (found.cfg.D, found.cfg.L) == (20, 2) and found.hf_config["embd_pdrop"] == 0.5
  assert found.cfg.P == base_model.resolve(model(folder)).cfg.P  # the rest is the folder's
  same = base_model.resolve(
    model(folder, init="scratch", config_overrides="tie_word_embeddings=True,model_type=gpt2")
  )
  assert same.cfg == base_model.resolve(model(folder, init="scratch")).cfg


@pytest.mark.parametrize(
  "overrides, message",
  [
    ("n_emb=16", "has no key 'n_emb'; did you mean n_embd"),
    ("n_embd=many", "n_embd=many: must be a number, like the default 40"),
    ("n_embd=1.5", "n_embd=1.5: must be a number"),
    ("n_embd=True", "n_embd=True: must be a number"),
    ("tie_word_embeddings=1", "must be True or False"),
    ("n_embd=41", "config_overrides='n_embd=41'"),
    ("model_type=gptj", "model_type=gptj: .* describes a gpt2"),
  ],
)
def test_impossible_config_overrides_are_refused(folder, overrides, message):
  with pytest.raises(RequestError, match=message):
    base_model.resolve(model(folder, init="scratch", config_overrides=overrides))


@pytest.mark.slow
def test_separate_tokenizer_is_used_and_exported(config, folder, tmp_path):
  (tmp_path / "words").mkdir()
  tiny.write_tokenizer(tmp_path / "words", 280)  # with other tokens than the model's own
  config.model.tokenizer, config.train.steps = str(tmp_path / "words"), 1
  config.model.init, config.model.config_overrides = "scratch", "n_layer=1"
  run = finetune(config, tmp_path / "run")
  shutil.rmtree(tmp_path / "words")
  for found in (jaxft.pretrained.load_workdir(run.workdir), jaxft.load(run.export)):
    assert len(found.tokenizer) == 280 and found.source.cfg.L == 1
  assert json.loads((run.export / "config.json").read_text())["n_layer"] == 1


@pytest.mark.parametrize(
  "name, message",
  [
    ("gone", "found no tokenizer.json or vocab.json"),
    ("nobody/here", "the download from the hub failed"),
  ],
)
def test_missing_tokenizer_is_refused(folder, tmp_path, name, message):
  (tmp_path / "gone").mkdir()
  with pytest.raises(RequestError, match=f"config.model.tokenizer=.*{message}"):
    base_model.resolve(model(folder, tokenizer=str(tmp_path / name) if name == "gone" else name))


def test_folder_of_a_run_is_refused_with_its_export(folder, tmp_path):
  (tmp_path / "config.json").write_text(jaxft.config.to_json(jaxft.config.default()))
  command = f"python -m jaxft.export --workdir {tmp_path} --out {tmp_path}/export"
  with pytest.raises(RequestError, match=f"the folder of a run, not of a model; .*{command}"):
    jaxft.load(tmp_path)
  shutil.copytree(folder, tmp_path / "export")
  with pytest.raises(RequestError, match=f"give its export, '{tmp_path}/export'"):
    jaxft.load(tmp_path)
  assert "give its export" in repo.validate_model(str(tmp_path))[0]
  (tmp_path / "config.json").unlink()
  (tmp_path / "run.model").mkdir()
  assert "give its export" in repo.validate_model(str(tmp_path))[0]
