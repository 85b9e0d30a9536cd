"""What a user sees: a terminal's bar and prompt, and a log without control characters."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from processes import ROOT, train

from jaxft.utils.console import escape_controls

pytestmark = pytest.mark.slow
ESCAPE = "\x1b"
# Ctrl-C reaches what has the terminal as its own; `preexec_fn` would fork a process with JAX's
# threads in it.
OWN_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Terminal:
  """A command on a pseudo-terminal of 24 rows and 100 columns."""

  def __init__(self, *command, **env):
    try:
      self.text, (self._fd, theirs) = "", pty.openpty()
    except OSError:
      pytest.skip("this system gives no pseudo-terminal")
    self.resize(24, 100)
    self.process = subprocess.Popen(
      [sys.executable, "-c", OWN_TERMINAL, "-m", *map(str, command)],
      stdin=theirs,
      stdout=theirs,
      stderr=theirs,
      env=os.environ | {"TERM": "xterm-256color"} | env,
      cwd=ROOT,
    )
    os.close(theirs)

  def resize(self, rows, columns):
    fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

  def send(self, keys):
    os.write(self._fd, keys.encode())

  def until(self, pattern, seconds=120):
    """Reads until the pattern is there; what came before it and it are taken."""
    end = time.monotonic() + seconds
    while not (found := re.search(pattern, self.text)):
      left = end - time.monotonic()
      assert left > 0 and select.select([self._fd], [], [], left)[0], (
        f"{pattern!r} did not come: {self.text[-2000:]!r}"
      )
      try:
        self.text += os.read(self._fd, 65536).decode(errors="replace")
      except OSError:  # the other side is closed
        assert re.search(pattern, self.text), f"{pattern!r} did not come: {self.text[-2000:]!r}"
    taken, self.text = self.text[: found.end()], self.text[found.end() :]
    return taken

  def end(self):
    """All that comes until the command ends, and its exit code."""
    try:
      while more := os.read(self._fd, 65536):
        self.text += more.decode(errors="replace")
    except OSError:
      pass
    return self.text, self.process.wait(60)


def test_progress_bar_resize_and_ctrl_c(config_file, tmp_path):
  """On a terminal: Ctrl-C saves."""
  flags = ("--config.train.steps=100000", "--config.train.save_every=0")
  terminal = Terminal("jaxft.train", "--config", config_file, "--workdir", tmp_path / "w", *flags)
  terminal.until(r"training.*\d+/100000.*tokens/s")
  terminal.resize(11, 37)
  os.kill(terminal.process.pid, signal.SIGWINCH)
  terminal.until("training")
  terminal.send("\x03")
  said, code = terminal.end()
  assert code == 75 and "stopped: SIGINT: saved at step" in said, (code, said)
  assert "Traceback" not in said and list((tmp_path / "w" / "checkpoints").iterdir())


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_log_has_no_control_characters(config_file, tmp_path, variable, monkeypatch):
  """Lines, and nothing that steers a terminal."""
  monkeypatch.setenv(variable, "1")
  done = train(
    config_file, tmp_path / "w", "--config.train.log_every=4", "--config.train.sample_prompts="
  )
  assert ESCAPE not in done.stdout + done.stderr and "\r" not in done.stdout
  assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("step ")] == [
    "4/12",
    "8/12",
    "12/12",
  ]


def test_interactive_generate_streams_text(folder):
  """And remembers the prompts."""
  terminal = Terminal(
    "jaxft.generate", "--model", folder, "--temperature", 0, "--max_new_tokens", 9
  )
  terminal.until("prompt> ")
  terminal.send("Once upon\n")
  first = terminal.until("prompt> ")
  terminal.send(f"{ESCAPE}[A\n")  # arrow up
  again = terminal.until("prompt> ")
  answer = first.replace("\r", "").split("\n")[1]
  assert (
    answer.startswith("Once upon")
    and len(answer) > len("Once upon")
    and answer in again.replace("\r", "")
  )
  terminal.send("\x04")
  said, code = terminal.end()
  assert code == 0 and "Traceback" not in said


def test_single_prompt_is_streamed(folder):
  flags = ("--prompt", "Once upon", "--temperature", 0, "--max_new_tokens", 9)
  on_terminal, code = Terminal("jaxft.generate", "--model", folder, *flags).end()
  piped = subprocess.run(
    [sys.executable, "-m", "jaxft.generate", "--model", folder, *map(str, flags)],
    capture_output=True,
    text=True,
  )
  assert code == 0 and piped.stdout.startswith("Once upon")
  # what a model writes may steer a terminal
  assert on_terminal.replace("\r", "") == escape_controls(piped.stdout)
