"""What can end a command, and the exit code each ending has (README, "Exit codes")."""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any


class JaxftError(Exception):
  """An ending that the user can act on: one or more plain lines and no traceback."""

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
  """A checkpoint that may be sound cannot be read here and now: no permission, no memory, no handles."""


class PeerLostError(JaxftError):
  """Another process of the run did not come, died or froze."""

  exit_code = 5


class Preempted(BaseException):
  """Asked to stop, and saved: the same command continues the run.

  Like KeyboardInterrupt no Exception: a signal may raise it inside any library, whose own `except Exception` must let it pass.
  """

  exit_code = 75


def first_line(error: Exception) -> str:
  """What an exception of another library says, in one line; its type where it says nothing."""
  return (str(error).strip() or type(error).__name__).splitlines()[0]


def truncate(line: str) -> str:
  """The line without its middle, if it is long: a value in it may be a file's whole content."""
  return line if len(line) <= 2000 else f"{line[:1000]} ... {line[-1000:]}"


def same_command(overwrite: bool) -> str:
  """What continues a run, in words. `overwrite`: it was started with --overwrite_output_dir, which would begin again."""
  return "the same command" + ", without --overwrite_output_dir," * overwrite


def run_command(main: Callable[[], None]) -> None:
  """Runs a command's `main` and turns its endings into exit codes."""
  signal.signal(signal.SIGINT, signal.default_int_handler)  # jaxft/__init__.py gave it away
  sys.excepthook = sys.__excepthook__  # everything is imported
  for stream in (
    sys.stdout,
    sys.stderr,
  ):  # a terminal or a log that is not in UTF-8 must not end a run
    stream.reconfigure(errors="backslashreplace")
  sys.unraisablehook = _ignore_closed_loops
  try:
    main()
  except (JaxftError, Preempted, OSError, KeyboardInterrupt) as error:
    code = print_error(error)
    with contextlib.suppress(OSError):
      sys.stdout.flush()
      sys.stderr.flush()
    # Skip the interpreter's shutdown. It takes 0.8 s; after a signal while XLA compiles it crashes, with code 139 (jax 0.10.2).
    os._exit(code)


def _ignore_closed_loops(unraisable: Any) -> None:
  """After a write that failed, which is raised, TensorStore (0.1.86) tells this of every other array, half a page each."""
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


def exit_code(error: BaseException) -> int:
  """The exit code of a command that ends with this."""
  if isinstance(error, JaxftError | Preempted):
    return error.exit_code
  if isinstance(error, OSError):  # a full disk, a folder that may not be written
    return StorageError.exit_code
  return 130 if isinstance(error, KeyboardInterrupt) else JaxftError.exit_code


def print_error(error: BaseException) -> int:
  """Says on standard error why a command ends, if there is still somebody to hear it, and returns its exit code."""
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
    sys.stderr = open(
      os.devnull, "w", encoding="utf-8"
    )  # or Python tries again at its end, and changes the exit code
  return exit_code(error)
