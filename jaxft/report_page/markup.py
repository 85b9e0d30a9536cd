"""HTML whose text is always escaped: a sample, a path or a label may hold any characters."""

import base64
import hashlib
import html
from typing import Any

from jaxft.report_page.style import SCRIPT, STYLE
from jaxft.utils.console import escape_controls


class Html(str):
  """Markup. Every other text that goes into a page is escaped by `element`."""


def element(name: str, *children: Any, **attributes: Any) -> Html:
  """An element: children are texts, numbers, Html, lists of these, or None, which is left out.

  Attributes that are None are left out too; class_ gives class, and data_x data-x.
  """
  words = [name] + [
    f'{key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
    for key, value in attributes.items()
    if value is not None
  ]
  return Html(f"<{' '.join(words)}>{escape_children(*children)}</{name}>")


def escape_children(*children: Any) -> Html:
  """The children, escaped, side by side."""
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
  """The text as HTML: control characters and halves of surrogate pairs, which no page may hold, are written out."""
  return html.escape(escape_controls(text.encode(errors="backslashreplace").decode()))


def breakable(text: str) -> Html:
  """The text, which a narrow screen breaks behind a slash before it does within a word."""
  return Html(escape(text).replace("/", "/<wbr>"))


def table(head: list[Any], rows: list[list[Any]], class_: str | None = None) -> Html:
  """The first cell of a row is its name; the table scrolls sideways where the screen is narrower."""
  body = [
    element("tr", element("th", row[0], scope="row"), [element("td", cell) for cell in row[1:]])
    for row in rows
  ]
  top = (
    element("thead", element("tr", [element("th", cell, scope="col") for cell in head]))
    if head
    else None
  )
  return element(
    "div",
    element("table", top, element("tbody", body)),
    class_=" ".join(filter(None, ["scroll", class_])),
  )


def section(title: str, *children: Any) -> Html:
  return element("section", element("h2", title), *children)


def render_page(title: str, *children: Any) -> str:
  """A whole page that loads nothing: its policy forbids any request, and any script but the one here."""
  digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
  policy = (
    f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
  )
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
    f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
    + "\n".join(escape_children(child) for child in children)
    + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
  )
