"""Library users silence and redirect what jaxft prints, by `logging.getLogger("jaxft")`."""

import logging
import subprocess
import sys

import pytest

import jaxft
from jaxft.utils.logger import log, warn

LOGGER = logging.getLogger("jaxft")


@pytest.fixture
def logger():
  level, handlers = LOGGER.level, [*LOGGER.handlers]
  yield LOGGER
  LOGGER.setLevel(level)
  LOGGER.handlers[:] = handlers


def test_lines_go_to_stdout_and_warnings_to_stderr(capsys):
  log("a [bold]line[/bold] with \x1b[31m in it")
  warn("too \x07 loud")
  said = capsys.readouterr()
  assert said.out == "a [bold]line[/bold] with \\x1b[31m in it\n"
  assert said.err == "warning: too \\x07 loud\n"


def test_level_silences_a_run(logger, config, tmp_path, capsys):
  config.train.steps = 1
  logger.setLevel(logging.ERROR)
  jaxft.finetune(config, tmp_path / "run")
  said = capsys.readouterr()
  assert said.out == said.err == ""


def test_handler_gets_the_lines_of_a_run(logger, config, tmp_path, capsys):
  config.train.steps = 1
  records = []

  class Collect(logging.Handler):
    def emit(self, record):
      records.append(record)

  logger.handlers[:] = [Collect()]
  jaxft.finetune(config, tmp_path / "run")
  assert capsys.readouterr().out == ""
  lines = [record.getMessage() for record in records]
  assert any(line.startswith("step 1/1") for line in lines)
  assert any(line.startswith("report: ") for line in lines)
  assert {record.levelname for record in records} == {"INFO"}


def test_handler_of_a_user_gets_lines_whenever_it_is_added(config, tmp_path):
  """Also right after `import jaxft`, before anything is logged; and propagation stays as set."""
  program = """
import logging, sys
import jaxft
logger = logging.getLogger("jaxft")
logger.addHandler(logging.FileHandler("log.txt"))
logger.propagate = True
logging.basicConfig(filename="root.txt")
from jaxft.utils.logger import log
log("a line")
"""
  done = subprocess.run(
    [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
  )
  assert done.stdout == "a line\n" and done.stderr == ""
  assert (tmp_path / "log.txt").read_text() == "a line\n"
  assert (tmp_path / "root.txt").read_text() == "INFO:jaxft:a line\n"
