"""Feeds trackers without ever waiting for them.

A tracker's library runs in a process of its own (tracker_process.py), and a thread here speaks with it. So the run does not
feel it: the library may raise, hang, print, hold the interpreter while it is imported, leave threads and hooks behind. And when
the run is killed, there is a process left that says so.

A run that is resumed goes on as the same run of the tracker; its id is in WORKDIR/trackers.json. Steps that were lost and are
taken again are not sent again: they have the same losses bit for bit; TensorBoard, MLflow and Trackio would draw both, and W&B
refuses a step below its last. A run that begins again, at step 0, is a new run everywhere.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import jaxft.config
from jaxft.config_checks import TRACKERS
from jaxft.errors import Preempted, first_line
from jaxft.metrics.reporter import JsonlLog
from jaxft.utils.console import log
from jaxft.utils.files import atomic_write
from jaxft.utils.redact import redact

SHUTDOWN_TIMEOUT = 15  # seconds at the end, for all trackers together
SEND_INTERVAL = 1  # seconds between messages: what comes meanwhile goes together
MAX_QUEUE = 10_000  # lines that wait for a tracker; those that come then are dropped
# The modules each needs. The last is only for MLflow's own database, which MLFLOW_TRACKING_URI may replace by a server.
REQUIRED_MODULES = {
  "tensorboard": ("tensorboardX",),
  "mlflow": ("mlflow",),
  "wandb": ("wandb",),
  "trackio": ("trackio",),
}
LOCAL_ONLY_MODULES = {"mlflow": ("MLFLOW_TRACKING_URI", ("sqlalchemy", "alembic"))}


def enabled_trackers(config: ConfigDict) -> list[str]:
  return [name for name in TRACKERS if name in config.tracking.writers]


def missing_packages(config: ConfigDict) -> list[str]:
  """One line for each tracker whose library is not installed; nothing is imported."""
  lines = []
  for name in enabled_trackers(config):
    variable, more = LOCAL_ONLY_MODULES.get(name, ("", ()))
    modules = REQUIRED_MODULES[name] + (() if os.environ.get(variable) else more)
    if absent := [module for module in modules if not _installed(module)]:
      lines.append(
        f"config.tracking.writers: {name} needs {' and '.join(absent)}, not installed here: "
        'pip install "jaxft[tracking]"'
      )
  return lines


def _installed(module: str) -> bool:
  spec = importlib.util.find_spec(module)
  return spec is not None and spec.origin is not None  # a folder ./wandb, which W&B makes, has none


class TrackerGroup:
  """All trackers of a run; in processes other than the first there are none. The end of the context tells them how it ended."""

  def __init__(
    self,
    config: ConfigDict,
    workdir: Path,
    start: int,
    metrics: JsonlLog,
    samples: JsonlLog,
    writes: bool,
  ):
    """Reads WORKDIR/trackers.json, and writes it; raises StorageError.

    Args:
      start: step that the run goes on from.
      metrics, samples: what is kept of the pieces before, and what a resume has dropped.
      writes: false in all processes but one.
    """
    self._names, self._clients = enabled_trackers(config) if writes else [], []
    if not self._names:
      return
    file = workdir / "trackers.json"
    before = _read_manifest(file) if start else {}
    self._run = {
      "id": before.get("id") or uuid.uuid4().hex,
      "resumed": bool(before),
      "name": config.tracking.run_name,
    }
    self._run |= {
      "workdir": str(workdir.absolute()),
      "settings": _redact_settings(jaxft.config.flatten(config)),
    }
    self._run["name"] = redact(self._run["name"])
    self._known, self._kept = (
      before.get("writers", []),
      {"metrics": metrics.entries[:], "samples": samples.entries[:]},
    )
    self._told = samples.entries + samples.dropped
    self._sent = _entry_keys("metrics", metrics.dropped) | _entry_keys("samples", samples.dropped)
    known = [name for name in TRACKERS if name in {*self._known, *self._names}]
    atomic_write(file, json.dumps({"id": self._run["id"], "writers": known}) + "\n")

  def __enter__(self) -> "TrackerGroup":
    for name in self._names:
      if name in self._known:
        self._clients.append(
          TrackerClient(name, self._run | {"samples": self._told}, {}, self._sent)
        )
      else:  # one that is new to a run gets all of it
        self._clients.append(TrackerClient(name, self._run | {"samples": []}, self._kept, set()))
    return self

  def log(self, kind: str, line: dict[str, Any]) -> None:
    """`kind`: metrics or samples. Returns at once."""
    for writer in self._clients:
      writer.log(kind, line)

  def __exit__(self, _, error: BaseException | None, __) -> None:
    status, until = _exit_status(error), time.monotonic() + SHUTDOWN_TIMEOUT
    for writer in self._clients:
      writer.finish(status)
    for writer in self._clients:
      writer.wait(until)


class TrackerClient(threading.Thread):
  """Sends lines to the process of one tracker, and waits for its answers, in place of the run."""

  def __init__(
    self, writer: str, run: dict[str, Any], lines: dict[str, list[dict[str, Any]]], sent: set[Any]
  ):
    """`lines`: of each kind, to send first; `sent`: places of lines that need not be sent again, see `_entry_keys`."""
    super().__init__(name=f"jaxft-{writer}", daemon=True)
    self._writer, self._run, self._sent = writer, run, sent
    self._lines = {kind: list(lines.get(kind, [])) for kind in ("metrics", "samples")}
    self._given = sum(map(len, self._lines.values()))
    self._arrived, self._changed, self._end, self._told = 0, threading.Condition(), None, False
    self._process: subprocess.Popen | None = None
    self.start()

  def log(self, kind: str, line: dict[str, Any]) -> None:
    if self._sent and self._sent.issuperset(_entry_keys(kind, [line])):
      return
    with self._changed:
      self._given += 1
      if sum(map(len, self._lines.values())) < MAX_QUEUE:
        self._lines[kind].append(line)
        self._changed.notify()

  def finish(self, status: dict[str, str]) -> None:
    with self._changed:
      self._end = status
      self._changed.notify()

  def wait(self, until: float) -> None:
    """Waits for the tracker's end until then, and no longer; says what was lost."""
    self.join(max(0, until - time.monotonic()))
    if late := self.is_alive():
      if self._process:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(self._process.pid, signal.SIGKILL)  # with what the library has started
      self.join(5)
    lost = self._given - self._arrived
    if lost or late:
      log(
        f"{self._writer}: {f'not done after {SHUTDOWN_TIMEOUT} s; ' * late}{lost:,} of {self._given:,} lines did not arrive"
      )

  def run(self) -> None:
    try:
      with _start_worker(self._writer) as self._process:
        self._send(self._run)
        ended = False
        while not ended:
          message = self._next()
          self._send(message)
          answer = json.loads(
            self._process.stdout.readline() or '{"failed": "its process has ended"}'
          )
          self._take(answer, len(message["metrics"]) + len(message["samples"]))
          ended = message["end"] is not None
    except (OSError, ValueError) as error:  # no process could be started, or it has died
      self._take({"failed": first_line(error)}, 0)

  def _send(self, message: dict[str, Any]) -> None:
    self._process.stdin.write(json.dumps(message) + "\n")
    self._process.stdin.flush()

  def _next(self) -> dict[str, Any]:
    """What there is to send, as soon as there is something."""
    with self._changed:
      if self._arrived:
        self._changed.wait_for(lambda: self._end, SEND_INTERVAL)
      self._changed.wait_for(lambda: self._end or any(self._lines.values()))
      message = self._lines | {"end": self._end}
      self._lines = {kind: [] for kind in self._lines}
      return message

  def _take(self, answer: dict[str, str], lines: int) -> None:
    if "failed" not in answer:
      if not self._arrived:
        log(f"{self._writer}: {answer['where']}")
      self._arrived += lines
    elif not self._told:
      self._told = True
      log(
        f"{self._writer}: {redact(answer['failed'])}; the run goes on, what was sent is lost there"
      )


def _start_worker(writer: str) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-m", "jaxft.metrics.tracker_worker", writer],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
    encoding="utf-8",
    start_new_session=True,  # Ctrl-C is for the run
  )


def _entry_keys(kind: str, lines: list[dict[str, Any]]) -> set[Any]:
  """What each line tells of: (step, key) for each number, (step, when, prompt) for each sample."""
  if kind == "samples":
    return {(line["step"], line.get("when"), line.get("prompt")) for line in lines}
  return {(line["step"], key) for line in lines for key in line if not key.startswith("system/")}


def _exit_status(error: BaseException | None) -> dict[str, str]:
  if error is None:
    return {"status": "finished", "why": ""}
  kinds = {Preempted: "preempted", KeyboardInterrupt: "killed"}
  return {"status": kinds.get(type(error), "failed"), "why": redact(first_line(error))}


def _read_manifest(file: Path) -> dict[str, Any]:
  try:
    it = json.loads(file.read_text(encoding="utf-8"))
    return {"id": str(it["id"]), "writers": list(it["writers"])}
  except (OSError, ValueError, KeyError, TypeError):
    return {}


def _redact_settings(values: dict[str, Any]) -> dict[str, Any]:
  hidden = lambda value: redact(value) if isinstance(value, str) else value
  return {
    key: [hidden(it) for it in value] if isinstance(value, tuple) else hidden(value)
    for key, value in values.items()
  }
