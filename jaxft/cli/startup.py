"""What a command does before its imports, which take a second; `errors.run_command` takes over."""

import gc
import signal
import sys

from jaxft.cli import usage
from jaxft.utils import environment


def begin_command() -> None:
  """Repair the process's environment, and print --help if it is asked for."""
  # Ctrl-C ends the imports without pages of traceback.
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  environment.setup()
  environment.quiet_transformers()
  # The default is 700: garbage collection took a tenth of the time of the imports.
  gc.set_threshold(10_000, 10, 10)
  usage.print_help(sys.orig_argv)
