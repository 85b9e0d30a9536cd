"""examples/*.ipynb: its code runs from top to bottom, and does what its text says.

The cells run as one program, in a process of its own. A Jupyter kernel would add 30 packages to the
tests for what the notebooks do not have: magics, widgets, pictures.
"""

import ast
import importlib.util
import json
import re
import subprocess
import sys

import pages
import processes
import pytest

import jaxft
import jaxft.config

NOTEBOOKS = sorted((pages.ROOT / "examples").glob("*.ipynb"))
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
@pytest.mark.parametrize(
  "there, wanted", [("jaxft", []), ("checkout", [sys.executable]), ("", ["git", sys.executable])]
)
def test_notebook_installs_jaxft_where_missing(file, there, wanted, tmp_path, monkeypatch):
  commands = []
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [*sys.path])
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == there else None)
  monkeypatch.setattr(subprocess, "run", lambda words, check: commands.append(words))
  if there == "checkout":
    (tmp_path / there).mkdir()
  exec(cells(file, "code")[0], {})
  assert [words[0] for words in commands] == wanted
  assert (str(tmp_path / "checkout") in sys.path) == bool(wanted)


@pytest.mark.slow
@pytest.mark.wide
def test_notebook_trains_and_generates_stories(tmp_path):
  """Stories are generated before and after."""
  file = pages.ROOT / "examples" / "tinystories.ipynb"
  program = "\n\n".join(cells(file, "code"))
  assert program.count("STEPS = 300\n") == 1
  program = program.replace("STEPS = 300\n", "STEPS = 40\n")
  done = subprocess.run(
    [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, done.stderr
  before, after = (
    float(loss) for loss in re.findall(r"^loss ([\d.]+) nats", done.stdout, re.MULTILINE)
  )
  assert after < 5 < 10 < before  # no village in a ship's log
  losses = [
    line["eval/loss"]
    for line in processes.lines(tmp_path / "runs/notebook/metrics.jsonl")
    if "eval/loss" in line
  ]
  assert losses[0] == pytest.approx(before, abs=1e-3) and losses[-1] == pytest.approx(
    after, abs=1e-3
  )
  halves = [
    tmp_path / "runs/notebook" / name / "model.safetensors" for name in ("export", "bfloat16")
  ]
  assert halves[0].stat().st_size > 1.9 * halves[1].stat().st_size
