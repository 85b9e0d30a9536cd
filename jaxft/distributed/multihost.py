"""Several processes as one run: they meet (roll_call.py), watch each other (watchdog.py), and must agree."""

import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

import jaxft
from jaxft.distributed import rendezvous
from jaxft.distributed.rendezvous import ProcessInfo
from jaxft.distributed.watchdog import Watchdog, install_abort_handler
from jaxft.errors import JaxftError, Preempted, RequestError, print_error
from jaxft.utils.console import console, log
from jaxft.utils.files import atomic_write

START_TIMEOUT, PEER_TIMEOUT = 300, 60  # seconds
_call_counter = itertools.count()  # the same in all processes


@contextmanager
def distributed_context(
  place: ProcessInfo | None, start_timeout: int = START_TIMEOUT, peer_timeout: int = PEER_TIMEOUT
) -> Iterator[None]:
  """Inside it this process is part of the run, and only process 0 says anything. It does not return from an error: the process
  ends, with the error's exit code, because JAX would wait for the others at exit.

  Raises RequestError or PeerLost when not all processes come within `start_timeout` seconds.
  """
  if place is None:
    yield
    return
  console.quiet = place.process_id != 0
  log(
    f"waiting for {place.num_processes} processes at {place.coordinator}; to run alone: --num_processes=1"
  )
  peers = rendezvous.connect_peers(place, start_timeout)
  watchdog = Watchdog(place, peers, peer_timeout)
  install_abort_handler(peers[0] if place.process_id else None)
  jax.distributed.initialize(
    place.coordinator,
    place.num_processes,
    place.process_id,
    initialization_timeout=start_timeout,
    heartbeat_timeout_seconds=10 * peer_timeout,  # the watchdog is to be first, with a name
    cluster_detection_method="deactivate" if is_only_local_process() else None,
  )
  try:
    yield
  except BaseException as error:
    if not isinstance(error, JaxftError | Preempted | KeyboardInterrupt | SystemExit):
      # A collective whose other end is gone fails here before the watchdog knows why; a bug waits the same seconds.
      time.sleep(peer_timeout + 5 if isinstance(error, jax.errors.JaxRuntimeError) else 5)
    code = print_error(error)
    watchdog.announce_exit(code, str(error).splitlines()[0] if str(error) else type(error).__name__)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  assert_all_equal(
    "the end", {}
  )  # process 0 may still be exporting, and is watched until it is done
  watchdog.announce_exit(0, "")


def is_only_local_process() -> bool:
  """Whether SLURM or Open MPI has started one process here: it is to have all devices, and JAX would give it the first."""
  tasks = (
    os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0],
    os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"),
  )
  return "1" in tasks and "JAX_LOCAL_DEVICE_IDS" not in os.environ


@functools.cache
def package_versions() -> Mapping[str, str]:
  """Of what computes, and of jaxft's own files."""
  files = sorted(Path(jaxft.__file__).parent.rglob("*.py"))
  own = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
  packages = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
  )
  found = {"jaxft": f"{jaxft.__version__} ({own})", "python": platform.python_version()}
  for name in packages:
    with suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return MappingProxyType(found)


def assert_all_equal(topic: str, facts: dict[str, Any]) -> None:
  """Raises RequestError in every process, with a line for each fact that is not the same in all of them."""
  from jax._src.distributed import (
    global_state,  # its key-value store is JAX's own, and Orbax's, way to compare notes
  )

  # jax.process_count() would start JAX, whose environment is not complete yet.
  store, me, processes = global_state.client, global_state.process_id, global_state.num_processes
  if store is None or processes == 1:
    return
  topic = f"{topic}/{next(_call_counter)}"  # keys are set once, and a program may train twice
  patience = (
    24 * 3_600_000
  )  # ms: others may be tokenising or exporting; one that is lost is the watchdog's to find
  store.key_value_set(f"jaxft/{topic}/{me}", json.dumps(facts, default=str))
  if me == 0:
    lines = []
    for other in range(1, processes):
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


def check_shared_folder(folder: Path) -> None:
  """Raises RequestError in all processes when the folder is not the same one, on one disk, for all of them."""
  if jax.process_count() == 1:
    return
  from jax._src.distributed import global_state

  store, mark, key = global_state.client, folder / "run.hosts", next(_call_counter)
  if jax.process_index() == 0:
    text = f"{os.getpid()} {time.time_ns()}"
    atomic_write(mark, text)
    store.key_value_set(f"jaxft/mark/{key}", text)
  text = store.blocking_key_value_get(f"jaxft/mark/{key}", 600_000)
  until = time.monotonic() + 30  # network disks show a new file late
  while not (seen := mark.is_file() and mark.read_text() == text) and time.monotonic() < until:
    time.sleep(0.5)
  assert_all_equal(
    "workdir", {f"--workdir={str(folder)!r}, on one disk that all processes share": bool(seen)}
  )
  if jax.process_index() == 0:
    mark.unlink(missing_ok=True)
