"""Where benchmarks put what they found: docs/benchmarks.md, each in a section of its own."""

from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def put(what: str, command: str, text: str) -> None:
  """Puts a result into the page, in the place of the last one of its name."""
  begin, end = f"<!-- {what} -->", f"<!-- end of {what} -->"
  old = PAGE.read_text(encoding="utf-8")
  if begin not in old:
    old += f"\n## {what[0].upper() + what[1:]}: `python {command}`\n\n{begin}\n{end}\n"
  before, _, rest = old.partition(begin)
  _, _, after = rest.partition(end)
  PAGE.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
