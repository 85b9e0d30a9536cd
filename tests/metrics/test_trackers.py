"""Trackers: what they got is read back from their own files, and none of them disturbs the run."""

import collections
import contextlib
import json
import math
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import types

import psutil
import pytest
import read_trackers
import tiny

import jaxft.config
from jaxft.errors import NumericsError, Preempted, RequestError
from jaxft.metrics import system, trackers
from jaxft.metrics.sinks import JsonlSink
from jaxft.metrics.system import SystemMetrics
from jaxft.metrics.trackers import TrackerGroup
from jaxft.train import finetune, validate_run
from jaxft.utils.redact import redact

NAMES = ("tensorboard", "mlflow", "wandb", "trackio")
KEY = "0123456789abcdef0123456789abcdef01234567"
ENDINGS = {  # what the reader finds for a run that failed, was preempted, or finished
  "tensorboard": ("failed: step 6", "preempted: SIGTERM", "finished"),
  "mlflow": (
    "FAILED failed at step 6: step 6",
    "KILLED preempted at step 5: SIGTERM",
    "FINISHED finished",
  ),
  "wandb": ("[1] failed: step 6", "[1] preempted: SIGTERM", "[0] finished"),
  "trackio": ("error failed step 6", "warn preempted SIGTERM", "info finished"),
}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
  for name in list(os.environ):
    if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_", "TENSORBOARD_")):
      monkeypatch.delenv(name)
  monkeypatch.setenv("NETRC", os.devnull)  # somebody's key for W&B
  monkeypatch.setattr(trackers, "SHUTDOWN_TIMEOUT", 120)  # other tests may want the same cores


@pytest.fixture
def silent_server():
  """Takes connections, and never says a word."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    yield f"http://127.0.0.1:{server.getsockname()[1]}"


def log_piece(workdir, names, steps, start=0, ending=None):
  """Logs a piece of a run: an entry and a sample for each step."""
  config = jaxft.config.default()
  config.tracking.writers = tuple(names)
  config.model.path = "https://me:hunter2@host/model?token=hunter3"
  files = JsonlSink(workdir, start, True)
  group = TrackerGroup(config=config, workdir=workdir, start=start, files=files, writes=True)

  def write(kind, entry):
    for sink in (files, group):
      sink.write(kind, entry, "")

  with contextlib.suppress(type(ending)), group:
    for step in steps:
      loss = ("nan", "inf")[step - 2] if step in (2, 3) else 1 / step
      write("metrics", {"step": step, "train/loss": loss, "train/tokens": 7 * step})
      text = {"when": "during", "prompt": "Once", "text": f" text{step}", "seed": 0}
      write("samples", {"step": step} | text)
    best = {"when": "after", "prompt": "Once", "text": " of the best", "seed": 0}
    write("samples", {"step": steps[0]} | best)  # an earlier step
    if ending:
      raise ending


def read(name, workdir):
  done = subprocess.run(
    [sys.executable, read_trackers.__file__, name, str(workdir)], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.mark.slow_for("mlflow", "wandb", "trackio")
@pytest.mark.parametrize("name", NAMES)
def test_tracker_gets_each_entry_once_and_status(name, tmp_path):
  """Each entry arrives once, over a resume, and so does the status of each piece."""
  failed, preempted, _ = ENDINGS[name]
  log_piece(tmp_path, [name], range(1, 6), ending=Preempted("SIGTERM: saved"))
  assert read(name, tmp_path)["status"].startswith(preempted)
  error = NumericsError("step 6: loss nan")
  log_piece(tmp_path, [name], range(4, 7), start=3, ending=error)  # 4 and 5 are taken again
  found = read(name, tmp_path)
  assert found["runs"] == 1 and found["status"].startswith(failed)
  assert [step for step, _ in found["metrics"]["train/loss"]] == [1, 2, 3, 4, 5, 6]
  assert [value for _, value in found["metrics"]["train/tokens"]] == [7, 14, 21, 28, 35, 42]
  losses = [value for _, value in found["metrics"]["train/loss"]]
  assert losses[3:] == pytest.approx([1 / 4, 1 / 5, 1 / 6])
  assert math.isnan(losses[1]) and losses[2] > 1e308  # MLflow's database has no infinity
  assert [found["text"].count(f"text{step}") for step in range(1, 7)] == [1] * 6
  assert found["text"].count(" of the best") == 2
  assert float(found["settings"]["optim.learning_rate"]) == 5e-5
  assert found["settings"]["model.path"] == "https://***@host/model?token=***"
  # Without it MLflow's page (3.17) takes the run for one of a generative application, and shows no
  # metrics.
  assert name != "mlflow" or found["kind"] == "custom_model_development"


@pytest.mark.slow
@pytest.mark.wide
def test_restarted_run_and_new_tracker(
  tmp_path,
):
  """A run that begins again is a new run; a tracker that comes later gets all of it."""
  log_piece(tmp_path, ["mlflow", "tensorboard"], [1, 2, 3])
  log_piece(tmp_path, ["mlflow", "tensorboard"], [1, 2, 3, 4])
  log_piece(tmp_path, ["mlflow", "trackio"], [4, 5], start=3)
  assert read("mlflow", tmp_path)["runs"] == 2
  steps = {
    name: [step for step, _ in read(name, tmp_path)["metrics"]["train/tokens"]]
    for name in NAMES[::3]
  }
  assert steps == {"tensorboard": [1, 2, 3, 4], "trackio": [1, 2, 3, 4, 5]}


def readings_of(workdir):
  """The first readings of a thread that has just begun."""
  with SystemMetrics(True, workdir) as metrics:
    until = time.monotonic() + 30
    while not metrics.latest and time.monotonic() < until:
      time.sleep(0.01)
  metrics.join()
  return metrics.latest


def test_system_metrics_of_host(tmp_path):
  found = readings_of(tmp_path)
  assert 0 < found["system/memory_percent"] <= 100
  assert 10e6 < found["system/process_memory_bytes"] < found["system/memory_used_bytes"]
  assert found["system/disk_used_bytes"] == pytest.approx(
    psutil.disk_usage(str(tmp_path)).used, rel=0.1
  )
  assert 0 < found["system/disk_percent"] <= 100
  with SystemMetrics(False, tmp_path) as metrics:
    assert not metrics.is_alive()


def test_disk_and_network_counters_are_deltas(tmp_path, monkeypatch):
  Counters = collections.namedtuple("Counters", "bytes_sent bytes_recv read_bytes write_bytes")
  # None: the host has no disk yet.
  of_disk = iter([None, Counters(0, 0, 1000, 2000), Counters(0, 0, 1003, 2005)])
  of_network = iter([Counters(7, 70, 0, 0), Counters(8, 90, 0, 0)])
  monkeypatch.setattr(psutil, "disk_io_counters", lambda: next(of_disk))
  monkeypatch.setattr(psutil, "net_io_counters", lambda: next(of_network))
  *_, disk, network = system._host_readings(tmp_path)
  assert disk() == {}
  assert disk() == {"system/disk_read_bytes": 0, "system/disk_written_bytes": 0}
  assert disk() == {"system/disk_read_bytes": 3, "system/disk_written_bytes": 5}
  assert network() == {"system/network_sent_bytes": 0, "system/network_received_bytes": 0}
  assert network() == {"system/network_sent_bytes": 1, "system/network_received_bytes": 20}


class Nvml:
  """The functions of pynvml that are called, for two cards; the second reports its memory alone."""

  class NVMLError(Exception):
    pass

  nvmlInit = staticmethod(lambda: None)
  nvmlDeviceGetCount = staticmethod(lambda: 2)
  nvmlDeviceGetHandleByIndex = staticmethod(lambda i: i)

  @staticmethod
  def nvmlDeviceGetMemoryInfo(handle):
    return types.SimpleNamespace(total=8 * 2**30, used=2 * 2**30)

  @classmethod
  def only_of_the_first(cls, handle, value):
    if handle:
      raise cls.NVMLError("Not Supported")
    return value

  @classmethod
  def nvmlDeviceGetUtilizationRates(cls, handle):
    return types.SimpleNamespace(gpu=cls.only_of_the_first(handle, 93))

  @classmethod
  def nvmlDeviceGetPowerUsage(cls, handle):
    return cls.only_of_the_first(handle, 61_500)

  @classmethod
  def nvmlDeviceGetEnforcedPowerLimit(cls, handle):
    return cls.only_of_the_first(handle, 70_000)


def test_gpu_readings_fail_independently(tmp_path, monkeypatch):
  gpu = lambda found: {
    key.removeprefix("system/"): value for key, value in found.items() if "/gpu" in key
  }
  monkeypatch.setitem(sys.modules, "pynvml", Nvml)
  memory = {"memory_bytes": 2 * 2**30, "memory_percent": 25}
  first = memory | {"percent": 93, "power_watts": 61.5, "power_limit_watts": 70}
  expected = {f"gpu0_{key}": value for key, value in first.items()}
  expected |= {f"gpu1_{key}": value for key, value in memory.items()}
  assert gpu(readings_of(tmp_path)) == expected

  def broken(*_):
    raise OSError("no /proc in this container")

  for name in ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetPowerUsage"):
    monkeypatch.setattr(Nvml, name, broken)
  for name in ("virtual_memory", "disk_usage", "cpu_percent"):
    monkeypatch.setattr(psutil, name, broken)
  found = readings_of(tmp_path)
  assert gpu(found) == {"gpu0_percent": 93, "gpu0_power_limit_watts": 70}
  assert found["system/process_memory_bytes"] > 0
  assert not {"system/memory_percent", "system/disk_percent"} & found.keys()
  monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
  assert gpu(found := readings_of(tmp_path)) == {} and found["system/process_memory_bytes"] > 0


@pytest.mark.slow
def test_tracking_keeps_training_and_leaks_no_secret(config, tmp_path, monkeypatch):
  """Training is the same bit for bit, and no file has a secret."""
  plain = finetune(config, tmp_path / "plain")
  monkeypatch.setenv("WANDB_API_KEY", KEY)
  monkeypatch.setenv("WANDB_MODE", "offline")
  config.tracking.writers, config.tracking.system_metrics = NAMES, True
  config.tracking.run_name = "https://me:hunter2@host"
  workdir = tmp_path / "tracked"
  tracked = finetune(config, workdir)
  keys = ("train/loss", "eval/loss", "train/grad_norm")
  losses = lambda run: [
    (line["step"], key, line[key]) for line in run.metrics for key in keys if key in line
  ]
  assert losses(tracked) == losses(plain)
  assert tracked.samples == plain.samples
  assert (tracked.export / "model.safetensors").read_bytes() == (
    plain.export / "model.safetensors"
  ).read_bytes()
  assert (
    0 < tracked.metrics[-2]["system/memory_percent"] <= 100
    and "system/cpu_percent" not in plain.metrics[-2]
  )
  for name in NAMES:
    found = read(name, workdir)
    assert ENDINGS[name][2] in found["status"], name
    for key in ("train/loss", "eval/loss", "system/process_memory_bytes"):
      steps, values = zip(*((line["step"], line[key]) for line in tracked.metrics if key in line))
      assert [step for step, _ in found["metrics"][key]] == list(steps)
      assert [value for _, value in found["metrics"][key]] == pytest.approx(values, rel=1e-6)
  written = [file for file in workdir.rglob("*") if file.is_file()]
  assert [file for file in written if KEY.encode() in file.read_bytes()] == []
  # Beside the request itself, which a resume is compared with, in config.json and in checkpoints.
  assert {
    file.relative_to(workdir).parts[0] for file in written if b"hunter2" in file.read_bytes()
  } == {
    "config.json",
    "checkpoints",
  }


@pytest.mark.slow
def test_broken_trackers_do_not_change_training(
  config, tmp_path, monkeypatch, silent_server, capsys
):
  """Trackers that raise, hang or die are reported once."""
  plain = finetune(config, tmp_path / "plain")
  capsys.readouterr()
  (tmp_path / "file").touch()
  monkeypatch.setenv("MLFLOW_TRACKING_URI", silent_server)  # hangs: 120 s for an answer, and again
  monkeypatch.setenv("WANDB_BASE_URL", silent_server)
  monkeypatch.setenv("WANDB_API_KEY", KEY)
  monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file"))  # raises
  monkeypatch.setattr(trackers, "SHUTDOWN_TIMEOUT", 2)
  start = trackers._start_worker

  def start_and_kill(name):
    process = start(name)
    if name == "trackio":
      process.kill()
    return process

  monkeypatch.setattr(trackers, "_start_worker", start_and_kill)
  config.tracking.writers = NAMES
  tracked = finetune(config, tmp_path / "tracked")
  losses = lambda run: [line["train/loss"] for line in run.metrics if "train/loss" in line]
  assert losses(tracked) == losses(plain)
  said = capsys.readouterr().out
  assert said.count("tensorboard: NotADirectoryError") == 1
  assert said.count("trackio: ") == 2 and "lines were not delivered" in said
  assert "mlflow: not finished after 2 s; " in said and "wandb: not finished after 2 s; " in said


def test_hanging_tracker_costs_a_step_microseconds(
  tmp_path, monkeypatch, silent_server, capsys, record_property
):
  """And its queue is bounded."""
  monkeypatch.setenv("MLFLOW_TRACKING_URI", silent_server)
  monkeypatch.setattr(trackers, "SHUTDOWN_TIMEOUT", 0.1)
  monkeypatch.setattr(trackers, "MAX_QUEUE", 1000)
  config = jaxft.config.default()
  config.tracking.writers = ("mlflow",)
  files = JsonlSink(tmp_path, 0, True)
  with TrackerGroup(config=config, workdir=tmp_path, start=0, files=files, writes=True) as group:
    began = time.perf_counter()
    for step in range(5000):
      group.write("metrics", {"step": step, "train/loss": 1.0}, "")
    seconds = (time.perf_counter() - began) / 5000
    assert sum(map(len, group._clients[0]._lines.values())) <= 1000
  assert "5,000 of 5,000 lines were not delivered" in capsys.readouterr().out
  print(f"{seconds * 1e6:.1f} microseconds a line")
  assert seconds < 1e-3


@pytest.mark.slow
def test_full_disk_of_trackers_is_reported(config, tmp_path, small_disk, monkeypatch, capsys):
  """And it does not change training."""
  plain = finetune(config, tmp_path / "plain")
  capsys.readouterr()
  with (small_disk / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
    while ballast.write(bytes(4096)):
      pass
  monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(small_disk))
  monkeypatch.setenv("TRACKIO_DIR", str(small_disk / "trackio"))
  monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{small_disk}/mlflow.db")
  config.tracking.writers = ("tensorboard", "trackio", "mlflow")
  tracked = finetune(config, tmp_path / "tracked")
  losses = lambda run: [line["train/loss"] for line in run.metrics if "train/loss" in line]
  assert losses(tracked) == losses(plain)
  assert (tracked.export / "model.safetensors").read_bytes() == (
    plain.export / "model.safetensors"
  ).read_bytes()
  given = len(tracked.metrics) + len(tracked.samples)
  said = capsys.readouterr().out
  for name in config.tracking.writers:
    # Some may be written: a database has a page or two in reserve.
    last = said.split(f"{name}: ")[-1]
    assert re.match(rf"[1-9]\d* of {given} lines were not delivered", last), said


@pytest.mark.slow
def test_killed_run_gets_status_killed(tmp_path):
  script = f"""
import os, signal, time
from pathlib import Path
import jaxft.config
from jaxft.metrics.sinks import JsonlSink
from jaxft.metrics.trackers import TrackerGroup
config, workdir = jaxft.config.default(), Path({str(tmp_path)!r})
config.tracking.writers = ("mlflow",)
files = JsonlSink(workdir, 0, True)
with TrackerGroup(config=config, workdir=workdir, start=0, files=files, writes=True) as group:
  group.write("metrics", {{"step": 1, "train/loss": 2.5}}, "")
  while not group._clients[0]._arrived:
    time.sleep(0.1)
  os.kill(os.getpid(), signal.SIGKILL)
"""
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
  assert done.returncode == -signal.SIGKILL, done.stderr
  until, status = time.monotonic() + 30, None
  while status != "KILLED" and time.monotonic() < until:
    time.sleep(0.2)
    with sqlite3.connect(tmp_path / "mlflow.db") as db:
      (status,) = db.execute("select status from runs").fetchone()
  assert status == "KILLED"


def test_missing_tracker_names_install_command(folder, stories, tmp_path, monkeypatch):
  (tmp_path / "no_such_tracker").mkdir()  # a folder of that name beside the run is no library
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setitem(trackers.REQUIRED_MODULES, "wandb", ("no_such_tracker",))
  monkeypatch.setitem(trackers.REQUIRED_MODULES, "tensorboard", ("json",))  # is installed
  config = tiny.config(folder, stories)
  config.tracking.writers = ("tensorboard", "wandb")
  problem = "config.tracking.writers: wandb needs no_such_tracker, which is not installed"
  with pytest.raises(RequestError, match=rf'^{problem}: pip install "jaxft\[tracking\]"$'):
    validate_run(jaxft.config.resolve(config), tmp_path / "w")


@pytest.mark.parametrize(
  "text, shown",
  [
    ("https://user:token@host/x", "https://***@host/x"),
    ("see postgresql://u@db, http://ok/x@y", "see postgresql://***@db, http://ok/x@y"),
    ("http://host/?a=1&api_key=s3cret&b=2#c", "http://host/?a=1&api_key=***&b=2#c"),
    ("me@host.org", "me@host.org"),
    ("with hf_AbCdEfGhIjKlMnOpQr in it", "with *** in it"),
  ],
)
def test_redact_hides_logins_and_tokens(text, shown):
  assert redact(text) == shown
