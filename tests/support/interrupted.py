"""A run that is started again until it ends, and must then equal an undisturbed one."""

import os
import signal
import subprocess
import threading
import time

import fault_points
import jax
import numpy as np
import orbax.checkpoint as ocp
import preloaded
import processes

STEPS, SAVE_EVERY = 12, 3
CONFIG = f"""
import sys
from pathlib import Path
sys.path.insert(0, {{tests!r}})
import tiny

def get_config():
  c = tiny.config(Path({{folder!r}}), Path({{stories!r}}))
  c.model.dropout = 0.1
  c.train.steps, c.train.save_every = {STEPS}, {SAVE_EVERY}
  c.train.eval_every, c.train.micro_batch_size = 4, 4
  c.train.keep_best_metric = "eval/loss"
  return c
"""


class Interrupted:
  """A workdir in which the same command is started until it is through."""

  def __init__(self, config_file, workdir):
    self.workdir, self.config_file, self.moment = (
      workdir,
      config_file,
      workdir.with_name(f"{workdir.name}.moment"),
    )

  def start(self, point="nowhere", count=1, action="none", largest_file=None):
    command = [fault_points.__file__, point, str(count), action]
    command += ["--config", str(self.config_file), "--workdir", str(self.workdir)]
    command += [f"--config.data.cache_dir={self.workdir.with_name(f'{self.workdir.name}.tokens')}"]
    self.moment.unlink(missing_ok=True)
    return preloaded.Popen(
      command,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env=os.environ | {"FAULT_FILE": str(self.moment), "LARGEST_FILE": str(largest_file or "")},
    )

  def end(self, process):
    """Its exit code, all that it said, and the seconds since the fault."""
    # communicate() would leave out what has been read ahead of the last line
    end = threading.Timer(240, process.kill)
    end.start()
    said = process.stdout.read()
    process.stdout.close()
    process.wait(10)
    end.cancel()
    assert "Traceback" not in said and "damaged" not in said, said
    assert process.returncode in (0, 4, 75, -signal.SIGKILL), said
    since = (
      time.time() - float(self.moment.read_text())
      if self.moment.exists() and self.moment.read_text()
      else 0.0
    )
    return process.returncode, said, since

  def lost_steps(self):
    """Steps that were logged and are in no checkpoint."""
    done = [
      line["step"] for line in whole_lines(self.workdir / "metrics.jsonl") if "train/loss" in line
    ]
    return max(done, default=0) - max(steps(self.workdir), default=0)

  def result(self):
    """Everything that must be the same."""
    export = {
      file.name: file.read_bytes()
      for file in (self.workdir / "export").iterdir()
      if file.suffix != ".md"
    }
    samples = (self.workdir / "samples.jsonl").read_text()
    return processes.losses(self.workdir), samples, state(self.workdir, STEPS), export


def whole_lines(file):
  text = file.read_text() if file.exists() else ""
  file_lines = text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]
  return [processes.json.loads(line) for line in file_lines]


def steps(workdir):
  folder = workdir / "checkpoints"
  return (
    [int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()]
    if folder.exists()
    else []
  )


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
  assert same_bits(state, wanted[2])
  evals = {
    line["step"]: line["eval/loss"]
    for line in whole_lines(run.workdir / "metrics.jsonl")
    if "eval/loss" in line
  }
  best = min((step for step in evals if step), key=evals.__getitem__)
  assert {best, STEPS} <= set(steps(run.workdir)) and len(
    steps(run.workdir)
  ) <= 4  # keep=2, the best, one not yet deleted
  left = [
    entry.name for entry in (run.workdir / "checkpoints").iterdir() if not entry.name.isdecimal()
  ]
  assert not left, f"left over: {left}"


def same_bits(a, b):
  bits = lambda x: (x.dtype, x.shape, x.tobytes())
  return jax.tree.all(jax.tree.map(lambda x, y: bits(np.asarray(x)) == bits(np.asarray(y)), a, b))
