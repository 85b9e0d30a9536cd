"""Repairs of a process's environment before other imports: streams, home, width.

It also reports environment variables that make a library's import fail.
"""

import os
import pwd
import re
import sys
import tempfile
from pathlib import Path
from types import TracebackType

# Prefixes of variables that a library may reject during its import. Names of other variables, such
# as PATH, may appear in any message.
ENV_PREFIXES = ("JAX_", "XLA_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "DATASETS_", "TF_")
STREAMS = {"stdin": (0, "r"), "stdout": (1, "w"), "stderr": (2, "w")}
MIN_COLUMNS = 40  # rich truncates numbers on a narrower terminal


def setup() -> None:
  """Repair streams, home and terminal width; call this before other imports."""
  _reopen_std_streams()
  _ensure_home()
  _ensure_min_width()
  sys.excepthook = _env_error_hook  # until `errors.run_command` takes over


def quiet_transformers() -> None:
  """Suppress the advice to install torch that transformers prints at import."""
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def _reopen_std_streams() -> None:
  """Open the null device for each standard stream that was closed (`>&-`).

  Otherwise the next opened file would get its descriptor, and output of libraries would be written
  into that file.
  """
  closed = [name for name in STREAMS if getattr(sys, name) is None]
  for number in range(3):
    try:
      os.fstat(number)  # fails if the descriptor is closed
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is `number`
  for name in closed:
    number, mode = STREAMS[name]
    setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))


def _ensure_home() -> None:
  """Set $HOME to a private temporary folder if the user has no home.

  A container that runs as a user unknown to its image has neither $HOME nor an entry in
  /etc/passwd. Libraries would find no folder for their caches.
  """
  if os.environ.get("HOME"):
    return
  try:
    pwd.getpwuid(os.getuid())
  except KeyError:
    home = Path(tempfile.gettempdir()) / f"jaxft-home-{os.getuid()}"
    try:
      home.mkdir(mode=0o700, exist_ok=True)
      own = home.lstat().st_uid == os.getuid() and not home.is_symlink()
    except OSError:  # a file has this name
      own = False
    os.environ["HOME"] = str(home) if own else tempfile.mkdtemp(prefix="jaxft-home-")


def _ensure_min_width() -> None:
  """Raise $COLUMNS if it is too small; it is 0 in some containers and under expect."""
  columns = os.environ.get("COLUMNS", "")
  if columns.isdecimal() and int(columns) < MIN_COLUMNS:
    os.environ["COLUMNS"] = str(MIN_COLUMNS)


def _env_error_hook(
  kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
  """End the process with exit code 2 if a variable makes an import fail.

  An example is JAX_ENABLE_X64=maybe.
  """
  message = str(error)
  variables = {name: it for name, it in os.environ.items() if name.startswith(ENV_PREFIXES)}
  named = [name for name in variables if re.search(rf"\b{re.escape(name)}\b", message.upper())]
  named += [name for name, value in variables.items() if value and repr(value) in message]
  if kind is ValueError and named:
    culprit = f"{named[0]}={os.environ[named[0]]!r}: {' '.join(message.split())}"
    print(f"error: {culprit}; unset the variable, or change its value", file=sys.stderr)
    sys.stderr.flush()
    os._exit(2)
  sys.__excepthook__(kind, error, trace)
