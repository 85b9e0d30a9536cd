"""What a process may be started without, set right before anything else is imported: streams, a home, a width to print in."""

import os
import pwd
import sys
import tempfile
from pathlib import Path

NARROWEST = 40  # columns: below it rich cuts numbers


def set_right() -> None:
  """Give the process what its parent did not."""
  _open_closed_streams()
  _find_a_home()
  _print_wide_enough()


def _open_closed_streams() -> None:
  """A stream that was closed (`>&-`) becomes the null device. Else the next file that is opened would take its place, and
  whatever a library prints would be written into it."""
  for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
    if getattr(sys, name) is None:
      try:
        os.fstat(number)  # Python has closed nothing itself: if it is there it is somebody's file
      except OSError:
        os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
      setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


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
