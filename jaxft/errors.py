"""What can end a command, and the exit code each ending has (README, "Exit codes")."""

import sys
import traceback
from collections.abc import Callable


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


class PeerLost(JaxftError):
  """Another process of the run did not come, died or froze."""

  exit_code = 5


class Preempted(JaxftError):
  """Asked to stop, and saved: the same command continues the run."""

  exit_code = 75


def first_line(error: Exception) -> str:
  """What an exception of another library says, in one line; its type where it says nothing."""
  return (str(error).strip() or type(error).__name__).splitlines()[0]


def shortened(line: str) -> str:
  """The line without its middle, if it is long: a value in it may be a file's whole content."""
  return line if len(line) <= 2000 else f"{line[:1000]} ... {line[-1000:]}"


def run_command(main: Callable[[], None]) -> None:
  """Runs a command's `main` and turns its endings into exit codes."""
  for stream in (sys.stdout, sys.stderr):  # a terminal or a log that is not in UTF-8 must not end a run
    stream.reconfigure(errors="backslashreplace")
  try:
    main()
  except (JaxftError, OSError, KeyboardInterrupt) as error:
    sys.exit(tell(error))


def tell(error: BaseException) -> int:
  """Says on standard error why a command ends, and returns its exit code."""
  if isinstance(error, JaxftError):
    label = "stopped" if isinstance(error, Preempted) else "error"
    for line in str(error).splitlines():
      print(f"{label}: {shortened(line)}", file=sys.stderr)
    return error.exit_code
  if isinstance(error, OSError):  # a full disk, a folder that may not be written: its text names the file
    print(f"error: {error}", file=sys.stderr)
    return StorageError.exit_code
  if isinstance(error, KeyboardInterrupt):
    print("stopped: interrupted", file=sys.stderr)
    return 130
  traceback.print_exception(error)  # a fault of jaxft's own
  return JaxftError.exit_code
