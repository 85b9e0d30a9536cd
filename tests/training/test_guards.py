"""Workdir lock, disk space, signals, the best checkpoint, early stopping, non-finite numbers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft.train
import jaxft.training.workdir
from jaxft.checkpoint import manager
from jaxft.errors import Preempted, RequestError, StorageError
from jaxft.metrics.logger import MetricsLogger
from jaxft.metrics.sinks import JsonlLog
from jaxft.pretrained import load_workdir
from jaxft.train import finetune
from jaxft.training import loop, preemption
from jaxft.training.train_state import TrainState
from jaxft.training.train_step import nonfinite_leaf_names
from jaxft.utils.files import atomic_write


def test_workdir_lock_refuses_second_run(config, tmp_path):
  """The message has pid and host."""
  with jaxft.training.workdir.lock_workdir(tmp_path / "run"):
    held = json.loads((tmp_path / "run" / "run.lock.json").read_text())
    script = f"""
from pathlib import Path
from jaxft.training.workdir import lock_workdir
with lock_workdir(Path({str(tmp_path / "run")!r})): pass
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (
      f"RequestError: --workdir={str(tmp_path / 'run')!r}: process {os.getpid()} on "
      f"{held['host']} is writing" in done.stderr
    )
  with jaxft.training.workdir.lock_workdir(tmp_path / "run"):
    pass


def test_move_aside_moves_the_lock_too(tmp_path, monkeypatch):
  """Never from under a run."""
  workdir = tmp_path / "run"
  with jaxft.training.workdir.lock_workdir(workdir / "of_another"):
    with jaxft.training.workdir.lock_workdir(workdir):
      with pytest.raises(
        RequestError, match=f"process {os.getpid()} on .* is writing in .*run/of_another; stop it"
      ):
        jaxft.training.workdir.check_movable(workdir)
  with jaxft.training.workdir.lock_workdir(workdir):
    jaxft.training.workdir.check_movable(workdir)
    (workdir / "metrics.jsonl").touch()
    assert jaxft.training.workdir.move_aside(workdir) == tmp_path / "run.1"
    assert sorted(it.name for it in workdir.iterdir()) == sorted(jaxft.training.workdir.LOCK_FILES)
    assert sorted(it.name for it in (tmp_path / "run.1").iterdir()) == [
      "metrics.jsonl",
      "of_another",
    ]
    with (
      pytest.raises(RequestError, match="is writing there"),
      jaxft.training.workdir.lock_workdir(workdir),
    ):
      pass
  with monkeypatch.context() as quota:
    quota.setattr(
      Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(122, "Disk quota exceeded"))
    )
    with pytest.raises(StorageError, match="Disk quota exceeded"):
      jaxft.training.workdir.move_aside(workdir)
  assert (workdir / jaxft.training.workdir.LOCK_FILES[0]).exists() and not (
    tmp_path / "run.2"
  ).exists()
  with pytest.raises(RequestError, match="/proc is a mount point"):
    jaxft.training.workdir.check_movable(Path("/proc"))
  monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
  with pytest.raises(RequestError, match="is not writable"):
    jaxft.training.workdir.check_movable(workdir)
  (tmp_path / "link").symlink_to(tmp_path / "nowhere")
  with (
    pytest.raises(RequestError, match="a broken link"),
    jaxft.training.workdir.lock_workdir(tmp_path / "link"),
  ):
    pass


def test_check_disk_space_names_the_bytes(tmp_path):
  jaxft.training.workdir.check_disk_space({tmp_path / "not" / "there": 1000}, "checkpoints")
  with pytest.raises(
    StorageError,
    match=r"there: checkpoints need 1,000,000,000,000,000,000 bytes and the disk has [\d,]+ free",
  ):
    jaxft.training.workdir.check_disk_space(
      {tmp_path: 10, tmp_path / "not" / "there": 10**18 - 10}, "checkpoints"
    )


def test_check_disk_space_sums_folders_of_one_disk(tmp_path, monkeypatch):
  monkeypatch.setattr(
    jaxft.training.workdir.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 900, 100)
  )
  jaxft.training.workdir.check_disk_space({tmp_path / "a": 60, tmp_path / "b": 40}, "checkpoints")
  with pytest.raises(StorageError, match="b: checkpoints need 110 bytes and the disk has 100 free"):
    jaxft.training.workdir.check_disk_space({tmp_path / "a": 60, tmp_path / "b": 50}, "checkpoints")


def test_second_signal_has_the_default_handler(monkeypatch):
  sent = []
  with preemption.PreemptionHandler() as stop, stop.deferred():
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.received == "SIGUSR1" and signal.getsignal(signal.SIGTERM) == stop._on_signal
    monkeypatch.setattr(
      jaxft.training.workdir.os,
      "kill",
      lambda pid, number: sent.append((pid, number, signal.getsignal(number))),
    )
    stop._on_signal(signal.SIGTERM, None)
  assert sent == [(os.getpid(), signal.SIGTERM, signal.SIG_DFL)]


def test_checkpoint_save_overlaps_one_step(config, tmp_path, monkeypatch):
  """So that a kill costs at most `save_every` + 1 steps, however slow the disk is."""
  events, wait, save, log_step = (
    [],
    manager.CheckpointManager.wait,
    manager.CheckpointManager.save,
    MetricsLogger.log_step,
  )
  monkeypatch.setattr(
    manager.CheckpointManager, "wait", lambda self: (events.append("wait"), wait(self))[1]
  )
  monkeypatch.setattr(
    manager.CheckpointManager,
    "save",
    lambda self, step, *rest: (save(self, step, *rest), events.append(("save", step)))[0],
  )
  monkeypatch.setattr(
    MetricsLogger,
    "log_step",
    lambda self, step, *rest: (events.append(("logged", step)), log_step(self, step, *rest))[1],
  )
  config.train.save_every = 3
  finetune(config, tmp_path / "run")
  for step in (3, 6, 9):
    after = events[events.index(("save", step)) :]
    assert "wait" in after[: after.index(("logged", step + 2))], after


def test_best_checkpoint_is_preserved_beside_newest(tmp_path):
  checkpoints = manager.CheckpointManager(tmp_path / "c", 2, best_metric="eval/loss")
  state = {"x": jnp.arange(7.0)}
  for step, loss in enumerate([3.0, 1.0, 2.0, 2.5, 2.6, 2.7], 1):
    checkpoints.save(step, state, {"config": {}}, {"eval/loss": loss})
  checkpoints.wait()
  assert checkpoints.steps() == [2, 5, 6]
  checkpoints.close()
  # another process knows it too
  again = manager.CheckpointManager(tmp_path / "c", 2, best_metric="eval/loss", writes=True)
  for step in (7, 8):
    again.save(step, state, {"config": {}}, {"eval/loss": 2.0})
  again.close()
  assert again.steps() == [2, 7, 8] and sorted(
    path.name for path in (tmp_path / "c").iterdir()
  ) == ["2", "7", "8"]


def test_last_state_is_freed_before_the_best_is_read(config, tmp_path, monkeypatch):
  """There may be no room for two, and where no step is left none donates the first."""
  config.train.keep_best_metric, config.train.eval_every = "eval/loss", 4
  refs, freed = [], []
  train, restore = loop.train, jaxft.train.restore_best

  def trained(run, state, **tools):
    first = jax.tree.leaves(state)
    step, state = train(run, state, **tools)
    freed.append([x.is_deleted() for x in first])
    refs.extend(map(weakref.ref, jax.tree.leaves(state)))
    return step, state

  def restored(*rest):
    freed.append([ref() is None for ref in refs])
    return restore(*rest)

  monkeypatch.setattr(loop, "train", trained)
  monkeypatch.setattr(jaxft.train, "restore_best", restored)
  finetune(config, tmp_path / "run")
  assert all(map(all, freed)) and len(freed) == 2
  refs.clear(), freed.clear()
  finetune(config, tmp_path / "run")
  assert not any(freed[0]) and all(freed[1])


def test_early_stopping_ends_training(config, tmp_path):
  config.optim.learning_rate, config.optim.warmup_steps = 1e-30, 0  # nothing is learned
  config.train.eval_every, config.train.early_stopping_patience, config.train.keep_best_metric = (
    2,
    2,
    "eval/loss",
  )
  run = finetune(config, tmp_path / "run")
  evaluated = [line["step"] for line in run.metrics if "eval/loss" in line]
  assert evaluated == [0, 2, 4] and run.metrics[-1]["step"] == 4
  again = finetune(config, tmp_path / "run")  # and is over when it is started again
  assert [line["step"] for line in again.metrics if "eval/loss" in line] == evaluated
  assert (run.export / "model.safetensors").exists()


@pytest.mark.slow
def test_strict_run_ends_at_a_damaged_checkpoint(config, tmp_path):
  finetune(config, tmp_path / "run")
  newest = max(
    int(entry.name)
    for entry in (tmp_path / "run" / "checkpoints").iterdir()
    if entry.name.isdecimal()
  )
  for file in (tmp_path / "run" / "checkpoints" / str(newest)).rglob("*"):
    if file.is_file() and file.stat().st_size > 1000:
      data = bytearray(file.read_bytes())
      data[len(data) // 2] ^= 4
      file.write_bytes(data)
  with pytest.raises(StorageError, match=f"checkpoints/{newest}: damaged"):
    finetune(config, tmp_path / "run", strict=True)
  assert (tmp_path / "run" / "checkpoints" / str(newest)).exists()
  finetune(config, tmp_path / "run")


@pytest.mark.slow
def test_changed_setting_needs_allow_change(config, tmp_path):
  finetune(config, tmp_path / "run")
  # longer it may be, with another rate it is another run
  config.train.steps, config.optim.learning_rate = 14, 5e-4
  refused = (
    r"(?s)^config.optim.learning_rate=0.0005: the run was started with 0.001\n[^\n]*--allow_change"
  )
  with pytest.raises(RequestError, match=refused):
    finetune(config, tmp_path / "run")
  run = finetune(config, tmp_path / "run", allow_change=True)
  assert max(line["step"] for line in run.metrics) == 14


def test_resume_refuses_other_model_data_or_optimizer(config, folder, stories, tmp_path):
  """The message names what differs."""
  model, text = (
    shutil.copytree(folder, tmp_path / "model"),
    shutil.copyfile(stories, tmp_path / "text.jsonl"),
  )
  config.model.path, config.data.train = str(model), (str(text),)
  finetune(config, tmp_path / "run")
  facts = (model / "config.json").read_text()
  # of the same shapes
  (model / "config.json").write_text(json.dumps(json.loads(facts) | {"layer_norm_epsilon": 0.5}))
  with pytest.raises(RequestError, match="norm_eps is 0.5; the run was started with 1e-05"):
    finetune(config, tmp_path / "run")
  # the run keeps the config that it trained
  assert load_workdir(tmp_path / "run").source.cfg.norm_eps == 1e-5
  saved_config = tmp_path / "run" / "run.model" / "config.json"
  saved_config.write_text(
    json.dumps(json.loads(saved_config.read_text()) | {"layer_norm_epsilon": 0.5})
  )
  with pytest.raises(RequestError, match="norm_eps is 0.5, but was 1e-05 when the run"):
    load_workdir(tmp_path / "run")
  (model / "config.json").write_text(facts)
  rows = text.read_text()
  text.write_text(rows + rows.splitlines()[0] + "\n")
  with pytest.raises(
    RequestError, match="config.data: the training text or its tokenization has changed"
  ):
    finetune(config, tmp_path / "run")
  text.write_text(rows)
  config.optim.name = "lion"
  with pytest.raises(RequestError, match="from another model or optimizer"):
    finetune(config, tmp_path / "run", allow_change=True)
  config.optim.name, config.train.steps = "adamw", 10
  with pytest.raises(RequestError, match="has a checkpoint of step 12 already"):
    finetune(config, tmp_path / "run", allow_change=True)


@pytest.mark.slow
def test_torn_metrics_line_does_not_stop_export(config, tmp_path):
  """A broken config is named."""
  run = finetune(config, tmp_path / "run")
  metrics = run.workdir / "metrics.jsonl"
  os.truncate(metrics, metrics.stat().st_size - 5)
  load_workdir(run.workdir).export(tmp_path / "out")
  assert "eval loss" in (tmp_path / "out" / "README.md").read_text()
  (run.workdir / "config.json").write_bytes(b"\xff")
  with pytest.raises(RequestError, match="config.json: .*decode byte"):
    load_workdir(run.workdir)


def test_nonfinite_leaf_names():
  params = {"a": {"kernel": jnp.zeros(2)}, "b": jnp.zeros(3)}
  state = TrainState(step=jnp.int32(0), params=params, opt_state=(jnp.zeros(2),))
  assert nonfinite_leaf_names(np.array([False, True, False, True, False, True]), state) == [
    "the gradient of ['b']",
    "params['a']['kernel']",
    "opt[0]",
  ]


def test_float16_compute_is_refused_with_advice(config, tmp_path):
  config.model.compute_dtype = "float16"
  with pytest.raises(
    RequestError,
    match="compute_dtype='float16': .*maximum is 65504; bfloat16 has the range of float32",
  ):
    finetune(config, tmp_path / "run")


def test_metrics_of_other_processes_stay_in_memory(tmp_path):
  lines = JsonlLog(tmp_path / "metrics.jsonl", -1, writes=False)
  lines.write({"step": 1, "x": 2})
  assert lines.values("x") == [2] and not list(tmp_path.iterdir())
  assert jax.process_index() == 0


def test_best_step_has_the_least_metric(tmp_path):
  checkpoints = manager.CheckpointManager(tmp_path / "c", 2, best_metric="eval/loss")
  for step, loss in enumerate([3.0, 1.0, 2.0, 2.5], 1):
    checkpoints.save(step, {"x": jnp.arange(7.0)}, {"config": {}}, {"eval/loss": loss})
  checkpoints.wait()
  assert checkpoints.best_step() == 2
  checkpoints.close()
  assert manager.CheckpointManager(tmp_path / "c", 2, best_metric="eval/loss").best_step() == 2


def test_failed_atomic_write_leaves_the_old_file(tmp_path, monkeypatch):
  file = tmp_path / "about.json"
  atomic_write(file, "before")

  def full(_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(StorageError, match="about.json: No space left"):
    atomic_write(file, "after")
  assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]


def test_preemption_between_saves_saves_that_step(config, tmp_path, monkeypatch):
  step = MetricsLogger.log_step

  def stopped(self, number, *rest):
    step(self, number, *rest)
    if number == 2:
      signal.raise_signal(signal.SIGUSR1)

  monkeypatch.setattr(MetricsLogger, "log_step", stopped)
  with pytest.raises(
    Preempted,
    match="SIGUSR1: saved at step 3 of 12; the same command, without --overwrite_output_dir,",
  ):
    finetune(config, tmp_path / "run", overwrite=True)
  assert manager.CheckpointManager(tmp_path / "run" / "checkpoints").steps() == [3]
