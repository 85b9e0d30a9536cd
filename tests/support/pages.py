"""The steps of README.md, docs/ and the docstrings of configs/: commands and Python, in order."""

import ast
import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted(
  str(file.relative_to(ROOT)) for file in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
)
CONFIGS = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("configs/*.py"))
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
COMMAND = "python -m jaxft."
QUICKSTART = "python -m jaxft.train --config configs/quickstart.py"


class Step(NamedTuple):
  """A command, or a block of Python, that a page has its reader run."""

  kind: str  # "command" or "python"
  text: str  # a command is one line, as it is written


def text_of(name: str) -> str:
  """A page; of a config the docstring."""
  text = (ROOT / name).read_text(encoding="utf-8")
  return ast.get_docstring(ast.parse(text)) if name.endswith(".py") else text


def steps(name: str) -> list[Step]:
  """What is to be run, in the order of the page."""
  text, found, end = text_of(name), [], 0
  if name.endswith(".py"):
    return [Step("command", line) for line in _commands(text)]
  for block in FENCE.finditer(text):
    found += _inline(text[end : block.start()])
    if block[2] == "python":
      found.append(Step("python", re.sub(rf"^{block[1]}", "", block[3], flags=re.MULTILINE)))
    elif block[2] != "text":  # what a command prints
      found += [Step("command", line) for line in _commands(block[3])]
    end = block.end()
  return found + _inline(text[end:])


def words(command: str) -> list[str]:
  """As a shell cuts it, without a comment at its end."""
  return shlex.split(command, comments=True)


def blocks(name: str, language: str) -> list[str]:
  return [block[3] for block in FENCE.finditer(text_of(name)) if block[2] == language]


def prose(name: str) -> str:
  """The page without its fenced blocks."""
  return FENCE.sub("", text_of(name))


def _commands(text: str) -> list[str]:
  lines = [" ".join(line.split()) for line in text.replace("\\\n", " ").splitlines()]
  return [line for line in map(_with_module, lines) if line.startswith(COMMAND)]


def _with_module(line: str) -> str:
  """Return `jaxft train ...` as `python -m jaxft.train ...`, which tests call by module."""
  line = re.sub(r"^jaxft quickstart\b", QUICKSTART, line)
  return re.sub(r"^jaxft ([a-z]+)(?= |$)", rf"{COMMAND}\1", line)


def _inline(text: str) -> list[Step]:
  """Commands within a sentence or a table; one without arguments is a name."""
  quoted = (_with_module(" ".join(code.split())) for code in INLINE.findall(text))
  return [
    Step("command", code)
    for code in quoted
    if code.startswith(COMMAND) and " " in code.removeprefix(COMMAND)
  ]
