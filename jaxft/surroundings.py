"""What a process may be started without, set right before anything else is imported: streams, a home, a width to print in."""

import os
import pwd
import sys
import tempfile
from pathlib import Path

STREAMS = {"stdin": (0, "r"), "stdout": (1, "w"), "stderr": (2, "w")}
NARROWEST = 40  # columns: below it rich cuts numbers


def set_right() -> None:
  """Give the process what its parent did not."""
  _open_closed_streams()
  _find_a_home()
  _print_wide_enough()


def _open_closed_streams() -> None:
  """A stream that was closed (`>&-`) becomes the null device. Else the next file that is opened would take its place, and
  whatever a library prints would be written into it."""
  closed = [name for name in STREAMS if getattr(sys, name) is None]
  for number in range(3):
    try:
      os.fstat(number)  # Python has opened nothing of its own there
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
  for name in closed:
    number, mode = STREAMS[name]
    setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))


def _find_a_home() -> None:
  """Where neither $HOME nor the user's entry in /etc/passwd says where caches may lie, as in a container that runs as another
  user than its image has: a folder of temporary files, of this user alone."""
  if os.environ.get("HOME"):
    return
  try:
    pwd.getpwuid(os.getuid())
  except KeyError:
    home = Path(tempfile.gettempdir()) / f"jaxft-home-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    if home.stat().st_uid == os.getuid() and not home.is_symlink():  # else it is another's
      os.environ["HOME"] = str(home)


def _print_wide_enough() -> None:
  """$COLUMNS is 0 in some containers and under expect."""
  columns = os.environ.get("COLUMNS", "")
  if columns.isdecimal() and int(columns) < NARROWEST:
    os.environ["COLUMNS"] = str(NARROWEST)
