"""Send metrics and samples to trackers, without ever waiting for them.

Each tracker's library runs in a separate process (tracker_worker.py), and a thread here talks to
it. The library may raise, hang, print, block the interpreter during its import, or leave threads
and hooks behind: none of this disturbs the run. If the run is killed, the process reports it.

A resumed run continues the same tracker run, whose id is in WORKDIR/trackers.json. Lost steps that
are repeated are not sent again, because their losses are the same bit for bit. TensorBoard, MLflow
and Trackio would draw them twice, and W&B refuses a step below its last. A run that starts again
from step 0 is a new run in every tracker.
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
from typing import IO

import jaxft.config
from jaxft.config import Config, TrackingSection
from jaxft.config_checks import TRACKERS
from jaxft.errors import Preempted, first_line
from jaxft.metrics.sinks import JsonlSink, Kind
from jaxft.utils.files import atomic_write
from jaxft.utils.logger import log
from jaxft.utils.redact import redact
from jaxft.utils.types import Json

SHUTDOWN_TIMEOUT = 15  # seconds to wait at the end, for all trackers together
SEND_INTERVAL = 1  # seconds between messages; entries in between are sent together
MAX_QUEUE = 10_000  # lines that wait for a tracker; more are dropped
# Tracker -> the modules that it needs.
REQUIRED_MODULES = {name: (name,) for name in TRACKERS} | {"tensorboard": ("tensorboardX",)}
# Modules for MLflow's local database, not needed if MLFLOW_TRACKING_URI names a server.
LOCAL_ONLY_MODULES = {"mlflow": ("MLFLOW_TRACKING_URI", ("sqlalchemy", "alembic"))}


def enabled_trackers(tracking: TrackingSection) -> list[str]:
  """Return the trackers in `tracking.writers`."""
  return [name for name in TRACKERS if name in tracking.writers]


def missing_packages(tracking: TrackingSection) -> list[str]:
  """Return a line for each tracker whose library is not installed; imports nothing."""
  lines = []
  for name in enabled_trackers(tracking):
    variable, more = LOCAL_ONLY_MODULES.get(name, ("", ()))
    modules = REQUIRED_MODULES[name] + (() if os.environ.get(variable) else more)
    if missing := " and ".join(module for module in modules if not _installed(module)):
      problem = f"{name} needs {missing}, which is not installed"
      lines.append(f'config.tracking.writers: {problem}: pip install "jaxft[tracking]"')
  return lines


def _installed(module: str) -> bool:
  spec = importlib.util.find_spec(module)
  # A folder ./wandb, which W&B creates, would be found as a namespace package, without an origin.
  return spec is not None and spec.origin is not None


class TrackerGroup:
  """The sink of all trackers of a run; only the first process has trackers.

  A context manager; its exit sends the status of the run to the trackers.
  """

  def __init__(self, *, config: Config, workdir: Path, start: int, files: JsonlSink, writes: bool):
    """Read and update WORKDIR/trackers.json.

    Args:
      config: the config of the run.
      workdir: folder of the run.
      start: step from which the run continues; 0 for a new run.
      files: the entries so far, and those that a resume dropped.
      writes: true in one process of the run; the others have no trackers.

    Raises:
      StorageError: the file cannot be written.
    """
    self._names = enabled_trackers(config.tracking) if writes else []
    self._clients: list[TrackerClient] = []
    if not self._names:
      return
    file = workdir / "trackers.json"
    manifest = _read_manifest(file) if start else {}
    self._run = {
      "id": manifest.get("id") or uuid.uuid4().hex,
      "resumed": bool(manifest),
      "name": redact(config.tracking.run_name),
      "workdir": str(workdir.absolute()),
      "settings": _redact_settings(jaxft.config.flatten(config)),
    }
    self._resumed_names = manifest.get("writers", [])
    metrics, samples = files.metrics, files.samples
    self._entries = {"metrics": metrics.entries[:], "samples": samples.entries[:]}
    self._sent_samples = samples.entries + samples.dropped
    self._sent = _entry_keys("metrics", metrics.dropped) | _entry_keys("samples", samples.dropped)
    names = [name for name in TRACKERS if name in {*self._resumed_names, *self._names}]
    atomic_write(file, json.dumps({"id": self._run["id"], "writers": names}) + "\n")

  def __enter__(self) -> "TrackerGroup":
    for name in self._names:
      if name in self._resumed_names:
        run = self._run | {"samples": self._sent_samples}
        client = TrackerClient(tracker=name, run=run, backlog={}, sent=self._sent)
      else:  # a tracker that was added on resume gets all entries so far
        run = self._run | {"samples": []}
        client = TrackerClient(tracker=name, run=run, backlog=self._entries, sent=set())
      self._clients.append(client)
    return self

  def write(self, kind: Kind, entry: Json, line: str) -> None:
    """Queue an entry, without waiting."""
    for client in self._clients:
      client.write(kind, entry)

  def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
    status = _exit_status(error)
    deadline = time.monotonic() + SHUTDOWN_TIMEOUT
    for client in self._clients:
      client.finish(status)
    for client in self._clients:
      client.wait(deadline)


class TrackerClient(threading.Thread):
  """Talks to the process of one tracker in a thread, so that no step waits for it."""

  def __init__(
    self,
    tracker: str,
    run: Json,
    backlog: dict[str, list[Json]],
    sent: set[tuple],
  ):
    """Start the thread.

    Args:
      tracker: name of the tracker, a key of `tracker_backends.BACKENDS`.
      run: fields of a `tracker_backends.TrackerRun`.
      backlog: entries of each kind, to send first.
      sent: `_entry_keys` of the entries that were sent before a resume.
    """
    super().__init__(name=f"jaxft-{tracker}", daemon=True)
    self._tracker = tracker
    self._run = run
    self._sent = sent
    self._lines = {kind: list(backlog.get(kind, [])) for kind in ("metrics", "samples")}
    self._given = sum(map(len, self._lines.values()))
    self._arrived = 0
    self._changed = threading.Condition()
    self._end: dict[str, str] | None = None
    self._warned = False
    self._process: subprocess.Popen[str] | None = None
    self.start()

  def write(self, kind: Kind, entry: Json) -> None:
    """Queue an entry, unless it was sent before or the queue is full."""
    if self._sent and self._sent.issuperset(_entry_keys(kind, [entry])):
      return
    with self._changed:
      self._given += 1
      if sum(map(len, self._lines.values())) < MAX_QUEUE:
        self._lines[kind].append(entry)
        self._changed.notify()

  def finish(self, status: dict[str, str]) -> None:
    """Queue the end of the run, without waiting."""
    with self._changed:
      self._end = status
      self._changed.notify()

  def wait(self, deadline: float) -> None:
    """Wait for the tracker until `deadline` at most; log the number of lost lines."""
    self.join(max(0, deadline - time.monotonic()))
    if late := self.is_alive():
      if self._process:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(self._process.pid, signal.SIGKILL)  # with its child processes
      self.join(5)
    lost = self._given - self._arrived
    if lost or late:
      timeout = f"not finished after {SHUTDOWN_TIMEOUT} s; " if late else ""
      log(f"{self._tracker}: {timeout}{lost:,} of {self._given:,} lines were not delivered")

  def run(self) -> None:
    """Send messages and read answers until the run ends; the thread's main loop."""
    try:
      with _start_worker(self._tracker) as process:
        self._process = process
        assert process.stdin and process.stdout  # pipes
        _send(process.stdin, self._run)
        ended = False
        while not ended:
          message = self._next_message()
          _send(process.stdin, message)
          line = process.stdout.readline() or '{"failed": "its process has ended"}'
          self._handle_answer(json.loads(line), len(message["metrics"]) + len(message["samples"]))
          ended = message["end"] is not None
    except (OSError, ValueError) as error:  # the process did not start, or died
      self._handle_answer({"failed": first_line(error)}, 0)

  def _next_message(self) -> Json:
    """Wait for entries or the end of the run, and return them as a message."""
    with self._changed:
      if self._arrived:
        self._changed.wait_for(lambda: self._end, SEND_INTERVAL)
      self._changed.wait_for(lambda: self._end or any(self._lines.values()))
      message = self._lines | {"end": self._end}
      self._lines = {kind: [] for kind in self._lines}
      return message

  def _handle_answer(self, answer: dict[str, str], lines: int) -> None:
    if "failed" not in answer:
      if not self._arrived:
        log(f"{self._tracker}: {answer['where']}")
      self._arrived += lines
    elif not self._warned:
      self._warned = True
      error = redact(answer["failed"])
      log(f"{self._tracker}: {error}; the run continues, but the tracker lost these entries")


def _send(stream: IO[str], message: Json) -> None:
  stream.write(json.dumps(message) + "\n")
  stream.flush()


def _start_worker(tracker: str) -> subprocess.Popen[str]:
  return subprocess.Popen(
    [sys.executable, "-m", "jaxft.metrics.tracker_worker", tracker],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
    encoding="utf-8",
    start_new_session=True,  # so that Ctrl-C reaches only the run
  )


def _entry_keys(kind: Kind, lines: list[Json]) -> set[tuple]:
  """Return (step, key) for each number and (step, when, prompt) for each sample."""
  if kind == "samples":
    return {(line["step"], line.get("when"), line.get("prompt")) for line in lines}
  return {(line["step"], key) for line in lines for key in line if not key.startswith("system/")}


def _exit_status(error: BaseException | None) -> dict[str, str]:
  if error is None:
    return {"status": "finished", "why": ""}
  statuses: dict[type[BaseException], str]
  statuses = {Preempted: "preempted", KeyboardInterrupt: "killed"}
  return {"status": statuses.get(type(error), "failed"), "why": redact(first_line(error))}


def _read_manifest(file: Path) -> Json:
  try:
    manifest = json.loads(file.read_text(encoding="utf-8"))
    return {"id": str(manifest["id"]), "writers": list(manifest["writers"])}
  except (OSError, ValueError, KeyError, TypeError):
    return {}


def _redact_settings(values: Json) -> Json:
  def redacted(value: object) -> object:
    if isinstance(value, tuple):
      return [redacted(it) for it in value]
    return redact(value) if isinstance(value, str) else value

  return {key: redacted(value) for key, value in values.items()}
