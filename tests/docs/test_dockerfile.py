"""The Dockerfile, as far as it can be tried without Docker: what it copies installs and runs.

Not tried here: the base image, CUDA's wheels, and a GPU inside a container.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pages
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PROJECT = tomllib.loads((pages.ROOT / "pyproject.toml").read_text())
NO_COMMENTS = re.sub(r"^#.*\n", "", (pages.ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
LINES = [
  line.split(maxsplit=1) for line in NO_COMMENTS.replace("\\\n", " ").splitlines() if line.strip()
]


def of(instruction):
  return [rest for name, rest in LINES if name == instruction]


def copied():
  """(what, the folder that is current then, where it goes) of each COPY."""
  workdir = "/"
  for name, rest in LINES:
    if name == "WORKDIR":
      workdir = rest
    if name == "COPY":
      *what, where = rest.split()
      yield what, workdir, where


def installed():
  """What pip is given, without its options."""
  commands = [shlex.split(rest) for rest in of("RUN") if "pip install" in rest]
  return [
    word
    for words in commands
    for word in words[words.index("install") + 1 :]
    if not word.startswith("-")
  ]


def test_packages_are_pinned_to_tested_versions():
  lines = (pages.ROOT / "constraints.txt").read_text().splitlines()
  pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
  (base,) = of("FROM")
  there = {"python_version": re.search(r"\d+\.\d+", base)[0]}
  for dependency in map(Requirement, PROJECT["project"]["dependencies"]):
    if dependency.marker and not dependency.marker.evaluate(there):
      continue
    version = pinned[dependency.name.lower().replace("_", "-")]
    assert dependency.specifier.contains(version, prereleases=True), dependency
  assert pinned["jax"] == pinned["jaxlib"]
  (command,) = [rest for rest in of("RUN") if "pip install" in rest]
  assert "--constraint=constraints.txt" in shlex.split(command)


def test_image_extra_and_python_exist():
  (base,) = of("FROM")
  version = re.fullmatch(r"python:(\d+\.\d+)-slim", base)[1]
  assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(f"{version}.0")
  (what,) = installed()
  extras = re.fullmatch(r"\.\[([\w,]+)\]", what)[1].split(",")
  assert extras == ["cuda"] and set(extras) <= PROJECT["project"]["optional-dependencies"].keys()


def test_copied_files_exist_and_are_not_ignored():
  rules = [
    line
    for line in (pages.ROOT / ".dockerignore").read_text().splitlines()
    if line and line[0] != "#"
  ]
  assert rules[0] == "*"
  for what, _, _ in copied():
    for name in what:
      assert (pages.ROOT / name).exists(), name
      assert f"!{name}" in rules, f"{name}: .dockerignore leaves it out"
  assert {rule[1:] for rule in rules if rule[0] == "!"} == {
    name for what, _, _ in copied() for name in what
  }


def test_image_user_owns_its_volumes():
  """The image does not run as root."""
  names = [name for name, _ in LINES]
  number, user = re.search(r"useradd --uid (\d+) .*?(\w+) &&", of("RUN")[0]).groups()
  assert of("USER") == [number] and names.index("USER") > max(
    i for i, name in enumerate(names) if name == "RUN"
  )
  (volumes,), (environment,) = of("VOLUME"), of("ENV")
  volumes = json.loads(volumes)
  owned = re.search(rf"chown -R {user} (.*)", of("RUN")[0])[1].split()
  assert all(any(Path(volume).is_relative_to(workdir) for workdir in owned) for volume in volumes)
  for variable in ("HF_HOME", "XDG_CACHE_HOME"):
    workdir = dict(word.split("=") for word in environment.split())[variable]
    assert any(Path(workdir).is_relative_to(volume) for volume in volumes), variable
  assert json.loads(of("CMD")[0]) == ["python", "-m", "jaxft.doctor"] and not of("ENTRYPOINT")


@pytest.mark.slow
def test_copied_files_install_and_run(tmp_path):
  """pip builds jaxft from what is copied, and the commands of the README's `docker run` start."""
  for what, workdir, where in copied():
    for name in what:
      folder = tmp_path / f"image{workdir}"
      folder.mkdir(parents=True, exist_ok=True)
      if (pages.ROOT / name).is_dir():
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(pages.ROOT / name, folder / where, ignore=ignored)
      else:
        shutil.copy(pages.ROOT / name, folder / where)
  source, work, site = (tmp_path / name for name in ("image/src", "image/work", "site"))
  options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
  run([sys.executable, "-m", "pip", "install", *options, "."], source)
  commands = [command for page in pages.PAGES for command in docker_runs(page)]
  assert commands
  for command in commands:
    words = [*command, "--print_config"] if "--config" in command else command
    done = run([sys.executable, *words[1:]], work, PYTHONPATH=str(site))
    assert "jaxft" in done.stdout or "config.model.path" in done.stdout
  code = "import jaxft; print(jaxft.__file__); "
  code += "from jaxft.report_page import markup; markup.render_page('')"  # its files are there
  where = run([sys.executable, "-c", code], work, PYTHONPATH=str(site))
  assert Path(where.stdout.strip()).is_relative_to(site)


def docker_runs(page):
  """What containers of a page run."""
  for block in pages.blocks(page, ""):
    for line in block.replace("\\\n", " ").splitlines():
      if line.startswith("docker run ") and " jaxft " in line:
        yield shlex.split(line.partition(" jaxft ")[2], comments=True)


def run(words, workdir, **environment):
  done = subprocess.run(
    words, cwd=workdir, capture_output=True, text=True, env=os.environ | environment
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done
