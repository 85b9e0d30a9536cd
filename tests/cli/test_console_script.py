"""`jaxft COMMAND` is `python -m jaxft.COMMAND`, and shipped configs are found by name."""

import os
import subprocess
import sys
import tomllib

import pytest
from processes import ROOT

import jaxft
from jaxft.cli import commands, flags, usage
from jaxft.errors import RequestError
from jaxft.training import run_info

CONFIG = "from jaxft.config import default\ndef get_config(*texts):\n  c = default()\n  {line}\n"
CONFIG += "  return c\n"


def run(*words, options=(), module="jaxft", workdir=ROOT):
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  command = [sys.executable, *options, "-m", module, *words]
  return subprocess.run(command, cwd=workdir, env=environment, capture_output=True, text=True)


def parsed(monkeypatch, name):
  monkeypatch.setattr(sys, "argv", ["jaxft.train", "--config", name])
  return flags.parse(usage.TRAIN, ("dry_run",))


def test_script_is_main_of_the_package():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  assert project["scripts"] == {"jaxft": "jaxft.__main__:main"}


def test_help_lists_commands_without_importing_jax():
  done = run("--help", options=("-X", "importtime"))
  assert done.returncode == 0
  for name in [*commands.COMMANDS, "quickstart"]:
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"  {name} ")]
    meaning = line.removeprefix(f"  {name} ").strip()
    assert 10 < len(meaning) < 80 and "python" not in meaning and '"' not in meaning
  assert {*commands.shipped_configs()} <= {*done.stdout.replace(",", " ").split()}
  imported = {line.rsplit("|")[-1].strip() for line in done.stderr.splitlines()}
  assert "jaxft.cli.commands" in imported
  assert not {"jax", "numpy", "rich", "ml_collections", "jaxft.config"} & imported


@pytest.mark.parametrize(
  "words, message",
  [
    (["tarin"], "error: 'tarin': unknown command; did you mean train?\n"),
    (["xyzzy"], "error: 'xyzzy': unknown command; jaxft --help lists them\n"),
    (["--config", "x"], "error: '--config': name a command before the flags, such as: jaxft train"),
  ],
)
def test_unknown_command_is_one_line(words, message):
  done = run(*words)
  assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
  assert done.stderr.startswith(message)


def test_no_command_prints_the_list():
  done = run()
  assert (done.returncode, done.stdout) == (2, run("--help").stdout)
  done = run("--version")
  assert (done.returncode, done.stdout) == (0, f"jaxft {jaxft.__version__}\n")


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_usage_has_the_command_as_typed(name):
  short, long = run(name, "--help"), run("--help", module=f"jaxft.{name}")
  assert short.returncode == long.returncode == 0
  first_line = short.stdout.splitlines()[0].removeprefix("usage: ")
  assert first_line.startswith(f"jaxft {name} ") and "python -m" not in first_line
  shorter = long.stdout.replace(f"python -m jaxft.{name}", f"jaxft {name}")
  assert shorter.split("\n\n", 1)[1] == short.stdout.split("\n\n", 1)[1]


@pytest.mark.parametrize(
  "words", [["train", "--config", "quikstart"], ["plan", "--config=quickstart"], ["export"]]
)
def test_errors_are_those_of_the_module(words):
  name, *rest = words
  short, long = run(*words), run(*rest, module=f"jaxft.{name}")
  assert short.returncode == 2 and short.stderr.startswith("error: ")
  assert (short.returncode, short.stdout, short.stderr) == (2, long.stdout, long.stderr)


def test_config_imports_from_the_current_folder(tmp_path):
  """As with `python -m`, but a file there hides no library."""
  (tmp_path / "helper.py").write_text("STEPS = 7\n")
  (tmp_path / "json.py").write_text("raise SystemExit('not the library')\n")
  line = "import helper; c.train.steps = helper.STEPS"
  (tmp_path / "mine.py").write_text(CONFIG.format(line=line))
  # A script's own folder is the first of the path, not the current folder.
  code = "import sys; sys.path[0] = '/nowhere'; from jaxft.__main__ import main; main()"
  command = [sys.executable, "-c", code, "train", "--config=mine.py", "--print_config"]
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert done.returncode == 0 and "config.train.steps=7" in done.stdout.replace(" ", ""), (
    done.stdout + done.stderr
  )


def test_quickstart_is_train_with_a_config():
  done = run("quickstart", "--config.train.steps=7", "--print_config")
  words = ("--config", "quickstart", "--config.train.steps=7", "--print_config")
  assert done.returncode == 0 and done.stdout == run("train", *words).stdout


def test_runs_record_the_command_as_typed(monkeypatch):
  monkeypatch.setattr(sys, "orig_argv", ["jaxft", "train", "--config", "my file.py"])
  assert run_info.shell_command() == "jaxft train --config 'my file.py'"


@pytest.mark.parametrize("name", commands.shipped_configs())
def test_shipped_configs_load_by_name(monkeypatch, tmp_path, name):
  monkeypatch.chdir(tmp_path)
  by_file = parsed(monkeypatch, str(ROOT / "configs" / f"{name}.py"))
  for spelling in (name, f"{name}.py", f"configs/{name}.py"):
    by_name = parsed(monkeypatch, spelling)
    assert by_name.config == by_file.config and by_name.config_file == by_file.config_file
    assert by_name.config_name == spelling


def test_files_of_the_current_folder_come_first(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "quickstart.py").write_text(CONFIG.format(line="c.train.steps = 1"))
  for spelling in ("quickstart", "configs/quickstart.py"):
    assert parsed(monkeypatch, spelling).config.train.steps == 1
  (tmp_path / "quickstart").write_text(CONFIG.format(line="c.train.steps = 2"))
  assert parsed(monkeypatch, "quickstart").config.train.steps == 2
  (tmp_path / "configs" / "mine.py").write_text(CONFIG.format(line="c.train.steps = len(texts[0])"))
  assert parsed(monkeypatch, "mine:four").config.train.steps == 4
  assert parsed(monkeypatch, "configs/mine.py:a:b").config.train.steps == 3


@pytest.mark.parametrize(
  "name, hint",
  [
    ("gpt2_tinystory", "did you mean gpt2_tinystories?"),
    ("configs/gtpj_6b_lora.py", "did you mean gptj_6b_lora?"),
    ("quickstrat:text", "did you mean quickstart?"),
    ("nowhere.py", "shipped configs: gpt2_from_scratch, "),
    ("other/quickstart.py", "did you mean quickstart?"),
    ("", "--config is missing"),
  ],
)
def test_mistyped_name_gets_the_nearest(monkeypatch, tmp_path, name, hint):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(RequestError) as raised:
    parsed(monkeypatch, name)
  assert hint in str(raised.value) and "\n" not in str(raised.value)


def test_install_without_configs_still_reads_files(monkeypatch, tmp_path):
  """The container's: its configs are in the current folder."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(commands, "CONFIG_FOLDERS", (tmp_path / "none",))
  with pytest.raises(RequestError, match="'quickstart': no such file.*; name a file"):
    parsed(monkeypatch, "quickstart")
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "quickstart.py").write_text(CONFIG.format(line="c.train.steps = 1"))
  assert parsed(monkeypatch, "quickstart").config.train.steps == 1
  assert "quickstart" in commands.overview()


def complete(folder, *words):
  """What bash offers for the last word."""
  (folder / "jaxft").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m jaxft "$@"\n')
  (folder / "jaxft").chmod(0o755)
  (folder / "mine.py").touch()
  code = 'eval "$(jaxft completion)"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
  code += '_jaxft jaxft "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"; '
  code += 'printf "%s\\n" "${COMPREPLY[@]}"'
  path = f"{folder}:{os.environ['PATH']}"
  environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}
  command = ["bash", "-c", code, "bash", "jaxft", *words]
  done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
  assert done.returncode == 0 and not done.stderr
  return done.stdout.split()


def test_bash_completes_commands_configs_and_flags(tmp_path):
  assert complete(tmp_path, "t") == ["train", "tokenizer"]
  assert complete(tmp_path, "train", "--config", "gptj_6b_l") == ["gptj_6b_lora"]
  assert complete(tmp_path, "train", "--config", "m") == ["mine.py"]
  assert complete(tmp_path, "train", "--dry") == ["--dry_run"]
  assert "--temperature" in complete(tmp_path, "generate", "--t")


def test_quickstart_has_its_own_help():
  done = run("quickstart", "--help")
  assert done.returncode == 0 and done.stdout == commands.QUICKSTART_HELP and not done.stderr


def test_mistyped_flag_of_the_script_is_named():
  done = run("--verison")
  assert done.returncode == 2
  assert done.stderr == "error: '--verison': unknown flag; did you mean --version?\n"
