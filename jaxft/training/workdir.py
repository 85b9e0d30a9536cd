"""The workdir: one writer at a time, what may be overwritten or moved, and room on the disk."""

import itertools
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from filelock import FileLock, Timeout

from jaxft.errors import RequestError, StorageError
from jaxft.utils.files import atomic_write, write_failure

LOCK_FILES = ("run.lock", "run.lock.json")
RUN_FILES = ("checkpoints", "metrics.jsonl", "config.json", "report.html", "export")


@contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
  """Holds the workdir's lock, which ends with the process; raises RequestError, with pid and host, when another run has it."""
  if jax.process_index() > 0:  # process 0 writes
    yield
    return
  if workdir.is_symlink() and not workdir.exists():
    raise RequestError(
      f"--workdir={str(workdir)!r}: a link that leads nowhere; make the folder, or name another one"
    )
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    lock, about = FileLock(workdir / LOCK_FILES[0]), workdir / LOCK_FILES[1]
    try:
      lock.acquire(timeout=0)
    except Timeout:
      raise RequestError(
        f"--workdir={str(workdir)!r}: {_lock_owner(about)} is writing there; stop it, or name another folder"
      ) from None
    atomic_write(about, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
  except (OSError, NotImplementedError) as error:  # the second: a disk that knows no locks
    raise StorageError(f"workdir {workdir}: {write_failure(workdir, error)}") from error
  try:
    yield
  finally:
    about.unlink(missing_ok=True)
    lock.release()


def _lock_owner(about: Path) -> str:
  try:
    holder = json.loads(about.read_text())
    return f"process {holder['pid']} on {holder['host']}"
  except (OSError, ValueError, KeyError, TypeError):
    return "another run"


def check_not_an_input(workdir: Path, used: Iterable[Path]) -> None:
  """Raises RequestError where a new run reads something in the workdir that is to be moved aside."""
  for path in (Path.cwd(), *used):
    if path.resolve().is_relative_to(workdir.resolve()):
      raise RequestError(
        f"--overwrite_output_dir: {path} lies in {workdir}, which would be moved aside; name another --workdir"
      )


def check_movable(workdir: Path) -> None:
  """Raises RequestError where a workdir cannot be moved aside, or a run is going on in a folder of it."""
  there = workdir.resolve()
  if os.path.ismount(there):
    raise RequestError(
      f"--overwrite_output_dir: {workdir} is a mount point, which cannot be moved; name a folder in it"
    )
  if not os.access(there.parent, os.W_OK):
    raise RequestError(
      f"--overwrite_output_dir: {workdir} would be moved aside, and {there.parent} may not be written to; name another "
      "--workdir"
    )
  for file in there.glob("**/run.lock"):
    if file.parent == there:
      continue
    lock = FileLock(file)
    try:
      lock.acquire(timeout=0)
    except Timeout:
      raise RequestError(
        f"--overwrite_output_dir: {_lock_owner(file.with_name('run.lock.json'))} is writing in {file.parent}; stop it, or name "
        "another --workdir"
      ) from None
    lock.release()


def has_content(workdir: Path) -> bool:
  """Whether a workdir has anything that a new run would replace."""
  return any((workdir / name).exists() for name in RUN_FILES)


def move_aside(workdir: Path) -> Path:
  """Renames a workdir, and makes a new one, in which the lock goes on. Returns the other name; raises StorageError.

  All of it is in one of the two folders at any moment.
  """
  there = workdir.resolve()
  names = (there.with_name(f"{there.name}.{number}") for number in itertools.count(1))
  aside = next(name for name in names if not os.path.lexists(name))
  try:
    there.rename(aside)
    try:
      there.mkdir()
    except OSError:  # a quota
      aside.rename(there)
      raise
    for name in LOCK_FILES:
      if (aside / name).exists():
        (aside / name).rename(there / name)
  except OSError as error:
    raise StorageError(
      f"--overwrite_output_dir: {workdir}: {write_failure(workdir, error)}"
    ) from error
  return aside


def check_disk_space(needed: dict[Path, int], what: str) -> None:
  """Raises StorageError when a disk has less free than what is needed of it.

  Args:
    needed: bytes for each folder, which need not be there yet.
    what: the bytes are for.
  """
  disks = {}
  for folder, nbytes in needed.items():
    there = folder.absolute()
    while not there.exists():
      there = there.parent
    disk, free = there.stat().st_dev, shutil.disk_usage(there).free
    disks[disk] = disks.get(disk, 0) + nbytes
    if free < disks[disk]:
      raise StorageError(
        f"{folder}: {what} need {disks[disk]:,} bytes and the disk has {free:,} free; make room, or name a folder elsewhere"
      )
