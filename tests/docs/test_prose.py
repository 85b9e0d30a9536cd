"""scripts/prose.py, which `make lint` runs, finds what it is for."""

import subprocess
import sys

import pages
import pytest

SCRIPT = pages.ROOT / "scripts" / "prose.py"


def check(file):
  done = subprocess.run([sys.executable, SCRIPT, file], capture_output=True, text=True)
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
  "text, error",
  [
    ("The run writes a checkpoint every 100 steps.", ""),
    ("The memory is told before any of it is taken.", "markers per 1,000 words"),
    ("Of each layer the weights, which stand beside the others.", "markers per 1,000 words"),
    ("The run saves the weights and " + "the moments and " * 10 + "stops.", "words a sentence"),
    ("Short one here.\n\n```\nwhat is told: " + "word " * 60 + "\n```", ""),
  ],
)
def test_dialect_and_long_sentences_are_errors(tmp_path, text, error):
  file = tmp_path / "page.md"
  file.write_text(text)
  code, _, stderr = check(file)
  assert code == bool(error) and error in stderr


def test_docstrings_messages_and_comments_are_counted_apart(tmp_path):
  file = tmp_path / "module.py"
  file.write_text(
    '"""Load the weights of a model."""\n\n# The file is read twice, as it may change.\n'
    'raise ValueError(f"{name}: there is no such file here")\n'
  )
  code, stdout, stderr = check(file)
  kinds = {line.split()[0]: line.split()[1:3] for line in stdout.splitlines()[1:]}
  assert kinds == {"messages": ["1", "7"], "docstrings": ["1", "6"], "comments": ["1", "9"]}
  assert code == 1 and "messages" in stderr and "docstrings" not in stderr


def test_missing_files_and_open_code_blocks_are_errors(tmp_path):
  assert check(tmp_path / "none.md")[0] == 1
  file = tmp_path / "page.md"
  file.write_text("```\ncode\n\nThe memory is told before any of it is taken.\n")
  code, _, stderr = check(file)
  assert code == 1 and "is not closed" in stderr
