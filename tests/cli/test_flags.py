"""Command-line words and config values as people write them: clear, or rejected in one line."""

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

import jaxft.config
from jaxft.cli import flags, parsers, usage
from jaxft.errors import RequestError
from jaxft.train import finetune

CONFIG = (
  "from jaxft.config import default\ndef get_config(*given):\n  c = default()\n{lines}  return c\n"
)
# Values of each type as they may stand on a command line, and what they mean.
TEXTS = [
  "my file.txt", "Once upon a time, there was", "a,b", "(1)", "[x]", "'quoted'", 'say "x"', "None",
  "True", "12", "1e3", "-x", "--x", "a=b", "$HOME", "日本 é", "#", "{prompt}", "a\\b", "*.txt",
  "hub:x/y:train@2", "C:\\data", "lambda: 0", "()", "", " ", "~", "0x10",
]  # fmt: skip
NUMBERS = [("7", 7), ("0", 0), ("1000000", 1_000_000)]
REALS = [("1e-4", 1e-4), ("1", 1.0), (".5", 0.5), ("3E-5", 3e-5)]
SEVERAL = ("data.train", "data.validation", "train.sample_prompts")
ONE = ("tracking.run_name", "data.text_column", "model.revision", "export.push_to_hub")


def config_file(folder, *lines, name="c.py"):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / name).write_text(CONFIG.format(lines="".join(f"  {line}\n" for line in lines)))
  return str(folder / name)


def parsed(monkeypatch, *words):
  monkeypatch.setattr(sys, "argv", ["jaxft.train", *words])
  return flags.parse(usage.TRAIN, ("dry_run",), ("workdir",)).config


def value_of(config, name):
  return jaxft.config.flatten(config)[name]


@pytest.mark.parametrize("part", range(4))
def test_parse_awkward_values(monkeypatch, tmp_path, part):
  monkeypatch.setenv("HOME", "/home/me")
  file, rng = config_file(tmp_path), random.Random(part)
  for _ in range(25):
    kind = rng.choice(["one", "several", "number", "real"])
    if kind in ("one", "several"):
      name, said = rng.choice(ONE if kind == "one" else SEVERAL), rng.choice(TEXTS)
      home = "/home/me" if name.startswith("data.t") and kind == "several" and said == "~" else None
      home = "/home/me" if name == "data.validation" and said == "~" else home
      wanted = said if kind == "one" else () if said in ("", "()") else (home or said,)
    else:
      name = rng.choice(
        ["train.seed", "train.steps"] if kind == "number" else ["optim.learning_rate", "optim.b1"]
      )
      said, wanted = rng.choice(NUMBERS if kind == "number" else REALS)
    spellings = [
      [f"--config.{name}={said}"],
      [f"-config.{name}={said}"],
      [f"--config.{name}", said],
      [f"-config.{name}", said],
    ]
    before = [["--config", file], [f"--config={file}"]]
    for words in spellings:
      found = value_of(parsed(monkeypatch, *rng.choice(before), *words, "--dry_run"), name)
      assert found == wanted and type(found) is type(wanted), (words, found)


def test_list_settings_repeat_the_flag(monkeypatch, tmp_path):
  """A setting of several texts takes the flag several times."""
  words = [
    "--config.data.train",
    "a b.txt",
    "--config.data.train=c.txt",
    "--config.data.train=('d',)",
  ]
  assert parsed(monkeypatch, "--config", config_file(tmp_path), *words).data.train[:2] == (
    "a b.txt",
    "c.txt",
  )


def test_escapes_are_replaced_and_printed(monkeypatch, tmp_path, capsys):
  file = config_file(tmp_path)
  config = parsed(
    monkeypatch,
    "--config",
    file,
    r"--config.data.separator=\n\n",
    r"--config.data.template={prompt}\n{completion}",
  )
  assert (config.data.separator, config.data.template) == ("\n\n", "{prompt}\n{completion}")
  assert r"config.data.separator=\n\n: read as '\n\n'" in capsys.readouterr().err
  assert (
    parsed(monkeypatch, "--config", file, r"--config.tracking.run_name=a\n").tracking.run_name
    == r"a\n"
  )
  assert flags.unescape("\n|\\d", "x") == "\n|\\d" and capsys.readouterr().err == ""


@pytest.mark.parametrize(
  "folder", ["2026-01-01T10:30", "a b", "é日本", "[x]", "c.d", "-e", "$HOME", "a=b"]
)
def test_config_file_in_any_folder(monkeypatch, tmp_path, folder):
  lines = (
    "c.train.seed = 5",
    "from pathlib import Path",
    "c.model.path = Path(__file__).parent / 'model'",
  )
  config = parsed(
    monkeypatch, "--config", config_file(tmp_path / folder, *lines), "--config.train.steps=3"
  )
  assert (config.train.seed, config.train.steps) == (5, 3) and config.model.path == str(
    tmp_path / folder / "model"
  )


def test_config_file_gets_text_after_colon(monkeypatch, tmp_path):
  """`--config FILE:TEXT` calls get_config(TEXT)."""
  file = config_file(tmp_path, "c.train.seed = int(given[0]) if given else 1")
  assert parsed(monkeypatch, "--config", file).train.seed == 1
  assert parsed(monkeypatch, "--config", f"{file}:7").train.seed == 7
  monkeypatch.setenv("HOME", str(tmp_path))
  assert parsed(monkeypatch, "--config", f"~/{Path(file).name}:7").train.seed == 7
  file = config_file(tmp_path, "c.train.seed = len(given[0])")
  assert parsed(monkeypatch, "--config", f"{file}:7:8").train.seed == 3


@pytest.mark.parametrize(
  "text", ["{[]}", "{[1]: 2}", "1, 2, 3", "1,2", "-" * 4000 + "1", "(1,)", "()x", "'a', 2"]
)
def test_prompt_may_be_odd_python(monkeypatch, tmp_path, text):
  file = config_file(tmp_path)
  assert parsed(
    monkeypatch, "--config", file, f"--config.train.sample_prompts={text}"
  ).train.sample_prompts == (text,)


def test_arrays_and_frozen_configs_are_unwrapped(monkeypatch, tmp_path):
  lines = "import numpy", "c.data.train = numpy.array(['a', 'b'])", "c.train.steps = numpy.array(3)"
  config = parsed(monkeypatch, "--config", config_file(tmp_path / "a", *lines))
  assert config.data.train == ("a", "b") and config.train.steps == 3
  lines = "import ml_collections", "c.train.seed = 7", "c = ml_collections.FrozenConfigDict(c)"
  config = parsed(
    monkeypatch, "--config", config_file(tmp_path / "b", *lines), "--config.train.steps=3"
  )
  assert (config.train.seed, config.train.steps) == (7, 3)


def test_config_file_values_are_normalized(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", "/home/me")
  lines = (
    "import numpy, pathlib",
    "c.data.train = 'a.txt'",
    "c.data.validation = [pathlib.Path('~/b.txt'), 'c.txt']",
    "c.optim.learning_rate, c.optim.weight_decay = numpy.float32(0.5), 0",
    "c.train.steps, c.train.seed = 1e3, numpy.int64(4)",
    "c.export.out = pathlib.Path('~/out')",
    "c.train.sample_prompts, c.model.path = 'Once', 'gpt2'",
    "c.tracking.system_metrics = numpy.bool_(True)",
  )
  config = parsed(monkeypatch, "--config", config_file(tmp_path, *lines))
  assert config.data.train == ("a.txt",) and config.data.validation == ("/home/me/b.txt", "c.txt")
  assert (config.optim.learning_rate, config.optim.weight_decay) == (0.5, 0.0)
  assert (config.train.steps, config.train.seed, config.tracking.system_metrics) == (1000, 4, True)
  assert config.export.out == "/home/me/out" and config.train.sample_prompts == ("Once",)
  assert type(config.train.steps) is int
  assert all(
    type(value).__module__ == "builtins" for value in jaxft.config.flatten(config).values()
  )
  assert jaxft.config.from_json(jaxft.config.to_json(config)).to_dict() == config.to_dict()


@pytest.mark.parametrize(
  "line, message",
  [
    ("c.optim.learning_rate = 'fast'", "config.optim.learning_rate='fast': must be a number"),
    ("c.train.steps = 1.5", "config.train.steps=1.5: must be a whole number"),
    ("c.data.train = 3", "config.data.train=.3,.: must be a string, or a tuple of strings"),
    (
      "c.tracking.system_metrics = 'yes'",
      "config.tracking.system_metrics='yes': must be True or False",
    ),
    (
      "c.train.stepz = 3",
      "--config: .*/c.py: config.train.stepz: unknown setting; did you mean train.steps.?$",
    ),
    ("raise SystemExit(3)", "--config: .*/c.py failed: SystemExit: 3"),
    (
      "c.train.only = ('h.0',)",
      "config.train.only: unknown setting; use train.tra",
    ),
    ("c.data.only = 1", "--config: .*/c.py: config.data.only: unknown setting; "),
    ("raise ValueError('no \"only\" here')", "--config: .*/c.py failed: ValueError"),
    ("import no_such_module", "failed: ModuleNotFoundError"),
    ("c = 3", "must return a ConfigDict"),
    (
      "c.data.encoding = 'utf-99'",
      "config.data.encoding='utf-99': must be the name of an encoding",
    ),
    ("c.data.encoding = 'base64'", "must be the name of an encoding"),
  ],
)
def test_invalid_flags_are_rejected(monkeypatch, tmp_path, line, message):
  """With a hint at the nearest flag or setting."""
  with pytest.raises(RequestError, match=message):
    config = parsed(monkeypatch, "--config", config_file(tmp_path, line))
    if lines := jaxft.config.validate(config):
      raise RequestError("\n".join(lines))


@pytest.mark.parametrize(
  "line, message",
  [
    ("c.train.stesp = 3", "config.train.stesp: unknown setting; did you mean train.steps?"),
    ("c.train.stesp += 3", "config.train.stesp: unknown setting; did you mean train.steps?"),
    ("c['train']['stesp'] = 3", "config.train.stesp: unknown setting; did you mean train.steps?"),
    ("c.train.update(stesp=3)", "config.train.stesp: unknown setting; did you mean train.steps?"),
    ("c.trian.steps = 3", "config.trian: unknown section; did you mean config.train?"),
    ("c.steps = 3", "config.steps: unknown setting; did you mean train.steps?"),
    ("c.optim.lr = 3", "config.optim.lr: unknown setting; use optim.learning_rate"),
    ("c.train_file = 3", "config.train_file: unknown setting; use data.train"),
    ("c.data.zzzz = 3", "config.data.zzzz: unknown setting; --print_config lists all settings"),
  ],
)
def test_misspelt_setting_in_a_config_file(monkeypatch, tmp_path, line, message):
  file = config_file(tmp_path, line)
  with pytest.raises(RequestError) as refusal:
    parsed(monkeypatch, "--config", file)
  assert str(refusal.value) == f"--config: {file}: {message}"


@pytest.mark.parametrize("line", ["{}['stesp']", "object().stesp", "ConfigDict().lock().stesp"])
def test_other_missing_keys_in_a_config_file(monkeypatch, tmp_path, line):
  """They are no settings."""
  file = config_file(tmp_path, "from ml_collections import ConfigDict", line)
  with pytest.raises(RequestError, match="c.py failed: (KeyError|AttributeError): .*stesp"):
    parsed(monkeypatch, "--config", file)


def test_config_file_that_resolves_reports_all_lines(monkeypatch, tmp_path):
  lines = ("import jaxft.config", "c.train.steps, c.optim.b1 = -3, 2.0", "jaxft.config.resolve(c)")
  file = config_file(tmp_path, *lines)
  with pytest.raises(RequestError) as refusal:
    parsed(monkeypatch, "--config", file)
  assert str(refusal.value).splitlines() == [
    f"--config: {file}: config.optim.b1=2.0: must be at least 0 and below 1",
    f"--config: {file}: config.train.steps=-3: must be at least 0",
  ]


@pytest.mark.parametrize(
  "name, there",
  [
    ("optim.lr", "optim.learning_rate"),
    ("max_steps", "train.steps"),
    ("data.block_size", "data.sequence_length"),
  ],
)
def test_foreign_names_suggest_settings(name, there):
  assert jaxft.config.unknown_settings([name]) == [f"config.{name}: unknown setting; use {there}"]
  assert set(jaxft.config.FOREIGN_NAMES.values()) <= set(jaxft.config.BY_NAME)
  assert not any(
    name in {known.split(".")[1] for known in jaxft.config.BY_NAME}
    for name in jaxft.config.FOREIGN_NAMES
  )


def test_tilde_is_expanded(monkeypatch, tmp_path):
  """Unless a file has this very name."""
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.chdir(tmp_path)
  assert parsers.export().parse_args(["--model", "gpt2", "--out=~/x"]).out == str(
    tmp_path / "home" / "x"
  )
  monkeypatch.setattr(
    sys, "argv", ["x", "--config", config_file(tmp_path), "--workdir=~/run", "--print_config"]
  )
  assert flags.parse_train().workdir == tmp_path / "home" / "run"
  (tmp_path / "~").mkdir()
  assert parsers.evaluate().parse_args(["--model", "~", "--data", "~/a"]).model == "~"
  assert os.listdir("~") == [] and Path("~").is_dir()


def test_finetune_does_not_change_the_config(folder, stories, tmp_path):
  """And a prompt that is too long is reported with its name, before anything is compiled."""
  config = tiny.config(folder, stories)
  config.data.train, config.optim.learning_rate = Path(stories), np.float32(1e-3)
  config.train.sample_prompts = "the cat " * 99
  with pytest.raises(
    RequestError,
    match="config.train.sample_prompts: 'the cat the cat .* tokens and the model 71 positions",
  ):
    finetune(config, tmp_path / "run")
  assert config.data.train == Path(stories) and not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
  "file, words, wanted",
  [
    (("c.train.steps = 8",), ["train.epochs=3"], {"train.steps": 0, "train.epochs": 3.0}),
    (("c.train.epochs = 3.0",), ["train.steps=8"], {"train.steps": 8, "train.epochs": 0.0}),
    (("c.train.epochs = 3.0",), ["train.steps=0"], {"train.steps": 0, "train.epochs": 3.0}),
    (
      ("c.optim.warmup_steps = 8",),
      ["optim.warmup_ratio=0.1"],
      {"optim.warmup_steps": 0, "optim.warmup_ratio": 0.1},
    ),
    (
      ("c.optim.warmup_ratio = 0.1",),
      ["optim.warmup_steps=8"],
      {"optim.warmup_steps": 8, "optim.warmup_ratio": 0.0},
    ),
    (("c.train.eval_every = 8",), ["train.eval_every=epoch"], {"train.eval_every": "epoch"}),
    (("c.train.eval_every = 'epoch'",), ["train.eval_every=8"], {"train.eval_every": 8}),
    (("c.train.eval_every = 'epoch'",), ["train.seed=8"], {"train.eval_every": "epoch"}),
    (
      ("c.data.validation = 'v.txt'",),
      ["data.train=t.txt"],
      {"data.train": ("t.txt",), "data.validation": ()},
    ),
    (
      ("c.data.validation = 'v.txt'",),
      ["data.train=t", "data.validation=w"],
      {"data.validation": ("w",)},
    ),
    (("c.data.validation = 'v.txt'",), ["train.seed=8"], {"data.validation": ("v.txt",)}),
  ],
)
def test_flag_overrides_counterpart_in_file(monkeypatch, tmp_path, capsys, file, words, wanted):
  config = parsed(
    monkeypatch, "--config", config_file(tmp_path, *file), *(f"--config.{word}" for word in words)
  )
  assert {name: value_of(config, name) for name in wanted} == wanted
  dropped = wanted.get("data.validation") == ()
  assert (
    "config.data.validation is ignored, because the command line sets config.data.train"
    in capsys.readouterr().err
  ) == dropped


def test_train_flag_replaces_validation_of_file(monkeypatch, tmp_path, capsys):
  """A share of the given text is held out instead."""
  file = config_file(tmp_path, "c.data.validation, c.data.validation_fraction = ('v.txt',), 0.0")
  config = parsed(monkeypatch, "--config", file, "--config.data.train=t.txt")
  assert (config.data.validation, config.data.validation_fraction) == ((), 0.05)
  note = "a share of 0.05 of the new text is held out instead (to keep it: "
  note += "--config.data.validation=v.txt)"
  assert note in capsys.readouterr().err
  config = parsed(
    monkeypatch,
    "--config",
    file,
    "--config.data.train=t.txt",
    "--config.data.validation_fraction=0",
  )
  assert config.data.validation_fraction == 0


@pytest.mark.parametrize("line", ["c.data = Odd({'validation': 3})", "c = Odd(); c.data = 3"])
def test_odd_file_values_give_no_traceback(monkeypatch, tmp_path, line):
  file = config_file(tmp_path, "from ml_collections import ConfigDict as Odd", line)
  try:
    assert parsed(monkeypatch, "--config", file, "--config.data.train=t.txt").data.validation == ()
  except RequestError as refusal:
    assert "\n" not in str(refusal)


@pytest.mark.parametrize("value", ["np.int64(8)", "None", "[8]", "len", "True", "8.5"])
def test_flag_overrides_any_file_value(monkeypatch, tmp_path, value):
  file = config_file(
    tmp_path, "import numpy as np", "with c.ignore_type():", f"  c.train.steps = {value}"
  )
  assert parsed(monkeypatch, "--config", file, "--config.train.steps=4").train.steps == 4


@pytest.mark.parametrize(
  "words, message",
  [
    (["--block_size=8"], "--block_size: unknown flag; did you mean --config.data.sequence_length?"),
    (["--max_length=8"], "--max_length: unknown flag; did you mean --config.data.sequence_length?"),
    (["--train_file", "x"], "--train_file: unknown flag; did you mean --config.data.train?"),
    (["--jsno"], "--jsno: unknown flag; did you mean --json?"),
    (["--json=maybe"], "--json=maybe: maybe is not true or false"),
    (["--remat=full"], "--remat: unknown flag; did you mean --config.memory.remat?"),
  ],
)
def test_flags_of_other_commands_suggest_settings(monkeypatch, tmp_path, words, message):
  monkeypatch.setattr(sys, "argv", ["prepare", "--config", config_file(tmp_path), *words])
  with pytest.raises(RequestError) as refusal:
    flags.parse("usage", ("json",))
  assert message in str(refusal.value)


def test_json_config_is_rejected(monkeypatch, tmp_path):
  (tmp_path / "c.json").write_text('{"train": null}')
  with pytest.raises(RequestError, match="must be a Python file with get_config"):
    parsed(monkeypatch, "--config", str(tmp_path / "c.json"), "--config.train.steps=4")


def test_exclusive_flags_are_rejected(monkeypatch, tmp_path):
  file = config_file(tmp_path, "c.model.path, c.data.train = 'm', 't'")
  config = parsed(
    monkeypatch, "--config", file, "--config.train.steps=8", "--config.train.epochs=3"
  )
  assert jaxft.config.validate(config) == [
    "config.train.steps=8 and config.train.epochs=3.0: set exactly one of the two"
  ]


def test_file_without_get_config_and_empty_workdir_are_named(monkeypatch, tmp_path):
  file = tmp_path / "mine.py"
  file.write_text("x = 1")
  with pytest.raises(RequestError, match=r"mine.py: has no get_config\(\); define one"):
    flags.load_config(str(file))
  monkeypatch.setattr(sys, "argv", ["train", "--config", "quickstart", "--workdir", ""])
  with pytest.raises(RequestError, match="--workdir is empty; name a folder"):
    flags.parse_train()


def test_entropy_column_of_a_config_is_not_looked_for_in_other_text(monkeypatch):
  argv = ["train", "--config", "quickstart", "--config.data.train=mine.txt"]
  monkeypatch.setattr(sys, "argv", argv)
  assert flags.parse_train().config.data.nats_column == ""
  monkeypatch.setattr(sys, "argv", [*argv, "--config.data.nats_column=entropy"])
  assert flags.parse_train().config.data.nats_column == "entropy"
