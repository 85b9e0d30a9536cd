"""The process that serves one tracker.

    python -m jaxft.metrics.tracker_worker WRITER

It reads one JSON message per line from standard input, and writes one answer per line to standard
output. The first message is a `TrackerRun`, without an answer. All others are {"metrics": [lines],
"samples": [lines], "end": null or {"status", "why"}}. If the input ends before a message with an
"end", the run was killed.
"""

import json
import os
import queue
import signal
import sys
import threading

from jaxft.errors import first_line
from jaxft.metrics import tracker_backends
from jaxft.utils.redact import redact
from jaxft.utils.types import Json

SHUTDOWN_TIMEOUT = 15  # seconds, to report that the run was killed
KILLED_STATUS = {"status": "killed", "why": "the process ended without an error message"}
KILLED_MESSAGE = {"metrics": [], "samples": [], "end": KILLED_STATUS}


class TrackerService:
  """Opens the tracker at the first message; retries at the next if that fails."""

  def __init__(self, name: str, run: tracker_backends.TrackerRun):
    self._name = name
    self._run = run
    self._tracker: tracker_backends.Backend | None = None
    self._step = 0

  def __call__(self, message: Json) -> Json:
    """Pass a message to the tracker; return {"where": ...} or {"failed": reason}."""
    try:
      metrics = [(line["step"], tracker_backends.to_floats(line)) for line in message["metrics"]]
      self._step = max([self._step, *(step for step, _ in metrics)])
      if self._tracker is None:
        self._tracker = tracker_backends.BACKENDS[self._name](self._run)
      if metrics or message["samples"]:
        self._tracker.write(metrics, message["samples"])
      if message["end"]:
        self._tracker.finish(**message["end"], step=self._step)
    except Exception as error:  # of a library, the network or a disk: must not end the run
      reason = first_line(error)
      kind = type(error).__name__
      return {"failed": redact(reason if kind in reason else f"{kind}: {reason}")}
    return {"where": redact(self._tracker.where)}


def main() -> None:
  """Serve the tracker until a message with an "end"."""
  # These signals are for the run, which then sends its status.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  os.nice(10)
  answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
  for stream in (1, 2):  # discard what libraries print: it may contain a key
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
  messages = queue.SimpleQueue()
  threading.Thread(target=_read_messages, args=(messages,), daemon=True).start()
  service = TrackerService(sys.argv[1], tracker_backends.TrackerRun(**messages.get()))
  ended = False
  while not ended:
    message = messages.get()
    ended = message["end"] is not None
    answer = service(message)
    if message is not KILLED_MESSAGE:
      print(json.dumps(answer), file=answers, flush=True)


def _read_messages(messages: queue.SimpleQueue) -> None:
  """Read messages in a thread: a hanging library must not hide a killed run."""
  message = {}
  for line in sys.stdin:
    message = json.loads(line)
    messages.put(message)
  if not message.get("end"):
    messages.put(KILLED_MESSAGE)
    limit = threading.Timer(SHUTDOWN_TIMEOUT, os._exit, (1,))
    limit.daemon = True
    limit.start()


if __name__ == "__main__":
  main()
