"""The errors that end a command, each with its exit code (README, "Exit codes")."""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any


class JaxftError(Exception):
  """An error that the user can act on: one or more plain lines and no traceback."""

  exit_code = 1


class RequestError(JaxftError):
  """The request is wrong: a config key, a data file, a model folder."""

  exit_code = 2


class NumericsError(JaxftError):
  """Loss or gradients stopped being finite numbers."""

  exit_code = 3


class StorageError(JaxftError):
  """A checkpoint or an export could not be written, or what was read back is damaged."""

  exit_code = 4


class CheckpointReadError(StorageError):
  """A checkpoint that may be sound cannot be read now: no permission, memory or handles."""


class PeerLostError(JaxftError):
  """Another process of the run did not start, died or froze."""

  exit_code = 5


class Preempted(BaseException):
  """The run was asked to stop, and has saved: the same command continues it.

  Not an Exception, like KeyboardInterrupt: a signal may raise it inside any library, whose own
  `except Exception` must let it pass.
  """

  exit_code = 75


def first_line(error: BaseException) -> str:
  """Return the first line of another library's error, or its type if it has no message."""
  return (str(error).strip() or type(error).__name__).splitlines()[0]


def truncate(line: str) -> str:
  """Cut the middle out of a long line: a value in it may be a file's whole content."""
  return line if len(line) <= 2000 else f"{line[:1000]} ... {line[-1000:]}"


def same_command(overwrite: bool) -> str:
  """Return what continues a run, in words; --overwrite_output_dir would begin it again."""
  return "the same command" + ", without --overwrite_output_dir," * overwrite


def run_command(main: Callable[[], None]) -> None:
  """Run a command's `main` and turn its errors into exit codes."""
  signal.signal(signal.SIGINT, signal.default_int_handler)  # cli/startup.py gave it away
  sys.excepthook = sys.__excepthook__  # everything is imported
  for stream in (sys.stdout, sys.stderr):  # one that is not in UTF-8 must not end a run
    stream.reconfigure(errors="backslashreplace")
  sys.unraisablehook = _ignore_closed_loops
  try:
    main()
  except (JaxftError, Preempted, OSError, KeyboardInterrupt) as error:
    code = print_error(error)
    with contextlib.suppress(OSError):
      sys.stdout.flush()
      sys.stderr.flush()
    # Skip the interpreter's shutdown. It takes 0.8 s; after a signal while XLA compiles it
    # crashes, with code 139 (jax 0.10.2).
    os._exit(code)


def _ignore_closed_loops(unraisable: Any) -> None:
  """Ignore what TensorStore (0.1.86) prints after a failed write, half a page for each array.

  The failure itself is raised.
  """
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


def exit_code(error: BaseException) -> int:
  """Return the exit code of a command that ends with this error."""
  if isinstance(error, JaxftError | Preempted):
    return error.exit_code
  if isinstance(error, OSError):  # a full disk, a folder that may not be written
    return StorageError.exit_code
  return 130 if isinstance(error, KeyboardInterrupt) else JaxftError.exit_code


def print_error(error: BaseException) -> int:
  """Print on standard error, if it is still open, why a command ends; return its exit code."""
  try:
    if isinstance(error, JaxftError | Preempted):
      label = "stopped" if isinstance(error, Preempted) else "error"
      for line in str(error).splitlines():
        print(f"{label}: {truncate(line)}", file=sys.stderr)
    elif isinstance(error, OSError):  # its text names the file
      print(f"error: {error}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
      print("stopped: interrupted", file=sys.stderr)
    else:
      traceback.print_exception(error)  # a fault of jaxft's own
  except OSError:  # a terminal that is gone, a log on a full disk
    # Otherwise Python tries again at its end, and changes the exit code.
    sys.stderr = open(os.devnull, "w", encoding="utf-8")
  return exit_code(error)
