"""Trackers: what they are told is read back from their own files, and nothing that they do reaches the run."""

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
from jaxft.metrics.reporter import JsonlLog
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


def tell(workdir, names, steps, start=0, ending=None, kept=None):
  """What a piece of a run tells: a line and a sample for each step. `kept`: the last step that a resume keeps."""
  config = jaxft.config.default()
  config.tracking.writers, config.model.path = (
    tuple(names),
    "https://me:hunter2@host/model?token=hunter3",
  )
  metrics, samples = (
    JsonlLog(workdir / name, start or -1, True) for name in ("metrics.jsonl", "samples.jsonl")
  )
  with (
    contextlib.suppress(type(ending)),
    TrackerGroup(config, workdir, start, metrics, samples, True) as told,
  ):
    for step in steps:
      metrics.write(
        step,
        {
          "train/loss": ("nan", "inf")[step - 2] if step in (2, 3) else 1 / step,
          "train/tokens": 7 * step,
        },
      )
      samples.write(step, {"when": "during", "prompt": "Once", "text": f" text{step}", "seed": 0})
      told.log("metrics", metrics.entries[-1])
      told.log("samples", samples.entries[-1])
    samples.write(
      steps[0], {"when": "after", "prompt": "Once", "text": " of the best", "seed": 0}
    )  # an earlier step
    told.log("samples", samples.entries[-1])
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
def test_a_tracker_is_told_everything_once_and_how_each_piece_ended(name, tmp_path):
  failed, preempted, _ = ENDINGS[name]
  tell(tmp_path, [name], range(1, 6), ending=Preempted("SIGTERM: saved"))
  assert read(name, tmp_path)["status"].startswith(preempted)
  tell(
    tmp_path, [name], range(4, 7), start=3, ending=NumericsError("step 6: loss nan")
  )  # 4 and 5 are taken again
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
  # Without it MLflow's page (3.17) takes the run for one of a generative application, and shows no metrics.
  assert name != "mlflow" or found["kind"] == "custom_model_development"


@pytest.mark.slow
@pytest.mark.wide
def test_a_run_that_begins_again_is_a_new_run_and_a_tracker_that_comes_later_gets_all_of_it(
  tmp_path,
):
  tell(tmp_path, ["mlflow", "tensorboard"], [1, 2, 3])
  tell(tmp_path, ["mlflow", "tensorboard"], [1, 2, 3, 4])
  tell(tmp_path, ["mlflow", "trackio"], [4, 5], start=3)
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


def test_the_load_of_this_host_is_read_while_a_run_goes_on(tmp_path):
  found = readings_of(tmp_path)
  assert 0 < found["system/memory_percent"] <= 100
  assert 10e6 < found["system/process_memory_bytes"] < found["system/memory_used_bytes"]
  assert found["system/disk_used_bytes"] == pytest.approx(
    psutil.disk_usage(str(tmp_path)).used, rel=0.1
  )
  assert 0 < found["system/disk_percent"] <= 100
  with SystemMetrics(False, tmp_path) as metrics:
    assert not metrics.is_alive()


def test_disk_and_network_are_counted_from_the_first_reading(tmp_path, monkeypatch):
  Counters = collections.namedtuple("Counters", "bytes_sent bytes_recv read_bytes write_bytes")
  of_disk = iter(
    [None, Counters(0, 0, 1000, 2000), Counters(0, 0, 1003, 2005)]
  )  # None: no disk is there yet
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
  """The functions of pynvml that are called, of two cards: the second is a part of one, and tells its memory alone."""

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


def test_each_reading_of_a_gpu_is_told_whatever_else_fails(tmp_path, monkeypatch):
  gpu = lambda found: {
    key.removeprefix("system/"): value for key, value in found.items() if "/gpu" in key
  }
  monkeypatch.setitem(sys.modules, "pynvml", Nvml)
  memory = {"memory_bytes": 2 * 2**30, "memory_percent": 25}
  first = memory | {"percent": 93, "power_watts": 61.5, "power_limit_watts": 70}
  wanted = {f"gpu0_{key}": value for key, value in first.items()} | {
    f"gpu1_{key}": it for key, it in memory.items()
  }
  assert gpu(readings_of(tmp_path)) == wanted

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
def test_training_is_the_same_bit_for_bit_and_no_file_has_a_secret(config, tmp_path, monkeypatch):
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
      told = [[line["step"], line[key]] for line in tracked.metrics if key in line]
      assert [step for step, _ in found["metrics"][key]] == [step for step, _ in told]
      assert [value for _, value in found["metrics"][key]] == pytest.approx(
        [value for _, value in told], rel=1e-6
      )
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
def test_trackers_that_raise_hang_or_die_change_nothing_and_are_told_of_once(
  config, tmp_path, monkeypatch, silent_server, capsys
):
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
  assert said.count("trackio: ") == 2 and "lines did not arrive" in said
  assert "mlflow: not done after 2 s; " in said and "wandb: not done after 2 s; " in said


def test_a_tracker_that_hangs_costs_a_step_microseconds_and_lines_beyond_the_most_are_dropped(
  tmp_path, monkeypatch, silent_server, capsys, record_property
):
  monkeypatch.setenv("MLFLOW_TRACKING_URI", silent_server)
  monkeypatch.setattr(trackers, "SHUTDOWN_TIMEOUT", 0.1)
  monkeypatch.setattr(trackers, "MAX_QUEUE", 1000)
  config = jaxft.config.default()
  config.tracking.writers = ("mlflow",)
  metrics, samples = (
    JsonlLog(tmp_path / name, -1, True) for name in ("metrics.jsonl", "samples.jsonl")
  )
  with TrackerGroup(config, tmp_path, 0, metrics, samples, True) as told:
    began = time.perf_counter()
    for step in range(5000):
      told.log("metrics", {"step": step, "train/loss": 1.0})
    seconds = (time.perf_counter() - began) / 5000
    assert sum(map(len, told._clients[0]._lines.values())) <= 1000
  assert "5,000 of 5,000 lines did not arrive" in capsys.readouterr().out
  print(f"{seconds * 1e6:.1f} microseconds a line")
  assert seconds < 1e-3


@pytest.mark.slow
def test_a_full_disk_is_told_of_and_changes_nothing(
  config, tmp_path, small_disk, monkeypatch, capsys
):
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
    # Some may find a place: a database keeps a page or two free.
    assert re.match(rf"[1-9]\d* of {given} lines did not arrive", said.split(f"{name}: ")[-1]), said


@pytest.mark.slow
def test_a_run_that_is_killed_is_marked_so(tmp_path):
  script = f"""
import os, signal, time
from pathlib import Path
import jaxft.config
from jaxft.metrics.reporter import JsonlLog
from jaxft.metrics.trackers import TrackerGroup
config, workdir = jaxft.config.default(), Path({str(tmp_path)!r})
config.tracking.writers = ("mlflow",)
metrics, samples = JsonlLog(workdir / "metrics.jsonl", -1, True), JsonlLog(workdir / "samples.jsonl", -1, True)
with TrackerGroup(config, workdir, 0, metrics, samples, True) as told:
  told.log("metrics", {{"step": 1, "train/loss": 2.5}})
  while not told._clients[0]._arrived:
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


def test_a_library_that_is_not_there_is_named_with_the_command_that_installs_it(
  folder, stories, tmp_path, monkeypatch
):
  (tmp_path / "no_such_tracker").mkdir()  # a folder of that name beside the run is no library
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setitem(trackers.REQUIRED_MODULES, "wandb", ("no_such_tracker",))
  monkeypatch.setitem(trackers.REQUIRED_MODULES, "tensorboard", ("json",))  # is there
  config = tiny.config(folder, stories)
  config.tracking.writers = ("tensorboard", "wandb")
  line = r'config.tracking.writers: wandb needs no_such_tracker, not installed here: pip install "jaxft\[tracking\]"'
  with pytest.raises(RequestError, match=f"^{line}$"):
    validate_run(config, tmp_path / "w")


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
def test_logins_in_addresses_are_masked(text, shown):
  assert redact(text) == shown
