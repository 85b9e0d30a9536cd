"""Setup of a command before its imports, which take a second; then `errors.run_command` runs it."""

import gc
import signal
import sys

from jaxft.cli import usage
from jaxft.utils import environment


def begin_command() -> None:
  """Set up the environment of the process, and print --help if requested."""
  # Without this, Ctrl-C during the imports prints pages of traceback.
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  environment.setup()
  environment.quiet_transformers()
  # With the default of 700, garbage collection takes a tenth of the import time.
  gc.set_threshold(10_000, 10, 10)
  usage.print_help(sys.orig_argv)
