"""Who is there: process 0 waits for all others on the coordinator's port, before JAX takes it over."""

import importlib.util
import json
import os
import socket
import time
import warnings
from typing import Any, NamedTuple

from jaxft.errors import PeerLostError, RequestError, first_line
from jaxft.utils.console import log

REQUIRED_FLAGS = "several processes need --coordinator, --num_processes, --process_id"


class ProcessInfo(NamedTuple):
  """Where this process stands among those of a run."""

  coordinator: str  # HOST:PORT of process 0
  num_processes: int
  process_id: int


def detect_processes(
  coordinator: str | None, processes: int | None, process: int | None, timeout: int
) -> ProcessInfo | None:
  """From the flags, or where they are not given from SLURM, Open MPI, Kubernetes or a TPU's metadata; None for a lone process.

  Raises RequestError when only some of it is known.
  """
  # What jax.distributed.initialize itself asks; there is no public name (jax 0.10 to 0.12).
  from jax._src import clusters

  if processes == 1:
    return None
  given = coordinator, processes, process
  try:
    with warnings.catch_warnings(
      action="ignore"
    ):  # a pod of Kubernetes, without its package: most are alone
      detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
      coordinator, processes, process, _ = detect(*given, None, None, timeout)
  except (
    Exception
  ) as error:  # a pod that may not ask who else there is, a metadata server that is silent, ...
    if given != (None, None, None):
      raise RequestError(
        f"looking for the other processes: {first_line(error)}; {REQUIRED_FLAGS}"
      ) from error
    log(
      f"running alone: the other processes, if there are any, were not found ({first_line(error)}); {REQUIRED_FLAGS}"
    )
    return None
  pod = "KUBERNETES_SERVICE_HOST" in os.environ
  if (
    pod
    and given == (None, None, None)
    and not (coordinator or importlib.util.find_spec("kubernetes"))
  ):
    log(
      f"running alone: to find the other pods of a job, if there are any, JAX needs pip install kubernetes; {REQUIRED_FLAGS}"
    )
  known = {"--coordinator": coordinator, "--num_processes": processes, "--process_id": process}
  if all(value is None for value in known.values()) or processes == 1:
    return None
  if missing := [name for name, value in known.items() if value is None]:
    raise RequestError(f"{', '.join(missing)}: missing; {REQUIRED_FLAGS}")
  host, colon, port = coordinator.rpartition(":")
  if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
    raise RequestError(f"--coordinator={coordinator!r}: must be HOST:PORT of process 0")
  if not 0 <= process < processes:
    raise RequestError(
      f"--process_id={process}: must be from 0 to {processes - 1} (--num_processes={processes})"
    )
  return ProcessInfo(coordinator, processes, process)


def connect_peers(place: ProcessInfo, timeout: int) -> dict[int, socket.socket]:
  """Calls the roll. Returns connections to the other processes: of process 0 to all of them, of the others to process 0."""
  host, _, port = place.coordinator.rpartition(":")
  host = host.removeprefix("[").removesuffix("]")  # of an IPv6 address
  return (
    _accept_peers(int(port), place, timeout)
    if place.process_id == 0
    else {0: _connect(host, int(port), place, timeout)}
  )


def _accept_peers(port: int, place: ProcessInfo, timeout: int) -> dict[int, socket.socket]:
  there: dict[int, socket.socket] = {}
  until = time.monotonic() + timeout
  try:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    listener = socket.create_server(
      ("", port), family=family, dualstack_ipv6=both, backlog=place.num_processes
    )
  except OSError as error:
    raise RequestError(
      f"--coordinator={place.coordinator}: cannot listen on port {port} ({error.strerror})"
    ) from error
  fault, peers = "", []
  with listener:
    while len(there) < place.num_processes - 1 and not fault:
      listener.settimeout(max(0.01, until - time.monotonic()))
      try:
        peer, address = listener.accept()
        peers.append(peer)
        hello = json.loads(_read_line(peer, time.monotonic() + 5))
        other, processes = int(hello["process"]), int(hello["processes"])
      except TimeoutError:
        if time.monotonic() >= until:
          break
        continue
      except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
        continue  # something else that tries ports
      if processes != place.num_processes:
        fault = (
          f"--num_processes={processes} on process {other}, and {place.num_processes} on process 0"
        )
      elif (
        not 0 < other < processes or other in there and not is_closed(there[other])
      ):  # it may have been started again
        fault = f"--process_id={other}: another process has it too (at {address[0]})"
      there[other] = peer
  missing = [str(i) for i in range(1, place.num_processes) if i not in there]
  lost = (
    "" if fault or not missing else f"process {', '.join(missing)} did not come within {timeout} s"
  )
  for peer in peers:
    send_message(peer, {"refused": fault} if fault else {"lost": lost} if lost else {"go": True})
  if fault:
    raise RequestError(fault)
  if lost:
    raise PeerLostError(
      f"{lost}; {len(there) + 1} of {place.num_processes} are there; to run this one alone: --num_processes=1"
    )
  return there


def _connect(host: str, port: int, place: ProcessInfo, timeout: int) -> socket.socket:
  until = time.monotonic() + timeout
  while True:
    try:
      peer = socket.create_connection((host, port), timeout=5)
      send_message(peer, {"process": place.process_id, "processes": place.num_processes})
      verdict = json.loads(_read_line(peer, until + 5))
      if not isinstance(verdict, dict):
        raise ValueError("something else listens there")
      break
    except (OSError, ValueError) as error:
      if time.monotonic() > until:
        told = f"did not answer within {timeout} s, or had all its processes before"
        raise PeerLostError(f"process 0 at {host}:{port} {told} ({error})") from error
      time.sleep(0.3)
  if "refused" in verdict:
    raise RequestError(verdict["refused"])
  if "lost" in verdict:
    raise PeerLostError(verdict["lost"])
  return peer


def _read_line(peer: socket.socket, until: float) -> bytes:
  """One short line; raises OSError when it does not come in time, or the other end closes."""
  line = b""
  while not line.endswith(b"\n") and len(line) < 2000:
    peer.settimeout(max(0.01, until - time.monotonic()))
    byte = peer.recv(1)
    if not byte:
      raise OSError("the connection was closed")
    line += byte
  return line


def is_closed(peer: socket.socket) -> bool:
  peer.setblocking(False)
  try:
    return peer.recv(1, socket.MSG_PEEK) == b""
  except BlockingIOError:
    return False
  except OSError:
    return True


def send_message(peer: socket.socket, message: dict[str, Any] | None) -> None:
  try:
    peer.sendall((json.dumps(message) if message else "").encode() + b"\n")
  except OSError:
    pass  # whoever reads from it finds out
