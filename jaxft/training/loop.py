"""The train loop: steps, logging, evaluation, samples and checkpoints."""

import contextlib
import functools
import time
from collections.abc import Iterator

import jax

from jaxft.checkpoint.manager import CheckpointManager
from jaxft.data import loader
from jaxft.data.loader import Batch
from jaxft.errors import Preempted, same_command
from jaxft.hardware import flops, roofline, specs
from jaxft.metrics.logger import MetricsLogger, due_at
from jaxft.metrics.sinks import ConsoleSink, JsonlSink
from jaxft.metrics.system import SystemMetrics
from jaxft.metrics.trackers import TrackerGroup
from jaxft.training.evaluator import Evaluator
from jaxft.training.preemption import PreemptionHandler
from jaxft.training.profiler import Profiler
from jaxft.training.stages import BuiltRun
from jaxft.training.train_state import TrainState
from jaxft.training.train_step import TrainStepFn, nonfinite_leaf_names
from jaxft.utils.console import ProgressBar
from jaxft.utils.logger import log
from jaxft.utils.types import Json


def open_logger(
  run: BuiltRun, start: int, tokens_seen: int, stack: contextlib.ExitStack
) -> tuple[JsonlSink, MetricsLogger]:
  """Open the sinks for metrics and samples, and the logger that writes to them.

  Args:
    run: the built run.
    start: step that the run starts from.
    tokens_seen: tokens trained on before `start`.
    stack: closes the sinks when the run ends.
  """
  config = run.config
  workdir = run.request.workdir
  is_main = jax.process_index() == 0
  mesh = run.inputs.mesh
  rows = run.inputs.data.train
  system = SystemMetrics(is_main and config.tracking.system_metrics, workdir)
  stack.enter_context(system)
  files = JsonlSink(workdir, start, is_main)
  trackers = TrackerGroup(config=config, workdir=workdir, start=start, files=files, writes=is_main)
  stack.enter_context(trackers)
  target = specs.local_target(run.inputs.device, mesh.size)
  model_flops = flops.model_flops(run.cfg, config.train.batch_size, rows.seq_len)
  logger = MetricsLogger(
    train=config.train,
    sinks=(files, trackers, ConsoleSink()),
    total_steps=run.inputs.total_steps,
    num_rows=len(rows),
    device=run.inputs.device,
    nonfinite_names=functools.partial(nonfinite_leaf_names, state=run.program.state),
    tokens_seen=tokens_seen,
    ideal_step_seconds=roofline.ideal_step_seconds(target, mesh.size, model_flops),
    system=system,
    on_step=run.request.on_step,
  )
  return files, logger


def train(
  run: BuiltRun,
  state: TrainState,
  *,
  train_step: TrainStepFn,
  checkpoints: CheckpointManager,
  logger: MetricsLogger,
  evaluator: Evaluator,
  preemption: PreemptionHandler,
  about: Json,
  start_time: float,
) -> tuple[int, TrainState]:
  """Take the remaining steps.

  Step n + 1 is dispatched before the metrics of step n are read, so that logging does not leave the
  device idle. `state` is donated. `about` gets "reached", the last step taken.

  Returns:
    The number of the last step, and the state after it.

  Raises:
    Preempted: a signal asked the run to stop. All steps taken are saved.
  """
  start = step = int(state.step)
  total_steps = run.inputs.total_steps
  patience = run.config.train.early_stopping_patience
  same = same_command(run.request.overwrite)
  ended_early = start > 0 and 0 < patience <= evaluator.evals_since_best()
  if ended_early and start < total_steps:
    log(
      f"config.train.early_stopping_patience={patience}: the eval loss has not improved for this "
      "number of evaluations, so training has ended; to continue, set a higher value or 0"
    )
  batches = train_batches(run, start)
  profiler = Profiler(
    folder=run.request.workdir / "profile",
    first=start + 3,
    count=run.config.train.profile_steps,
    total=total_steps,
    paused=logger.clock.paused,
  )
  logger.clock.restart()
  pending = None  # metrics of the newest step, on the device, not logged yet
  with preemption.deferred(), profiler, ProgressBar("training", total_steps, start) as progress:
    for step in range(start + 1, 0 if ended_early else total_steps + 1):
      profiler.on_step_begin(step, pending)
      state, metrics = train_step(state, next(batches))
      about["reached"] = step
      if step == start + 1:
        jax.block_until_ready(metrics)
        log(f"first step after {time.monotonic() - start_time:.1f} s")
      if pending:
        logger.log_step(step - 1, jax.device_get(pending), progress)
      profiler.on_step_end(step, metrics)
      # A save may overlap with one step only: a kill then costs at most save_every + 1 steps.
      checkpoints.wait()
      pending = metrics
      due = _due_after(step, run)
      stopping = preemption.should_stop(step)
      if due or stopping:
        logger.log_step(step, jax.device_get(pending), progress)
        pending = None
        eval_metrics = {}
        with logger.clock.paused():
          if "eval" in due:
            when = "after" if step == total_steps else f"step {step}"
            eval_metrics = evaluator.evaluate(state.all_params, step, when)
            ended_early = 0 < patience <= evaluator.evals_since_best()
          if "sample" in due:
            evaluator.sample(state.all_params, step, "during")
          if "save" in due or stopping or ended_early:
            checkpoints.save(
              step,
              state.checkpointable,
              run.checkpoint_metadata | {"tokens": logger.tokens_seen},
              eval_metrics,
            )
      if stopping:
        checkpoints.close()
        raise Preempted(
          f"{preemption.received}: saved at step {step} of {total_steps}; {same} continues"
        )
      if ended_early:
        log(
          f"early stopping at step {step} of {total_steps}: the eval loss did not improve for "
          f"{patience} evaluations"
        )
        break
    checkpoints.close()
    if preemption.should_stop(total_steps + 1):
      raise Preempted(f"{preemption.received}: all steps are saved; {same} exports the model")
  return step, state


def train_batches(run: BuiltRun, start: int = 0) -> Iterator[Batch]:
  """Return the batches of all steps after `start`, on the run's devices."""
  return loader.train_batches(
    run.inputs.data.train,
    batch_size=run.config.train.batch_size,
    accumulation=run.program.batch["ids"].shape[0],
    seed=run.config.data.shuffle_seed,
    total_rows=run.inputs.total_rows,
    start=start,
    sharding=run.program.batch_sharding,
  )


def _due_after(step: int, run: BuiltRun) -> set[str]:
  """Return which of "eval", "save" and "sample" are due after a step."""
  train = run.config.train
  rows = len(run.inputs.data.train)
  intervals = {"eval": train.eval_every, "save": train.save_every, "sample": train.sample_every}
  due = {what for what, every in intervals.items() if due_at(every, step, rows, train.batch_size)}
  if step == run.inputs.total_steps:  # the exported weights are sampled after the loop
    due = (due | {"eval", "save"}) - {"sample"}
  if "eval" in due and train.keep_best_metric:
    due.add("save")
  return due
