"""Checkpoints: Orbax, plus a checksum of every leaf.

Orbax loads flipped bits without an error (0.12.8, measured).
"""

import contextlib
import dataclasses
import itertools
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from jaxft.checkpoint.checksums import checksums, chunk_checksum, nonfinite_leaves
from jaxft.config import TrainSection
from jaxft.errors import CheckpointReadError, NumericsError, StorageError, first_line
from jaxft.utils.files import is_encodable, json_sha256
from jaxft.utils.types import Json, Params, PyTree

Result = TypeVar("Result")
PLACEHOLDER: PyTree = ocp.PLACEHOLDER  # replaces a leaf that is not read
READ_BATCH_BYTES = 2**28  # bytes of leaves read at a time if memory is low
CHUNK_BYTES = 2**26  # bytes of a chunk and of a file, which Orbax builds in memory as a whole
TMP_MARK = ".orbax-checkpoint-tmp"  # in names of half-written checkpoints
TRASH_DIR = "to-be-deleted"
# Orbax finds the files of a checkpoint with a glob pattern and does not escape the path.
GLOB_CHARS = ("[", "**", "\\")
# Errors that a sound file can raise on this machine at this moment.
TRANSIENT_ERRORS = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "Permission denied")
TRANSIENT_ERRORS += ("Operation not permitted", "Too many open files", "Cannot allocate memory")
TRANSIENT_ERRORS += ("Stale file handle",)


def validate_path(folder: Path) -> list[str]:
  """Return an error line if checkpoints in this folder could not be read, else []."""
  path = str(folder.absolute())
  if not is_encodable(path):
    return [
      f"{str(folder)!r}: its name is not UTF-8, and Orbax (0.12) cannot save there; name "
      "another folder"
    ]
  if char := next((char for char in GLOB_CHARS if char in path), ""):
    return [
      f"{str(folder)!r}: Orbax (0.12) reads the {char} in this path as part of a pattern, and "
      "would not find its checkpoints again; name a folder without any of "
      f"{' '.join(GLOB_CHARS)}"
    ]
  return []


@dataclasses.dataclass
class KeepVerified:
  """Orbax policy that preserves the checkpoint that was last verified."""

  step: int | None

  def should_preserve(
    self, checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo], *, context: object
  ) -> Sequence[bool]:
    """Return for each checkpoint whether it must be preserved."""
    return [info.step == self.step for info in checkpoints]


def _silence_orbax() -> None:
  """Keep tracebacks out of the log: their errors are also raised."""
  # After a failed read Orbax (0.12.8) leaves tasks that are never awaited. asyncio would log a
  # traceback for each, although the error is printed in one line. Orbax itself logs to absl.
  for name in ("asyncio", "absl"):
    logging.getLogger(name).setLevel(logging.CRITICAL)


class CheckpointState(NamedTuple):
  """The arrays of a checkpoint: all state that training changes.

  The field names are part of the file format. A checkpoint's JSON record of the run (config,
  fingerprints, versions) is `BuiltRun.checkpoint_metadata` in training/stages.py.
  """

  step: jax.Array  # optimizer steps done, skipped ones included
  params: Params  # the trained weights, in float32 or in `model.param_dtype`
  opt: PyTree  # the state of the optax chain: moments and counts


class CheckpointManager:
  """The checkpoints of a run, saved in the background.

  Each is a folder `STEP/` with the state and a JSON record, which has checksums of both. A
  checkpoint is verified by reading it back. The last verified one stays until a newer one is
  verified.
  """

  def __init__(
    self,
    folder: Path,
    max_to_keep: int = 1,
    best_metric: str = "",
    *,
    writes: bool = False,
    low_memory: bool = False,
  ):
    """Open the folder, or make it.

    Args:
      folder: folder of the checkpoints.
      max_to_keep: number of newest checkpoints to keep. The last verified one stays too, until a
        newer one is verified.
      best_metric: the checkpoint with the lowest value of this metric stays too.
      writes: this run is the folder's only writer, and removes half-written and half-deleted
        checkpoints of a killed run.
      low_memory: read and write some leaves at a time, and wait for saves, because the host has no
        room for a copy of the state.

    Raises:
      StorageError: the folder cannot be made or read.
    """
    _silence_orbax()
    self.folder = folder
    self._max_to_keep = max_to_keep
    self._best_metric = best_metric
    self._low_memory = low_memory
    self._verified = KeepVerified(None)
    self._has_saved = False
    self._closed = False
    self._nbytes = 0
    best = checkpoint_managers.BestN(
      get_metric_fn=self._metric, reverse=True, n=1, keep_checkpoints_without_metrics=False
    )
    policies = [checkpoint_managers.LatestN(max_to_keep), self._verified]
    policies += [best] if best_metric else []
    options = ocp.CheckpointManagerOptions(
      preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
      # Without best_fn Orbax writes no metrics, and after a restart no best checkpoint is known.
      best_fn=self._metric if best_metric else None,
      best_mode="min",
      todelete_subdir=TRASH_DIR,  # so that no half-deleted checkpoint has a valid name
    )
    # At most 1 GB in transfer. Orbax (0.12.8) applies this limit only to arrays that a callback of
    # its array handler defers, and none is deferred.
    limit = 1 if low_memory else None
    handlers = {
      "state": ocp.PyTreeCheckpointHandler(save_device_host_concurrent_gb=limit),
      "meta": ocp.JsonCheckpointHandler(),
    }
    self._call(lambda: folder.mkdir(parents=True, exist_ok=True))
    if writes:
      self._call(self._sweep)
    folder = folder.absolute()
    self._manager = self._call(
      lambda: ocp.CheckpointManager(folder, options=options, item_handlers=handlers)
    )

  def _metric(self, metrics: Mapping[str, float | str] | None) -> float:
    return float(metrics.get(self._best_metric, math.inf)) if metrics else math.inf

  def _path(self, step: int) -> Path:
    return self.folder / str(step)

  def save(
    self,
    step: int,
    state: CheckpointState,
    meta: Json,
    metrics: Mapping[str, float | str] | None = None,  # "nan" and "inf" are strings
  ) -> None:
    """Start to save a checkpoint.

    The arrays may be changed or donated as soon as this returns.

    The first checkpoint of a process is finished and verified before this returns, so that a faulty
    disk shows early. Later the newest one is verified each time the last verified one is about to
    be older than the newest `max_to_keep`.

    Args:
      step: optimizer steps done.
      state: the arrays to save.
      meta: record of the run; `step`, leaf specs and checksums are added.
      metrics: eval metrics, for `best_metric`.

    Raises:
      NumericsError: the state is not finite. An update can overflow although loss and gradients
        were finite.
      StorageError: this or the previous checkpoint could not be written, or verification failed.
    """
    if names := nonfinite_leaves(state):
      raise NumericsError(
        f"step {step}: not saved: {names[0]} is not finite ({len(names)} such leaves)"
      )
    self.wait()
    steps = self.steps()
    if steps and self._verified.step not in (steps[-1], *[*steps, step][-self._max_to_keep :]):
      self.verify(steps[-1], state)
    # Checksums are of the arrays in memory, so that damage on the way to the disk is found too.
    meta = meta | {"step": step, "leaves": leaf_specs(state), "checksums": checksums(state)}
    meta |= {"sha256": json_sha256(meta)}
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), state)
    args = ocp.args.Composite(
      state=ocp.args.PyTreeSave(
        state, save_args=save_args, ocdbt_target_data_file_size=CHUNK_BYTES
      ),
      meta=ocp.args.JsonSave(meta),
    )

    # Without force Orbax silently skips a step that is not after the newest one.
    write = lambda: self._manager.save(step, args=args, metrics=dict(metrics or {}), force=True)
    self._nbytes = tree_nbytes(state)
    if not self._call(write):
      raise StorageError(f"{self._path(step)}: not saved")
    if self._low_memory or not self._has_saved:
      self.wait()
    if not self._has_saved:
      self.verify(step, state)
      self._has_saved = True

  def verify(self, step: int, like: PyTree) -> None:
    """Read a checkpoint back and compare checksums. If they match, it is preserved.

    Each process reads some chunks, a few at a time, because memory may not hold a second state.

    Args:
      step: step of the checkpoint.
      like: state or shapes with the same tree.

    Raises:
      StorageError: the checkpoint is damaged.
    """
    expected = self.metadata(step)["checksums"]
    folder = self._path(step).absolute() / "state"
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(like))
    names = list(ocp.tree.to_flat_dict(like, sep="."))  # the names of their folders in Orbax

    def read() -> list[int]:
      # Threads run in parallel: decompression and numpy release the GIL.
      with ThreadPoolExecutor(4) as pool:
        pairs = zip(names, leaves, strict=True)
        return [_local_checksum(folder, name, leaf, pool) for name, leaf in pairs]

    sums = np.array(self._read(step, read), np.uint32)
    if jax.process_count() > 1:
      sums = multihost_utils.process_allgather(sums).sum(0, dtype=np.uint32)
    for path, checksum in zip(map(jax.tree_util.keystr, paths), sums, strict=True):
      if checksum != expected[path]:
        raise StorageError(f"{self._path(step)}: {path} changed between writing and reading back")
    self._verified.step = step

  def quarantine(self, step: int) -> Path:
    """Rename a damaged checkpoint and return its new path.

    The run can then save this step again.
    """
    names = (f"damaged-{step}" + (f"-{i}" if i > 1 else "") for i in itertools.count(1))
    path = next(path for name in names if not (path := self.folder / name).exists())
    if jax.process_index() == 0:
      self._call(lambda: self._path(step).rename(path))
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f"set aside {step}")
    self._call(self._manager.reload)
    return path

  def wait(self) -> None:
    """Wait until all saves are on disk.

    Raises:
      StorageError: a save failed. The steps on disk are listed again before.
    """
    try:
      self._call(self._manager.wait_until_finished)
    except StorageError:
      self._manager.reload()
      raise
    self._sweep(half_written=False)

  def _sweep(self, half_written: bool = True) -> None:
    """Remove deleted checkpoints and, if `half_written`, those of a killed save."""
    if jax.process_index() == 0:
      shutil.rmtree(self.folder / TRASH_DIR, ignore_errors=True)
      for folder in self.folder.glob(f"*{TMP_MARK}*") if half_written else ():
        shutil.rmtree(folder, ignore_errors=True)

  def close(self) -> None:
    """Wait for the current save and close; raises StorageError if the save failed."""
    self._call(self._manager.close)
    self._closed = True
    self._sweep(half_written=False)

  def close_quietly(self) -> None:
    """Close after an error that is already reported."""
    if not self._closed:
      with contextlib.suppress(Exception):
        self._manager.close()

  def steps(self) -> list[int]:
    """Return the steps of all checkpoints, oldest first."""
    return sorted(self._manager.all_steps())

  def best_step(self) -> int | None:
    """Return the step with the lowest `best_metric`; None if no checkpoint has it."""
    step = self._manager.best_step()
    has_metric = step is not None and self._metric(self._manager.metrics(step)) < math.inf
    return step if has_metric else None

  def metadata(self, step: int) -> Json:
    """Read a checkpoint's record; raises StorageError if it is damaged."""

    def read() -> tuple[Json, bool]:
      # Orbax expects an epath.Path, but its exists() hides permission errors.
      folder = self._path(step).absolute() / "meta"
      meta = dict(ocp.JsonCheckpointHandler().restore(folder))  # pyrefly: ignore[bad-argument-type]
      return meta, meta.pop("sha256") == json_sha256(meta)

    meta, is_sound = self._read(step, read)
    if not is_sound:
      raise StorageError(f"{self._path(step)}: damaged (its record differs from its checksum)")
    return meta

  def restore(self, step: int, like: PyTree) -> PyTree:
    """Restore the state of a checkpoint and check its checksums.

    Args:
      step: step of the checkpoint.
      like: ShapeDtypeStructs with shardings. A leaf that is `PLACEHOLDER` is not read.

    Raises:
      StorageError: the checkpoint is damaged.
    """
    expected = self.metadata(step)["checksums"]
    state = like
    for batch in _split_by_size(like) if self._low_memory else [like]:
      read = self._restore(step, batch)
      state = jax.tree.map(lambda new, old: old if new is PLACEHOLDER else new, read, state)
    # Checksums of the arrays on their devices, so that damage on the way there is found too.
    actual = checksums(jax.tree.map(lambda x: None if x is PLACEHOLDER else x, state))
    leaves = jax.tree_util.tree_leaves_with_path(like)
    skipped = {jax.tree_util.keystr(path) for path, x in leaves if x is PLACEHOLDER}
    names = expected.keys() - skipped | actual.keys()
    wrong = [name for name in names if expected.get(name) != actual.get(name)]
    if wrong:
      raise StorageError(
        f"{self._path(step)}: damaged ({min(wrong)} and {len(wrong) - 1} more leaves differ from "
        "their checksums)"
      )
    if not skipped:
      self._verified.step = step
    return state

  def _restore(self, step: int, like: PyTree) -> PyTree:
    restore_args = ocp.checkpoint_utils.construct_restore_args(like)
    args = ocp.args.PyTreeRestore(like, restore_args=restore_args)
    read = ocp.PyTreeCheckpointHandler().restore
    folder = self._path(step).absolute() / "state"  # not an epath.Path, as in `metadata`
    return self._read(step, lambda: read(folder, args=args))  # pyrefly: ignore[bad-argument-type]

  def _read(self, step: int, read: Callable[[], Result]) -> Result:
    """Return `read()` if it succeeds in all processes; else raise the same error.

    `read` must not wait for other processes, which may have failed already. Orbax's manager waits;
    its handlers do not.

    Raises:
      CheckpointReadError: a process cannot read the file now.
      StorageError: the file is damaged.
    """
    try:
      result = read()
    except Exception as error:  # damaged files make Orbax raise many types
      failure, outcome = error, _worst_outcome(2 if is_transient_error(error) else 1)
    else:
      failure, outcome = None, _worst_outcome(0)
      if not outcome:
        return result
    reason = "by another process" if failure is None else first_line(failure)
    reason = reason.split(" See full TensorStore")[0]  # a page of text
    if outcome == 2:
      raise CheckpointReadError(
        f"{self._path(step)}: cannot be read now ({reason}); it was left unchanged. Run again when "
        "it can be read"
      ) from failure
    raise StorageError(f"{self._path(step)}: damaged ({reason})") from failure

  def _call(self, action: Callable[[], Result]) -> Result:
    """Return `action()`; raises StorageError for any exception."""
    try:
      return action()
    except Exception as error:  # disk full, ...: Orbax and TensorStore share no base class
      reason = first_line(error).split(" [source locations")[0]
      if self._nbytes:
        free = shutil.disk_usage(self.folder).free
        reason += f"; it takes {self._nbytes:,} bytes and the disk has {free:,} free"
      raise StorageError(f"checkpoint in {self.folder}: {reason}") from error


def num_new_checkpoints(
  steps: list[int], total_steps: int, train: TrainSection, steps_of_epoch: int
) -> int:
  """Return how many more checkpoints the disk needs room for until the run ends.

  Args:
    steps: steps of the checkpoints on disk.
    total_steps: of the run.
    train: the settings of the run.
    steps_of_epoch: steps of one epoch.
  """
  settings = [train.save_every, *([train.eval_every] if train.keep_best_metric else [])]
  # A setting is a number of steps, "epoch", or 0 for only at the end.
  intervals = [(it if isinstance(it, int) else steps_of_epoch) or total_steps for it in settings]
  num_saves = sum(-(-(total_steps - max(steps, default=0)) // every) for every in intervals)
  at_once = max(train.keep, 2) + bool(train.keep_best_metric) + 1  # while the next one is written
  return min(num_saves, max(at_once - len(steps), 1))


def _worst_outcome(outcome: int) -> int:
  """Return the largest outcome of all processes, so that all raise the same error."""
  if jax.process_count() == 1:
    return outcome
  return int(np.max(multihost_utils.process_allgather(np.int32(outcome))))


def is_transient_error(error: Exception) -> bool:
  """Return whether a read error may pass.

  Its cause is then this machine at this moment, such as low memory, and not the file.
  """
  kinds = MemoryError, PermissionError, jax.errors.JaxRuntimeError
  return isinstance(error, kinds) or any(reason in str(error) for reason in TRANSIENT_ERRORS)


def leaf_specs(state: PyTree) -> dict[str, str]:
  """Return dtype and shape of each leaf, by path."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def tree_nbytes(state: PyTree) -> int:
  """Return the bytes of arrays or shapes: an upper bound of a checkpoint on disk."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _split_by_size(like: PyTree) -> list[PyTree]:
  """Split `like` into copies of at most `READ_BATCH_BYTES` bytes or one leaf each.

  The other leaves of a copy are placeholders.
  """
  batches: list[set[jax.tree_util.KeyPath]] = []
  room = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(like):
    if leaf is not PLACEHOLDER:
      room -= tree_nbytes(leaf)
      if room < 0:
        batches.append(set())
        room = READ_BATCH_BYTES - tree_nbytes(leaf)
      batches[-1].add(path)

  def select(paths: set[jax.tree_util.KeyPath]) -> PyTree:
    mask = lambda path, x: x if path in paths else PLACEHOLDER
    return jax.tree_util.tree_map_with_path(mask, like)

  return list(map(select, batches))


def _local_checksum(
  folder: Path, name: str, leaf: jax.Array | jax.ShapeDtypeStruct, pool: ThreadPoolExecutor
) -> int:
  """Return the share in a leaf's checksum of the chunks that this process reads."""
  store = {"driver": "ocdbt", "base": folder.as_uri() + "/", "path": f"{name}/"}
  array = tensorstore.open({"driver": "zarr", "kvstore": store}, read=True).result()
  if (array.shape, array.dtype.numpy_dtype) != (leaf.shape, leaf.dtype):
    raise ValueError(f"{name} is {array.dtype.name}{array.shape}")
  sizes = array.chunk_layout.read_chunk_template.shape
  # Read by the chunks on disk: each is decompressed once, and no leaf is in memory as a whole.
  ranges = (range(0, length, size) for length, size in zip(leaf.shape, sizes, strict=True))
  offsets = itertools.product(*ranges)
  local_offsets = itertools.islice(offsets, jax.process_index(), None, jax.process_count())

  def checksum(offsets: tuple[int, ...]) -> int:
    ends = map(sum, zip(offsets, sizes))  # the last chunk may reach past the end of the leaf
    chunk = tuple(slice(i, min(end, n)) for i, end, n in zip(offsets, ends, leaf.shape))
    return chunk_checksum(array[chunk].read().result(), offsets, leaf.shape)

  return sum(pool.map(checksum, local_offsets)) % 2**32
