"""about.json: with what a run was started and how it ended; its page is written at the end."""

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

import jaxft
from jaxft.distributed import multihost
from jaxft.errors import StorageError, exit_code, first_line
from jaxft.metrics.reporter import peak_memory_source
from jaxft.utils.console import log
from jaxft.utils.files import read_json_object, write_json
from jaxft.utils.redact import redact

# What decides the devices and the compiled program beside the command line.
ENV_VARIABLES = ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "CUDA_VISIBLE_DEVICES", "XLA_FLAGS")


@contextlib.contextmanager
def record_run(
  workdir: Path, mesh: jax.sharding.Mesh, facts: dict[str, Any], write_page: Callable[[Path], None]
) -> Iterator[None]:
  """A context for a run: writes about.json before it, and how the run ended and its page after it.

  A disk that does not take them costs a line of the log, not the run. Only process 0 writes.

  Args:
    facts: what only the run knows of itself: "step", where this start begins, and "total_steps",
      "model", "memory"; later "reached", the last step that was taken, "exported_step" and
      "export".
    write_page: writes the page of the run in this workdir.
  """
  if jax.process_index() > 0:
    yield
    return
  about = {"starts": []}
  with _log_failure("about.json"):
    device = mesh.local_devices[0]
    devices = {"count": mesh.size, "kind": device.device_kind, "processes": jax.process_count()}
    start = {"at": _now(), "step": facts["step"], "devices": devices, "mesh": dict(mesh.shape)}
    starts = read_json_object(workdir / "about.json", []).get("starts") if facts["step"] else []
    about = {
      "starts": [*(starts if isinstance(starts, list) else []), start],
      "command": shell_command(),
      "folder": os.getcwd(),
      "environment": {name: os.environ[name] for name in ENV_VARIABLES if name in os.environ},
      "commit": git_commit(Path(jaxft.__file__).parent.parent),
      "versions": dict(multihost.package_versions()),
      **facts,
      "memory": facts["memory"] | {"peak_of": peak_memory_source(device)},
      "devices": devices,
      "mesh": dict(mesh.shape),
    }
    write_json(workdir / "about.json", about)
  ending = {"exit_code": 0, "why": ""}
  try:
    yield
  except BaseException as error:
    ending = {"exit_code": exit_code(error), "why": redact(str(error)) or type(error).__name__}
    raise
  finally:
    with _log_failure("report.html"):
      about |= {key: facts[key] for key in ("reached", "exported_step", "export") if key in facts}
      write_json(workdir / "about.json", about | {"ending": {"at": _now(), **ending}})
      write_page(workdir)
      log(f"report: {workdir / 'report.html'}")


@contextlib.contextmanager
def _log_failure(name: str) -> Iterator[None]:
  try:
    yield
  except Exception as error:  # of any kind: hours of training are worth more than a page
    reason = f"{type(error).__name__}: {first_line(error)}"
    reason = str(error) if isinstance(error, StorageError) else reason
    log(f"{name} is not written ({reason}); python -m jaxft.report makes the page again")


def _now() -> str:
  return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def shell_command() -> str | None:
  """The command line of this process, for a shell; None where it is no `python -m jaxft...`."""
  words = sys.orig_argv
  for i, word in enumerate(words):
    if word.startswith("jaxft.") and words[i - 1] == "-m":
      return redact(shlex.join(["python", "-m", *words[i:]]))
  return None  # a notebook, say


def git_commit(checkout: Path) -> str | None:
  """The commit of a git checkout, from its files; None where it is none. Ignores later changes."""
  try:
    git = checkout / ".git"
    if git.is_file():  # a work tree of its own
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
