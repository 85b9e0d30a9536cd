"""HTML with escaped text: samples, paths and labels may contain any characters."""

import base64
import hashlib
import html
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from jaxft.utils.console import escape_controls


class Html(str):
  """Text that is HTML already; `element` escapes every other text."""


# Text and numbers, which are escaped; Html; None, which is omitted; or sequences of these.
Child: TypeAlias = "str | float | None | Sequence[Child]"


def element(name: str, *children: Child, **attributes: str | float | None) -> Html:
  """Return an HTML element.

  Attributes with the value None are omitted. Names are translated: class_ is class, data_x is
  data-x.
  """
  tag = name
  for key, value in attributes.items():
    if value is not None:
      tag += f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
  return Html(f"<{tag}>{join(children)}</{name}>")


def join(child: Child) -> Html:
  """Return a child, or the concatenation of several, as HTML."""
  if isinstance(child, Html):
    return child
  if isinstance(child, list | tuple):
    return Html("".join(map(join, child)))
  return Html("" if child is None else escape(str(child)))


def escape(text: str) -> str:
  """Return the text as HTML, with control characters and lone surrogates escaped."""
  return html.escape(escape_controls(text.encode(errors="backslashreplace").decode()))


def breakable(text: str) -> Html:
  """Return the text with possible line breaks after slashes, for narrow screens."""
  return Html(escape(text).replace("/", "/<wbr>"))


def table(head: Sequence[Child], rows: Sequence[Sequence[Child]], class_: str = "") -> Html:
  """Return a table that scrolls horizontally; a row's first cell is its header."""
  body = [
    element("tr", element("th", name, scope="row"), [element("td", it) for it in cells])
    for name, *cells in rows
  ]
  top = [element("thead", element("tr", [element("th", it, scope="col") for it in head]))]
  inner = element("table", top if head else None, element("tbody", body))
  return element("div", inner, class_=f"scroll {class_}".strip())


def section(title: str, *children: Child) -> Html:
  """Return a section with a heading."""
  return element("section", element("h2", title), *children)


def read_asset(*names: str) -> str:
  """Return the concatenated style sheets or scripts, which are next to this file."""
  folder = Path(__file__).parent
  return "\n" + "".join((folder / name).read_text(encoding="utf-8") for name in names)


def render_page(title: str, *children: Child) -> str:
  """Return a self-contained page.

  Its content security policy allows no requests, and no script except its own.
  """
  script = read_asset("script.js")
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  policy = (
    f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
  )
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    '<link rel="icon" href="data:,">\n'
    f"<title>{escape(title)}</title>\n<style>{read_asset('style.css', 'memory.css')}</style>\n"
    "</head>\n<body>\n<main>\n"
    + "\n".join(map(join, children))
    + f"\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
  )
