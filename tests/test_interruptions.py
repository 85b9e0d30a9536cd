"""Runs that are killed, asked to stop or out of disk, at random and aimed moments, end as undisturbed ones, bit for bit."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import fault_points
import jax
import numpy as np
import orbax.checkpoint as ocp
import processes
import pytest

STEPS, SAVE_EVERY = 12, 3
KILLS, SIGNALS, DISKS = 5, 4, 5  # of a part
CONFIG = f"""
import sys
from pathlib import Path
sys.path.insert(0, {{tests!r}})
import tiny

def get_config():
  c = tiny.config(Path({{folder!r}}), Path({{stories!r}}))
  c.model.dropout = 0.1
  c.train.steps, c.train.save_every, c.train.eval_every, c.train.micro_batch_size = {STEPS}, {SAVE_EVERY}, 4, 4
  c.train.keep_best_metric = "eval/loss"
  return c
"""


class Interrupted:
  """A workdir in which the same command is started until it is through."""

  def __init__(self, config_file, workdir):
    self.workdir, self.config_file, self.moment = workdir, config_file, workdir.with_name(f"{workdir.name}.moment")

  def start(self, place="nowhere", count=1, action="none", largest_file=None):
    command = [sys.executable, fault_points.__file__, place, str(count), action]
    command += ["--config", str(self.config_file), "--workdir", str(self.workdir)]
    command += [f"--config.data.cache_dir={self.workdir.with_name(f'{self.workdir.name}.tokens')}"]
    self.moment.unlink(missing_ok=True)
    return subprocess.Popen(
      command,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env=os.environ | {"FAULT_FILE": str(self.moment), "LARGEST_FILE": str(largest_file or "")},
    )

  def end(self, process):
    """Its exit code, all that it said, and the seconds since the fault."""
    said, _ = process.communicate(timeout=240)
    assert "Traceback" not in said and "damaged" not in said, said
    assert process.returncode in (0, 4, 75, -signal.SIGKILL), said
    since = time.time() - float(self.moment.read_text()) if self.moment.exists() and self.moment.read_text() else 0.0
    return process.returncode, said, since

  def lost_steps(self):
    """Steps that were told of and are in no checkpoint."""
    done = [line["step"] for line in whole_lines(self.workdir / "metrics.jsonl") if "train/loss" in line]
    return max(done, default=0) - max(steps(self.workdir), default=0)

  def result(self):
    """Everything that must be the same."""
    export = {file.name: file.read_bytes() for file in (self.workdir / "export").iterdir() if file.suffix != ".md"}
    samples = (self.workdir / "samples.jsonl").read_text()
    return processes.losses(self.workdir), samples, state(self.workdir, STEPS), export


def whole_lines(file):
  text = file.read_text() if file.exists() else ""
  file_lines = text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]
  return [processes.json.loads(line) for line in file_lines]


def steps(workdir):
  folder = workdir / "checkpoints"
  return [int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()] if folder.exists() else []


def state(workdir, step):
  """Every leaf of a checkpoint, read by Orbax alone."""
  folder = (workdir / "checkpoints" / str(step) / "state").absolute()
  with ocp.PyTreeCheckpointer() as reader:
    to_numpy = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(folder).item_metadata.tree
    )
    return reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=to_numpy))


def assert_same(run, undisturbed):
  (losses, samples, state, export), wanted = run.result(), undisturbed
  assert losses == wanted[0] and samples == wanted[1] and export == wanted[3]
  jax.tree.map(np.testing.assert_array_equal, state, wanted[2])


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, folder, stories):
  file = tmp_path_factory.mktemp("configs") / "interrupted.py"
  places = {"tests": str(processes.ROOT / "tests"), "folder": str(folder), "stories": str(stories)}
  file.write_text(CONFIG.format(**places))
  return file


@pytest.fixture(scope="module")
def undisturbed(config_file, tmp_path_factory):
  run = Interrupted(config_file, tmp_path_factory.mktemp("runs") / "undisturbed")
  began = time.monotonic()
  code, said, _ = run.end(run.start())
  assert code == 0, said
  return run.result(), time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parts(5, 60)
def test_killed_runs_end_as_undisturbed_ones(config_file, undisturbed, tmp_path, part, record_property):
  rng, killed, aimed, lost, run = random.Random(part), 0, 0, [0], None
  wanted, seconds = undisturbed
  while killed < KILLS:
    run = run or Interrupted(config_file, tmp_path / f"run{killed}")
    if rng.random() < 0.5:
      place = rng.choice(list(fault_points.PLACES))
      process = run.start(place, rng.choice([1, 1, 2, 3]), "SIGKILL")
    else:
      process, place = run.start(), None
      time.sleep(rng.uniform(0.3, 1) * seconds)
      process.kill()
    code, _, _ = run.end(process)
    assert code in (0, -signal.SIGKILL)
    if code == 0:
      assert_same(run, wanted)
      run = None
      continue
    killed, aimed = killed + 1, aimed + (place is not None)
    lost.append(run.lost_steps())
    assert lost[-1] <= SAVE_EVERY + 1, (place, lost)
  if run:
    code, said, _ = run.end(run.start())
    assert code == 0, said
    assert_same(run, wanted)
  figures = {"most steps lost": max(lost)}
  record_property("torture", {"what": "SIGKILL, half aimed, half at random", "tried": killed, "figures": figures})
  shutil.rmtree(tmp_path)


PHASES = {  # where a signal meets the run, and whether there is anything to save by then
  "compile": "program built",
  "data": "batch made",
  "step": "step told",
  "evaluation": "evaluation",
  "sample": "sample",
  "save": "arrays written",
  "handing over": "save handed over",
  "reading back": "first checkpoint read back",
  "closing": "saves awaited",
  "export": "weights exported",
  "comparing": "export compared",
  "tokens": "tokens made",
}


@pytest.mark.slow
@pytest.mark.parts(3, 30)
def test_runs_that_are_asked_to_stop_save_and_end_as_undisturbed_ones(
  config_file, undisturbed, tmp_path, part, record_property
):
  rng, stopped, slowest, run, again = random.Random(part), 0, 0.0, None, False
  phases = list(PHASES)[part * SIGNALS % len(PHASES) :][:SIGNALS]
  while stopped < SIGNALS:
    run = run or Interrupted(config_file, tmp_path / f"run{stopped}{'again' * again}")
    number = rng.choice(["SIGTERM", "SIGINT", "SIGUSR1"])
    phase, before = phases[stopped], max(steps(run.workdir), default=0)
    code, said, seconds = run.end(run.start(PHASES[phase], 1 if again else rng.choice([1, 1, 2]), number))
    if code == 0:  # what was left of the run does not pass the place so often: a new one does
      assert_same(run, undisturbed[0])
      assert not again, phase
      run, again = None, True
      continue
    again = False
    assert code == 75 and re.search(f"stopped: {number}: (saved at step|nothing was lost)", said), (phase, said)
    assert seconds < 10
    saved = re.search("saved at step ([0-9]+)", said)
    assert not saved or max(steps(run.workdir)) == int(saved[1]), (phase, said)
    assert max(steps(run.workdir), default=0) >= before
    stopped, slowest = stopped + 1, max(slowest, seconds)
  if run:
    code, said, _ = run.end(run.start())
    assert code == 0, said
    assert_same(run, undisturbed[0])
  figures = {"slowest end, seconds": round(slowest, 1)}
  record_property("torture", {"what": "SIGTERM, SIGINT, SIGUSR1 in every phase", "tried": stopped, "figures": figures})
  shutil.rmtree(tmp_path)


def test_a_second_signal_ends_at_once(config_file, tmp_path):
  run = Interrupted(config_file, tmp_path / "run")
  process = run.start("save begun", 1, "SIGTERM")
  while not run.moment.exists():
    time.sleep(0.01)
  process.terminate()
  assert process.wait(10) == -signal.SIGTERM
  process.stdout.close()


WRITING = ["save begun", "arrays written", "checkpoint in place", "file written, not renamed", "line of metrics"]
WRITING += ["weights exported", "export to be put in place", "tokens written"]


@pytest.mark.slow
@pytest.mark.parts(2, 20)
def test_a_full_disk_ends_with_code_4_and_costs_nothing(config_file, undisturbed, tmp_path, part, record_property):
  rng, filled, run = random.Random(part), 0, None
  while filled < DISKS:
    run = run or Interrupted(config_file, tmp_path / f"run{filled}")
    newest = max(steps(run.workdir), default=0)
    before = newest and state(run.workdir, newest)
    if rng.random() < 0.5:
      process = run.start(rng.choice(WRITING), rng.choice([1, 2, 3]), "ENOSPC")
    else:
      process = run.start(largest_file=rng.choice([500, 3_000, 20_000, 60_000, 100_000]))
    code, said, _ = run.end(process)
    if before:
      jax.tree.map(np.testing.assert_array_equal, state(run.workdir, max(newest, min(steps(run.workdir)))), before)
    if code == 0:
      assert_same(run, undisturbed[0])
      run = None
      continue
    assert code == 4 and re.search(r"error: .*/.*bytes", said), said
    filled += 1
  if run:
    code, said, _ = run.end(run.start())
    assert code == 0, said
    assert_same(run, undisturbed[0])
  record_property("torture", {"what": "disk full: ENOSPC where files are written, RLIMIT_FSIZE", "tried": filled})


@pytest.fixture
def small_disk(tmp_path):
  """A disk of 4 MiB."""
  if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], capture_output=True).returncode:
    pytest.skip("mounting a small disk needs root")
  yield tmp_path
  subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.slow
@pytest.mark.parts(1, 8)
def test_a_disk_that_another_program_fills_costs_nothing(config_file, undisturbed, small_disk, part, record_property):
  run = Interrupted(config_file, small_disk / "run")
  process = run.start()
  for line in process.stdout:
    if line.startswith(f"step {1 + part}/"):
      break
  with (small_disk / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
    while ballast.write(bytes(4096)):
      pass
  code, said, _ = run.end(process)
  assert code == 4 and re.search(r"error: .*/.*bytes", said), said
  code, said, _ = run.end(run.start())
  assert code == 4 and re.search(r"bytes .*free", said), said
  (small_disk / "ballast").unlink()
  code, said, _ = run.end(run.start())
  assert code == 0, said
  assert_same(run, undisturbed[0])
  record_property("torture", {"what": "disk full: a small tmpfs, filled while the run goes on", "tried": 2})
