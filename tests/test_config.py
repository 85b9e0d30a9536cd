"""Settings: documented once, checked all at once, saved and read back."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import jaxft.config
from jaxft import config_checks
from jaxft.errors import RequestError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def complete():
  config = jaxft.config.default()
  config.model.path, config.data.train, config.train.steps = "gpt2", ("a.txt",), 10
  return config


def test_complete_config_is_valid():
  assert jaxft.config.validate(complete()) == []


@pytest.mark.parametrize("setting", jaxft.config.SETTINGS, ids=lambda setting: setting.name)
def test_settings_have_docs_and_defaults_of_their_types(setting):
  assert len(setting.doc) > 3 and setting.doc in jaxft.config.describe(complete())
  section, key = setting.name.split(".")
  annotation = get_type_hints(jaxft.config.SECTIONS[section])[key]
  assert (setting.default is None) == (type(None) in get_args(annotation))
  if setting.default is not None:
    assert config_checks.type_error(setting.kind, setting.default) is None
    assert setting.check(setting.default) is None


@pytest.mark.parametrize(
  "name, kind, literals, wanted",
  [
    ("model.dropout", float, (), "at least 0 and below 1"),
    ("data.train", tuple, (), None),
    ("train.eval_every", int, ("epoch",), "at least 0"),
    ("memory.remat", str, (), "one of none, dots, full"),
  ],
)
def test_annotations_say_types_choices_and_literals(name, kind, literals, wanted):
  setting = jaxft.config.BY_NAME[name]
  assert (setting.kind, setting.literals) == (kind, literals)
  assert setting.check("all" if kind is str else -1) == wanted


def test_config_of_a_run_is_frozen():
  config = jaxft.config.resolve(complete())
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.train = config.train
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.train.steps = 3
  assert hash(config) == hash(jaxft.config.resolve(complete()))
  changed = config.replace({"train.steps": 3, "memory.remat": "full"})
  assert (changed.train.steps, changed.memory.remat, config.train.steps) == (3, "full", 10)


def test_resolve_normalizes_what_a_user_wrote(tmp_path):
  config = complete()
  config.data.train, config.train.batch_size, config.lora.alpha = tmp_path, 8.0, 4
  resolved = jaxft.config.resolve(config)
  assert resolved.data.train == (str(tmp_path),)
  assert type(resolved.train.batch_size) is int and type(resolved.lora.alpha) is float
  assert jaxft.config.resolve(resolved) == resolved
  assert config.data.train == tmp_path


@pytest.mark.parametrize(
  "name, near",
  [
    ("optim.learnig_rate", "optim.learning_rate"),
    ("learning_rate", "optim.learning_rate"),
    ("train.learning_rate", "optim.learning_rate"),
    ("optm.b1", "optim.b1"),
    ("data.seqlen", None),
    ("train.batchsize", "train.batch_size"),
  ],
)
def test_unknown_setting_suggests_nearest_name(name, near):
  line = jaxft.config.unknown_settings([name])[0]
  assert f"config.{name}" in line and (near is None or f"did you mean {near}?" in line)


@pytest.mark.parametrize(
  "name, value, message",
  [
    ("train.batch_size", -1, "at least 1"),
    ("optim.learning_rate", float("nan"), "finite"),
    ("optim.learning_rate", 0.0, "above 0"),
    ("optim.schedule", "lineer", "one of constant, linear, cosine"),
    ("mesh.fsdp", 0, "-1"),
    ("data.train", (), "empty"),
    ("optim.b2", 1.0, "below 1"),
    ("tracking.writers", ("jsonl", "wandbb"), "for 'wandbb', did you mean wandb?"),
    ("tracking.writers", ("mlflow", "mlflow"), "mlflow occurs twice"),
    ("model.path", "", "empty"),
    ("data.train", (1,), "a tuple of strings"),
    ("train.epochs", 1.0, "one of the two"),
    ("mesh.data", -1, "only one"),
    ("optim.warmup_ratio", 1.0, "below 1"),
    ("train.eval_every", "epochs", "a whole number or epoch"),
    ("data.template", "Answer:", "name of a column in braces"),
    ("model.config_overrides", "n_embd=8", "model.init=scratch"),
    ("optim.end_learning_rate", 1.0, "above"),
  ],
)
def test_invalid_values_are_named(name, value, message):
  config = complete()
  section, key = name.split(".")
  config[section][key] = value
  lines = jaxft.config.validate(config)
  assert len(lines) == 1 and f"config.{name}" in lines[0] and message in lines[0]
  with pytest.raises(RequestError) as refusal:
    jaxft.config.resolve(config)
  assert str(refusal.value) == lines[0]


def test_all_errors_are_reported_at_once():
  config = complete()
  config.train.batch_size, config.optim.b1, config.memory.remat = 0, 2.0, "all"
  assert len(jaxft.config.validate(config)) == 3
  with pytest.raises(RequestError) as refusal:
    jaxft.config.resolve(config)
  assert str(refusal.value).splitlines() == jaxft.config.validate(config)


def test_config_json_round_trip():
  config = complete()
  config.model.dropout, config.train.sample_prompts = 0.25, ("a", "b\n")
  for written in (config, complete()):
    text, resolved = jaxft.config.to_json(written), jaxft.config.resolve(written)
    assert jaxft.config.from_json(text) == resolved
    assert jaxft.config.to_json(resolved) == text
    assert resolved.to_dict() == written.to_dict()
  with pytest.raises(RequestError, match="optim.lr"):
    jaxft.config.from_json('{"optim": {"lr": 1}}')


@pytest.mark.parametrize("text", ["[1]", "[]", "null", "5", '[["train", {}]]', "{"])
def test_config_json_must_be_an_object(text):
  with pytest.raises(RequestError, match="config.json of the run: not a config"):
    jaxft.config.from_json(text)


def test_resume_fixes_only_what_changes_learning():
  before, now = complete(), complete()
  now.train.save_every, now.mesh.fsdp, now.optim.learning_rate = 7, 2, 1e-3
  assert [line.split("=")[0] for line in jaxft.config.diff_from_saved(before.to_dict(), now)] == [
    "config.optim.learning_rate"
  ]
  assert jaxft.config.MUTABLE_ON_RESUME <= jaxft.config.BY_NAME.keys()
  # A run from before there were adapters goes on.
  older = before.to_dict()
  del older["lora"], older["train"]["trainable_params"]
  assert jaxft.config.diff_from_saved(older, complete()) == []


@pytest.mark.parametrize(("old", "new"), jaxft.config.RENAMED.items())
def test_renamed_settings_of_earlier_runs_are_read(old, new):
  """Typed by a user the old name is refused, with the new one."""
  config = complete()
  section, key = new.split(".")
  config[section][key] = ("transformer.h.2.*",)
  saved = config.to_dict()
  saved[section][old.split(".")[1]] = saved[section].pop(key)
  assert jaxft.config.diff_from_saved(saved, config) == []
  assert len(jaxft.config.diff_from_saved(saved, complete())) == 1
  assert jaxft.config.from_json(json.dumps(saved)) == jaxft.config.resolve(config)
  assert jaxft.config.flatten(jaxft.config.rename_saved(saved)) == jaxft.config.flatten(config)
  assert jaxft.config.unknown_settings([old]) == [f"config.{old}: unknown setting; use {new}"]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_shipped_configs_are_complete_and_explained(file):
  spec = importlib.util.spec_from_file_location(file.stem, file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  assert jaxft.config.validate(module.get_config()) == []
  assert f"jaxft train --config configs/{file.name}" in module.__doc__


@pytest.mark.parametrize("setting", jaxft.config.SETTINGS, ids=lambda setting: setting.name)
def test_any_value_of_a_setting_is_valid_or_named(setting):
  """A plain dict stands for a config file that went round ConfigDict's own checks."""
  for value in (
    None,
    -1,
    0,
    1.5,
    10**400,
    float("nan"),
    float("inf"),
    "x",
    "",
    [],
    (),
    {},
    (1,),
    [None],
    True,
    b"x",
    object(),
  ):
    config = jaxft.config.default().to_dict()
    config["model"]["path"] = "gpt2"
    config["data"]["train"] = ("a.txt",)
    config["train"]["steps"] = 10
    section, key = setting.name.split(".")
    config[section][key] = value
    for line in jaxft.config.validate(config):
      assert setting.name in line or key in line, (value, line)
