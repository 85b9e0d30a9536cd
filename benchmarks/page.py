"""Where benchmarks put what they found: docs/benchmarks.md, each in a section of its own."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def machine(device: str, *packages: str) -> str:
  """The date, the machine and the versions: what each section begins with. `device`: as its framework calls it, or "cpu"."""
  what = [str(datetime.date.today()), f"{os.cpu_count()} CPU cores", *([] if device == "cpu" else [device])]
  what += [f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in packages)]
  return ", ".join(what)


def put(what: str, command: str, text: str) -> None:
  """Puts a result into the page, in the place of the last one of its name."""
  begin, end = f"<!-- {what} -->", f"<!-- end of {what} -->"
  old = PAGE.read_text(encoding="utf-8")
  if begin not in old:
    given = shlex.join([command, *sys.argv[1:]])  # a section is of the command that made it first
    old += f"\n## {what[0].upper() + what[1:]}: `python {given}`\n\n{begin}\n{end}\n"
  before, _, rest = old.partition(begin)
  _, _, after = rest.partition(end)
  PAGE.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "missing"
