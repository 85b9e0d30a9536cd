"""Write the HTML page of a run, or a page that compares several runs.

python -m jaxft.report WORKDIR [WORKDIR ...] [--out FILE]
"""

from pathlib import Path

from jaxft.cli import parsers
from jaxft.errors import RequestError, run_command
from jaxft.report_page import comparison, run_page, run_record
from jaxft.utils.files import atomic_write


def main() -> None:
  """Write the page and print its path."""
  arguments = parsers.report().parse_args()

  workdirs = arguments.workdirs
  records = [run_record.load(workdir) for workdir in workdirs]
  several = len(workdirs) > 1
  out = arguments.out or (Path("comparison.html") if several else workdirs[0] / "report.html")
  if out.is_dir():
    raise RequestError(f"--out={str(out)!r}: a folder; give the name of a file")
  if not out.parent.is_dir():
    raise RequestError(f"--out={str(out)!r}: no such folder; create {str(out.parent)!r}")
  atomic_write(out, comparison.render(records) if several else run_page.render(records[0]))
  for record in records:
    for note in record.notes:
      print(f"{record.workdir}: {note}")
  print(f"written to {out}")


if __name__ == "__main__":
  run_command(main)
