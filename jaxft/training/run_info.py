"""about.json: command, versions and devices of a run, and how it ended."""

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Generator
from pathlib import Path

import jax

import jaxft
from jaxft.distributed import multihost
from jaxft.errors import StorageError, first_line
from jaxft.metrics.system import peak_memory_source
from jaxft.training.memory import host_bytes
from jaxft.training.stages import BuiltRun
from jaxft.utils.files import read_json_object, write_json
from jaxft.utils.logger import log
from jaxft.utils.redact import redact
from jaxft.utils.types import Json

# Besides the command line, these decide the devices and the compiled program.
ENV_VARIABLES = ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "CUDA_VISIBLE_DEVICES", "XLA_FLAGS")


def write_about(run: BuiltRun, start: int, memory: dict[str, int]) -> Json:
  """Write about.json of a run that begins or resumes, and return its content.

  Args:
    run: the built run.
    start: step that the run resumes from; 0 for a new run.
    memory: planned bytes of a device, by purpose.
  """
  about: Json = {"starts": []}
  with log_failure("about.json"):
    file = run.request.workdir / "about.json"
    mesh = run.inputs.mesh
    device = run.inputs.device
    host = host_bytes(run.program)
    devices = {"count": mesh.size, "kind": device.device_kind, "processes": jax.process_count()}
    this_start = {"at": now(), "step": start, "devices": devices, "mesh": dict(mesh.shape)}
    starts = read_json_object(file, []).get("starts") if start else []
    about = {
      "starts": [*(starts if isinstance(starts, list) else []), this_start],
      "command": shell_command(),
      "folder": os.getcwd(),
      "environment": {name: os.environ[name] for name in ENV_VARIABLES if name in os.environ},
      "commit": git_commit(Path(jaxft.__file__).parent.parent),
      "versions": dict(multihost.package_versions()),
      "step": start,
      "total_steps": run.inputs.total_steps,
      "model": run.model_facts,
      "memory": {"planned": memory, "host": host, "peak_of": peak_memory_source(device)},
      "devices": devices,
      "mesh": dict(mesh.shape),
    }
    write_json(file, about)
  return about


@contextlib.contextmanager
def log_failure(name: str) -> Generator[None]:
  """Log an error and continue: a failed write of `name` must not end the run."""
  try:
    yield
  except Exception as error:  # any kind: hours of training are worth more than a page
    reason = f"{type(error).__name__}: {first_line(error)}"
    reason = str(error) if isinstance(error, StorageError) else reason
    log(f"{name} is not written ({reason}); to rebuild the page: python -m jaxft.report")


def now() -> str:
  """Return the time in UTC, in ISO 8601, such as "2026-11-29T12:00:00Z"."""
  return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def shell_command() -> str | None:
  """Return the command line for a shell; None if it is not a command of jaxft."""
  words = sys.orig_argv
  if words[:1] == ["jaxft"]:  # the console script (`jaxft/__main__.py`)
    return redact(shlex.join(words))
  for i, word in enumerate(words):
    if word.startswith("jaxft.") and words[i - 1] == "-m":
      return redact(shlex.join(["python", "-m", *words[i:]]))
  return None  # a notebook, for example


def git_commit(checkout: Path) -> str | None:
  """Return the commit of a git checkout, from its files; None for other folders.

  Uncommitted changes are ignored.
  """
  try:
    git = checkout / ".git"
    if git.is_file():  # a linked work tree
      git = checkout / git.read_text().removeprefix("gitdir:").strip()
    head = (git / "HEAD").read_text().strip()
    if not head.startswith("ref: "):
      return head
    name = head.removeprefix("ref: ")
    commondir = git / "commondir"
    common = git / commondir.read_text().strip() if commondir.exists() else git
    if (common / name).exists():
      return (common / name).read_text().strip()
    packed = (common / "packed-refs").read_text().splitlines()
    return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)
  except OSError:
    return None
