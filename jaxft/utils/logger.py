"""The logger "jaxft", which prints on the console until a user changes it; imports nothing slow."""

import contextlib
import logging
import sys

logger = logging.getLogger("jaxft")


class ConsoleHandler(logging.Handler):
  """Prints log records: warnings on standard error, all others on the console."""

  def emit(self, record: logging.LogRecord) -> None:
    """Print a record without markup and control characters: it may quote users' files."""
    from jaxft.utils.console import console, escape_controls  # rich, when something is printed

    text = escape_controls(record.getMessage())
    # The log may be on a full disk. This must not end the run while its own files can be written.
    with contextlib.suppress(OSError):
      if record.levelno >= logging.WARNING:
        print(f"{record.levelname.lower()}: {text}", file=sys.stderr, flush=True)
      else:
        console.print(text, markup=False)


def configure() -> None:
  """Print what jaxft logs, from level INFO on; `import jaxft` calls this."""
  if logger.level == logging.NOTSET:
    logger.setLevel(logging.INFO)
  if not logger.handlers:
    logger.addHandler(ConsoleHandler())
    logger.propagate = False  # absl and notebooks have a handler at the root


def log(text: str) -> None:
  """Log a line for the user at level INFO."""
  logger.info("%s", text)


def warn(text: str) -> None:
  """Log a line for the user at level WARNING."""
  logger.warning("%s", text)
