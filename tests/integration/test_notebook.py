"""examples/*.ipynb: its code runs from top to bottom, and does what its text says.

The cells run as one program, in a process of its own. A Jupyter kernel would add 30 packages to the
tests for what the notebooks do not have: magics, widgets, pictures.
"""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib

import pages
import processes
import pytest

import jaxft
import jaxft.config

NOTEBOOKS = sorted((pages.ROOT / "examples").glob("*.ipynb"))
EXTRAS = tomllib.loads((pages.ROOT / "pyproject.toml").read_text())["project"][
  "optional-dependencies"
]
each = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def cells(file, kind):
  return [
    "".join(cell["source"])
    for cell in json.loads(file.read_text())["cells"]
    if cell["cell_type"] == kind
  ]


@each
def test_notebook_has_no_outputs(file):
  notebook = json.loads(file.read_text())
  assert notebook["nbformat"] == 4 and notebook["metadata"].keys() == {
    "kernelspec",
    "language_info",
  }
  for cell in notebook["cells"]:
    assert not cell["metadata"] and not cell.get("outputs") and cell.get("execution_count") is None


@each
def test_notebook_code_parses_and_names_exist(file):
  code = cells(file, "code") + [
    block[3] for text in cells(file, "markdown") for block in pages.FENCE.finditer(text)
  ]
  for source in code:
    for node in ast.walk(ast.parse(source)):
      name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
      assert not re.fullmatch(r"jaxft\.\w+", name) or hasattr(jaxft, name.removeprefix("jaxft.")), (
        name
      )
      assert (
        not re.fullmatch(r"c\.\w+\.\w+", name) or name.removeprefix("c.") in jaxft.config.BY_NAME
      ), name
  for path in re.findall(
    r"`((?:docs|configs|examples)/[\w./]+)`", "\n".join(cells(file, "markdown"))
  ):
    assert (pages.ROOT / path).exists(), path


@each
@pytest.mark.parametrize("case", ["installed", "uploaded", "missing"])
def test_notebook_installs_jaxft_where_missing(file, case, tmp_path, monkeypatch):
  commands = []
  monkeypatch.chdir(tmp_path)
  is_installed = lambda name: name if case == "installed" else None
  monkeypatch.setattr(importlib.util, "find_spec", is_installed)
  monkeypatch.setattr(subprocess, "run", lambda words, check: commands.append(words))
  wheel = tmp_path / "jaxft-0.1.0-py3-none-any.whl"
  if case == "uploaded":
    wheel.touch()
  install = cells(file, "code")[0]
  if case == "missing":
    with pytest.raises(SystemExit, match="upload jaxft"):
      exec(install, {})
  else:
    exec(install, {})
  assert len(commands) == (case == "uploaded")
  for words in commands:
    path, extra = re.fullmatch(r"(.*\.whl)(?:\[(\w+)\])?", words[-1]).groups()
    assert words[0] == sys.executable and path == str(wheel)
    assert extra is None or extra in EXTRAS


def run_notebook(file, folder, replacements):
  """Run all cells as one program in `folder`; each key of `replacements` is in them once."""
  program = "\n\n".join(cells(file, "code"))
  for old, new in replacements.items():
    assert program.count(old) == 1, old
    program = program.replace(old, new)
  optimized = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
  command = [sys.executable, "-c", program]
  done = subprocess.run(
    command, cwd=folder, env=optimized, capture_output=True, text=True, timeout=600
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.slow
def test_embedded_notebook_trains_and_generates_stories(tmp_path):
  """Stories are generated before and after."""
  file = pages.ROOT / "examples" / "tinystories.ipynb"
  printed = run_notebook(file, tmp_path, {"STEPS = 300\n": "STEPS = 40\n"})
  before, after = (
    float(loss) for loss in re.findall(r"^loss ([\d.]+) nats", printed, re.MULTILINE)
  )
  assert after < 5 < 10 < before  # no village in a ship's log
  losses = [
    line["eval/loss"]
    for line in processes.lines(tmp_path / "runs/notebook/metrics.jsonl")
    if "eval/loss" in line
  ]
  assert losses[0] == pytest.approx(before, abs=1e-3)
  assert losses[-1] == pytest.approx(after, abs=1e-3)
  sizes = [
    (tmp_path / "runs/notebook" / name / "model.safetensors").stat().st_size
    for name in ("export", "bfloat16")
  ]
  assert sizes[0] > 1.9 * sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2_free_t4", "gpt2_xl_free_tpu"])
def test_accelerator_notebook_runs_on_small_stand_ins(name, folder, stories, tmp_path):
  """All cells, on CPUs; the model, the text and the number of steps are smaller."""
  small = f"""
c.model.path = {str(folder)!r}
c.data.train, c.data.validation = ({str(stories)!r},), ()
c.data.sequence_length, c.train.epochs, c.train.steps = 32, 0.0, 3
c.train.batch_size, c.train.micro_batch_size = 8, 0
c.train.sample_prompts, c.train.sample_tokens = ("Once upon",), 4
"""
  file = pages.ROOT / "examples" / f"{name}.ipynb"
  (require,) = re.findall(r'REQUIRE = "\w+"', file.read_text().replace(r"\"", '"'))
  (workdir,) = re.findall(r"WORKDIR = Path\(.*?\)", file.read_text().replace(r"\"", '"'))
  train = "run = jaxft.finetune("
  replacements = {
    require: "REQUIRE = None",
    workdir: 'WORKDIR = Path("run")',
    train: small + train,
  }
  printed = run_notebook(file, tmp_path, replacements)
  assert "Once upon a time there was a cat" in printed
  assert (tmp_path / "run" / "report.html").is_file()
  assert (tmp_path / "run" / "export" / "parity.json").is_file()
