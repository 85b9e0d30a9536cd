"""Wrong requests: one line that names the fault, exit 2, nothing left behind."""

import subprocess
import sys

import pytest
from processes import ROOT, run, train

import jaxft.train
from jaxft.errors import RequestError
from jaxft.train import finetune

FAULTS = {
  "typo": (
    ["--config.optim.learnig_rate=1"],
    "config.optim.learnig_rate: unknown setting; did you mean optim.learning_rate?",
  ),
  "no data": (
    ["--config.data.train=/nowhere/x.txt"],
    "data source '/nowhere/x.txt': no such file or folder",
  ),
  "no model": (["--config.model.path={tmp}"], "it has no config.json"),
  "no folder": (["--config.model.path=/nowhere/model"], "'/nowhere/model': no such folder"),
  "negative": (["--config.train.batch_size=-1"], "config.train.batch_size=-1: must be at least 1"),
  "wrong type": (
    ["--config.train.batch_size=many"],
    "--config.train.batch_size=many: 'many' is not a whole number",
  ),
  "no config": (["--config=nowhere.py"], "'nowhere.py': no such file"),
  "broken config": (["--config={tmp}/broken.py"], "broken.py failed: NameError"),
  "mistyped flag": (["--wokdir=x"], "--wokdir: unknown flag; did you mean --workdir?"),
  "stray word": (["x"], "'x': unexpected argument"),
  "one dash": (
    ["-config.optim.learnig_rate=1"],
    "config.optim.learnig_rate: unknown setting",
  ),
  "export over the run": (["--config.export.out={tmp}/w"], "the run itself is written there"),
  "export over a file": (["--config.export.out={tmp}/broken.py"], "is not an earlier export"),
  "a long name": (["--config.data.train=" + 5000 * "x"], "no such file or folder"),
  "a name with blanks": (
    ["--config.data.train=my (1) file.txt"],
    "'my (1) file.txt': no such file or folder",
  ),
  "vanishing eps": (["--config.optim.eps=1e-50"], "config.optim.eps=1e-50: must be at least 1e-30"),
  "shard size": (
    ["--config.export.max_shard_size=abc"],
    "config.export.max_shard_size='abc': must be a whole number",
  ),
  "no login": (["--config.export.push_to_hub=me/x"], "not logged in to the hub"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_train_errors_are_one_line(config_file, tmp_path, fault):
  arguments, message = FAULTS[fault]
  (tmp_path / "broken.py").write_text("def get_config():\n  return nothing\n")
  arguments = [argument.format(tmp=tmp_path) for argument in arguments]
  done = train(config_file, tmp_path / "w", *arguments, check=2)
  assert (
    done.stdout == ""
    and len(done.stderr.splitlines()) == 1
    and done.stderr.startswith("error: ")
    and message in done.stderr
  )
  assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
  "command", ["train", "prepare", "plan", "generate", "evaluate", "export", "tokenizer", "report"]
)
def test_help_does_not_import_jax(command):
  flags = [sys.executable, "-X", "importtime", "-m", f"jaxft.{command}", "--help"]
  done = subprocess.run(flags, capture_output=True, text=True)
  assert done.returncode == 0 and f"python -m jaxft.{command} " in done.stdout.splitlines()[0], (
    done.stderr
  )
  imported = {line.rsplit("|")[-1].strip() for line in done.stderr.splitlines()}
  assert "jaxft.cli.usage" in imported and not {"jax", "numpy", "ml_collections"} & imported


def test_parser_choices_match_the_code():
  """Parsers repeat them, as they import no jax."""
  from jaxft.cli import parsers
  from jaxft.hf.export_tensors import EXPORT_DTYPES
  from jaxft.utils import backend

  assert parsers.DTYPES == tuple(EXPORT_DTYPES) and parsers.DEVICES == backend.REQUIRE_CHOICES


def test_train_errors_need_no_slow_imports(config_file, tmp_path):
  """A wrong request waits for no package that takes seconds to import."""
  code = (
    "import os, runpy, sys; end, slow = os._exit, {'torch', 'transformers', 'datasets'}; "
    "os._exit = lambda code: print(sorted(slow & sys.modules.keys()), flush=True) or end(code); "
    "runpy.run_module('jaxft.train', run_name='__main__', alter_sys=True)"
  )
  flags = [
    f"--config={config_file}",
    f"--workdir={tmp_path / 'w'}",
    "--config.optim.learning_rate=-1",
  ]
  done = subprocess.run(
    [sys.executable, "-c", code, *flags], capture_output=True, text=True, cwd=ROOT
  )
  assert (done.returncode, done.stdout) == (2, "[]\n") and "learning_rate" in done.stderr


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["jaxft.evaluate", "--model", "{export}"], "--data is missing"),
    (
      ["jaxft.evaluate", "--data", "x"],
      "--model is missing; set it to a Hugging Face folder or hub id",
    ),
    (
      ["jaxft.export", "--modle", "{export}", "--out", "x"],
      "--modle: unknown flag; did you mean --model?",
    ),
    (
      ["jaxft.evaluate", "--model", "/nowhere/x", "--data", "{workdir}/metrics.jsonl"],
      "no such folder",
    ),
    (["jaxft.evaluate", "--model", "{export}", "--data", "nowhere.txt"], "no such file"),
    (
      [
        "jaxft.evaluate",
        "--model",
        "{export}",
        "--data",
        "{workdir}/metrics.jsonl",
        "--sequence_length",
        "9999",
      ],
      "--sequence_length=9999: must be from 2 to 71",
    ),
    (
      [
        "jaxft.evaluate",
        "--model",
        "/nowhere",
        "--data",
        "{workdir}/metrics.jsonl",
        "--stride",
        "-1",
      ],
      "--stride=-1: must be",
    ),
    (["jaxft.generate", "--model", "{export}"], "--prompt is missing"),
    (
      ["jaxft.generate", "--model", "{export}", "--prompt", "x", "--max_length", "1"],
      "and --max_length=1 includes",
    ),
    (
      ["jaxft.generate", "--model_type=gptj", "--model={export}", "--prompt=x"],
      "config.json has gpt2; set",
    ),
    (
      ["jaxft.generate", "--model", "{export}", "--prompt", "x", "--top_p", "7"],
      "--top_p=7.0: must be above 0 and at most 1",
    ),
    (
      ["jaxft.generate", "--model", "{export}", "--prompt_file", "nowhere"],
      "--prompt_file='nowhere': no such file or directory",
    ),
    (
      ["jaxft.export", "--workdir", "{workdir}", "--out", "x", "--step", "7"],
      "no checkpoint of step 7; its steps: [10, 12]",
    ),
    (["jaxft.export", "--workdir", "/nowhere", "--out", "x"], "not the folder of a run"),
    (
      ["jaxft.export", "--model", "{export}", "--step", "7", "--out", "x"],
      "--step needs --workdir",
    ),
  ],
)
def test_other_commands_errors_are_one_line(finished, tmp_path, arguments, message):
  workdir, _ = finished
  arguments = (a.format(export=workdir / "export", workdir=workdir) for a in arguments)
  done = run(*arguments, check=2, cwd=tmp_path, stdin=subprocess.DEVNULL)
  assert message in done.stderr.splitlines()[-1] and done.stdout == ""


def test_long_sample_prompt_fails_before_compile(config, tmp_path, monkeypatch):
  """With its name, before anything is compiled."""
  monkeypatch.setattr(jaxft.training.stages, "build_run", lambda *_: pytest.fail("compiled"))
  config.train.sample_prompts = ("short", "the cat " * 100)
  with pytest.raises(
    RequestError,
    match=r"config.train.sample_prompts: 'the cat .* tokens and the model \d+ positions",
  ):
    finetune(config, tmp_path / "w")
