"""The workdir: its lock, moving an old run aside, and free disk space."""

import itertools
import json
import os
import shutil
import socket
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

import jax
from filelock import FileLock, Timeout

from jaxft.distributed import multihost
from jaxft.errors import RequestError, StorageError
from jaxft.training.preemption import PreemptionHandler
from jaxft.utils.files import atomic_write, write_failure
from jaxft.utils.logger import log

LOCK_FILES = ("run.lock", "run.lock.json")
RUN_FILES = ("checkpoints", "metrics.jsonl", "config.json", "report.html", "export")


@contextmanager
def hold_workdir(workdir: Path, overwrite: bool, inputs: Iterable[Path]) -> Generator[None]:
  """Hold the workdir's lock while the context is open.

  Args:
    workdir: the folder of the run.
    overwrite: also check that the folder can be moved aside.
    inputs: files and folders that the run reads.

  Raises:
    RequestError: another run holds the lock, or the folder cannot be moved aside.
  """
  if overwrite:
    check_not_an_input(workdir, inputs)
  with lock_workdir(workdir):
    multihost.check_shared_folder(workdir)
    if overwrite and jax.process_index() == 0 and has_content(workdir):
      check_movable(workdir)
    yield


@contextmanager
def lock_workdir(workdir: Path) -> Generator[None]:
  """Hold the workdir's lock; the kernel releases it when the process dies.

  Raises:
    RequestError: another run holds it. The message has its pid and host.
    StorageError: the lock file cannot be written.
  """
  if jax.process_index() > 0:  # only process 0 writes
    yield
    return
  if workdir.is_symlink() and not workdir.exists():
    raise RequestError(
      f"--workdir={str(workdir)!r}: a broken link; create its target, or name another folder"
    )
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(workdir / LOCK_FILES[0])
    owner = workdir / LOCK_FILES[1]
    if not _acquire(lock):
      raise RequestError(
        f"--workdir={str(workdir)!r}: {_lock_owner(workdir)} is writing there; stop it, or name "
        "another folder"
      )
    atomic_write(owner, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
  except (OSError, NotImplementedError) as error:  # NotImplementedError: the disk has no file locks
    raise StorageError(f"workdir {workdir}: {write_failure(workdir, error)}") from error
  try:
    yield
  finally:
    owner.unlink(missing_ok=True)
    lock.release()


def _acquire(lock: FileLock) -> bool:
  try:
    lock.acquire(timeout=0)
  except Timeout:
    return False
  return True


def _lock_owner(workdir: Path) -> str:
  try:
    owner = json.loads((workdir / LOCK_FILES[1]).read_text())
    return f"process {owner['pid']} on {owner['host']}"
  except (OSError, ValueError, KeyError, TypeError):
    return "another run"


def check_not_an_input(workdir: Path, inputs: Iterable[Path]) -> None:
  """Raise RequestError if a new run reads a file in the workdir to be moved."""
  for path in (Path.cwd(), *inputs):
    if path.resolve().is_relative_to(workdir.resolve()):
      raise RequestError(
        f"--overwrite_output_dir: {path} is in {workdir}, which would be moved aside; name "
        "another --workdir"
      )


def check_movable(workdir: Path) -> None:
  """Raise RequestError if a workdir cannot be moved or has an active run in it."""
  folder = workdir.resolve()
  if os.path.ismount(folder):
    raise RequestError(
      f"--overwrite_output_dir: {workdir} is a mount point, which cannot be moved; name a folder "
      "in it"
    )
  if not os.access(folder.parent, os.W_OK):
    raise RequestError(
      f"--overwrite_output_dir: {workdir} cannot be moved aside, because {folder.parent} is not "
      "writable; name another --workdir"
    )
  for file in folder.glob(f"**/{LOCK_FILES[0]}"):
    if file.parent == folder:
      continue
    lock = FileLock(file)
    if not _acquire(lock):
      raise RequestError(
        f"--overwrite_output_dir: {_lock_owner(file.parent)} is writing in {file.parent}; stop it, "
        "or name another --workdir"
      )
    lock.release()


def has_content(workdir: Path) -> bool:
  """Return whether a workdir has files that a new run would replace."""
  return any((workdir / name).exists() for name in RUN_FILES)


def move_aside(workdir: Path) -> Path:
  """Rename a workdir to `NAME.1` (2, 3, ...) and make a new one with the lock.

  If the process dies at any point, every file is still in one of the two folders.

  Returns:
    The new path of the old files.

  Raises:
    StorageError: the folder cannot be renamed or made.
  """
  folder = workdir.resolve()
  names = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
  aside = next(name for name in names if not os.path.lexists(name))
  try:
    folder.rename(aside)
    try:
      folder.mkdir()
    except OSError:  # a disk quota, for example
      aside.rename(folder)
      raise
    for name in LOCK_FILES:
      if (aside / name).exists():
        (aside / name).rename(folder / name)
  except OSError as error:
    reason = write_failure(workdir, error)
    raise StorageError(f"--overwrite_output_dir: {workdir}: {reason}") from error
  return aside


def overwrite_workdir(workdir: Path, out: Path, preemption: PreemptionHandler) -> None:
  """Move the old run aside while all processes wait.

  If `out` already has an export, this logs that it will be replaced.
  """
  is_main = jax.process_index() == 0
  multihost.assert_all_equal("read", {})
  with preemption.deferred():
    if is_main and has_content(workdir):
      aside = move_aside(workdir)
      log(f"{workdir}: the old run is moved to {aside}; a new run begins (--overwrite_output_dir)")
    multihost.assert_all_equal("moved", {})
  if is_main and out.is_dir() and any(out.iterdir()):
    log(f"{out}: this export will be replaced when the run ends")


def check_disk_space(needed: dict[Path, int], what: str) -> None:
  """Check that disks have enough free space; folders on the same disk are added up.

  Args:
    needed: bytes for each folder, which need not exist yet.
    what: name of the files, for the error.

  Raises:
    StorageError: a disk has less free space than needed.
  """
  needed_on = {}
  for folder, nbytes in needed.items():
    existing = folder.absolute()
    while not existing.exists():
      existing = existing.parent
    disk = existing.stat().st_dev
    free = shutil.disk_usage(existing).free
    needed_on[disk] = needed_on.get(disk, 0) + nbytes
    if free < needed_on[disk]:
      raise StorageError(
        f"{folder}: {what} need {needed_on[disk]:,} bytes and the disk has {free:,} free; make "
        "room, or name a folder elsewhere"
      )
