"""HTML whose text is always escaped: a sample, a path or a label may have any characters."""

import base64
import hashlib
import html
from typing import Any

from jaxft.report_page.style import SCRIPT, STYLE
from jaxft.utils.console import escape_controls


class Html(str):
  """Markup. Every other text that goes into a page is escaped by `element`."""


def element(name: str, *children: Any, **attributes: Any) -> Html:
  """Returns an element; children are texts, numbers, Html, None or lists of these.

  Children and attributes that are None are left out; class_ gives class, and data_x data-x.
  """
  tag = name
  for key, value in attributes.items():
    if value is not None:
      tag += f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
  return Html(f"<{tag}>{escape_children(*children)}</{name}>")


def escape_children(*children: Any) -> Html:
  """Returns the children, escaped and joined."""
  parts = []
  for child in children:
    if isinstance(child, Html):
      parts.append(child)
    elif isinstance(child, list | tuple):
      parts.append(escape_children(*child))
    elif child is not None:
      parts.append(escape(str(child)))
  return Html("".join(parts))


def escape(text: str) -> str:
  """Returns the text as HTML, without control characters and halves of surrogate pairs."""
  return html.escape(escape_controls(text.encode(errors="backslashreplace").decode()))


def breakable(text: str) -> Html:
  """Returns the text with break opportunities after slashes, for narrow screens."""
  return Html(escape(text).replace("/", "/<wbr>"))


def table(head: list[Any], rows: list[list[Any]], class_: str | None = None) -> Html:
  """Returns a table that scrolls sideways; the first cell of a row is its name."""
  body = []
  for name, *cells in rows:
    body.append(
      element("tr", element("th", name, scope="row"), [element("td", it) for it in cells])
    )
  top = None
  if head:
    top = element("thead", element("tr", [element("th", cell, scope="col") for cell in head]))
  inner = element("table", top, element("tbody", body))
  return element("div", inner, class_=" ".join(filter(None, ["scroll", class_])))


def section(title: str, *children: Any) -> Html:
  return element("section", element("h2", title), *children)


def render_page(title: str, *children: Any) -> str:
  """Returns a page that loads nothing: its policy allows no request and no script but its own."""
  digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
  policy = (
    f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
  )
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    '<link rel="icon" href="data:,">\n'
    f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
    + "\n".join(escape_children(child) for child in children)
    + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
  )
