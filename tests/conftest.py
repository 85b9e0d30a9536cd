"""Eight fake devices, a shared compile cache, and small models made without jaxft."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

# Before jax starts. Sub-processes inherit the cache: a test run compiles each program once.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"jaxft-test-xla-{os.getuid()}")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Compiling is most of what tests do. Without LLVM's optimizations it takes half as long (27 s, not
# 50, for four train steps); with the older of two code generators, which jaxlib 0.11 no longer has,
# a third less than that. With --torture programs are compiled as users compile them.
if "--torture" not in sys.argv:
  os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
  if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
else:
  os.environ["FRESH_PROCESSES"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# torch's threads would wait for each other: a worker has a core. Without it test_families and
# test_sampler take a quarter more of the processor's time (116 s, not 92, on two cores).
os.environ.setdefault("OMP_NUM_THREADS", "1")
# the compilers for other hardware are installed, and would look for it
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from filelock import FileLock

jax.config.update("jax_num_cpu_devices", 8)

import interrupted
import processes
import tiny
import torture


class Said(NamedTuple):
  stdout: str
  stderr: str


def pytest_addoption(parser):
  parser.addoption(
    "--torture",
    action="store_true",
    help="the large counts, and a table of them in docs/reliability.md",
  )


def pytest_generate_tests(metafunc):
  """`@pytest.mark.parts(few, many)`: a test in parts, many with --torture; the first is quick."""
  if marker := metafunc.definition.get_closest_marker("parts"):
    few, many = marker.args
    parts = range(many if metafunc.config.getoption("--torture") else few)
    metafunc.parametrize(
      "part", [pytest.param(i, marks=[pytest.mark.slow] * (i > 0)) for i in parts]
    )


# The files that take minutes begin first, so that no worker is left with one of them at the end.
LONGEST = (
  "test_shipped_configs",
  "test_aot_compiler",
  "test_pages",
  "test_recipes",
  "test_kills",
  "test_signals",
  "test_gpu_short",
  "test_full_disks",
  "test_multihost",
  "test_commands",
  "test_notebook",
  "test_lora",
  "test_train",
  "test_sampler",
  "test_guards",
  "test_families",
  "test_train_step",
  "test_planner",
)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items):
  for item in items:
    for name in ("slow", "wide"):
      marker = item.get_closest_marker(f"{name}_for")
      if marker and {*marker.args} & {*item.callspec.id.split("-")}:
        item.add_marker(name)
  place = {name: i for i, name in enumerate(LONGEST)}
  items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_terminal_summary(terminalreporter, config):
  if config.getoption("--torture") and not config.getoption("collectonly"):
    reports = [
      report for of in ("passed", "failed", "error") for report in terminalreporter.getreports(of)
    ]
    terminalreporter.write_line("\n" + torture.write_table(reports))


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
  """`shared(name, make)`: a folder that the first worker makes by make(folder), for all workers."""
  workers = "PYTEST_XDIST_WORKER" in os.environ
  home = tmp_path_factory.getbasetemp().parent if workers else tmp_path_factory.getbasetemp()

  def made(name, make):
    with FileLock(home / f"{name}.lock"):
      if not (home / f"{name}.made").exists():
        shutil.rmtree(home / name, ignore_errors=True)  # of a worker that failed
        (home / name).mkdir()
        make(home / name)
        (home / f"{name}.made").touch()
    return home / name

  return made


@pytest.fixture(scope="session")
def folder(shared) -> Path:
  """A GPT-2 folder as transformers would write it: odd, distinct sizes, every bias random."""
  return shared("models", lambda home: tiny.write_gpt2(home / "tiny", seed=0)) / "tiny"


@pytest.fixture(scope="session")
def stories(shared) -> Path:
  """A .jsonl of small stories."""
  return (
    shared("data", lambda home: tiny.write_stories(home / "stories.jsonl", 120, seed=0))
    / "stories.jsonl"
  )


@pytest.fixture
def config(folder, stories):
  """A run of seconds: 12 steps of 8 rows on one device."""
  return tiny.config(folder, stories)


@pytest.fixture(scope="session")
def configs(shared, folder, stories):
  paths = {
    "tests": str(processes.ROOT / "tests" / "support"),
    "folder": str(folder),
    "stories": str(stories),
  }

  def make(home):
    (home / "small.py").write_text(processes.CONFIG.format(**paths))
    (home / "interrupted.py").write_text(interrupted.CONFIG.format(**paths))

  return shared("configs", make)


@pytest.fixture(scope="session")
def config_file(configs):
  return configs / "small.py"


@pytest.fixture(scope="session")
def interruptible(configs):
  return configs / "interrupted.py"


@pytest.fixture(scope="session")
def undisturbed(interruptible, shared):
  """What a run that nobody interrupts leaves, and how many lines it says."""

  def make(home):
    run = interrupted.Interrupted(interruptible, home / "run")
    code, said, _ = run.end(run.start())
    assert code == 0, said
    (home / "said").write_text(said)

  home = shared("undisturbed", make)
  return interrupted.Interrupted(interruptible, home / "run").result(), (
    home / "said"
  ).read_text().count("\n")


@pytest.fixture(scope="session")
def finished(config_file, shared):
  """A whole, undisturbed run: its workdir, and all that it said."""

  def make(home):
    done = processes.train(config_file, home / "whole")
    (home / "said").write_text(json.dumps([done.stdout, done.stderr]))

  home = shared("finished", make)
  return home / "whole", Said(*json.loads((home / "said").read_text()))


@pytest.fixture
def small_disk():
  """A disk of 4 MiB, outside pytest's folders: it could not remove one that a killed run left."""
  place = Path(tempfile.mkdtemp(prefix="jaxft-disk-"))
  if subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True
  ).returncode:
    place.rmdir()
    pytest.skip("mounting a small disk needs root")
  yield place
  subprocess.run(["umount", "--lazy", str(place)], check=True)
  place.rmdir()
