"""Pages of runs: python -m jaxft.report WORKDIR [WORKDIR ...] [--out FILE]"""

import argparse
from pathlib import Path

from jaxft.errors import RequestError, run_command
from jaxft.files import write_whole
from jaxft.page import comparison, record, run


def main() -> None:
  parser = argparse.ArgumentParser(
    "python -m jaxft.report", description="Writes the page of a run again, or one that compares several runs."
  )
  parser.add_argument("workdirs", nargs="+", type=Path, metavar="WORKDIR", help="what a run was given as --workdir")
  parser.add_argument(
    "--out", type=Path, metavar="FILE", help="the page (default: WORKDIR/report.html; of several: comparison.html)"
  )
  arguments = parser.parse_args()

  workdirs, several = arguments.workdirs, len(arguments.workdirs) > 1
  out = arguments.out or (Path("comparison.html") if several else workdirs[0] / "report.html")
  if out.is_dir() or not out.parent.is_dir():
    raise RequestError(f"--out={str(out)!r}: " + ("a folder; name a file in it" if out.is_dir() else "no such folder"))
  records = [record.read(workdir) for workdir in workdirs]
  write_whole(out, comparison.page(records) if several else run.page(records[0]))
  for it in records:
    for note in it.notes:
      print(f"{it.workdir}: {note}")
  print(f"written to {out}")


if __name__ == "__main__":
  run_command(main)
