"""Checkpoints: Orbax, plus a checksum of every leaf.

Orbax loads flipped bits without a word (0.12.8, measured).
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
PLACEHOLDER: PyTree = ocp.PLACEHOLDER  # for a leaf that is not read
READ_BATCH_BYTES = 2**28  # read at once, of one leaf or several, where there is no room for all
CHUNK_BYTES = 2**26  # compressed at once, and of a file, which Orbax makes in memory as a whole
TMP_MARK = ".orbax-checkpoint-tmp"  # in the names of folders beside the checkpoints
TRASH_DIR = "to-be-deleted"
# Orbax collects the files of a checkpoint by a glob pattern, and does not escape the path.
GLOB_CHARS = ("[", "**", "\\")
# Reasons why a sound file cannot be read on this machine at this moment.
TRANSIENT_ERRORS = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "Permission denied")
TRANSIENT_ERRORS += ("Operation not permitted", "Too many open files", "Cannot allocate memory")
TRANSIENT_ERRORS += ("Stale file handle",)


def validate_path(folder: Path) -> list[str]:
  """Return why checkpoints in this folder could not be read again, in at most one line."""
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
  """Orbax policy that preserves the checkpoint last read back and equal to what was written."""

  step: int | None

  def should_preserve(
    self, checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo], *, context: object
  ) -> Sequence[bool]:
    return [info.step == self.step for info in checkpoints]


def _silence_orbax() -> None:
  """Keep tracebacks of errors that are raised too out of the log."""
  # After a failed read Orbax (0.12.8) leaves tasks behind that nobody awaits; asyncio would log
  # each with a traceback, pages after the error has been printed in one line. absl: Orbax's log.
  for name in ("asyncio", "absl"):
    logging.getLogger(name).setLevel(logging.CRITICAL)


class CheckpointState(NamedTuple):
  """Everything a checkpoint holds besides its JSON record, and everything that training changes.

  The names of the fields are in the files of every checkpoint. What the record says of the run
  (config, fingerprints, versions) is `BuiltRun.checkpoint_metadata` of training/stages.py.
  """

  step: jax.Array  # optimizer steps done, skipped ones included
  params: Params  # the trained weights, in float32 or in `model.param_dtype`
  opt: PyTree  # the state of the optax chain: moments and counts


class CheckpointManager:
  """The checkpoints of one run: `folder/STEP/` with state and JSON record, saved in background."""

  def __init__(
    self,
    folder: Path,
    max_to_keep: int = 1,
    best_metric: str = "",
    *,
    writes: bool = False,
    low_memory: bool = False,
  ):
    """Open the folder, making it if need be; raises StorageError when it cannot.

    Args:
      max_to_keep: the newest checkpoints; the last that was read back stays too, until a newer one
        has been.
      best_metric: the checkpoint with the least value of this metric stays too.
      writes: this run is the folder's only writer, and removes what a killed one left half written
        or half deleted.
      low_memory: read and write some leaves at a time, and wait for it: the host has no room for a
        copy of the state.
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
      # Without it Orbax writes no metrics, and another process knows of no best one.
      best_fn=self._metric if best_metric else None,
      best_mode="min",
      todelete_subdir=TRASH_DIR,  # so that none is ever half deleted under its own name
    )
    # At most a gigabyte on its way at once; but Orbax (0.12.8) heeds it only for arrays that a
    # callback of its array handler defers, and none is.
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
    metrics: Mapping[str, float | str] | None = None,  # "nan" and "inf" are texts
  ) -> None:
    """Start to write; the arrays may be changed or donated as soon as this returns.

    Raises StorageError, and NumericsError for a state that is not finite: an update can overflow
    though nothing before it did. The first checkpoint of a process is waited for and read back, so
    that a disk that is not to be trusted shows at once, and later the newest one each time the last
    that was read back is about to be older than the newest `max_to_keep`.
    """
    if names := nonfinite_leaves(state):
      raise NumericsError(
        f"step {step}: not saved: {names[0]} is not finite ({len(names)} such leaves)"
      )
    self.wait()
    steps = self.steps()
    if steps and self._verified.step not in (steps[-1], *[*steps, step][-self._max_to_keep :]):
      self.verify(steps[-1], state)
    # Checksums of the arrays in memory: whatever happens to them on the way to the disk shows.
    meta = meta | {"step": step, "leaves": leaf_specs(state), "checksums": checksums(state)}
    meta |= {"sha256": json_sha256(meta)}
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), state)
    args = ocp.args.Composite(
      state=ocp.args.PyTreeSave(
        state, save_args=save_args, ocdbt_target_data_file_size=CHUNK_BYTES
      ),
      meta=ocp.args.JsonSave(meta),
    )

    # force: without it Orbax leaves out, in silence, a step that is not after the newest.
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
    """Read a checkpoint back and compares checksums; raises StorageError. It is preserved then.

    Each process reads some chunks, a few at a time: there may be no memory for a second state.
    """
    expected = self.metadata(step)["checksums"]
    folder = self._path(step).absolute() / "state"
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(like))
    names = list(ocp.tree.to_flat_dict(like, sep="."))  # as Orbax names their folders

    def read() -> list[int]:
      # Threads decompress and add up at once: numpy lets go of the interpreter.
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
    """Rename a damaged checkpoint, as the run will save this step again; returns its new path."""
    names = (f"damaged-{step}" + (f"-{i}" if i > 1 else "") for i in itertools.count(1))
    path = next(path for name in names if not (path := self.folder / name).exists())
    if jax.process_index() == 0:
      self._call(lambda: self._path(step).rename(path))
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f"set aside {step}")
    self._call(self._manager.reload)
    return path

  def wait(self) -> None:
    """Return when all saves are on disk; else raises StorageError and lists the steps anew."""
    try:
      self._call(self._manager.wait_until_finished)
    except StorageError:
      self._manager.reload()
      raise
    self._sweep(half_written=False)

  def _sweep(self, half_written: bool = True) -> None:
    """Remove deleted checkpoints and, where nothing is being written, half-written ones."""
    if jax.process_index() == 0:
      shutil.rmtree(self.folder / TRASH_DIR, ignore_errors=True)
      for folder in self.folder.glob(f"*{TMP_MARK}*") if half_written else ():
        shutil.rmtree(folder, ignore_errors=True)

  def close(self) -> None:
    """Wait for what is being written; raises StorageError if it is not on disk then."""
    self._call(self._manager.close)
    self._closed = True
    self._sweep(half_written=False)

  def close_quietly(self) -> None:
    """Close after an error, which is reported already."""
    if not self._closed:
      with contextlib.suppress(Exception):
        self._manager.close()

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def best_step(self) -> int | None:
    """The step with the least value of `best_metric`; None where no checkpoint has it."""
    step = self._manager.best_step()
    has_metric = step is not None and self._metric(self._manager.metrics(step)) < math.inf
    return step if has_metric else None

  def metadata(self, step: int) -> Json:
    """Read a checkpoint's record; raises StorageError when it is not what was saved."""

    def read() -> tuple[Json, bool]:
      # Orbax asks for an epath.Path, whose exists() would hide that one may not read the file.
      folder = self._path(step).absolute() / "meta"
      meta = dict(ocp.JsonCheckpointHandler().restore(folder))  # pyrefly: ignore[bad-argument-type]
      return meta, meta.pop("sha256") == json_sha256(meta)

    meta, is_sound = self._read(step, read)
    if not is_sound:
      raise StorageError(f"{self._path(step)}: damaged (its record differs from its checksum)")
    return meta

  def restore(self, step: int, like: PyTree) -> PyTree:
    """Restore the state; raises StorageError when it is not what was saved.

    Args:
      like: ShapeDtypeStructs with shardings. A leaf that is `PLACEHOLDER` stays so.
    """
    expected = self.metadata(step)["checksums"]
    state = like
    for batch in _split_by_size(like) if self._low_memory else [like]:
      read = self._restore(step, batch)
      state = jax.tree.map(lambda new, old: old if new is PLACEHOLDER else new, read, state)
    # Of the arrays where they are used: a bit that flips on the way to them shows too.
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
    """Return `read()`, where all processes can read.

    It must not wait for other processes, which may have failed already. Orbax's manager does; its
    handlers do not.

    Raises, in all of them, CheckpointReadError where one may not read the file, and StorageError
    where it is damaged.
    """
    try:
      result = read()
    except Exception as error:  # whatever damage makes Orbax raise
      failure, outcome = error, _worst_outcome(2 if is_transient_error(error) else 1)
    else:
      failure, outcome = None, _worst_outcome(0)
      if not outcome:
        return result
    reason = "by another process" if failure is None else first_line(failure)
    reason = reason.split(" See full TensorStore")[0]  # which is a page long
    if outcome == 2:
      raise CheckpointReadError(
        f"{self._path(step)}: cannot be read now ({reason}); it was left unchanged. Run again when "
        "it can be read"
      ) from failure
    raise StorageError(f"{self._path(step)}: damaged ({reason})") from failure

  def _call(self, action: Callable[[], Result]) -> Result:
    """Return `action()`; raises StorageError for whatever it raises."""
    try:
      return action()
    except Exception as error:  # disk full, ...: Orbax and TensorStore have no common class
      reason = first_line(error).split(" [source locations")[0]
      if self._nbytes:
        free = shutil.disk_usage(self.folder).free
        reason += f"; it takes {self._nbytes:,} bytes and the disk has {free:,} free"
      raise StorageError(f"checkpoint in {self.folder}: {reason}") from error


def num_new_checkpoints(
  steps: list[int], total_steps: int, train: TrainSection, steps_of_epoch: int
) -> int:
  """How many more checkpoints the disk will have to hold at once, until the run is through.

  Args:
    steps: those of the checkpoints on disk.
  """
  settings = [train.save_every, *([train.eval_every] if train.keep_best_metric else [])]
  # Numbers of steps, or "epoch"; 0: only at the end.
  intervals = [(it if isinstance(it, int) else steps_of_epoch) or total_steps for it in settings]
  num_saves = sum(-(-(total_steps - max(steps, default=0)) // every) for every in intervals)
  at_once = max(train.keep, 2) + bool(train.keep_best_metric) + 1  # while the next one is written
  return min(num_saves, max(at_once - len(steps), 1))


def _worst_outcome(outcome: int) -> int:
  """The largest of all processes: all raise the same, or one would wait for the others."""
  if jax.process_count() == 1:
    return outcome
  return int(np.max(multihost_utils.process_allgather(np.int32(outcome))))


def is_transient_error(error: Exception) -> bool:
  """Whether an error while reading is of this machine and moment rather than of the file."""
  kinds = MemoryError, PermissionError, jax.errors.JaxRuntimeError
  return isinstance(error, kinds) or any(reason in str(error) for reason in TRANSIENT_ERRORS)


def leaf_specs(state: PyTree) -> dict[str, str]:
  """The type and shape of each leaf, by path."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def tree_nbytes(state: PyTree) -> int:
  """Most bytes that a checkpoint takes on disk, of arrays or of their shapes."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _split_by_size(like: PyTree) -> list[PyTree]:
  """Copy `like` with at most `READ_BATCH_BYTES` bytes, or one leaf, each, and placeholders."""
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
  """What this process's share of the chunks of a leaf on disk adds to its checksum."""
  store = {"driver": "ocdbt", "base": folder.as_uri() + "/", "path": f"{name}/"}
  array = tensorstore.open({"driver": "zarr", "kvstore": store}, read=True).result()
  if (array.shape, array.dtype.numpy_dtype) != (leaf.shape, leaf.dtype):
    raise ValueError(f"{name} is {array.dtype.name}{array.shape}")
  sizes = array.chunk_layout.read_chunk_template.shape
  # Chunk by chunk, as they lie on disk: each is decompressed once, and no leaf is whole in memory.
  ranges = (range(0, length, size) for length, size in zip(leaf.shape, sizes, strict=True))
  offsets = itertools.product(*ranges)
  local_offsets = itertools.islice(offsets, jax.process_index(), None, jax.process_count())

  def checksum(offsets: tuple[int, ...]) -> int:
    ends = map(sum, zip(offsets, sizes))  # past the end of the leaf for the last chunk
    chunk = tuple(slice(i, min(end, n)) for i, end, n in zip(offsets, ends, leaf.shape))
    return chunk_checksum(array[chunk].read().result(), offsets, leaf.shape)

  return sum(pool.map(checksum, local_offsets)) % 2**32
