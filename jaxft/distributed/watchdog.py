"""Is anyone lost: the connections of the roll call stay open, and a line a second goes both ways.

A process that dies closes its connection, one that is frozen falls silent; either way all others end with exit code 5. JAX's
own coordination service would abort them, minutes later and with no name.
"""

import ctypes
import faulthandler
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from typing import Any

from jaxft.distributed.rendezvous import ProcessInfo, is_closed, send_message
from jaxft.errors import PeerLostError, Preempted, same_command

GRACE_SECONDS = (
  15  # seconds that others have to end by themselves after one has ended with an error
)


class Watchdog(threading.Thread):
  """Sends and hears a line a second; ends the process when another is lost, or has ended with an error."""

  def __init__(self, place: ProcessInfo, peers: dict[int, socket.socket], limit: int):
    super().__init__(name="jaxft-watchdog", daemon=True)
    self._place, self._peers, self._limit, self._lock = place, peers, limit, threading.Lock()
    self._ending = False
    self.start()

  def announce_exit(self, code: int, why: str) -> None:
    """Says that this process is about to end, so that the others do not take it for lost.

    Process 0 stays, for a while, until all others have ended: JAX's service is in it, and they may end for the same reason.
    """
    self._ending = True
    with self._lock:
      for peer in self._peers.values():
        send_message(peer, {"ended": self._place.process_id, "code": code, "why": why})
    if code and self._place.process_id == 0:
      self.join(
        GRACE_SECONDS + 5
      )  # the others give up first, and say why: without JAX's service they would be aborted

  def run(self) -> None:
    heard = dict.fromkeys(self._peers, time.monotonic())
    waiting = selectors.DefaultSelector()
    for process, peer in self._peers.items():
      peer.setblocking(False)
      waiting.register(peer, selectors.EVENT_READ, process)
    rests, doomed = dict.fromkeys(self._peers, b""), None
    while heard or doomed and not self._ending:
      for key, _ in waiting.select(timeout=1):
        process, chunk = key.data, _receive(key.fileobj)
        if not chunk and self._ending:
          waiting.unregister(key.fileobj)
          del heard[process]
          continue
        if not chunk:
          self._lost(f"process {process} is gone: its connection closed")
        heard[process] = time.monotonic()
        *lines, rests[process] = (rests[process] + chunk).split(b"\n")
        for message in map(json.loads, filter(None, lines)):
          if "lost" in message:
            self._lost(message["lost"])
          if message["code"]:
            # One that was preempted has agreed on it with the others, which may take longer to end.
            patience = self._limit if message["code"] == Preempted.exit_code else GRACE_SECONDS
            why = (
              f"process {message['ended']} ended with exit code {message['code']}: {message['why']}"
            )
            doomed = doomed or (time.monotonic() + patience, why)
          if self._place.process_id == 0 and message["code"]:
            self._tell(message)
          if message["ended"] == process:  # a closed connection is no news from here on
            waiting.unregister(key.fileobj)
            del heard[process]
      now = time.monotonic()
      for process, at in heard.items():
        if now - at > self._limit:
          self._lost(f"process {process} is frozen or cut off: not heard of for {self._limit} s")
      if doomed and now > doomed[0]:
        self._lost(doomed[1])
      with self._lock:
        for peer in self._peers.values():
          send_message(peer, None)

  def _tell(self, message: dict[str, Any]) -> None:
    with self._lock:
      for process, peer in self._peers.items():
        if process != message.get("ended"):
          send_message(peer, message)

  def _lost(self, why: str) -> None:
    if self._ending:  # with an exit code of its own
      return
    if self._place.process_id == 0:
      self._tell({"lost": why})
    _exit_process(why)


def _exit_process(why: str) -> None:
  """Ends the process here and now: the main thread may wait in a collective for ever."""
  again = same_command("--overwrite_output_dir" in sys.argv)
  print(
    f"error: {why}; {again} continues from the newest checkpoint. Where this process was:",
    file=sys.stderr,
  )
  faulthandler.dump_traceback()
  sys.stderr.flush()
  os._exit(PeerLostError.exit_code)


def install_abort_handler(coordinator: socket.socket | None) -> None:
  """When process 0 dies, JAX's client aborts at once (jax 0.10 to 0.12: LOG(FATAL)), which may come before the watchdog.

  Args:
    coordinator: the connection to process 0; None in it itself. While it is open the abort has another reason, and goes on.
  """

  def handler(_: int) -> None:
    if coordinator is None or not is_closed(coordinator):
      return
    again = same_command("--overwrite_output_dir" in sys.argv)
    print(
      f"error: JAX has given up, most likely because process 0 is gone; {again} continues",
      file=sys.stderr,
    )
    faulthandler.dump_traceback()
    os._exit(PeerLostError.exit_code)

  callback = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
  install_abort_handler.kept = callback  # as long as the process lives
  ctypes.CDLL(None).signal(
    signal.SIGABRT, callback
  )  # Python's own handlers run too late: abort() does not return


def _receive(peer: socket.socket) -> bytes:
  try:
    return peer.recv(65536)
  except BlockingIOError:
    return b"\n"
  except OSError:
    return b""
