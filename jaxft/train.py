"""Fine-tune a model.

python -m jaxft.train --config configs/X.py [--workdir DIR] [--config.a.b=value ...]

The same command again continues a run that was stopped or killed. `finetune` is the same thing for
notebooks.
"""

import contextlib
import dataclasses
import time
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

import jaxft.config
from jaxft.checkpoint.manager import CheckpointManager
from jaxft.cli.flags import parse_train
from jaxft.config import Config
from jaxft.distributed import multihost
from jaxft.errors import RequestError, exit_code, first_line, run_command
from jaxft.metrics.logger import OnStep
from jaxft.plan import measure, rendering
from jaxft.plan.planner import plan_from_compiled, resolve_model_config
from jaxft.report_page import run_page
from jaxft.training import loop, run_info, stages
from jaxft.training.evaluator import Evaluator
from jaxft.training.inputs import RunRequest, load_inputs, validate_run
from jaxft.training.memory import max_host_bytes
from jaxft.training.preemption import PreemptionHandler
from jaxft.training.resume import restore_best
from jaxft.training.stages import BuiltRun
from jaxft.training.train_state import TrainState
from jaxft.training.workdir import check_not_an_input, hold_workdir, overwrite_workdir
from jaxft.utils import backend
from jaxft.utils.console import console, log
from jaxft.utils.files import write_json
from jaxft.utils.redact import redact
from jaxft.utils.types import Json

OOM_ADVICE = (
  "a smaller config.train.micro_batch_size, config.memory.remat=full or "
  "config.memory.loss_chunk=128 need less memory"
)


class TrainOutput(NamedTuple):
  """A finished run."""

  workdir: Path
  metrics: list[Json]  # the lines of metrics.jsonl
  samples: list[Json]  # the lines of samples.jsonl
  export: Path  # the Hugging Face folder


def finetune(
  config: ConfigDict | Config,
  workdir: str | Path,
  *,
  dry_run: bool = False,
  strict: bool = False,
  allow_change: bool = False,
  overwrite: bool = False,
  require: str | None = None,
  on_step: OnStep | None = None,
) -> TrainOutput | None:
  """Fine-tunes as `config` says, continuing what `workdir` holds, and exports the result.

  Args:
    config: from `jaxft.config.default()`; `jaxft.config.SETTINGS` explains every key.
    workdir: folder for everything that the run writes.
    dry_run: compile, print the memory, and return None: no weights are read and nothing is written.
    strict: a damaged checkpoint ends the run, instead of being set aside for the one before it.
    allow_change: continue although settings that shape what is learned have changed since the run
      was started.
    overwrite: begin a new run; one that is in `workdir` is moved to a folder beside it, which is
      logged.
    require: "gpu" or "tpu": what JAX must compute on; None: whatever it finds.
    on_step: called as `on_step(step, metrics)` after each train step, in every process. `metrics`
      has "loss", "grad_norm", "learning_rate" (floats, from the step) and "tokens" (int, all
      trained so far). An exception that it raises ends the run.

  Raises:
    RequestError, NumericsError, StorageError, Preempted: see `jaxft.errors`.
  """
  settings = jaxft.config.normalize(config)
  backend.validate_require(require)
  backend.configure_jax()
  flags = {
    "--workdir": Path(workdir),
    "--dry_run": dry_run,
    "--strict": strict,
    "--allow_change": allow_change,
    "--overwrite_output_dir": overwrite,
  }
  command = flags | jaxft.config.with_prefix(settings) | {**multihost.package_versions()}
  multihost.assert_all_equal("command", command)
  request = RunRequest(
    config=jaxft.config.resolve(settings),
    workdir=Path(workdir),
    strict=strict,
    allow_change=allow_change,
    overwrite=overwrite,
    on_step=on_step,
  )
  validate(request)
  backend.require_device(require)
  start_time = time.monotonic()
  with contextlib.ExitStack() as stack:
    preemption = stack.enter_context(PreemptionHandler())
    if not dry_run:
      stack.enter_context(hold_workdir(request.workdir, overwrite, request.input_paths))
    inputs = load_inputs(request)
    run = stages.build_run(request, inputs)
    if dry_run:
      print_plan(run, compile_steps(run))
      return None
    return train_and_export(run, preemption, stack, start_time)


def train_and_export(
  run: BuiltRun, preemption: PreemptionHandler, stack: contextlib.ExitStack, start_time: float
) -> TrainOutput:
  """Runs what `finetune` has built. The only function that holds the state between two stages."""
  compiled, checkpoints, state, tokens_seen = start_run(run, preemption, stack)
  start = int(state.step)
  stages.write_run_files(run)
  about = stack.enter_context(report_at_end(run, start, compiled.memory))
  files, logger = loop.open_logger(run, start, tokens_seen, stack)
  evaluator = Evaluator(run=run, eval_step=compiled.eval_step, logger=logger, history=files.metrics)
  if start == 0:
    evaluator.evaluate(state.all_params, 0, "before")
    evaluator.sample(state.all_params, 0, "before")
  # A signal while trackers are waited for changes nothing of how the run ended.
  stack.callback(preemption.defer)
  step, state = loop.train(
    run,
    state,
    train_step=compiled.train_step,
    checkpoints=checkpoints,
    logger=logger,
    evaluator=evaluator,
    preemption=preemption,
    about=about,
    start_time=start_time,
  )
  if run.config.train.keep_best_metric:  # else the last weights are exported
    frozen = state.frozen
    del state  # there may be no room for two
    like = run.program.state.checkpointable
    step, best = restore_best(checkpoints, like, run.request.strict)
    state = TrainState.from_checkpoint(best, frozen)
  evaluator.sample(state.all_params, step, "after")
  about["exported_step"] = step
  params = state.params
  del state
  stages.export_run(run, params, step, about)
  log(evaluator.summary(step))
  return TrainOutput(
    workdir=run.request.workdir,
    metrics=files.metrics.entries,
    samples=files.samples.entries,
    export=run.request.export_dir,
  )


def validate(request: RunRequest) -> None:
  """Raises RequestError with every error that shows before JAX looks for devices."""
  config = request.config
  validate_run(config, request.workdir, request.overwrite)
  if config.memory.offload != "none":
    backend.limit_pinned_memory(max_host_bytes(config, resolve_model_config(config)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledSteps:
  """The compiled programs of a run, and what a device needs for them."""

  traced: jax.stages.Traced  # the train step
  train_step: jax.stages.Compiled
  eval_step: jax.stages.Compiled
  memory: dict[str, int]  # bytes of a device, by what they are for


def compile_steps(run: BuiltRun) -> CompiledSteps:
  """Compiles train step and eval step: what they need is known before any of it is taken."""
  start = time.monotonic()
  program = run.program
  device = run.inputs.device
  try:
    traced = program.train_step.trace(program.state, program.batch)
    train_step = traced.lower().compile()
    eval_step = program.eval_step.lower(program.state.all_params, program.eval_batch).compile()
  except jax.errors.JaxRuntimeError as error:
    raise RequestError(
      f"this run does not compile for {device.device_kind}: {first_line(error)}; {OOM_ADVICE}"
    ) from error
  if program.offload != "none":
    backend.check_slices(train_step, device.platform)
  memory = measure.memory_breakdown(program, train_step.memory_analysis())["breakdown"]
  sizes = {what: rendering.format_bytes(nbytes) for what, nbytes in memory.items() if nbytes}
  log(
    f"compiled in {time.monotonic() - start:.1f} s; a device needs "
    f"{rendering.format_bytes(sum(memory.values()))}: "
    + ", ".join(f"{what} {size}" for what, size in sizes.items())
  )
  return CompiledSteps(traced=traced, train_step=train_step, eval_step=eval_step, memory=memory)


def print_plan(run: BuiltRun, compiled: CompiledSteps) -> None:
  if jax.process_index() == 0:
    plan = plan_from_compiled(
      run.config, run.cfg, run.program, compiled.traced, compiled.train_step, compiled.eval_step
    )
    console.print(rendering.render_plan(plan))


def start_run(
  run: BuiltRun, preemption: PreemptionHandler, stack: contextlib.ExitStack
) -> tuple[CompiledSteps, CheckpointManager, TrainState, int]:
  """Compiles the steps, and restores or initialises the state; the last value is its tokens.

  A run that is to be overwritten is moved when nothing is left to refuse the new one.
  """
  if run.request.overwrite:
    stages.check_room(run, [])
    compiled = compile_steps(run)
    # A collective gives up on a process that comes 30 s late.
    multihost.assert_all_equal("compiled", {})
    state = stages.initial_state(run)
    jax.block_until_ready(state.step)  # now nothing is left to refuse
    overwrite_workdir(run.request.workdir, run.request.export_dir, preemption)
    return compiled, stack.enter_context(stages.open_checkpoints(run)), state, 0
  checkpoints = stack.enter_context(stages.open_checkpoints(run))
  stages.check_room(run, checkpoints.steps())
  compiled = compile_steps(run)
  multihost.assert_all_equal("compiled", {})
  state, tokens_seen = stages.restore_or_init(run, checkpoints)
  return compiled, checkpoints, state, tokens_seen


@contextlib.contextmanager
def report_at_end(run: BuiltRun, start: int, memory: dict[str, int]) -> Generator[Json]:
  """Writes about.json and, when the run returns or raises, how it ended and its page.

  Yields the content of about.json, which gets "reached", the last step that was taken,
  "exported_step" and "export". A disk that takes no file costs a line of the log, not the run.
  """
  if jax.process_index() > 0:
    yield {}
    return
  workdir = run.request.workdir
  about = run_info.write_about(run, start, memory)
  ending = {"exit_code": 0, "why": ""}
  try:
    yield about
  except BaseException as error:
    ending = {"exit_code": exit_code(error), "why": redact(str(error)) or type(error).__name__}
    raise
  finally:
    with run_info.log_failure("report.html"):
      ending_at = {"at": run_info.now(), **ending}
      write_json(workdir / "about.json", about | {"ending": ending_at})
      run_page.write(workdir)
      log(f"report: {workdir / 'report.html'}")


def main() -> None:
  arguments = parse_train()

  def apply_per_device() -> None:
    if arguments.per_device:
      backend.configure_jax()
      backend.require_device(arguments.require)
      arguments.per_device.apply_to(arguments.config, jax.device_count())

  if arguments.print_config:
    apply_per_device()
    print(jaxft.config.describe(arguments.config))
    return
  if arguments.overwrite_output_dir:
    check_not_an_input(arguments.workdir, [arguments.config_file])
  timeouts = (arguments.start_timeout, arguments.peer_timeout)
  with multihost.distributed_context(arguments.process_info, *timeouts):
    apply_per_device()
    finetune(
      arguments.config,
      arguments.workdir,
      dry_run=arguments.dry_run,
      strict=arguments.strict,
      allow_change=arguments.allow_change,
      overwrite=arguments.overwrite_output_dir,
      require=arguments.require,
    )


if __name__ == "__main__":
  run_command(main)
