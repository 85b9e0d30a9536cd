"""Checkpoints: Orbax, plus a checksum of every leaf, because Orbax loads flipped bits without a word (0.12.8, measured)."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from jaxft.checkpoint.checksums import checksums, chunk_checksum, nonfinite_leaves
from jaxft.errors import CheckpointReadError, NumericsError, StorageError, first_line
from jaxft.utils.files import is_encodable

# After a failed read Orbax (0.12.8) leaves tasks behind that nobody awaits; asyncio would log each with a traceback, pages
# after the error has been told in one line.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)
logging.getLogger("absl").setLevel(
  logging.CRITICAL
)  # Orbax's: what it logs with a traceback it raises too

PLACEHOLDER = ocp.PLACEHOLDER
READ_BATCH_BYTES = (
  2**28
)  # bytes of a leaf, or of several, that are read at once where there is no room for all
CHUNK_BYTES = (
  2**26
)  # bytes that are compressed at once, and that a file is to have: Orbax makes a file in memory, as a whole
TMP_MARK, TRASH_DIR = (
  ".orbax-checkpoint-tmp",
  "to-be-deleted",
)  # in the names of folders beside the checkpoints
GLOB_CHARS = (
  "[",
  "**",
  "\\",
)  # Orbax collects the files of a checkpoint by a pattern, and does not escape the path
# Reasons why a sound file cannot be read here and now.
TRANSIENT_ERRORS = (
  "PERMISSION_DENIED",
  "RESOURCE_EXHAUSTED",
  "Permission denied",
  "Operation not permitted",
)
TRANSIENT_ERRORS += ("Too many open files", "Cannot allocate memory", "Stale file handle")


def validate_path(folder: Path) -> list[str]:
  """Why checkpoints in this folder could not be read again, at most one line."""
  if not is_encodable(str(folder.absolute())):
    return [
      f"{str(folder)!r}: its name is not UTF-8, and Orbax would not save there (0.12); name another folder"
    ]
  found = [part for part in GLOB_CHARS if part in str(folder.absolute())]
  return [
    f"{str(folder)!r}: Orbax takes the {part} in the path of a checkpoint for part of a pattern (0.12), and would not "
    f"find what it has saved; name a folder without any of {' '.join(GLOB_CHARS)}"
    for part in found[:1]
  ]


@dataclasses.dataclass
class KeepVerified:
  """Orbax's policy that keeps the checkpoint that was last read back and found as it was written."""

  step: int | None

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
    return [info.step == self.step for info in checkpoints]


class CheckpointManager:
  """The checkpoints of one run: `folder/STEP/` with the state and a JSON record about it, written in the background."""

  def __init__(
    self,
    folder: Path,
    keep: int = 1,
    best_metric: str = "",
    *,
    writes: bool = False,
    low_memory: bool = False,
  ):
    """Opens the folder, making it if need be; raises StorageError when it cannot.

    Args:
      keep: newest checkpoints to keep; the last that was read back stays too, until a newer one has been.
      best_metric: keep the one with the least value of this metric too.
      writes: this run is the folder's only writer, and removes what a killed one left half written or half deleted.
      low_memory: read and write some leaves at a time, and wait for it: the host has no room for a copy of the state.
    """
    self.folder, self._closed, self._nbytes = folder, False, 0
    self._keep, self._low_memory, self._verified, self._has_saved = (
      keep,
      low_memory,
      KeepVerified(None),
      False,
    )
    self._lowest = lowest = lambda metrics: (
      metrics.get(best_metric, math.inf) if metrics else math.inf
    )
    kept = [LatestN(keep), self._verified]
    if best_metric:
      kept.append(
        BestN(get_metric_fn=lowest, reverse=True, n=1, keep_checkpoints_without_metrics=False)
      )
    options = ocp.CheckpointManagerOptions(
      preservation_policy=AnyPreservationPolicy(kept),
      best_fn=lowest
      if best_metric
      else None,  # without it Orbax writes no metrics, and another process knows of no best one
      best_mode="min",
      todelete_subdir=TRASH_DIR,  # so that none is ever half there under its own name
    )
    piece = (
      {"save_device_host_concurrent_gb": 1, "is_prioritized_key_fn": lambda _: False}
      if low_memory
      else {}
    )
    handlers = {"state": ocp.PyTreeCheckpointHandler(**piece), "meta": ocp.JsonCheckpointHandler()}
    self._or_storage_error(lambda: folder.mkdir(parents=True, exist_ok=True))
    if writes:
      self._or_storage_error(self._sweep)
    opened = lambda: ocp.CheckpointManager(
      folder.absolute(), options=options, item_handlers=handlers
    )
    self._manager = self._or_storage_error(opened)

  def save(
    self, step: int, state: Any, meta: dict[str, Any], metrics: Mapping[str, float] | None = None
  ) -> None:
    """Starts to write; the arrays may be changed or donated as soon as this returns.

    Raises StorageError, and NumericsError for a state that is not finite: an update can overflow though nothing before it did.
    The first checkpoint of a process is waited for and read back, so that a disk that is not to be trusted shows at once, and
    later the newest one each time the last that was read back is about to be older than the newest `keep`.
    """
    if wrong := nonfinite_leaves(state):
      raise NumericsError(
        f"step {step}: not saved: {wrong[0]} is not finite ({len(wrong)} such leaves)"
      )
    self.wait()
    steps = self.steps()
    if steps and self._verified.step not in (steps[-1], *[*steps, step][-self._keep :]):
      self._read_back(steps[-1], state)
    meta = meta | {"step": step, "leaves": leaf_specs(state), "checksums": checksums(state)}
    meta |= {"sha256": _sha256(meta)}
    each = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), state)
    arrays = ocp.args.PyTreeSave(state, save_args=each, ocdbt_target_data_file_size=CHUNK_BYTES)
    args = ocp.args.Composite(state=arrays, meta=ocp.args.JsonSave(meta))
    # force: without it Orbax leaves out, in silence, a step that is not after the newest.
    write = lambda: self._manager.save(step, args=args, metrics=dict(metrics or {}), force=True)
    self._nbytes = tree_nbytes(state)
    if not self._or_storage_error(write):
      raise StorageError(f"{self.folder / str(step)}: not saved")
    if self._low_memory or not self._has_saved:
      self.wait()
    if not self._has_saved:
      self._read_back(step, state)
      self._has_saved = True

  def _read_back(self, step: int, like: Any) -> None:
    self.verify(step, like)
    self._verified.step = step

  def verify(self, step: int, like: Any) -> None:
    """Reads a checkpoint back, each process some chunks of it, and compares checksums; raises StorageError."""
    wanted = self.metadata(step)["checksums"]
    folder = self.folder.absolute() / str(step) / "state"
    leaves = jax.tree_util.tree_flatten_with_path(like)[0]
    names = list(ocp.tree.to_flat_dict(like, sep="."))  # as Orbax names their folders

    def read() -> list[int]:
      with ThreadPoolExecutor(
        4
      ) as pool:  # to decompress and to add up; numpy lets go of the interpreter
        return [
          _local_checksum(folder, name, leaf, pool)
          for name, (_, leaf) in zip(names, leaves, strict=True)
        ]

    sums = np.array(self._read(step, read), np.uint32)
    if jax.process_count() > 1:
      sums = multihost_utils.process_allgather(sums).sum(0, dtype=np.uint32)
    for (path, _), found in zip(leaves, sums, strict=True):
      if found != wanted[name := jax.tree_util.keystr(path)]:
        raise StorageError(f"{self.folder / str(step)}: {name} read back is not what was written")

  def quarantine(self, step: int) -> Path:
    """Renames a damaged checkpoint, out of the way of the one that the run will save at this step; returns its new place."""
    names = (
      self.folder / (f"damaged-{step}" + (f"-{number}" if number > 1 else ""))
      for number in itertools.count(1)
    )
    aside = next(name for name in names if not name.exists())
    if jax.process_index() == 0:
      self._or_storage_error(lambda: (self.folder / str(step)).rename(aside))
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f"set aside {step}")
    self._or_storage_error(self._manager.reload)
    return aside

  def wait(self) -> None:
    """Returns when everything saved is on disk. Raises StorageError if it is not; the steps are then read from the disk."""
    try:
      self._or_storage_error(self._manager.wait_until_finished)
    except StorageError:
      self._manager.reload()
      raise
    self._sweep(half_written=False)

  def _sweep(self, half_written: bool = True) -> None:
    """Removes checkpoints that were to go and, where nothing is being written, those that were never whole."""
    if jax.process_index() == 0:
      shutil.rmtree(self.folder / TRASH_DIR, ignore_errors=True)
      for rest in self.folder.glob(f"*{TMP_MARK}*") if half_written else ():
        shutil.rmtree(rest, ignore_errors=True)

  def close(self) -> None:
    """Waits for what is being written; raises StorageError if it is not on disk then."""
    self._or_storage_error(self._manager.close)
    self._closed = True
    self._sweep(half_written=False)

  def close_quietly(self) -> None:
    """Closes after an error, whose story is told already."""
    if not self._closed:
      with contextlib.suppress(Exception):
        self._manager.close()

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def best_step(self) -> int | None:
    """The step with the least value of the metric that was named; None where none of those that are kept has it."""
    step = self._manager.best_step()
    return (
      step if step is not None and self._lowest(self._manager.metrics(step)) < math.inf else None
    )

  def metadata(self, step: int) -> dict[str, Any]:
    """The record of a checkpoint; raises StorageError when it cannot be read, or is not what was saved."""

    def read() -> tuple[dict[str, Any], bool]:
      meta = ocp.JsonCheckpointHandler().restore(self.folder.absolute() / str(step) / "meta")
      return meta, meta.pop("sha256") == _sha256(meta)

    meta, sound = self._read(step, read)
    if not sound:
      raise StorageError(
        f"{self.folder / str(step)}: damaged (its record differs from its checksum)"
      )
    return meta

  def restore(self, step: int, like: Any) -> Any:
    """The state, placed as the ShapeDtypeStructs in `like` say; raises StorageError when it is not what was saved.

    A leaf of `like` that is `PLACEHOLDER` stays so.
    """
    wanted = self.metadata(step)["checksums"]
    state = like
    for some in _split_by_size(like) if self._low_memory else [like]:
      state = jax.tree.map(
        lambda new, old: old if new is PLACEHOLDER else new, self._restore(step, some), state
      )
    found = checksums(jax.tree.map(lambda x: None if x is PLACEHOLDER else x, state))
    left_out = {
      jax.tree_util.keystr(path)
      for path, x in jax.tree_util.tree_flatten_with_path(like)[0]
      if x is PLACEHOLDER
    }
    names = wanted.keys() - left_out | found.keys()
    wrong = [name for name in names if wanted.get(name) != found.get(name)]
    if wrong:
      raise StorageError(
        f"{self.folder / str(step)}: damaged ({min(wrong)} and {len(wrong) - 1} more leaves differ from their checksums)"
      )
    if not left_out:
      self._verified.step = step
    return state

  def _restore(self, step: int, like: Any) -> Any:
    how = ocp.args.PyTreeRestore(
      like, restore_args=ocp.checkpoint_utils.construct_restore_args(like)
    )
    folder = self.folder.absolute() / str(step) / "state"
    return self._read(step, lambda: ocp.PyTreeCheckpointHandler().restore(folder, args=how))

  def _read(self, step: int, act: Callable[[], Any]) -> Any:
    """What `act` reads, where all processes can read it. It must not wait for other processes: they may have failed already,
    as in Orbax's manager, so its handlers are asked.

    Raises, in all of them, Unreadable where one is refused the file, and StorageError where it is damaged.
    """
    found, failure = None, None
    try:
      found = act()
    except Exception as error:  # whatever damage makes Orbax raise
      failure = error
    outcome = 0 if failure is None else 2 if is_transient_error(failure) else 1
    if jax.process_count() > 1:
      outcome = int(np.max(multihost_utils.process_allgather(np.int32(outcome))))
    if not outcome:
      return found
    reason = "by another process" if failure is None else first_line(failure)
    reason = reason.split(" See full TensorStore")[0]  # which is a page long
    place = self.folder / str(step)
    if outcome == 2:
      raise CheckpointReadError(
        f"{place}: cannot be read now ({reason}); nothing was changed: run again where it can"
      ) from failure
    raise StorageError(f"{place}: damaged ({reason})") from failure

  def _or_storage_error(self, act: Callable[[], Any]) -> Any:
    try:
      return act()
    except (
      Exception
    ) as error:  # disk full, no permission, ...: Orbax and TensorStore have no common class
      reason = first_line(error).split(" [source locations")[0]
      if self._nbytes:
        free = shutil.disk_usage(self.folder).free
        reason += f"; it takes {self._nbytes:,} bytes and the disk has {free:,} free"
      raise StorageError(f"checkpoint in {self.folder}: {reason}") from error


def num_new_checkpoints(
  steps: list[int], total_steps: int, train: ConfigDict, steps_of_epoch: int
) -> int:
  """How many more checkpoints the disk will have to hold at once, until a run of so many steps is through.

  Args:
    steps: those of the checkpoints that are there.
  """
  of = lambda every: (steps_of_epoch if every == "epoch" else every) or total_steps
  everies = [of(train.save_every)]
  if train.keep_best_metric:
    everies.append(of(train.eval_every))
  saves = sum(-(-(total_steps - max(steps, default=0)) // every) for every in everies)
  at_once = max(train.keep, 2) + bool(train.keep_best_metric) + 1  # while the next one is written
  return min(saves, max(at_once - len(steps), 1))


def is_transient_error(error: Exception) -> bool:
  """Whether an error while reading tells of this machine and moment rather than of the file."""
  kinds = MemoryError, PermissionError, jax.errors.JaxRuntimeError
  return isinstance(error, kinds) or any(reason in str(error) for reason in TRANSIENT_ERRORS)


def _sha256(meta: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def leaf_specs(state: Any) -> dict[str, str]:
  """The type and shape of each leaf, by path."""
  leaves = jax.tree_util.tree_flatten_with_path(state)[0]
  return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def tree_nbytes(state: Any) -> int:
  """What a checkpoint takes on the disk at most, of arrays or of their shapes."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _split_by_size(like: Any) -> list[Any]:
  """`like` several times, each with at most `READ_BATCH_BYTES` bytes, or one leaf, to be read."""
  groups, room = [], 0
  for path, leaf in jax.tree_util.tree_flatten_with_path(like)[0]:
    if leaf is not PLACEHOLDER:
      room -= tree_nbytes(leaf)
      if room < 0:
        groups.append(set())
        room = READ_BATCH_BYTES - tree_nbytes(leaf)
      groups[-1].add(path)
  only = lambda paths: jax.tree_util.tree_map_with_path(
    lambda at, x: x if at in paths else PLACEHOLDER, like
  )
  return [only(paths) for paths in groups]


def _local_checksum(folder: Path, name: str, leaf: Any, pool: ThreadPoolExecutor) -> int:
  """What this process's share of the chunks of a leaf, read as they lie on the disk, adds to its checksum."""
  store = {"driver": "ocdbt", "base": folder.as_uri() + "/", "path": f"{name}/"}
  array = tensorstore.open({"driver": "zarr", "kvstore": store}, read=True).result()
  if (array.shape, array.dtype.numpy_dtype) != (leaf.shape, leaf.dtype):
    raise ValueError(f"{name} is {array.dtype.name}{array.shape}")
  sizes = array.chunk_layout.read_chunk.shape or ()  # None of a scalar
  corners = itertools.product(
    *(range(0, whole, size) for whole, size in zip(leaf.shape, sizes, strict=True))
  )
  mine = itertools.islice(corners, jax.process_index(), None, jax.process_count())

  def of(corner: tuple[int, ...]) -> int:
    box = tuple(
      slice(start, min(start + size, whole))
      for start, size, whole in zip(corner, sizes, leaf.shape)
    )
    return chunk_checksum(array[box].read().result(), corner, leaf.shape)

  return sum(pool.map(of, mine)) % 2**32
