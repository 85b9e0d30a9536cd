"""What `make wheel` builds: an sdist, and a wheel from it that runs without a checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from processes import ROOT, lines

MAX_BYTES = 6_000_000
SOURCES = ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt"]
SMALL = [
  "--config.train.steps=20",
  "--config.train.batch_size=2",
  "--config.data.sequence_length=64",
  "--config.data.limit_validation=8",
  "--config.data.limit_train=200",
  "--config.train.sample_tokens=4",
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  """The sdist, and the wheel that pip builds from it."""
  home = tmp_path_factory.mktemp("built")
  source = home / "source"
  for folder in ("jaxft", "configs", "assets"):
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "shipped")
    shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
  for name in SOURCES:
    shutil.copy(ROOT / name, source / name)
  (source / "configs" / "__pycache__").mkdir()
  (source / "configs" / "__pycache__" / "x.pyc").touch()
  code = f"from setuptools import build_meta; build_meta.build_sdist({str(home)!r})"
  run([sys.executable, "-c", code], source)
  (sdist,) = home.glob("*.tar.gz")
  options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", f"--wheel-dir={home}"]
  run([sys.executable, "-m", "pip", "wheel", *options, sdist], home)
  (wheel,) = home.glob("*.whl")
  return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
  """The bin folder of an environment with the wheel, and this one's packages without jaxft."""
  environment = tmp_path_factory.mktemp("installed") / "venv"
  run([sys.executable, "-m", "venv", "--without-pip", environment], ROOT)
  python = environment / "bin" / "python"
  (site,) = environment.glob("lib/python*/site-packages")
  paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
  # Python reads no .pth file in a folder that comes from a .pth file, so not that of the checkout.
  (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in sorted(paths)))
  options = ["--quiet", "--no-deps", "--no-index", "--no-compile", "--ignore-installed"]
  pip = [sys.executable, "-m", "pip", "--python", python]
  run([*pip, "install", *options, built[1]], ROOT)
  where = run([python, "-c", "import jaxft; print(jaxft.__file__)"], environment).stdout.strip()
  assert Path(where).is_relative_to(site)
  return environment / "bin"


def run(words, workdir, check=0):
  environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
  done = subprocess.run(
    [str(word) for word in words], cwd=workdir, env=environment, capture_output=True, text=True
  )
  assert done.returncode == check, done.stdout + done.stderr
  return done


def test_wheel_has_configs_and_assets(built):
  wheel = built[1]
  assert wheel.stat().st_size < MAX_BYTES
  names = set(zipfile.ZipFile(wheel).namelist())
  files = [*(ROOT / "configs").glob("*.py"), *(ROOT / "assets" / "quickstart").rglob("*.*")]
  assert {f"jaxft/shipped/{file.relative_to(ROOT)}" for file in files} <= names
  package = ROOT / "jaxft"
  sources = [it for kind in ("py", "css", "js") for it in package.rglob(f"*.{kind}")]
  assert {str(file.relative_to(ROOT)) for file in sources} <= names
  assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]


def test_sdist_has_what_the_wheel_is_built_from(built):
  with tarfile.open(built[0]) as archive:
    names = {name.partition("/")[2] for name in archive.getnames()}
  assert {*SOURCES, "configs/quickstart.py", "assets/quickstart/stories.jsonl"} <= names
  assert not [name for name in names if name.endswith(".pyc")]


def test_wheel_runs_in_an_empty_folder(installed, tmp_path):
  script = installed / "jaxft"
  listed = run([script, "--help"], tmp_path).stdout
  assert "  train " in listed and "gpt2_tinystories" in listed
  for spelling in ("gpt2_tinystories", "configs/gpt2_tinystories.py"):
    words = [script, "train", "--config", spelling, "--print_config"]
    assert "hub:roneneldan/TinyStories" in run(words, tmp_path).stdout
  wrong = run([script, "train", "--config", "gpt2_tinystory"], tmp_path, check=2)
  assert wrong.stderr.count("\n") == 1 and "did you mean gpt2_tinystories?" in wrong.stderr
  assert [*tmp_path.iterdir()] == []


def test_wheel_runs_the_quickstart(installed, tmp_path):
  run([installed / "jaxft", "quickstart", *SMALL], tmp_path)
  workdir = tmp_path / "runs" / "quickstart"
  losses = [it["train/loss"] for it in lines(workdir / "metrics.jsonl") if "train/loss" in it]
  assert losses and losses[-1] < losses[0]
  assert lines(workdir / "metrics.jsonl")[-1]["step"] == 20
  assert (workdir / "report.html").is_file() and (workdir / "export" / "config.json").is_file()
