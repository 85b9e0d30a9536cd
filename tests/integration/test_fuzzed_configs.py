"""Fuzzed settings: each is refused by its name before anything is compiled, or the run goes on."""

import random
import sys

import processes
import pytest

import jaxft.cli.flags
import jaxft.config
from jaxft import train
from jaxft.errors import RequestError

VALUES = """0 -1 1 2 1.5 nan inf -inf 1e400 -0.0 1e-400 None True x [] {} 999999999999 a,b ('a','b')
../nowhere /nowhere *.none {prompt} %s none auto full lm scratch linear float16 0x10 1_000 --x
hub: x@0 x@nan""".split()
VALUES += ["", " 3 ", "9" * 400, "é 🐈", "\ud800", "a\0b"]
PER_PART = 100
# ml_collections reads config files so, in its own way (1.1).
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def mistyped(rng: random.Random, name: str) -> str:
  at = rng.randrange(len(name))
  return rng.choice(
    [
      name[:at] + name[at + 1 :],
      name[:at] + "x" + name[at:],
      name.upper(),
      name + "s",
      name.replace(".", "_"),
    ]
  )


def fuzzed(rng: random.Random) -> tuple[list[str], list[str]]:
  """Flags, and the names that a refusal must have one of."""
  flags, names = [], []
  for _ in range(rng.choice([1, 1, 2])):
    name = rng.choice(jaxft.config.SETTINGS).name
    if rng.random() < 0.1:
      name = mistyped(rng, name)
    flags.append(f"--config.{name}={rng.choice(VALUES)}")
    names.append(f"config.{name}")
  return flags, names


def refused(flags: list[str], names: list[str], config_file, workdir, dry_run: bool) -> bool:
  """Whether the request is refused; fails when that is done in another way than with a name."""
  try:
    # ml_collections reads it too
    sys.argv = ["train", "--config", str(config_file), "--workdir", str(workdir), *flags]
    arguments = jaxft.cli.flags.parse_train()
    train.validate_run(jaxft.config.resolve(arguments.config), arguments.workdir)
    if dry_run:
      train.finetune(arguments.config, arguments.workdir, dry_run=True)
  except RequestError as error:
    assert any(name in str(error) for name in names), (flags, str(error))
    assert "Traceback" not in str(error)
    return True
  return False


@pytest.mark.parametrize("part", range(10))
def test_fuzzed_configs_validate_or_name_the_setting(
  config_file, tmp_path, monkeypatch, part, record_property
):
  """A thousand of them."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "argv", sys.argv)
  rng = random.Random(part)
  outcomes = [
    refused(*fuzzed(rng), config_file, tmp_path / "w", dry_run=False) for _ in range(PER_PART)
  ]
  assert 0.3 * PER_PART < sum(outcomes) < PER_PART
  figures = {"of them refused by name": sum(outcomes)}
  record_property(
    "torture", {"what": "fuzzed configs, checked", "tried": PER_PART, "sums": figures}
  )


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parts(1, 10)
def test_valid_fuzzed_configs_compile_or_are_refused(
  config_file, tmp_path, monkeypatch, part, record_property
):
  """The same configs again, each that passes the check with its data read and its step compiled."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "argv", sys.argv)
  rng, run, tried = random.Random(1000 + part), 0, 0
  while run < 10:
    flags, names = fuzzed(rng)
    tried += 1
    if refused(flags, names, config_file, tmp_path / "w", dry_run=False):
      continue
    refused(flags, names, config_file, tmp_path / "w", dry_run=True)
    run += 1
  record_property("torture", {"what": "fuzzed configs that pass the check, compiled", "tried": run})


def test_request_error_is_one_line(config_file, tmp_path):
  """In a process of its own: one line a fault, no traceback, nothing written."""
  done = processes.train(config_file, tmp_path / "w", "--config.train.steps=" + "9" * 400, check=2)
  assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: config.train.steps")
  assert not (tmp_path / "w").exists()
