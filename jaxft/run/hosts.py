"""Several processes as one run: who is there, do they agree, and is anyone lost.

Process 0 calls the roll on the coordinator's port before JAX takes it over, and the connections stay open: a line a second goes
both ways. A process that dies closes its connection, one that is frozen falls silent; either way all others end with exit code
5, in seconds or after `peer_timeout`. JAX's own coordination service would abort them, minutes later and with no name.
"""

import ctypes
import faulthandler
import hashlib
import importlib.metadata
import json
import os
import platform
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

import jaxft
from jaxft.errors import JaxftError, PeerLost, RequestError, tell
from jaxft.run.tracking import console, say

START_TIMEOUT, PEER_TIMEOUT = 300, 60  # seconds
GRACE = 15  # seconds that others have to end by themselves after one has ended with an error
WATCHDOGS: list["_Watchdog"] = []  # of this process: one while it is part of a run of several


class Place(NamedTuple):
  """Where this process stands among those of a run."""

  coordinator: str  # HOST:PORT of process 0
  processes: int
  process: int


def find(coordinator: str | None, processes: int | None, process: int | None, timeout: int) -> Place | None:
  """From the flags, or where they are not given from SLURM, Open MPI, Kubernetes or a TPU's metadata; None for a lone process.

  Raises RequestError when only some of it is known.
  """
  from jax._src import (
    clusters,
  )  # what jax.distributed.initialize itself asks; there is no public name (jax 0.10 to 0.12)

  coordinator, processes, process, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
    coordinator, processes, process, None, None, timeout
  )
  known = {"--coordinator": coordinator, "--num_processes": processes, "--process_id": process}
  if all(value is None for value in known.values()) or processes == 1:
    return None
  if missing := [name for name, value in known.items() if value is None]:
    raise RequestError(f"{', '.join(missing)}: missing; several processes need {', '.join(known)}")
  host, colon, port = coordinator.rpartition(":")
  if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
    raise RequestError(f"--coordinator={coordinator!r}: must be HOST:PORT of process 0")
  if not 0 <= process < processes:
    raise RequestError(f"--process_id={process}: must be from 0 to {processes - 1} (--num_processes={processes})")
  return Place(coordinator, processes, process)


@contextmanager
def joined(place: Place | None, start_timeout: int = START_TIMEOUT, peer_timeout: int = PEER_TIMEOUT) -> Iterator[None]:
  """Inside it this process is part of the run, and only process 0 says anything. It does not return from an error: the process
  ends, with the error's exit code, because JAX would wait for the others at exit.

  Raises RequestError or PeerLost when not all processes come within `start_timeout` seconds.
  """
  if place is None:
    yield
    return
  console.quiet = place.process != 0
  say(f"waiting for {place.processes} processes at {place.coordinator}")
  watchdog = _Watchdog(place, _roll_call(place, start_timeout), peer_timeout)
  WATCHDOGS.append(watchdog)
  _end_when_jax_aborts()
  jax.distributed.initialize(
    place.coordinator,
    place.processes,
    place.process,
    initialization_timeout=start_timeout,
    heartbeat_timeout_seconds=10 * peer_timeout,  # the watchdog is to be first, with a name
  )
  try:
    yield
  except BaseException as error:
    if not isinstance(error, JaxftError | KeyboardInterrupt | SystemExit):
      # A collective whose other end is gone fails here before the watchdog knows why; a bug waits the same seconds.
      time.sleep(peer_timeout + 5 if isinstance(error, jax.errors.JaxRuntimeError) else 5)
    code = tell(error)
    watchdog.end(code, str(error).splitlines()[0] if str(error) else type(error).__name__)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  watchdog.end(0, "")
  WATCHDOGS.remove(watchdog)


def versions() -> dict[str, str]:
  """Of what computes, and of jaxft's own files."""
  files = sorted(Path(jaxft.__file__).parent.rglob("*.py"))
  own = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
  found = {
    name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
  }
  return found | {"jaxft": f"{jaxft.__version__} ({own})", "python": platform.python_version()}


def agree(topic: str, facts: dict[str, Any]) -> None:
  """Raises RequestError in every process, with a line for each fact that is not the same in all of them."""
  if jax.process_count() == 1:
    return
  from jax._src.distributed import global_state  # its key-value store is JAX's own, and Orbax's, way to compare notes

  store, me = global_state.client, jax.process_index()
  patience = 3_600_000  # ms: others may still be tokenising; one that is lost is the watchdog's to find
  store.key_value_set(f"jaxft/{topic}/{me}", json.dumps(facts, default=str))
  if me == 0:
    lines = []
    for other in range(1, jax.process_count()):
      theirs = json.loads(store.blocking_key_value_get(f"jaxft/{topic}/{other}", patience))
      ours = json.loads(json.dumps(facts, default=str))
      lines += [
        f"{name}={theirs.get(name)!r} on process {other}: {ours.get(name)!r} on process 0; all must be the same"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
      ]
    store.key_value_set(f"jaxft/{topic}/verdict", "\n".join(lines) or "-")
  verdict = store.blocking_key_value_get(f"jaxft/{topic}/verdict", patience)
  if verdict != "-":
    raise RequestError(verdict)


def _roll_call(place: Place, timeout: int) -> dict[int, socket.socket]:
  """Connections to the other processes: of process 0 to all of them, of the others to process 0."""
  host, _, port = place.coordinator.rpartition(":")
  return (
    _wait_for_all(int(port), place, timeout) if place.process == 0 else {0: _answer(host, int(port), place, timeout)}
  )


def _wait_for_all(port: int, place: Place, timeout: int) -> dict[int, socket.socket]:
  there: dict[int, socket.socket] = {}
  until = time.monotonic() + timeout
  try:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    listener = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=place.processes)
  except OSError as error:
    raise RequestError(f"--coordinator={place.coordinator}: cannot listen on port {port} ({error.strerror})") from error
  fault, peers = "", []
  with listener:
    while len(there) < place.processes - 1 and not fault:
      listener.settimeout(max(0.01, until - time.monotonic()))
      try:
        peer, address = listener.accept()
        peers.append(peer)
        peer.settimeout(5)
        hello = json.loads(_line(peer))
        other, processes = int(hello["process"]), int(hello["processes"])
      except TimeoutError:
        if time.monotonic() >= until:
          break
        continue
      except (OSError, ValueError, KeyError, TypeError):
        continue  # something else that tries ports
      if processes != place.processes:
        fault = f"--num_processes={processes} on process {other}, and {place.processes} on process 0"
      elif other in there or not 0 < other < processes:
        fault = f"--process_id={other}: another process has it too (at {address[0]})"
      there[other] = peer
  missing = [str(i) for i in range(1, place.processes) if i not in there]
  lost = "" if fault or not missing else f"process {', '.join(missing)} did not come within {timeout} s"
  for peer in peers:
    _send(peer, {"refused": fault} if fault else {"lost": lost} if lost else {"go": True})
  if fault:
    raise RequestError(fault)
  if lost:
    raise PeerLost(f"{lost}; {len(there) + 1} of {place.processes} are there")
  return there


def _answer(host: str, port: int, place: Place, timeout: int) -> socket.socket:
  until = time.monotonic() + timeout
  while True:
    try:
      peer = socket.create_connection((host, port), timeout=5)
      _send(peer, {"process": place.process, "processes": place.processes})
      peer.settimeout(max(1, until - time.monotonic()) + 5)
      verdict = json.loads(_line(peer))
      break
    except (OSError, ValueError) as error:
      if time.monotonic() > until:
        raise PeerLost(f"process 0 at {host}:{port} did not answer within {timeout} s ({error})") from error
      time.sleep(0.3)
  if "refused" in verdict:
    raise RequestError(verdict["refused"])
  if "lost" in verdict:
    raise PeerLost(verdict["lost"])
  return peer


class _Watchdog(threading.Thread):
  """Sends and hears a line a second; ends the process when another is lost, or has ended with an error."""

  def __init__(self, place: Place, peers: dict[int, socket.socket], limit: int):
    super().__init__(name="jaxft-watchdog", daemon=True)
    self._place, self._peers, self._limit, self._lock = place, peers, limit, threading.Lock()
    self._ending = False
    self.start()

  def end(self, code: int, why: str) -> None:
    """Says that this process is about to end, so that the others do not take it for lost.

    Process 0 stays, for a while, until all others have ended: JAX's service is in it, and they may end for the same reason.
    """
    self._ending = True
    with self._lock:
      for peer in self._peers.values():
        _send(peer, {"ended": self._place.process, "code": code, "why": why})
    if code and self._place.process == 0:
      self.join(GRACE)

  def run(self) -> None:
    heard = dict.fromkeys(self._peers, time.monotonic())
    waiting = selectors.DefaultSelector()
    for process, peer in self._peers.items():
      peer.setblocking(False)
      waiting.register(peer, selectors.EVENT_READ, process)
    rests, doomed = dict.fromkeys(self._peers, b""), None
    while heard:
      for key, _ in waiting.select(timeout=1):
        process, chunk = key.data, _received(key.fileobj)
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
            doomed = doomed or (
              time.monotonic(),
              f"process {message['ended']} ended with exit code {message['code']}: {message['why']}",
            )
          if self._place.process == 0 and message["code"]:
            self._tell(message)
          if message["ended"] == process:  # a closed connection is no news from here on
            waiting.unregister(key.fileobj)
            del heard[process]
      now = time.monotonic()
      for process, at in heard.items():
        if now - at > self._limit:
          self._lost(f"process {process} is frozen or cut off: not heard of for {self._limit} s")
      if doomed and now - doomed[0] > GRACE:
        self._lost(doomed[1])
      with self._lock:
        for peer in self._peers.values():
          _send(peer, None)

  def _tell(self, message: dict[str, Any]) -> None:
    with self._lock:
      for process, peer in self._peers.items():
        if process != message.get("ended"):
          _send(peer, message)

  def _lost(self, why: str) -> None:
    if self._ending:  # with an exit code of its own
      return
    if self._place.process == 0:
      self._tell({"lost": why})
    _end(why)


def _end(why: str) -> None:
  """Ends the process here and now: the main thread may wait in a collective for ever."""
  print(
    f"error: {why}; the same command continues from the newest checkpoint. Where this process was:", file=sys.stderr
  )
  faulthandler.dump_traceback()
  sys.stderr.flush()
  os._exit(PeerLost.exit_code)


def _end_when_jax_aborts() -> None:
  """When process 0 dies, JAX's client aborts at once (jax 0.10 to 0.12: LOG(FATAL)), which may come before the watchdog."""

  def handler(_: int) -> None:
    print("error: JAX has given up, most likely because process 0 is gone; the same command continues", file=sys.stderr)
    faulthandler.dump_traceback()
    os._exit(PeerLost.exit_code)

  callback = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
  _end_when_jax_aborts.kept = callback  # as long as the process lives
  ctypes.CDLL(None).signal(signal.SIGABRT, callback)  # Python's own handlers run too late: abort() does not return


def _line(peer: socket.socket) -> bytes:
  with peer.makefile("rb") as stream:
    return stream.readline(10_000)


def _received(peer: socket.socket) -> bytes:
  try:
    return peer.recv(65536)
  except BlockingIOError:
    return b"\n"
  except OSError:
    return b""


def _send(peer: socket.socket, message: dict[str, Any] | None) -> None:
  try:
    peer.sendall((json.dumps(message) if message else "").encode() + b"\n")
  except OSError:
    pass  # whoever reads from it finds out
