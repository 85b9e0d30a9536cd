"""Going on with a run: is it the same one, and which of its checkpoints is sound."""

import json
from typing import Any

import jax
from ml_collections import ConfigDict

import jaxft.config
from jaxft.checkpoint.manager import PLACEHOLDER, CheckpointManager, leaf_specs
from jaxft.errors import CheckpointReadError, RequestError, StorageError
from jaxft.model.config import RUN_FIELDS
from jaxft.training.train_state import CheckpointState
from jaxft.utils.console import log
from jaxft.utils.units import format_count

LENGTH_SETTINGS = (
  "config.train.steps",
  "config.train.epochs",
)  # what only makes a run longer or shorter
OTHER_WORKDIR, WAYS_OUT = (
  "name another --workdir",
  "go back to its settings, name another --workdir, or go on with --allow_change",
)


def check_same_run(
  checkpoints: CheckpointManager,
  like: CheckpointState,
  config: ConfigDict,
  about: dict[str, Any],
  allow_change: bool,
) -> None:
  """Raises RequestError when the newest readable checkpoint is of another run than this one; says so, where that is allowed.

  A checkpoint with other leaves than `like`, the state of this run, is refused in any case: nothing could be done with it.
  """
  for step in reversed(checkpoints.steps()):
    try:
      meta = checkpoints.metadata(step)
    except CheckpointReadError:
      raise
    except StorageError:
      continue  # `restore_latest` will say so
    lines, longer = jaxft.config.diff_from_saved(meta["config"], config), ""
    if meta["total_steps"] < about["total_steps"]:
      lines = [line for line in lines if line.split("=")[0] not in LENGTH_SETTINGS]
      longer = (
        f"{about['total_steps']} steps in all instead of {meta['total_steps']}: going on at step {step}, with the learning "
        "rate as a run of that length has it" + _masked_rows_note(meta, about, step)
      )
    now = json.loads(json.dumps(about["model"]))
    lines += [
      f"config.json of config.model.path={config.model.path!r}: {name} is {now.get(name)!r}; the run was started with {was!r}"
      for name, was in meta.get("model", {}).items()  # a record of before 2026-11-21 has none
      if now.get(name) != was and name not in RUN_FIELDS  # told as settings already
    ]
    saved, wanted = meta["leaves"], leaf_specs(like)
    other = [
      name for name in sorted(saved.keys() | wanted.keys()) if saved.get(name) != wanted.get(name)
    ]
    if other:
      first = f"{other[0]} is {saved.get(other[0], 'missing')} there and {wanted.get(other[0], 'missing')} in this run"
      lines.append(
        f"{checkpoints.folder / str(step)}: of another model or optimizer: {first} ({len(other)} such leaves)"
      )
      raise RequestError(
        "\n".join([*lines, f"{checkpoints.folder} holds another run: {OTHER_WORKDIR}"])
      )
    if meta.get("frozen", "") != about["frozen"]:
      lines.append(
        f"config.model.path={config.model.path!r}: its weights, some of which are frozen, are not what they were"
      )
    if meta["data"] != about["data"]:
      lines.append(
        "config.data: the training text, or how it is cut into tokens, is not what the run was started with"
      )
    if (
      meta.get("held_out", about["held_out"]) != about["held_out"]
    ):  # a record of before 2026-11-28 has none
      lines.append("config.data: the held-out text is not what the run was started with")
    if meta["total_steps"] > about["total_steps"]:
      lines.append(
        f"{about['total_steps']} steps in all: the run was started for {meta['total_steps']}"
      )
    if about["total_steps"] < step:
      raise RequestError(
        "\n".join(
          [*lines, f"{checkpoints.folder} has a checkpoint of step {step} already: {OTHER_WORKDIR}"]
        )
      )
    if lines and allow_change:
      for line in lines:
        log(f"{line}; going on with the change, as --allow_change says")
    elif lines:
      lines.append(f"{checkpoints.folder} holds another run: {WAYS_OUT}")
      raise RequestError("\n".join(lines))
    if longer:
      log(longer)
    return


def _masked_rows_note(meta: dict[str, Any], about: dict[str, Any], step: int) -> str:
  """What is said of rows that the last step of a shorter run had masked, and that the longer one has passed then."""
  there = meta.get("rows_in_all")
  if not there:
    return ""
  passed = min(step * about["rows_of_step"], about["rows_in_all"]) - there
  return (
    f"; left out of one epoch: {format_count(passed, 'row')} that its last step had masked"
    if passed > 0
    else ""
  )


def restore_best(
  checkpoints: CheckpointManager, like: CheckpointState, strict: bool
) -> tuple[int, CheckpointState]:
  """The step of the best checkpoint, or the newest where none that is kept was evaluated, and its weights alone.

  Damaged ones are set aside, or raise if `strict`. Raises StorageError where none is sound.
  """
  unread = CheckpointState(PLACEHOLDER, like.params, jax.tree.map(lambda _: PLACEHOLDER, like.opt))
  while True:
    best = checkpoints.best_step()
    step = checkpoints.steps()[-1] if best is None else best
    try:
      weights = checkpoints.restore(step, unread)
    except CheckpointReadError:
      raise
    except StorageError as error:
      if strict or len(checkpoints.steps()) == 1:
        raise
      log(f"{error}; set aside as {checkpoints.quarantine(step).name}, and taking the next one")
      continue
    why = (
      "no checkpoint that is kept was evaluated"
      if best is None
      else "the best of the checkpoints that are kept"
    )
    log(f"exporting the weights of step {step}: {why}")
    return step, weights


def restore_latest(
  checkpoints: CheckpointManager, like: CheckpointState, total_steps: int, strict: bool
) -> tuple[CheckpointState | None, int]:
  """The newest sound checkpoint and the tokens it has seen, or (None, 0) when the run is new.

  Damaged ones that are newer are set aside, or raise if `strict`. Raises StorageError when there are some and none is sound.
  """
  damaged = {}
  for step in reversed(checkpoints.steps()):
    try:
      state, seen = checkpoints.restore(step, like), checkpoints.metadata(step)["tokens"]
    except CheckpointReadError:
      raise
    except StorageError as error:
      if strict:
        raise
      damaged[step] = str(error)
      continue
    for bad, reason in damaged.items():
      log(
        f"{reason}; set aside as {checkpoints.quarantine(bad).name}, and going on from the one before it"
      )
    log(f"continuing at step {step} of {total_steps}")
    return state, seen
  if damaged:
    last = (
      f"no sound checkpoint is left in {checkpoints.folder}; to start anew name another --workdir"
    )
    raise StorageError("\n".join([*damaged.values(), last]))
  return None, 0
