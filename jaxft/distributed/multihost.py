"""Several processes as one run: they meet (rendezvous), watch each other (watchdog) and agree."""

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
from jaxft.utils.console import console, log
from jaxft.utils.files import atomic_write

START_TIMEOUT, PEER_TIMEOUT = 300, 60  # seconds
_call_counter = itertools.count()  # the same in all processes


@contextmanager
def distributed_context(
  info: ProcessInfo | None, start_timeout: int = START_TIMEOUT, peer_timeout: int = PEER_TIMEOUT
) -> Generator[None]:
  """Join the distributed run; only process 0 logs.

  An error inside it ends the process at once, with the error's exit code, because JAX's own
  shutdown would wait for the others. Raises RequestError or PeerLostError when not all processes
  come within `start_timeout` seconds.
  """
  if info is None:
    yield
    return
  console.quiet = info.process_id != 0
  waiting = f"waiting for {info.num_processes} processes at {info.coordinator}"
  log(f"{waiting}; to run alone: --num_processes=1")
  peers = rendezvous.connect_peers(info, start_timeout)
  watchdog = Watchdog(info, peers, peer_timeout)
  install_abort_handler(peers[0] if info.process_id else None)
  jax.distributed.initialize(
    info.coordinator,
    info.num_processes,
    info.process_id,
    initialization_timeout=start_timeout,
    heartbeat_timeout_seconds=10 * peer_timeout,  # the watchdog is to be first, with a name
    cluster_detection_method="deactivate" if is_only_local_process() else None,
  )
  try:
    yield
  except BaseException as error:
    if not isinstance(error, JaxftError | Preempted | KeyboardInterrupt | SystemExit):
      # A collective whose peer is gone fails here before the watchdog knows why; after a bug we
      # wait too.
      time.sleep(peer_timeout + 5 if isinstance(error, jax.errors.JaxRuntimeError) else 5)
    code = print_error(error)
    why = str(error).splitlines()[0] if str(error) else type(error).__name__
    watchdog.announce_exit(code, why)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  # Process 0 may still be exporting, and is watched until it is done.
  assert_all_equal("the end", {})
  watchdog.announce_exit(0, "")


def is_only_local_process() -> bool:
  """Return whether SLURM or Open MPI has started one process on this node.

  It shall have all devices; JAX would give it the first.
  """
  tasks = (
    os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0],
    os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"),
  )
  return "1" in tasks and "JAX_LOCAL_DEVICE_IDS" not in os.environ


@functools.cache
def package_versions() -> Mapping[str, str]:
  """Return the versions of the packages that compute, and of jaxft's own files."""
  files = sorted(Path(jaxft.__file__).parent.rglob("*.py"))
  digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
  versions = {"jaxft": f"{jaxft.__version__} ({digest})", "python": platform.python_version()}
  accelerators = ("jax", "jaxlib", "jax-cuda13-plugin", "libtpu")
  for name in (*accelerators, "flax", "optax", "orbax-checkpoint", "numpy"):
    with suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  return MappingProxyType(versions)


def assert_all_equal(topic: str, facts: Mapping[str, object]) -> None:
  """Raise RequestError in every process, with a line for each fact that differs between them."""
  # JAX and Orbax synchronise through this key-value store; it has no public name.
  state = jax_private.distributed_state()
  store = state.client
  process_id = state.process_id
  num_processes = state.num_processes
  if store is None or num_processes == 1:
    return
  # Keys can be set once, and a program may train twice.
  prefix = f"jaxft/{topic}/{next(_call_counter)}"
  # Others may be tokenising or exporting; one that is lost is the watchdog's to find.
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
          lines.append(f"{name}={values}; all must be the same")
    store.key_value_set(f"{prefix}/verdict", "\n".join(lines) or "-")
  verdict = store.blocking_key_value_get(f"{prefix}/verdict", timeout_ms)
  if verdict != "-":
    raise RequestError(verdict)


def check_shared_folder(folder: Path) -> None:
  """Raise RequestError in all processes if they do not share this folder, on one disk."""
  if jax.process_count() == 1:
    return
  store = jax_private.distributed_state().client
  assert store is not None  # there are several processes
  mark = folder / "run.hosts"
  key = f"jaxft/mark/{next(_call_counter)}"
  if jax.process_index() == 0:
    text = f"{os.getpid()} {time.time_ns()}"
    atomic_write(mark, text)
    store.key_value_set(key, text)
  text = store.blocking_key_value_get(key, 600_000)
  deadline = time.monotonic() + 30  # network disks show a new file late
  while not (seen := mark.is_file() and mark.read_text() == text) and time.monotonic() < deadline:
    time.sleep(0.5)
  fact = f"--workdir={str(folder)!r}, on one disk that all processes share"
  assert_all_equal("workdir", {fact: bool(seen)})
  if jax.process_index() == 0:
    mark.unlink(missing_ok=True)
