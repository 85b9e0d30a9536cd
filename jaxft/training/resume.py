"""Resuming: check that it is the same run, and find its newest sound checkpoint."""

import json

import jax

import jaxft.config
from jaxft.checkpoint.manager import PLACEHOLDER, CheckpointManager, CheckpointState, leaf_specs
from jaxft.config import Config
from jaxft.errors import CheckpointReadError, RequestError, StorageError
from jaxft.model.config import RUN_FIELDS
from jaxft.utils.logger import log
from jaxft.utils.types import Json
from jaxft.utils.units import format_count

LENGTH_SETTINGS = ("config.train.steps", "config.train.epochs")  # change only the length of a run
OTHER_WORKDIR = "name another --workdir, or start anew with --overwrite_output_dir"
WAYS_OUT = "restore its settings, name another --workdir, or pass --allow_change"


def check_same_run(
  checkpoints: CheckpointManager,
  like: CheckpointState,
  config: Config,
  current: Json,
  allow_change: bool,
) -> None:
  """Check that the newest readable checkpoint belongs to this run.

  Args:
    checkpoints: the checkpoints in the workdir.
    like: the state of this run. A checkpoint with other leaves is always refused, because it cannot
      be restored.
    config: the config of this run.
    current: the metadata that a checkpoint of this run would have.
    allow_change: log the differences instead of raising.

  Raises:
    RequestError: the checkpoint belongs to another run.
  """
  for step in reversed(checkpoints.steps()):
    try:
      saved = checkpoints.metadata(step)
    except CheckpointReadError:
      raise
    except StorageError:
      continue  # `restore_latest` reports it
    lines = _diff(saved, config, current)
    if other := _other_leaves(like, saved["leaves"]):
      lines.append(f"{checkpoints.folder / str(step)}: from another model or optimizer: {other}")
      lines.append(f"{checkpoints.folder} holds another run: {OTHER_WORKDIR}")
      raise RequestError("\n".join(lines))
    total_steps = current["total_steps"]
    path = f"config.model.path={config.model.path!r}"
    if saved.get("frozen", "") != current["frozen"]:
      lines.append(
        f"{path}: its weights, some of them frozen, have changed since the run was started"
      )
    if saved["data"] != current["data"]:
      lines.append(
        "config.data: the training text or its tokenization has changed since the run was started"
      )
    # Records from before 2026-11-28 have no "held_out".
    if saved.get("held_out", current["held_out"]) != current["held_out"]:
      lines.append("config.data: the held-out text has changed since the run was started")
    if saved["total_steps"] > total_steps:
      lines.append(f"{total_steps} steps in total: the run was started for {saved['total_steps']}")
    if total_steps < step:
      lines.append(f"{checkpoints.folder} has a checkpoint of step {step} already: {OTHER_WORKDIR}")
      raise RequestError("\n".join(lines))
    if lines and not allow_change:
      lines.append(f"{checkpoints.folder} holds another run: {WAYS_OUT}")
      raise RequestError("\n".join(lines))
    for line in lines:
      log(f"{line}; continuing with the change (--allow_change)")
    if saved["total_steps"] < total_steps:
      log(
        f"{total_steps} steps in total instead of {saved['total_steps']}: continuing at step "
        f"{step} with the learning-rate schedule of the new length"
        + _masked_rows_note(saved, current, step)
      )
    return


def _diff(saved: Json, config: Config, current: Json) -> list[str]:
  """Return a line for each setting and model config field that has changed."""
  lines = jaxft.config.diff_from_saved(saved["config"], config)
  if saved["total_steps"] < current["total_steps"]:
    lines = [line for line in lines if line.split("=")[0] not in LENGTH_SETTINGS]
  model = json.loads(json.dumps(current["model"]))
  return lines + [
    f"config.json of config.model.path={config.model.path!r}: {name} is {model.get(name)!r}; the "
    f"run was started with {was!r}"
    for name, was in saved.get("model", {}).items()  # records from before 2026-11-21 have no model
    if model.get(name) != was and name not in RUN_FIELDS  # compared as settings
  ]


def _other_leaves(like: CheckpointState, saved: dict[str, str]) -> str:
  """Describe the first leaf whose dtype or shape differs; "" if all match."""
  current = leaf_specs(like)
  names = sorted(saved.keys() | current.keys())
  other = [name for name in names if saved.get(name) != current.get(name)]
  if not other:
    return ""
  was, now = (specs.get(other[0], "missing") for specs in (saved, current))
  return f"{other[0]} is {was} in the checkpoint and {now} in this run ({len(other)} such leaves)"


def _masked_rows_note(saved: Json, current: Json, step: int) -> str:
  """Report rows masked in a shorter run's last step, which this run skips."""
  rows = saved.get("rows_in_all")
  if not rows:
    return ""
  passed = min(step * current["rows_of_step"], current["rows_in_all"]) - rows
  if passed <= 0:
    return ""
  return f"; one epoch lacks {format_count(passed, 'sequence')}, masked by the shorter run"


def restore_best(
  checkpoints: CheckpointManager, like: CheckpointState, strict: bool
) -> tuple[int, CheckpointState]:
  """Restore the weights of the best checkpoint; of the newest if none has a metric.

  Args:
    checkpoints: the checkpoints of the run.
    like: shapes with shardings of a checkpoint's state.
    strict: raise for a damaged checkpoint, instead of setting it aside.

  Returns:
    The step of the checkpoint, and its state with weights only.

  Raises:
    StorageError: no checkpoint is sound, or one is damaged and `strict` is set.
  """
  skip_opt = jax.tree.map(lambda _: PLACEHOLDER, like.opt)
  weights_like = like._replace(step=PLACEHOLDER, opt=skip_opt)
  while True:
    best = checkpoints.best_step()
    step = checkpoints.steps()[-1] if best is None else best
    try:
      weights = checkpoints.restore(step, weights_like)
    except CheckpointReadError:
      raise
    except StorageError as error:
      if strict or len(checkpoints.steps()) == 1:
        raise
      log(f"{error}; set aside as {checkpoints.quarantine(step).name}; trying the next one")
      continue
    why = "no checkpoint was evaluated" if best is None else "the best checkpoint"
    log(f"exporting the weights of step {step}: {why}")
    return step, weights


def restore_latest(
  checkpoints: CheckpointManager, like: CheckpointState, total_steps: int, strict: bool
) -> tuple[CheckpointState | None, int]:
  """Restore the newest sound checkpoint.

  Args:
    checkpoints: the checkpoints of the run.
    like: shapes with shardings of a checkpoint's state.
    total_steps: of the run, for the log.
    strict: raise for a damaged checkpoint, instead of setting it aside.

  Returns:
    Its state and the number of tokens trained on so far; (None, 0) for a new run.

  Raises:
    StorageError: checkpoints exist but none is sound, or one is damaged and `strict` is set.
  """
  damaged = {}  # set aside only after an older checkpoint was restored
  for step in reversed(checkpoints.steps()):
    try:
      state = checkpoints.restore(step, like)
      tokens_seen = checkpoints.metadata(step)["tokens"]
    except CheckpointReadError:
      raise
    except StorageError as error:
      if strict:
        raise
      damaged[step] = str(error)
      continue
    for bad_step, reason in damaged.items():
      moved = checkpoints.quarantine(bad_step).name
      log(f"{reason}; set aside as {moved}; continuing from an older checkpoint")
    log(f"continuing at step {step} of {total_steps}")
    return state, tokens_seen
  if damaged:
    last = f"no sound checkpoint is left in {checkpoints.folder}; to start over, {OTHER_WORKDIR}"
    raise StorageError("\n".join([*damaged.values(), last]))
  return None, 0
