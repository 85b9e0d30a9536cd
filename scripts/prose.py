"""Measure the prose of this repository: sentence length, and words that plain English does without.

    python scripts/prose.py                 # a table by kind of text; exit code 1 above a limit
    python scripts/prose.py --worst 20      # and the sentences to rewrite first
    python scripts/prose.py jaxft/data      # only these files or folders, one row each file

A sentence ends at a full stop, a question mark, or the end of its paragraph, list item or table
cell. Code blocks, headings, and pieces of fewer than four words are left out, so that short table
cells do not lower the average. Inline code counts as one word.

Messages are the string literals of `jaxft` with at least four words, docstrings apart: errors,
warnings, log lines, --help and descriptions of settings.
"""

import argparse
import ast
import dataclasses
import io
import json
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What a text may have: words a sentence on average, words of the longest, markers per 1,000 words.
LIMITS = {
  "README": (17, 40, 4),
  "docs": (18, None, 4),
  "messages": (None, None, 4),
  "docstrings": (None, None, 4),
  "comments": (None, None, 4),
}
README_WORDS = 1000
SUFFIXES = (".md", ".py", ".ipynb")

# Each is correct English; many of them together read like a translation. The right column says
# what to write instead.
MARKERS = {
  r"told|tells?": "report, print, log, return, show",
  r"there (is|are|was|were|may be)": "name the subject: 'X has', 'X exists', 'found no X'",
  r"goes? with|go(es)? on|went on": "matches, belongs to, continues",
  r"of (its|their|your|one's|his) own": "its own X, a separate X",
  r"(so|as) many(?! as)|as much again": "a number, 'this many', 'the same number'",
  r"what (is|was|are|were|has|it|they|a|the|can|may|must|will|does|did|do|does)\b": "a noun",
  r"lies?|lay|stands?|stood": "is, is stored, is in",
  r"but for": "except",
  r"((is|are|was|were) (no|none|nothing)|ha(s|ve) (none|nothing))(?! (longer|more))": "is not X",
  r"(is|are|was|were) to be": "must be, should be, will be",
  r"beside": "next to, in addition to, with",
  r"to be had|had from": "available",
  r"other than (it|they)|in turn|one after the other": "sequentially, one at a time",
  r"whatever|whoever|wherever|however many": "any, all",
  r"as (it|they|one) (is|are|was|were)": "unchanged",
  r"in other (words|case)": "name the case",
  r"at once": "at the same time, immediately",
  r"nothing (is|was|more|else)|none (is|are|of)": "subject and verb",
  r"(?-i:\A(Of|Where|What|Whose|Which) )": "begin with the subject; 'if' for a condition",
}
MARKER = {re.compile(rf"\b({p})\b" if "A(" not in p else p, re.I): p for p in MARKERS}


@dataclasses.dataclass(frozen=True)
class Piece:
  """A sentence and where it is."""

  path: Path
  line: int
  text: str

  @property
  def words(self) -> int:
    return len(re.findall(r"[\w'’.-]*\w[\w'’.-]*", self.text))

  @property
  def markers(self) -> list[str]:
    return [m.group(0).strip().lower() for p in MARKER for m in p.finditer(self.text)]


def sentences(path: Path, line: int, block: str):
  """Yield the sentences of one paragraph."""
  text = re.sub(r"`+[^`]*`+", "CODE", block)
  text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
  text = re.sub(r"<[^<>]*>|\*\*?|__", "", text)
  text = " ".join(text.split())
  for sentence in re.split(r"(?<=[.!?])[\")]*\s+(?=[A-Z\"(0-9])", text):
    piece = Piece(path, line, sentence.strip())
    if piece.words >= 4:
      yield piece


def notebook(path: Path):
  """Yield the sentences of the Markdown cells; lines count from the start of a cell."""
  for cell in json.loads(path.read_text())["cells"]:
    if cell["cell_type"] == "markdown":
      yield from markdown(path, "".join(cell["source"]))


def markdown(path: Path, text: str | None = None):
  """Yield the sentences of a Markdown file, or of a text in it."""
  block, start, in_code = [], 0, False
  text = path.read_text() if text is None else text
  for number, line in enumerate([*text.splitlines(), ""], 1):
    if line.lstrip().startswith(("```", "~~~")):
      in_code = not in_code
      line = ""
    is_item = re.match(r"\s*([-*+]|\d+\.)\s", line)
    is_row = line.lstrip().startswith("|")
    is_break = not line.strip() or line.startswith(("#", "<!--", "---")) or in_code
    if block and (is_item or is_row or is_break):
      yield from sentences(path, start, " ".join(block))
      block = []
    if is_break:
      continue
    if is_row:
      for cell in line.strip().strip("|").split("|"):
        yield from sentences(path, number, cell)
      continue
    start = start if block else number
    block.append(re.sub(r"^\s*([-*+>]|\d+\.|!!! \w+)\s", "", line))
  if in_code:
    sys.exit(f"error: {path}: a code block is not closed")


def paragraphs(path: Path, line: int, text: str):
  """Yield the sentences of a docstring, or of several comment lines: indented examples left out."""
  for block in re.split(r"\n\s*\n", text):
    lines = block.splitlines()
    if lines and all(it.startswith("    ") for it in lines if it.strip()):
      continue  # an example
    # An entry of Args: or a list ends the sentence before it.
    for part in re.split(r"\n(?=\s*(?:[-*]|[\w`, ]+:)\s)", block):
      yield from sentences(path, line, part)


def python(path: Path):
  """Yield (kind, sentence) of a Python file: docstrings, messages, comments."""
  source = path.read_text()
  tree = ast.parse(source)
  docs = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
      text = ast.get_docstring(node)
      if text:
        docs.add(id(node.body[0].value))
        for piece in paragraphs(path, node.body[0].lineno, text):
          yield "docstrings", piece
  inside = {
    id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values
  }
  for node in ast.walk(tree):
    if id(node) in docs or id(node) in inside:
      continue
    if isinstance(node, ast.JoinedStr):
      parts = [it.value if isinstance(it, ast.Constant) else "CODE" for it in node.values]
      text = "".join(map(str, parts))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
      text = node.value
    else:
      continue
    if " " in text and not re.search(r"[{}<>=]{2}|^\s*<", text):
      for piece in sentences(path, node.lineno, text):
        yield "messages", piece
  yield from (("comments", piece) for piece in comments(path, source))


def comments(path: Path, source: str):
  """Yield the sentences of comments; consecutive comment lines are one paragraph."""
  block, start, last = [], 0, -1
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type != tokenize.COMMENT or "type: ignore" in token.string or "noqa" in token.string:
      continue
    number = token.start[0]
    alone = token.line.lstrip().startswith("#")
    if block and not (alone and number == last + 1):
      yield from sentences(path, start, " ".join(block))
      block = []
    start = start if block else number
    block.append(token.string.lstrip("# "))
    last = number if alone else -1
  if block:
    yield from sentences(path, start, " ".join(block))


def collect(paths: list[Path]):
  """Return {kind: sentences} of all files under the paths."""
  kinds = {kind: [] for kind in LIMITS}
  for path in paths:
    if path.name == "README.md" and path.parent == ROOT:
      kinds["README"] += markdown(path)
    elif path.suffix == ".md":
      kinds["docs"] += markdown(path)
    elif path.suffix == ".ipynb":
      kinds["docs"] += notebook(path)
    elif path.suffix == ".py":
      for kind, piece in python(path):
        kinds[kind].append(piece)
  return kinds


def files(names: list[str]) -> list[Path]:
  if not names:
    names = ["README.md", "docs", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "jaxft"]
    names += ["configs", "examples"]
  found = []
  for name in names:
    path = ROOT / name  # an absolute path stays what it is
    if not path.exists():
      sys.exit(f"error: {path}: no such file")
    found += sorted(it for it in path.rglob("*") if it.suffix in SUFFIXES) or [path]
  return found


def measure(pieces: list[Piece]) -> tuple[float, int, float]:
  """Return words a sentence on average, words of the longest, and markers per 1,000 words."""
  words = [piece.words for piece in pieces] or [0]
  markers = sum(len(piece.markers) for piece in pieces)
  return sum(words) / len(words), max(words), 1000 * markers / max(sum(words), 1)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("paths", nargs="*", help="files or folders (default: all prose)")
  parser.add_argument(
    "--worst", type=int, default=0, metavar="N", help="show N sentences of a kind"
  )
  args = parser.parse_args()

  kinds = collect(files(args.paths))
  faults = []
  print(f"{'text':<12}{'sentences':>10}{'words':>8}{'average':>9}{'longest':>9}{'markers':>9}")
  for kind, pieces in kinds.items():
    if not pieces:
      continue
    measured = measure(pieces)
    total = sum(piece.words for piece in pieces)
    print(
      f"{kind:<12}{len(pieces):>10}{total:>8}{measured[0]:>9.1f}{measured[1]:>9}{measured[2]:>9.1f}"
    )
    names = ("words a sentence", "words in the longest sentence", "markers per 1,000 words")
    for name, value, limit in zip(names, measured, LIMITS[kind], strict=True):
      if limit is not None and value > limit:
        faults.append(f"{kind}: {value:.4g} {name}; the limit is {limit}")
    if kind == "README" and len((ROOT / "README.md").read_text().split()) > README_WORDS:
      words = len((ROOT / "README.md").read_text().split())
      faults.append(f"README: {words} words; the limit is {README_WORDS}")
  for kind, pieces in kinds.items():
    worst = sorted(pieces, key=lambda it: (len(it.markers), it.words), reverse=True)[: args.worst]
    for it in worst:
      found = ", ".join(it.markers) or "-"
      print(f"{it.path}:{it.line}: {it.words} words, {found}: {it.text[:300]}")
    if args.worst:
      common = Counter(marker for piece in pieces for marker in piece.markers).most_common(12)
      print(f"{kind}: " + ", ".join(f"{marker} {count}" for marker, count in common))
  for fault in faults:
    print(f"error: {fault}", file=sys.stderr)
  return 1 if faults else 0


if __name__ == "__main__":
  sys.exit(main())
