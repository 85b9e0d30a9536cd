"""docs/glossary.md: the words that it bans are in no name, and hardly in the prose of the code."""

import ast
import re
from pathlib import Path

import pytest

import jaxft.config

ROOT = Path(__file__).parent.parent
GLOSSARY, TABLE = (
  (ROOT / "docs" / "glossary.md").read_text().split("## Words that names do not use")
)
BANNED = [
  word
  for row in re.findall(r"^\| (`.*?) \|", TABLE, re.MULTILINE)
  for word in re.findall(r"`(\w+)`", row)
]
TERMS = [
  name
  for row in re.findall(r"^\| [^|]+ \| ([^|]*) \| [^|]+ \|$", GLOSSARY, re.MULTILINE)
  for name in re.findall(r"`([^`]+)`", row)
]
FILES = sorted((ROOT / "jaxft").rglob("*.py"))


def names(tree):
  """Every name that a module gives, with its line."""
  for node in ast.walk(tree):
    line = getattr(node, "lineno", 0)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
      yield node.name, line
    elif isinstance(node, ast.arg | ast.keyword) and node.arg:
      yield node.arg, line
    elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
      yield node.id if isinstance(node, ast.Name) else node.attr, line
    elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
      yield node.name, line
    elif isinstance(node, ast.alias) and node.asname:
      yield node.asname, line


def words(name):
  """`_KeptPlaces_BT` -> kept, places, bt."""
  return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}


def test_banned_words_are_read_from_the_page():
  assert BANNED == ["told", "tell", "kept", "place", "places", "faults"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_banned_words_are_in_no_name(file):
  found = [
    f"{name}, line {line}"
    for name, line in names(ast.parse(file.read_text()))
    if words(name) & {*BANNED}
  ]
  assert not found and not words(file.stem) & {*BANNED}


@pytest.mark.parametrize("term", TERMS)
def test_terms_of_the_glossary_are_in_the_code(term):
  """A setting by its key, a metric or a file by its name, everything else as a name of its own."""
  source = "\n".join(file.read_text() for file in FILES)
  if re.fullmatch(r"(?:model|data|train|optim|mesh|memory|tracking)\.\w+", term):
    assert term in jaxft.config.BY_NAME
  else:
    assert re.search(rf"(?<!\w){re.escape(term)}(?!\w)", source)


def test_overloaded_words_are_rare_in_prose():
  """Sixteen meanings of four words were found in 225 lines once (2026-11)."""
  pattern = re.compile(rf"(?i)\b({'|'.join(BANNED)})\b")
  lines = [line for file in FILES for line in file.read_text().splitlines() if pattern.search(line)]
  assert len(lines) <= 25, "\n".join(lines)
