"""Eight fake devices, a shared compile cache, and small models made without jaxft."""

import os
import subprocess
import tempfile
import time
from pathlib import Path

# Before jax starts. Sub-processes inherit the cache: a program is compiled once in a whole test run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"jaxft-test-xla-{os.getuid()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling is most of what tests do
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the compilers for other hardware are installed, and would look for it

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

import interrupted
import processes
import tiny
import torture


def pytest_addoption(parser):
  parser.addoption(
    "--torture", action="store_true", help="the large counts, and a table of them in docs/reliability.md"
  )


def pytest_generate_tests(metafunc):
  """`@pytest.mark.parts(few, many)`: a test in so many parts, many with --torture; `make test` runs the first."""
  if marker := metafunc.definition.get_closest_marker("parts"):
    few, many = marker.args
    parts = range(many if metafunc.config.getoption("--torture") else few)
    metafunc.parametrize("part", [pytest.param(i, marks=[pytest.mark.slow] * (i > 0)) for i in parts])


# The files that take minutes begin first, so that no worker is left with one of them at the end.
LONGEST = (
  "test_kills",
  "test_commands",
  "test_signals",
  "test_hosts",
  "test_full_disks",
  "test_compiled",
  "test_train",
  "test_pages",
)


def pytest_collection_modifyitems(items):
  place = {name: i for i, name in enumerate(LONGEST)}
  items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_terminal_summary(terminalreporter, config):
  if config.getoption("--torture") and not config.getoption("collectonly"):
    reports = [report for of in ("passed", "failed", "error") for report in terminalreporter.getreports(of)]
    terminalreporter.write_line("\n" + torture.write_table(reports))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
  """A GPT-2 folder as transformers would write it: odd, distinct sizes, every bias random."""
  return tiny.write_gpt2(tmp_path_factory.mktemp("models") / "tiny", seed=0)


@pytest.fixture(scope="session")
def stories(tmp_path_factory) -> Path:
  """A .jsonl of small stories."""
  return tiny.write_stories(tmp_path_factory.mktemp("data") / "stories.jsonl", 120, seed=0)


@pytest.fixture
def config(folder, stories):
  """A run of seconds: 12 steps of 8 rows on one device."""
  return tiny.config(folder, stories)


@pytest.fixture(scope="session")
def config_file(tmp_path_factory, folder, stories):
  file = tmp_path_factory.mktemp("configs") / "small.py"
  file.write_text(
    processes.CONFIG.format(tests=str(processes.ROOT / "tests"), folder=str(folder), stories=str(stories))
  )
  return file


@pytest.fixture(scope="session")
def interruptible(tmp_path_factory, folder, stories):
  file = tmp_path_factory.mktemp("configs") / "interrupted.py"
  places = {"tests": str(processes.ROOT / "tests"), "folder": str(folder), "stories": str(stories)}
  file.write_text(interrupted.CONFIG.format(**places))
  return file


@pytest.fixture(scope="session")
def undisturbed(interruptible, tmp_path_factory):
  """What a run that nobody interrupts leaves, twice the same, and the seconds that it takes once its programs are compiled."""
  runs = [interrupted.Interrupted(interruptible, tmp_path_factory.mktemp("runs") / "undisturbed") for _ in range(2)]
  for run in runs:
    began = time.monotonic()
    code, said, _ = run.end(run.start())
    assert code == 0, said
  interrupted.assert_same(runs[0], runs[1].result())
  return runs[1].result(), time.monotonic() - began


@pytest.fixture(scope="session")
def finished(config_file, tmp_path_factory):
  """A whole, undisturbed run."""
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  return workdir, processes.train(config_file, workdir)


@pytest.fixture
def small_disk():
  """A disk of 4 MiB, outside pytest's folders: one left by a run that was killed would stop pytest from removing them."""
  place = Path(tempfile.mkdtemp(prefix="jaxft-disk-"))
  if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True).returncode:
    place.rmdir()
    pytest.skip("mounting a small disk needs root")
  yield place
  subprocess.run(["umount", "--lazy", str(place)], check=True)
  place.rmdir()
