"""Runs that are asked to stop, in every phase, save and end as undisturbed ones, bit for bit."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from interrupted import Interrupted, assert_same, steps

# And where a signal meets the run; `make test-all` tries the first four and "step", `make torture`
# all of them.
PHASES = {
  "compile": "program built",
  "evaluation": "evaluation",
  "save": "arrays written",
  "export": "weights exported",
  "data": "batch made",
  "step": "step logged",
  "sample": "sample",
  "handing over": "save handed over",
  "reading back": "first checkpoint read back",
  "closing": "saves awaited",
  "comparing": "export compared",
  "tokens": "tokens made",
}


# A run under nohup does not hear SIGHUP, and tests may be run under it.
SIGNALS = ["SIGTERM", "SIGINT", "SIGUSR1"] + ["SIGHUP"] * (
  signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
)


def phases_of(part):
  """One for part 0, which `make test` runs alone; then four each, in turn."""
  if not part:
    return ["step"]
  return list(itertools.islice(itertools.cycle(PHASES), 4 * (part - 1), 4 * part))


@pytest.mark.parts(2, 31)
def test_preempted_runs_save_and_resume_bit_for_bit(
  interruptible, undisturbed, tmp_path, part, record_property
):
  """Runs that are asked to stop end as undisturbed ones."""
  rng, stopped, slowest, run, again = random.Random(part), 0, 0.0, None, False
  phases = phases_of(part)
  while stopped < len(phases):
    run = run or Interrupted(interruptible, tmp_path / f"run{stopped}{'again' * again}")
    number = rng.choice(SIGNALS)
    phase, before = phases[stopped], max(steps(run.workdir), default=0)
    code, said, seconds = run.end(
      run.start(PHASES[phase], 1 if again else rng.choice([1, 1, 2]), number)
    )
    if code == 0:  # what was left of the run does not pass the point so often: a new one does
      assert_same(run, undisturbed[0])
      assert not run.moment.exists(), f"{phase}: the signal came, and the run went on to its end"
      assert not again, phase
      run, again = None, True
      continue
    again = False
    assert code == 75 and re.search(
      f"stopped: {number}: (saved at step|all steps are saved|no work was lost)", said
    ), (
      phase,
      said,
    )
    saved = re.search("saved at step ([0-9]+)", said)
    assert not saved or max(steps(run.workdir)) == int(saved[1]), (phase, said)
    assert max(steps(run.workdir), default=0) >= before
    stopped, slowest = stopped + 1, max(slowest, seconds)
  if run:
    code, said, _ = run.end(run.start())
    assert code == 0, said
    assert_same(run, undisturbed[0])
  figures = {"slowest end, seconds": round(slowest, 1)}
  record_property(
    "torture",
    {
      "what": "SIGTERM, SIGINT, SIGUSR1, SIGHUP in every phase",
      "tried": stopped,
      "figures": figures,
    },
  )
  shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_second_signal_ends_the_process_at_once(interruptible, tmp_path):
  run = Interrupted(interruptible, tmp_path / "run")
  process = run.start("save begun", 1, "SIGTERM")
  while not run.moment.exists():
    time.sleep(0.01)
  process.terminate()
  assert process.wait(10) == -signal.SIGTERM
  process.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize(
  "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.wide)]
)
def test_signal_during_compilation_has_exit_code(config_file, tmp_path, number):
  """Python's own exit crashed there, with 139: XLA's compiler threads were running (jax 0.10.2)."""
  command = [
    sys.executable,
    "-m",
    "jaxft.train",
    "--config",
    config_file,
    "--workdir",
    tmp_path / "run",
  ]
  environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0"}
  process = subprocess.Popen(
    list(map(str, command)),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env=environment,
  )
  for line in process.stdout:
    if "computing in" in line:
      break
  time.sleep(2)
  process.send_signal(number)
  said = process.communicate(timeout=60)[0]
  assert process.returncode == 75 and "the same command continues" in said, said


@pytest.mark.slow
def test_sighup_of_a_closed_terminal_loses_nothing(config_file, tmp_path):
  """An ssh that drops: SIGHUP from the kernel and from the shell, and nowhere to print."""
  ours, theirs = os.openpty()
  own_terminal = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.executable, sys.argv[1:])"
  )
  arguments = [
    sys.executable,
    "-m",
    "jaxft.train",
    "--config",
    config_file,
    "--workdir",
    tmp_path / "run",
    "--config.train.steps=9999",
  ]
  command = [sys.executable, "-c", own_terminal, *map(str, arguments)]
  process = subprocess.Popen(
    command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
  )
  os.close(theirs)
  shown = b""
  while b"tokens/s" not in shown:  # a bar, on a terminal
    shown += os.read(ours, 4096)
  os.close(ours)
  process.send_signal(signal.SIGHUP)
  assert process.wait(60) == 75
  assert steps(tmp_path / "run")
  about = json.loads((tmp_path / "run" / "about.json").read_text())
  assert about["ending"]["why"].startswith("SIGHUP: saved at step ")
