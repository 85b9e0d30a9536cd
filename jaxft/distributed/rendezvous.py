"""Rendezvous: process 0 waits for all others, before JAX starts.

It uses the coordinator's port before JAX does. JAX's own rendezvous would not name a process that
is missing or has different flags. The watchdog then reuses these connections.
"""

import importlib.util
import json
import os
import socket
import time
import warnings
from typing import NamedTuple

from jaxft.errors import PeerLostError, RequestError, first_line
from jaxft.utils import jax_private
from jaxft.utils.logger import log

REQUIRED_FLAGS = "several processes need --coordinator, --num_processes, --process_id"


class ProcessInfo(NamedTuple):
  """The identity of this process in a distributed run."""

  coordinator: str  # HOST:PORT of process 0
  num_processes: int
  process_id: int


def detect_processes(
  coordinator: str | None, processes: int | None, process: int | None, timeout: int
) -> ProcessInfo | None:
  """Return the process info from the flags, or from the cluster's environment.

  SLURM, Open MPI, Kubernetes and TPU metadata are detected.

  Args:
    coordinator: --coordinator, HOST:PORT of process 0.
    processes: --num_processes.
    process: --process_id.
    timeout: seconds to wait for a metadata server.

  Returns:
    None for a single process.

  Raises:
    RequestError: only some of the values are known, or one is invalid.
  """
  if processes == 1:
    return None
  flags = coordinator, processes, process
  no_flags = flags == (None, None, None)
  try:
    # In a Kubernetes pod JAX warns if its package is missing. Most pods do not need it.
    with warnings.catch_warnings(action="ignore"):
      coordinator, processes, process = jax_private.detect_cluster(*flags, timeout)
  except Exception as error:  # no permission to list pods, no answer from a metadata server, ...
    why = first_line(error)
    if not no_flags:
      raise RequestError(f"cannot find the other processes: {why}; {REQUIRED_FLAGS}") from error
    log(f"running alone: found no other processes ({why}); {REQUIRED_FLAGS}")
    return None
  in_pod = "KUBERNETES_SERVICE_HOST" in os.environ
  if in_pod and no_flags and not (coordinator or importlib.util.find_spec("kubernetes")):
    advice = "to find other pods of this job, if any, JAX needs a package: pip install kubernetes"
    log(f"running alone: {advice}; {REQUIRED_FLAGS}")
  known = {"--coordinator": coordinator, "--num_processes": processes, "--process_id": process}
  if all(value is None for value in known.values()) or processes == 1:
    return None
  if coordinator is None or processes is None or process is None:
    missing = [name for name, value in known.items() if value is None]
    raise RequestError(f"{', '.join(missing)}: missing; {REQUIRED_FLAGS}")
  host, colon, port = coordinator.rpartition(":")
  if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
    raise RequestError(f"--coordinator={coordinator!r}: must be HOST:PORT of process 0")
  if not 0 <= process < processes:
    allowed = f"from 0 to {processes - 1} (--num_processes={processes})"
    raise RequestError(f"--process_id={process}: must be {allowed}")
  return ProcessInfo(coordinator=coordinator, num_processes=processes, process_id=process)


def connect_peers(info: ProcessInfo, timeout: int) -> dict[int, socket.socket]:
  """Connect process 0 to all others, and each of them to process 0.

  Returns:
    The connections by process id.
  """
  host, _, port = info.coordinator.rpartition(":")
  host = host.removeprefix("[").removesuffix("]")  # brackets of an IPv6 address
  if info.process_id == 0:
    return _accept_peers(int(port), info, timeout)
  return {0: _connect(host, int(port), info, timeout)}


def _accept_peers(port: int, info: ProcessInfo, timeout: int) -> dict[int, socket.socket]:
  deadline = time.monotonic() + timeout
  try:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    listener = socket.create_server(
      ("", port), family=family, dualstack_ipv6=both, backlog=info.num_processes
    )
  except OSError as error:
    problem = f"cannot listen on port {port} ({error.strerror})"
    raise RequestError(f"--coordinator={info.coordinator}: {problem}") from error
  peers: dict[int, socket.socket] = {}
  sockets = []  # all connections: every one gets an answer, also if it is refused
  verdict: dict[str, object] = {"go": True}
  with listener:
    while len(peers) < info.num_processes - 1 and "go" in verdict:
      listener.settimeout(max(0.01, deadline - time.monotonic()))
      try:
        peer, address = listener.accept()
        sockets.append(peer)
        # A peer sends its line immediately. A silent connection must not delay the others.
        hello = json.loads(_read_line(peer, time.monotonic() + 5))
        other = int(hello["process"])
        processes = int(hello["processes"])
      except TimeoutError:
        if time.monotonic() >= deadline:
          break
        continue
      except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
        continue  # not a peer: a port scanner, for example
      if processes != info.num_processes:
        ours = f"{info.num_processes} on process 0"
        verdict = {"refused": f"--num_processes={processes} on process {other}, and {ours}"}
      # A second connection with the same id is fine if the first process ended and was restarted.
      elif not 0 < other < processes or other in peers and not is_closed(peers[other]):
        twice = f"--process_id={other}: another process has the same id (at {address[0]})"
        verdict = {"refused": twice}
      peers[other] = peer
  missing = [str(i) for i in range(1, info.num_processes) if i not in peers]
  if missing and "go" in verdict:
    verdict = {"lost": f"process {', '.join(missing)} did not connect within {timeout} s"}
  # Report a failure to all, so that none waits for its own timeout.
  for peer in sockets:
    send_message(peer, verdict)
  if "refused" in verdict:
    raise RequestError(verdict["refused"])
  if "lost" in verdict:
    present = f"{len(peers) + 1} of {info.num_processes} are connected"
    advice = "to run a single process, pass --num_processes=1"
    raise PeerLostError(f"{verdict['lost']}; {present}; {advice}")
  return peers


def _connect(host: str, port: int, info: ProcessInfo, timeout: int) -> socket.socket:
  deadline = time.monotonic() + timeout
  while True:
    try:
      peer = socket.create_connection((host, port), timeout=5)
      send_message(peer, {"process": info.process_id, "processes": info.num_processes})
      # Process 0 answers when all are connected, or at its own timeout.
      verdict = json.loads(_read_line(peer, deadline + 5))
      if not isinstance(verdict, dict):
        raise ValueError("another program listens on this port")
      break
    except (OSError, ValueError) as error:
      if time.monotonic() > deadline:
        problem = f"did not answer within {timeout} s, or already has all its processes"
        raise PeerLostError(f"process 0 at {host}:{port} {problem} ({error})") from error
      time.sleep(0.3)  # process 0 may be started later
  if "refused" in verdict:
    raise RequestError(verdict["refused"])
  if "lost" in verdict:
    raise PeerLostError(verdict["lost"])
  return peer


def _read_line(peer: socket.socket, deadline: float) -> bytes:
  """Read one short line; raise OSError if it is late, or the other end closes.

  Read byte by byte: bytes after the line must stay in the socket, for the watchdog.
  """
  line = b""
  while not line.endswith(b"\n") and len(line) < 2000:
    peer.settimeout(max(0.01, deadline - time.monotonic()))
    byte = peer.recv(1)
    if not byte:
      raise OSError("the connection was closed")
    line += byte
  return line


def is_closed(peer: socket.socket) -> bool:
  """Return whether the other end has closed the connection; reads no data."""
  peer.setblocking(False)
  try:
    return peer.recv(1, socket.MSG_PEEK) == b""
  except BlockingIOError:
    return False
  except OSError:
    return True


def send_message(peer: socket.socket, message: dict[str, object] | None) -> None:
  """Send a message as a line of JSON; None sends an empty line, a heartbeat."""
  try:
    peer.sendall((json.dumps(message) if message else "").encode() + b"\n")
  except OSError:
    pass  # the thread that reads from this peer detects the loss
