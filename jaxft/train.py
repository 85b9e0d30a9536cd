"""Fine-tune a model.

python -m jaxft.train --config configs/X.py [--workdir DIR] [--config.a.b=value ...]

The same command continues a run that was stopped or killed. In Python and notebooks, call
`finetune`.
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
from jaxft.utils.console import console
from jaxft.utils.files import write_json
from jaxft.utils.logger import log
from jaxft.utils.redact import redact
from jaxft.utils.types import Json

OOM_ADVICE = (
  "to save memory, lower config.train.micro_batch_size, or set config.memory.remat=full or "
  "config.memory.loss_chunk=128"
)


class TrainOutput(NamedTuple):
  """The results of a finished run."""

  workdir: Path
  metrics: list[Json]  # entries of metrics.jsonl
  samples: list[Json]  # entries of samples.jsonl
  export: Path  # Hugging Face folder


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
  """Fine-tune a model and export it; resume if `workdir` already holds the run.

  Args:
    config: from `jaxft.config.default()`; `jaxft.config.SETTINGS` explains every key.
    workdir: folder for all files that the run writes.
    dry_run: compile, print the memory use and return None. No weights are read, no files written.
    strict: raise for a damaged checkpoint, instead of setting it aside and using an older one.
    allow_change: resume even if settings that affect the result have changed since the run was
      started.
    overwrite: start a new run. An old one in `workdir` is moved to a folder next to it, whose name
      is logged.
    require: "gpu" or "tpu": the platform that JAX must run on; None: any.
    on_step: called as `on_step(step, metrics)` after each train step, in every process. `metrics`
      has the floats "loss", "grad_norm" and "learning_rate", and the int "tokens", which counts
      all tokens since the run began. An exception that it raises ends the run.

  Returns:
    The results of the run; None for a dry run.

  Raises:
    RequestError: the settings, the data or the model cannot be used, or the workdir holds another
      run.
    NumericsError: the loss, a gradient or a weight is not finite.
    StorageError: a checkpoint or the export could not be written or is damaged.
    Preempted: a signal stopped the run; calling again resumes it.
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
  """Train, evaluate and export a built run.

  No other function holds the train state between two stages, so `del` here frees its memory.
  """
  compiled, checkpoints, state, tokens_seen = start_run(run, preemption, stack)
  start = int(state.step)
  stages.write_run_files(run)
  about = stack.enter_context(report_at_end(run, start, compiled.memory))
  files, logger = loop.open_logger(run, start, tokens_seen, stack)
  evaluator = Evaluator(run=run, eval_step=compiled.eval_step, logger=logger, history=files.metrics)
  if start == 0:
    evaluator.evaluate(state.all_params, 0, "before")
    evaluator.sample(state.all_params, 0, "before")
  # The run has ended when the trackers close: a signal then must not change its exit code.
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
  if run.config.train.keep_best_metric:  # otherwise the last weights are exported
    frozen = state.frozen
    del state  # memory may not hold two states
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
  """Raise RequestError with all errors that show before JAX initializes devices."""
  config = request.config
  validate_run(config, request.workdir, request.overwrite)
  if config.memory.offload != "none":
    backend.limit_pinned_memory(max_host_bytes(config, resolve_model_config(config)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledSteps:
  """The compiled programs of a run, and the memory they need on a device."""

  traced: jax.stages.Traced  # the train step
  train_step: jax.stages.Compiled
  eval_step: jax.stages.Compiled
  memory: dict[str, int]  # bytes on a device, by purpose


def compile_steps(run: BuiltRun) -> CompiledSteps:
  """Compile train and eval step, and log their memory use before it is allocated."""
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
  """Print memory use and estimated speed of a run, from process 0."""
  if jax.process_index() == 0:
    plan = plan_from_compiled(
      run.config, run.cfg, run.program, compiled.traced, compiled.train_step, compiled.eval_step
    )
    console.print(rendering.render_plan(plan))


def start_run(
  run: BuiltRun, preemption: PreemptionHandler, stack: contextlib.ExitStack
) -> tuple[CompiledSteps, CheckpointManager, TrainState, int]:
  """Compile the steps, and restore or initialize the state.

  With `overwrite` the old run is moved aside only after the new one has compiled and loaded its
  weights, so that a run that cannot start leaves the old one untouched.

  Returns:
    The compiled steps, the checkpoints, the state, and the number of tokens trained on so far.
  """
  if run.request.overwrite:
    stages.check_room(run, [])
    compiled = compile_steps(run)
    # Compile times differ between processes, and a collective times out after 30 s. This waits.
    multihost.assert_all_equal("compiled", {})
    state = stages.initial_state(run)
    jax.block_until_ready(state.step)  # from here on the new run cannot be refused
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
  """Write about.json at the start and, at the end or on an error, report.html.

  The ending of the run is added to about.json.

  Failures to write are logged and do not end the run.

  Yields:
    The content of about.json. The run adds "reached" (the last step taken), "exported_step" and
    "export".
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
  """Run the command line."""
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
