"""Run several processes as one: rendezvous, watchdog, and checks that all agree."""

import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

import jax

import jaxft
from jaxft.distributed import rendezvous
from jaxft.distributed.rendezvous import ProcessInfo
from jaxft.distributed.watchdog import Watchdog, install_abort_handler
from jaxft.errors import JaxftError, Preempted, RequestError, print_error
from jaxft.utils import jax_private
from jaxft.utils.console import console
from jaxft.utils.files import atomic_write
from jaxft.utils.logger import log

START_TIMEOUT, PEER_TIMEOUT = 300, 60  # seconds
# All processes make the same calls in the same order, so the counter agrees between them.
_call_counter = itertools.count()


@contextmanager
def distributed_context(
  info: ProcessInfo | None, start_timeout: int = START_TIMEOUT, peer_timeout: int = PEER_TIMEOUT
) -> Generator[None]:
  """Join the distributed run; only process 0 logs.

  An error inside the context ends the process immediately, with the error's exit code, because
  JAX's own shutdown would wait for the others.

  Args:
    info: this process and the size of the run; None for a run of one process.
    start_timeout: seconds to wait for the other processes.
    peer_timeout: seconds of silence after which another process counts as lost.

  Raises:
    RequestError: the processes have different flags.
    PeerLostError: a process does not connect within `start_timeout` seconds.
  """
  if info is None:
    yield
    return
  console.quiet = info.process_id != 0
  waiting = f"waiting for {info.num_processes} processes at {info.coordinator}"
  log(f"{waiting}; to run a single process, pass --num_processes=1")
  peers = rendezvous.connect_peers(info, start_timeout)
  watchdog = Watchdog(info, peers, peer_timeout)
  install_abort_handler(peers[0] if info.process_id else None)
  jax.distributed.initialize(
    info.coordinator,
    info.num_processes,
    info.process_id,
    initialization_timeout=start_timeout,
    # Longer than the watchdog's timeout: the watchdog names the lost process, JAX does not.
    heartbeat_timeout_seconds=10 * peer_timeout,
    cluster_detection_method="deactivate" if is_only_local_process() else None,
  )
  try:
    yield
  except BaseException as error:
    if not isinstance(error, JaxftError | Preempted | KeyboardInterrupt | SystemExit):
      # If a peer dies, a collective may fail here before the watchdog knows the cause. Wait for the
      # watchdog, which reports the lost process. After any other error a short wait is enough.
      time.sleep(peer_timeout + 5 if isinstance(error, jax.errors.JaxRuntimeError) else 5)
    code = print_error(error)
    why = str(error).splitlines()[0] if str(error) else type(error).__name__
    watchdog.announce_exit(code, why)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  # Process 0 may still be exporting; the others watch it until it is done.
  assert_all_equal("the end", {})
  watchdog.announce_exit(0, "")


def is_only_local_process() -> bool:
  """Return whether SLURM or Open MPI has started one process on this node.

  Such a process gets all devices of the node; JAX would give it only the first.
  """
  tasks = (
    os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0],
    os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"),
  )
  return "1" in tasks and "JAX_LOCAL_DEVICE_IDS" not in os.environ


@functools.cache
def package_versions() -> Mapping[str, str]:
  """Return package versions, and a hash of jaxft's source files."""
  files = sorted(Path(jaxft.__file__).parent.rglob("*.py"))
  digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
  versions = {"jaxft": f"{jaxft.__version__} ({digest})", "python": platform.python_version()}
  accelerators = ("jax", "jaxlib", "jax-cuda13-plugin", "libtpu")
  for name in (*accelerators, "flax", "optax", "orbax-checkpoint", "numpy"):
    with suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  return MappingProxyType(versions)


def assert_all_equal(topic: str, facts: Mapping[str, object]) -> None:
  """Check that all processes have the same facts.

  Process 0 compares the facts of all processes and publishes the result.

  Args:
    topic: names the check in the key-value store.
    facts: values by name; anything that JSON cannot hold is compared as text.

  Raises:
    RequestError: in every process, with one line for each fact that differs.
  """
  # JAX and Orbax synchronize through the same key-value store; JAX has no public name for it.
  state = jax_private.distributed_state()
  store = state.client
  process_id = state.process_id
  num_processes = state.num_processes
  if store is None or num_processes == 1:
    return
  # A key can be set only once, and one program may train twice: number the calls.
  prefix = f"jaxft/{topic}/{next(_call_counter)}"
  # A day: other processes may be tokenizing or exporting. The watchdog detects lost ones.
  timeout_ms = 24 * 3_600_000
  store.key_value_set(f"{prefix}/{process_id}", json.dumps(facts, default=str))
  if process_id == 0:
    ours = json.loads(json.dumps(facts, default=str))
    lines = []
    for other in range(1, num_processes):
      theirs = json.loads(store.blocking_key_value_get(f"{prefix}/{other}", timeout_ms))
      for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
          values = f"{theirs.get(name)!r} on process {other}: {ours.get(name)!r} on process 0"
          lines.append(f"{name}={values}; all processes must have the same value")
    store.key_value_set(f"{prefix}/verdict", "\n".join(lines) or "-")
  verdict = store.blocking_key_value_get(f"{prefix}/verdict", timeout_ms)
  if verdict != "-":
    raise RequestError(verdict)


def check_shared_folder(folder: Path) -> None:
  """Check that all processes see this folder on a shared disk.

  Process 0 writes a small file; the others must find it within 30 s.

  Raises:
    RequestError: in all processes, if one of them does not find the file.
  """
  if jax.process_count() == 1:
    return
  store = jax_private.distributed_state().client
  assert store is not None  # with several processes JAX always has a client
  mark = folder / "run.hosts"
  key = f"jaxft/mark/{next(_call_counter)}"
  if jax.process_index() == 0:
    text = f"{os.getpid()} {time.time_ns()}"
    atomic_write(mark, text)
    store.key_value_set(key, text)
  text = store.blocking_key_value_get(key, 600_000)
  deadline = time.monotonic() + 30  # a network disk may show a new file late
  while not (seen := mark.is_file() and mark.read_text() == text) and time.monotonic() < deadline:
    time.sleep(0.5)
  fact = f"--workdir={str(folder)!r} (must be on a shared disk): visible"
  assert_all_equal("workdir", {fact: bool(seen)})
  if jax.process_index() == 0:
    mark.unlink(missing_ok=True)
