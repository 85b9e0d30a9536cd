"""Detection of lost processes, by heartbeats over the rendezvous connections.

Both ends send a line each second. A process that dies closes its connection; a frozen one stops
sending. In both cases all others end with exit code 5. JAX's own coordination service would abort
them minutes later, without naming the lost process.
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

from jaxft.distributed.rendezvous import ProcessInfo, is_closed, send_message
from jaxft.errors import PeerLostError, Preempted, same_command
from jaxft.utils.types import Json

_abort_handlers: list[object] = []  # keeps ctypes callbacks alive as long as the process
GRACE_SECONDS = 15  # after a process ended with an error, the others have this long to end


class Watchdog(threading.Thread):
  """Send heartbeats; end this process if another is lost or ended with an error."""

  def __init__(self, info: ProcessInfo, peers: dict[int, socket.socket], timeout: int):
    super().__init__(name="jaxft-watchdog", daemon=True)
    self._info = info
    self._peers = peers
    self._timeout = timeout
    self._lock = threading.Lock()
    self._ending = False
    self.start()

  def announce_exit(self, code: int, why: str) -> None:
    """Announce that this process is about to end, so that it does not count as lost.

    After an error, process 0 waits for the others to end first. It hosts JAX's coordination
    service, and the others may be ending for the same reason.

    Args:
      code: exit code of this process.
      why: first line of its error, or "".
    """
    self._ending = True
    with self._lock:
      for peer in self._peers.values():
        send_message(peer, {"ended": self._info.process_id, "code": code, "why": why})
    if code and self._info.process_id == 0:
      # Without JAX's service the others would abort, before they can print their error.
      self.join(GRACE_SECONDS + 5)

  def run(self) -> None:
    """Exchange heartbeats until all others have ended; the thread's main loop."""
    last_heard = dict.fromkeys(self._peers, time.monotonic())
    selector = selectors.DefaultSelector()
    for process, peer in self._peers.items():
      peer.setblocking(False)
      selector.register(peer, selectors.EVENT_READ, process)
    unread = dict.fromkeys(self._peers, b"")  # the beginning of a line
    doom: tuple[float, str] | None = None  # time at which to end this process, and the reason
    while last_heard or doom and not self._ending:
      for key, _ in selector.select(timeout=1):
        process = key.data
        chunk = _receive(self._peers[process])
        if not chunk and self._ending:
          selector.unregister(key.fileobj)
          del last_heard[process]
          continue
        if not chunk:
          self._peer_lost(f"process {process} is gone: its connection closed")
        last_heard[process] = time.monotonic()
        *lines, unread[process] = (unread[process] + chunk).split(b"\n")
        for message in map(json.loads, filter(None, lines)):
          if "lost" in message:
            self._peer_lost(message["lost"])
          if message["code"]:
            # On a preemption all processes end, and some of them may take longer.
            preempted = message["code"] == Preempted.exit_code
            grace = self._timeout if preempted else GRACE_SECONDS
            exit_code = f"exit code {message['code']}"
            why = f"process {message['ended']} ended with {exit_code}: {message['why']}"
            doom = doom or (time.monotonic() + grace, why)
          if self._info.process_id == 0 and message["code"]:
            self._broadcast(message)
          if message["ended"] == process:  # it may close its connection from now on
            selector.unregister(key.fileobj)
            del last_heard[process]
      now = time.monotonic()
      for process, heard_at in last_heard.items():
        if now - heard_at > self._timeout:
          silence = f"no heartbeat for {self._timeout} s"
          self._peer_lost(f"process {process} is frozen or disconnected: {silence}")
      if doom and now > doom[0]:
        self._peer_lost(doom[1])
      with self._lock:
        for peer in self._peers.values():
          send_message(peer, None)

  def _broadcast(self, message: Json) -> None:
    with self._lock:
      for process, peer in self._peers.items():
        if process != message.get("ended"):
          send_message(peer, message)

  def _peer_lost(self, why: str) -> None:
    if self._ending:  # this process already has its exit code
      return
    if self._info.process_id == 0:
      self._broadcast({"lost": why})
    _exit_process(why)


def _exit_process(why: str) -> None:
  """End the process immediately: the main thread may wait in a collective forever."""
  resume = f"{same_command('--overwrite_output_dir' in sys.argv)} continues"
  print(
    f"error: {why}; {resume} from the newest checkpoint. Stack of this process:", file=sys.stderr
  )
  faulthandler.dump_traceback()
  sys.stderr.flush()
  os._exit(PeerLostError.exit_code)


def install_abort_handler(coordinator: socket.socket | None) -> None:
  """Print the reason when JAX aborts because process 0 is gone.

  JAX's client aborts immediately (jax 0.10 to 0.12: LOG(FATAL)), possibly before the watchdog
  detects the loss.

  Args:
    coordinator: the connection to process 0; None in process 0. If it is still open, the abort has
      another reason and continues.
  """

  def handler(_: int) -> None:
    if coordinator is None or not is_closed(coordinator):
      return
    resume = f"{same_command('--overwrite_output_dir' in sys.argv)} continues"
    reason = "JAX aborted, most likely because process 0 is gone"
    print(f"error: {reason}; {resume}", file=sys.stderr)
    faulthandler.dump_traceback()
    os._exit(PeerLostError.exit_code)

  callback = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
  _abort_handlers.append(callback)
  # Not `signal.signal`: Python runs its handlers after the C handler returns, but abort() ends the
  # process there.
  ctypes.CDLL(None).signal(signal.SIGABRT, callback)


def _receive(peer: socket.socket) -> bytes:
  try:
    return peer.recv(65536)
  except BlockingIOError:
    return b"\n"
  except OSError:
    return b""
