"""End or break a training at a named point.

python tests/support/fault_points.py POINT N ACTION [arguments of jaxft.train]

The points are functions of jaxft and of Orbax, wrapped here before the command imports them; a
normal run has none of it. The action comes at the Nth time that the point is passed, and the moment
of it goes to the file that FAULT_FILE names.
"""

import contextlib
import errno
import functools
import importlib
import inspect
import os
import resource
import runpy
import signal
import sys
import time

FAULT_POINTS = {
  "tokens made": ("jaxft.data.token_cache:TokenWriter.close", "before"),
  "tokens written": ("jaxft.data.token_cache:TokenWriter.close", "after"),
  "program built": ("jaxft.training.build:build_train_program", "after"),
  "checkpoints opened": ("jaxft.checkpoint.manager:CheckpointManager.__init__", "after"),
  "state restored": ("jaxft.checkpoint.manager:CheckpointManager.restore", "before"),
  "record read": ("orbax.checkpoint:JsonCheckpointHandler.restore", "before"),
  "state read": ("orbax.checkpoint:PyTreeCheckpointHandler.restore", "before"),
  "weights loaded": ("jaxft.hf.load_weights:load_params", "after"),
  "evaluation": ("jaxft.training.evaluator:Evaluator._evaluate", "before"),
  "sample": ("jaxft.generation.sampler:Generator.__call__", "before"),
  "batch made": ("jaxft.data.loader:BatchSource.__getitem__", "before"),
  "step logged": ("jaxft.metrics.logger:MetricsLogger.log_step", "before"),
  "line of metrics": ("jaxft.metrics.sinks:JsonlLog.write", "torn"),
  "checksums": ("jaxft.checkpoint.manager:checksums", "before"),
  "save begun": ("orbax.checkpoint:CheckpointManager.save", "before"),
  "save handed over": ("orbax.checkpoint:CheckpointManager.save", "after"),
  "arrays written": (
    "orbax.checkpoint._src.path.atomicity:AtomicRenameTemporaryPath.finalize",
    "before",
  ),
  "checkpoint renamed": (
    "orbax.checkpoint._src.path.atomicity:AtomicRenameTemporaryPath.finalize",
    "after",
  ),
  "old checkpoint to go": (
    "orbax.checkpoint._src.path.deleter:StandardCheckpointDeleter.delete",
    "before",
  ),
  "old checkpoint gone": (
    "orbax.checkpoint._src.path.deleter:StandardCheckpointDeleter.delete",
    "after",
  ),
  "first checkpoint read back": ("jaxft.checkpoint.manager:CheckpointManager.verify", "before"),
  "saves awaited": ("jaxft.checkpoint.manager:CheckpointManager.wait", "before"),
  "checkpoints closed": ("jaxft.checkpoint.manager:CheckpointManager.close", "after"),
  "file written, not renamed": ("os:replace", "before"),
  "export begun": ("jaxft.hf.export:export_model", "before"),
  "weights exported": ("jaxft.hf.export:_write_safetensors", "after"),
  "export compared": ("jaxft.hf.export:verify_export", "before"),
  "export about to be renamed": ("jaxft.hf.export:_atomic_replace", "before"),
  "export renamed": ("jaxft.hf.export:_atomic_replace", "after"),
}


def note_moment() -> None:
  with open(os.environ.get("FAULT_FILE", os.devnull), "w") as file:
    file.write(str(time.time()))


def act(action: str) -> None:
  note_moment()
  if number := getattr(errno, action, None):
    raise OSError(number, os.strerror(number))
  os.kill(os.getpid(), signal.Signals[action])
  if action == "SIGKILL":
    time.sleep(60)


def tear(self, entry: dict, write, action: str) -> None:
  """Half of the line that would be written."""
  whole = self._file.read_bytes() if self._file.exists() else b""
  if action == "ENOSPC":  # from the kernel, in the middle of the write
    note_moment()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, resource.RLIM_INFINITY))
    return write(self, entry)
  write(self, entry)
  line = self._file.read_bytes()[len(whole) :]
  os.truncate(self._file, len(whole) + len(line) // 2)
  act(action)


def arm(point: str, count: int, action: str) -> None:
  """Wraps the function of a point."""
  target, when = FAULT_POINTS[point]
  module, _, path = target.partition(":")
  *parents, name = path.split(".")
  home = functools.reduce(getattr, parents, importlib.import_module(module))
  wrapped, passed = getattr(home, name), 0

  def due() -> bool:
    nonlocal passed
    passed += 1
    return passed == count

  @functools.wraps(wrapped)
  def around(*arguments, **how):
    now = due()
    if now and when == "torn":
      return tear(*arguments, write=wrapped, action=action)
    if now and when == "before":
      act(action)
    result = wrapped(*arguments, **how)
    if now and when == "after":
      act(action)
    return result

  async def around_coroutine(*arguments, **how):
    now = due()
    if now and when == "before":
      act(action)
    result = await wrapped(*arguments, **how)
    if now and when == "after":
      act(action)
    return result

  setattr(home, name, around_coroutine if inspect.iscoroutinefunction(wrapped) else around)


def main() -> None:
  # Importing torch would be most of a start; where it is imported already (preloaded.py), exports
  # are compared with it.
  sys.modules.setdefault("torch", None)
  point, count, action, *arguments = sys.argv[1:]
  if largest := os.environ.get("LARGEST_FILE"):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(largest), int(largest)))
  if point != "nowhere":
    arm(point, int(count), action)
  sys.argv = ["jaxft.train", *arguments]
  with contextlib.suppress(BrokenPipeError):
    runpy.run_module("jaxft.train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
