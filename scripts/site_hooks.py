"""Hooks of mkdocs: pages from outside docs/, links out of docs/, and the package diagram.

The pages are written for a reader of the repository. Here their links to other files of it become
names of files, and CHANGELOG.md and CONTRIBUTING.md become pages.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
PAGES = {**OUTSIDE, "README.md": "index.md"}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
DIAGRAM = "![Packages of jaxft; an arrow leads to the package that imports](figures/packages.svg)"


def on_files(files, config):
  """Add the pages that are at the root of the repository."""
  for source, page in OUTSIDE.items():
    text = (ROOT / source).read_text(encoding="utf-8")
    files.append(File.generated(config, page, content=relinked(text, source, page)))
  return files


def on_page_markdown(markdown, page, config, files):
  """Mend links out of docs/, and draw what GitHub draws from Mermaid."""
  name = page.file.src_uri
  if name not in OUTSIDE.values():
    markdown = relinked(markdown, f"docs/{name}", name)
  # mkdocs-material would load Mermaid from another host.
  return re.sub(r"```mermaid\n.*?```", DIAGRAM, markdown, flags=re.DOTALL)


def relinked(text: str, source: str, page: str) -> str:
  """Return the Markdown of `source` with links that hold at `page` of the site."""

  def relink(link: re.Match[str]) -> str:
    words, target, anchor = link.groups()
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if path in PAGES:
      path = PAGES[path]
    elif path.startswith("docs/"):
      path = path.removeprefix("docs/")
    elif (ROOT / path).exists():
      return words if words in (f"`{path}`", path) else f"{words} (`{path}`)"
    return f"[{words}]({posixpath.relpath(path, posixpath.dirname(page) or '.')}{anchor or ''})"

  pieces, end = [], 0
  for block in FENCE.finditer(text):
    pieces += [with_blank_lines(LINK.sub(relink, text[end : block.start()])), block[0]]
    end = block.end()
  return "".join([*pieces, with_blank_lines(LINK.sub(relink, text[end:]))])


def with_blank_lines(text: str) -> str:
  """Return text whose lists and tables follow an empty line, which GitHub does not need."""
  return re.sub(r"^(?![-*|#]|\d+\. |\s|$)(.+)\n(?=[-*] |\||\d+\. )", r"\1\n\n", text, flags=re.M)
