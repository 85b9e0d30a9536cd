"""Errors that end a command, each with its exit code (docs/reference/workdir.md)."""

import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable


class JaxftError(Exception):
  """An error that the user can fix: printed as one or more lines, without a traceback."""

  exit_code = 1


class RequestError(JaxftError):
  """The request is invalid: a setting, a data file, a model folder."""

  exit_code = 2


class NumericsError(JaxftError):
  """The loss or the gradients became NaN or infinite."""

  exit_code = 3


class StorageError(JaxftError):
  """A checkpoint or an export could not be written, or is damaged on disk."""

  exit_code = 4


class CheckpointReadError(StorageError):
  """A checkpoint that may be intact cannot be read now: permission, memory or file handles."""


class PeerLostError(JaxftError):
  """Another process of the run did not start, died or froze."""

  exit_code = 5


class Preempted(BaseException):
  """The run was asked to stop, and saved a checkpoint: the same command resumes it.

  Like KeyboardInterrupt it is not an Exception: a signal may raise it inside any library, and an
  `except Exception` there must not catch it.
  """

  exit_code = 75


def first_line(error: BaseException) -> str:
  """Return the first line of another library's error, or its type if it has no message."""
  return (str(error).strip() or type(error).__name__).splitlines()[0]


def truncate(line: str) -> str:
  """Cut the middle out of a long line: it may quote the whole content of a file."""
  return line if len(line) <= 2000 else f"{line[:1000]} ... {line[-1000:]}"


def same_command(overwrite: bool) -> str:
  """Name the command that resumes a run; with --overwrite_output_dir it would start a new one."""
  return "the same command" + ", without --overwrite_output_dir," * overwrite


def run_command(main: Callable[[], None]) -> None:
  """Run `main` of a command, and turn its errors into exit codes."""
  signal.signal(signal.SIGINT, signal.default_int_handler)  # undo cli/startup.py
  sys.excepthook = sys.__excepthook__  # all imports are done
  for stream in (sys.stdout, sys.stderr):  # printing to a stream without UTF-8 must not fail
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="backslashreplace")
  sys.unraisablehook = _ignore_closed_loops
  try:
    main()
  except (JaxftError, Preempted, OSError, KeyboardInterrupt) as error:
    code = print_error(error)
    with contextlib.suppress(OSError):
      sys.stdout.flush()
      sys.stderr.flush()
    # Skip the shutdown of the interpreter: it takes 0.8 s, and it crashes with code 139 if a signal
    # came while XLA compiled (jax 0.10.2).
    os._exit(code)


def _ignore_closed_loops(unraisable: "sys.UnraisableHookArgs") -> None:
  """Ignore messages of TensorStore (0.1.86) after a failed write: half a page for each array.

  The failure itself is raised as an exception.
  """
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


def exit_code(error: BaseException) -> int:
  """Return the exit code of a command that ends with this error."""
  if isinstance(error, JaxftError | Preempted):
    return error.exit_code
  if isinstance(error, OSError):  # a full disk, or a folder without write permission
    return StorageError.exit_code
  return 130 if isinstance(error, KeyboardInterrupt) else JaxftError.exit_code


def print_error(error: BaseException) -> int:
  """Print an error on standard error, if it is still open, and return its exit code."""
  try:
    if isinstance(error, JaxftError | Preempted):
      label = "stopped" if isinstance(error, Preempted) else "error"
      for line in str(error).splitlines():
        print(f"{label}: {truncate(line)}", file=sys.stderr)
    elif isinstance(error, OSError):  # its message names the file
      print(f"error: {error}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
      print("stopped: interrupted", file=sys.stderr)
    else:
      traceback.print_exception(error)  # a bug in jaxft
  except OSError:  # a closed terminal, or a log on a full disk
    # Otherwise Python retries the write at exit, and changes the exit code.
    sys.stderr = open(os.devnull, "w", encoding="utf-8")
  return exit_code(error)
