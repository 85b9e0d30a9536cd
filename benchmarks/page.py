"""Where benchmarks put what they found: docs/benchmarks.md, each in a section of its own.

With BENCHMARKS_OUT=FOLDER that page is left alone: figures and sections are lines of
FOLDER/results.jsonl, appended as they come, and benchmarks/gpu_tables.py makes a page of them. The
standard library only.
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
OUT = os.environ.get("BENCHMARKS_OUT")
_noted: list[dict[str, Any]] = []


def machine(device: str, *packages: str) -> str:
  """The date, the machine and the versions, with which each section begins.

  `device`: as its framework calls it, or "cpu".
  """
  what = [
    str(datetime.date.today()),
    f"{os.cpu_count()} CPU cores",
    *([] if device == "cpu" else [device]),
  ]
  what += [
    f"Python {platform.python_version()}",
    *(f"{name} {_version(name)}" for name in packages),
  ]
  return ", ".join(what)


def where(device: str) -> str:
  """A device as the name of a section has it."""
  return "a CPU" if device == "cpu" else device


def pictures() -> Path:
  """The folder for pictures: beside the page."""
  return Path(OUT) if OUT else PAGE.parent


def note(benchmark: str, **found: Any) -> dict[str, Any]:
  """Keeps figures as they are; one write a line, so that several processes may append to a file."""
  of = {
    name: os.environ[f"BENCHMARKS_{name.upper()}"]
    for name in ("part", "run")
    if f"BENCHMARKS_{name.upper()}" in os.environ
  }
  line = {"benchmark": benchmark, **of, "at": round(time.time()), **found}
  if OUT:
    Path(OUT).mkdir(parents=True, exist_ok=True)
    with (Path(OUT) / "results.jsonl").open("a", encoding="utf-8") as file:
      file.write(json.dumps(line) + "\n")
  _noted.append(line)
  return line


def noted(benchmark: str) -> list[dict[str, Any]]:
  """Lines of `note`: all that FOLDER has with BENCHMARKS_OUT=FOLDER, else those of this process."""
  lines = read(Path(OUT) / "results.jsonl") if OUT else _noted
  return [line for line in lines if line["benchmark"] == benchmark]


def read(file: Path) -> list[dict[str, Any]]:
  """The lines of a results.jsonl, except for one that was cut off in writing or is not ours."""
  found = []
  for line in (
    file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else ()
  ):
    with contextlib.suppress(ValueError):
      found.append(json.loads(line))
  return [line for line in found if isinstance(line, dict) and {"benchmark", "at"} <= line.keys()]


def put(what: str, command: str, text: str, device: str = "cpu") -> None:
  """Puts a result into the page, instead of the last one of its name.

  Args:
    device: that the figures are of, as its framework calls it.
  """
  command = shlex.join([command, *without_paths(sys.argv[1:])])
  if OUT:
    note("section", what=what, command=command, text=text, device=device)
  else:
    PAGE.write_text(
      with_section(PAGE.read_text(encoding="utf-8"), what, command, text), encoding="utf-8"
    )


def without_paths(words: list[str]) -> list[str]:
  """A command's flags without those for files of this machine."""
  return [
    word
    for word, after in zip(words, [*words[1:], ""])
    if not word.startswith("/") and not after.startswith("/")
  ]


def with_section(page: str, what: str, command: str, text: str) -> str:
  """The page with a section, whose heading is of the command that made it first."""
  begin, end = f"<!-- {what} -->", f"<!-- end of {what} -->"
  if begin not in page:
    page += f"\n## {what[0].upper() + what[1:]}: `python {command}`\n\n{begin}\n{end}\n"
  before, _, rest = page.partition(begin)
  _, _, after = rest.partition(end)
  return f"{before}{begin}\n{text}\n{end}{after}"


def with_sections(page: str, lines: list[dict[str, Any]]) -> str:
  """The page with every section of a results.jsonl, the newest of each name."""
  for line in lines:
    if line["benchmark"] == "section":
      page = with_section(page, line["what"], line["command"], line["text"])
  return page


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "missing"
