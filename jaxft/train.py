"""Fine-tune a model.

python -m jaxft.train --config configs/X.py [--workdir DIR] [--config.a.b=value ...]

The same command again continues a run that was stopped or killed. `finetune` is the same thing for
notebooks.
"""

import contextlib
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

import jaxft.config
from jaxft.checkpoint import manager
from jaxft.checkpoint.manager import CheckpointManager, tree_nbytes
from jaxft.cli.flags import parse_train
from jaxft.config import Config
from jaxft.data import loader, sources, tokenize
from jaxft.data.accounting import HELD_OUT_TAILS, num_rows_and_steps
from jaxft.data.dataset import PreparedData, prepare_data
from jaxft.distributed import multihost
from jaxft.errors import Preempted, RequestError, first_line, run_command, same_command
from jaxft.generation.sampler import Generator
from jaxft.hardware import flops, roofline, specs
from jaxft.hf import base_model, export, peft, push, repo, trainable_params
from jaxft.hf.card import model_card
from jaxft.hf.export_tensors import EXPORT_DTYPES
from jaxft.hf.tokenizer import fingerprint, load_tokenizer
from jaxft.hf.verify import format_parity
from jaxft.metrics.reporter import Reporter, due_at
from jaxft.metrics.system import SystemMetrics
from jaxft.metrics.trackers import TrackerGroup, missing_packages
from jaxft.model.decoder import parameter_count
from jaxft.plan import measure, rendering
from jaxft.plan.planner import plan_from_compiled, resolve_model_config
from jaxft.report_page import run_page
from jaxft.sharding.mesh import make_mesh
from jaxft.training import optimizer
from jaxft.training.build import TrainProgram, build_train_program
from jaxft.training.evaluator import Evaluator
from jaxft.training.init import init_train_state, load_or_init_params, merge_params, merged_shapes
from jaxft.training.memory import (
  check_fits,
  host_bytes,
  max_host_bytes,
  pinned_memory_warning,
)
from jaxft.training.preemption import PreemptionHandler
from jaxft.training.profiler import Profiler
from jaxft.training.resume import check_same_run, restore_best, restore_latest
from jaxft.training.run_info import record_run
from jaxft.training.train_state import TrainState
from jaxft.training.train_step import nonfinite_leaf_names
from jaxft.training.trainable import num_params
from jaxft.training.workdir import (
  check_disk_space,
  check_movable,
  check_not_an_input,
  has_content,
  lock_workdir,
  move_aside,
)
from jaxft.utils import backend
from jaxft.utils.console import ProgressBar, console, log
from jaxft.utils.files import atomic_write
from jaxft.utils.units import format_count

OOM_ADVICE = (
  "a smaller config.train.micro_batch_size, config.memory.remat=full or "
  "config.memory.loss_chunk=128 need less memory"
)


class TrainOutput(NamedTuple):
  """A finished run."""

  workdir: Path
  metrics: list[dict[str, Any]]  # the lines of metrics.jsonl
  samples: list[dict[str, Any]]  # the lines of samples.jsonl
  export: Path  # the Hugging Face folder


def validate_run(config: Config, workdir: Path, overwrite: bool = False) -> None:
  """Raises RequestError with every error that shows without building anything."""
  lines = jaxft.config.validate(config)
  if not lines:
    out = export_dir(config, workdir)
    lines += [f"config.export.out: {line}" for line in export.validate_export(out)]
    lines += [f"--workdir: {line}" for line in manager.validate_path(workdir / "checkpoints")]
    lines += [f"--workdir: {line}" for line in export.validate_workdir(workdir)]
    out_path = out.resolve()
    run_path = workdir.resolve()
    run_folders = [run_path / name for name in sources.RUN_FOLDERS if name != "export"]
    if out_path in (run_path, *run_path.parents) or any(
      out_path.is_relative_to(folder) for folder in run_folders
    ):
      lines.append(
        f"config.export.out={str(out)!r}: the run itself is written there; name a folder of its own"
      )
    path = config.model.path
    if path and repo.is_local(path) and Path(path).resolve() == run_path:
      lines.append(
        f"--workdir: {str(workdir)!r} is config.model.path, whose config.json the run would "
        "replace by its own"
      )
    elif export.is_hf_model(workdir) and not overwrite:
      lines.append(
        f"--workdir: {str(workdir)!r} has the config.json of a model, which the run would replace "
        "by its own; name another folder, or have all of it moved aside by --overwrite_output_dir"
      )
    if config.export.push_to_hub:
      lines += [f"config.export.{line}" for line in push.validate_push(config.export.push_to_hub)]
    lines += sources.validate_sources(config.data)
    lines += missing_packages(config)
  if not lines:  # reading a model's config takes seconds, most of them to import transformers
    needs_weights = config.model.init == "pretrained"
    lines += repo.validate_model(config.model.path, needs_weights, config.model.torch_bin)
  if lines:
    raise RequestError("\n".join(lines))


def small_data_warnings(config: Config, data: PreparedData, total_steps: int) -> list[str]:
  """Returns a line for each setting that the run cannot follow, as its data is too small for it.

  Raises RequestError for what needs an evaluation where nothing is held out.
  """
  lines = []
  rows = len(data.train)
  train = config.train
  if rows < train.batch_size:
    lines.append(
      f"config.train.batch_size={train.batch_size}: the training text fills only "
      f"{format_count(rows, 'row')}, so each step takes all of it and masks the rest of the batch"
    )
  if config.optim.warmup_steps > total_steps:
    steps = optimizer.warmup_steps(config.optim, total_steps)
    lines.append(
      f"config.optim.warmup_steps={config.optim.warmup_steps}: more than the "
      f"{format_count(total_steps, 'step')} of the run; {format_count(steps, 'step')} instead, a "
      "tenth of them"
    )
  if not data.validation:
    for name in ("keep_best_metric", "early_stopping_patience"):
      if getattr(train, name):
        read = format_count(data.report["rows"]["read"], "row")
        raise RequestError(
          f"config.train.{name}={getattr(train, name)!r}: nothing is held out of {read}; "
          "name sources in config.data.validation"
        )
    lines.append(
      "nothing is held out, so there is no eval loss; config.data.validation names text to "
      "evaluate on"
    )
  return lines


def _data_summary(report: dict[str, Any], rows: int) -> str:
  """Says in a line what is trained on, held out and left out."""
  documents = report["rows"]
  tokens = report["tokens"]
  held_out = format_count(documents["held_out"], "document")
  if tails := report["notes"].get(HELD_OUT_TAILS, 0):
    held_out = f"the ends of {format_count(tails, 'document')}"
  dropped = ", ".join(f"{reason}: {n:,}" for reason, n in documents["dropped"].items() if n)
  return (
    f"{format_count(documents['trained'], 'document')} with "
    f"{format_count(tokens['trained'], 'token')} to train on, in {format_count(rows, 'row')} of "
    f"{report['sequence_length']}; {held_out} with {format_count(tokens['held_out'], 'token')} "
    "held out" + (f"; left out: {dropped}" if dropped else "")
  )


def export_dir(config: Config, workdir: Path) -> Path:
  return Path(config.export.out) if config.export.out else workdir / "export"


def _input_paths(config: Config) -> list[Path]:
  """The files and folders that a run reads."""
  data = config.data
  model = config.model
  names = [sources.parse_weight(name)[0] for name in data.train]
  names += [*data.validation, *data.unrelated]
  names += [model.path, model.config, model.tokenizer, data.cache_dir]
  return [Path(name) for name in names if name and not name.startswith("hub:")]


def _compile(program: TrainProgram, device: jax.Device) -> tuple[Any, Any, Any]:
  """Returns the traced train step, and train step and eval step compiled; or RequestError."""
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
  return traced, train_step, eval_step


def finetune(
  config: ConfigDict | Config,
  workdir: str | Path,
  *,
  dry_run: bool = False,
  strict: bool = False,
  allow_change: bool = False,
  overwrite: bool = False,
  require: str | None = None,
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

  Raises:
    RequestError, NumericsError, StorageError, Preempted: see `jaxft.errors`.
  """
  workdir = Path(workdir)
  config = jaxft.config.normalize(config)
  backend.validate_require(require)
  backend.configure_jax()
  flags = {
    "--workdir": workdir,
    "--dry_run": dry_run,
    "--strict": strict,
    "--allow_change": allow_change,
    "--overwrite_output_dir": overwrite,
  }
  versions = multihost.package_versions()
  multihost.assert_all_equal("command", flags | jaxft.config.with_prefix(config) | versions)
  config = jaxft.config.resolve(config)
  validate_run(config, workdir, overwrite)
  if config.memory.offload != "none":
    backend.limit_pinned_memory(max_host_bytes(config, resolve_model_config(config)))
  backend.require_device(require)
  start_time = time.monotonic()
  with contextlib.ExitStack() as exit_stack:
    preemption = exit_stack.enter_context(PreemptionHandler())
    is_main = jax.process_index() == 0
    if not dry_run:
      if overwrite:
        check_not_an_input(workdir, _input_paths(config))
      exit_stack.enter_context(lock_workdir(workdir))
      multihost.check_shared_folder(workdir)
      if overwrite and is_main and has_content(workdir):
        check_movable(workdir)
    # ---- Mesh ------------------------------------------------------------------------------------
    mesh = make_mesh(config.mesh)
    device = mesh.local_devices[0]
    axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
    log(f"{mesh.size} x {device.device_kind}, mesh {axes}")

    # ---- Base model: config and tokenizer; no weights yet ----------------------------------------
    model_path = f"config.model.path={config.model.path!r}"
    source = base_model.resolve(config.model)
    P = source.cfg.P  # positions
    if overwrite:  # adapters name a model of their own
      check_not_an_input(workdir, [source.folder, source.tokenizer_folder])
    if source.adapter and config.lora.rank:
      raise RequestError(
        f"{model_path}: a folder of adapters, and adapters on top of it could not be used without "
        f"it; merge it first: python -m jaxft.export --model {config.model.path} --out MERGED"
      )
    if (length := config.data.sequence_length) > P:
      raise RequestError(f"config.data.sequence_length={length}: the model has {P} positions")
    tokenizer = load_tokenizer(source.tokenizer_folder, source.cfg.V)

    for prompt in config.train.sample_prompts:
      if (length := len(tokenize.encode_prompt(tokenizer, prompt))) >= P:
        raise RequestError(
          f"config.train.sample_prompts: {prompt[:40]!r}... has {length} tokens and the model "
          f"{P} positions; shorten it"
        )

    # ---- Data: every document and every token accounted for --------------------------------------
    with ProgressBar("tokenising", 1) as progress:
      on_progress = lambda done, total: progress.update(done, total=total)
      data = prepare_data(config.data, tokenizer, fingerprint(tokenizer), on_progress, log)
    if data.labels:
      labels = ", ".join(map(str, data.labels[:20])) + ", ..." * (len(data.labels) > 20)
      log(f"{len(data.labels)} classes: {labels}")
      source = repo.with_class_head(source, data.labels, tokenizer)
      data = data.with_class_ids(source.labels)
    elif source.cfg.classes:
      raise RequestError(f"{model_path}: a model that classifies; set config.model.head")
    export.check_exportable(source, tokenizer)
    has_frozen = bool(config.lora.rank or config.train.trainable_params)
    weights_fingerprint = ""
    if config.model.init == "pretrained":
      whole = has_frozen or jax.process_count() > 1
      weights_fingerprint = repo.fingerprint(source, whole=whole)
    inputs = {
      "config.data, as it is cut into tokens": data.fingerprint,
      "its validation text": data.validation_fingerprint,
      "config.data.unrelated": data.unrelated_fingerprint,
      "the files of config.model.path": weights_fingerprint,
    }
    inputs |= {f"config.json of the model: {key}": it for key, it in source.hf_config.items()}
    multihost.assert_all_equal("data", inputs)
    rows = data.train
    total_rows, total_steps = num_rows_and_steps(rows, config.train)
    if total_steps > (limit := jaxft.config.MAX_INT):
      raise RequestError(f"config.train.epochs={config.train.epochs}: more than {limit:,} steps")
    for line in small_data_warnings(config, data, total_steps):
      log(line)
    log(f"{_data_summary(data.report, len(rows))}; {format_count(total_steps, 'step')}")

    # ---- Model: shapes and shardings -------------------------------------------------------------
    model_type = source.hf_config["model_type"]
    cfg = trainable_params.apply_config(source.cfg, config, model_type)
    program = build_train_program(config, cfg, mesh, total_steps, rows[0])
    check_fits(program, config)
    if warning := pinned_memory_warning(program):
      log(warning)
    num_all = num_params(program.state.all_params, cfg)
    num_trained = num_params(program.state.params, cfg)
    log(
      f"{model_type} from {config.model.path}: {num_all:,} parameters, "
      + (f"{num_trained:,} of them trained, " if cfg.trained else "")
      + f"computing in {program.compute.dtype}"
    )

    # ---- Workdir: is it this run's? --------------------------------------------------------------
    metadata = {  # of each checkpoint
      "config": config.to_dict(),
      "total_steps": total_steps,
      "data": data.fingerprint,
      "held_out": data.validation_fingerprint,
      "rows_in_all": total_rows,
      "rows_of_step": min(len(rows), config.train.batch_size),
      "versions": dict(versions),
      "started_in": str(Path.cwd()),
      "workdir": str(workdir.absolute()),
      "local_model": repo.is_local(config.model.path),
      "model": dataclasses.asdict(cfg),
      "labels": data.labels,
      "frozen": weights_fingerprint if has_frozen else "",
    }
    out = export_dir(config, workdir)

    def open_checkpoints() -> CheckpointManager:
      """Opens the checkpoints of this run; raises where they are of another."""
      checkpoints = CheckpointManager(
        folder=workdir / "checkpoints",
        max_to_keep=config.train.keep,
        best_metric=config.train.keep_best_metric,
        writes=True,
        low_memory=program.offload != "none",
      )
      exit_stack.callback(checkpoints.close_quietly)
      check_same_run(checkpoints, program.state.checkpointable, config, metadata, allow_change)
      return checkpoints

    checkpoints = None if dry_run or overwrite else open_checkpoints()
    command = same_command(overwrite)
    if not dry_run:
      saved_steps = checkpoints.steps() if checkpoints else []
      steps_of_epoch = -(-len(rows) // config.train.batch_size)
      num_new = manager.num_new_checkpoints(saved_steps, total_steps, config.train, steps_of_epoch)
      needed = {
        workdir / "checkpoints": num_new * tree_nbytes(program.state.checkpointable),
        out: EXPORT_DTYPES[config.export.dtype].itemsize * parameter_count(source.cfg),
      }
      check_disk_space(needed, f"{num_new} checkpoints of this run and its export")

    # ---- Compile: what the step needs is known before any of it is taken -------------------------
    compile_start = time.monotonic()
    traced, train_step, eval_step = _compile(program, device)
    memory = measure.memory_breakdown(program, train_step.memory_analysis())["breakdown"]
    sizes = {what: rendering.format_bytes(nbytes) for what, nbytes in memory.items() if nbytes}
    log(
      f"compiled in {time.monotonic() - compile_start:.1f} s; a device needs "
      f"{rendering.format_bytes(sum(memory.values()))}: "
      + ", ".join(f"{what} {size}" for what, size in sizes.items())
    )
    if dry_run:
      if is_main:
        plan = plan_from_compiled(config, cfg, program, traced, train_step, eval_step)
        console.print(rendering.render_plan(plan))
      return None
    # A collective gives up on a process that comes 30 s late.
    multihost.assert_all_equal("compiled", {})

    # ---- State. The order is important: 1. a checkpoint of this run, the newest sound one; 2. the
    # pretrained weights; 3. new weights. Only 2 and 3 are beginnings, so only they are evaluated
    # and sampled as "before".
    saved = None
    tokens_seen = 0
    if checkpoints:
      like = program.state.checkpointable
      saved, tokens_seen = restore_latest(checkpoints, like, total_steps, strict)
    if saved is None:
      state = init_train_state(program, *load_or_init_params(program, cfg, source, config))
    else:
      frozen = load_or_init_params(program, cfg, source, config)[1] if cfg.trained else {}
      state = TrainState.from_checkpoint(saved, frozen)
    start = int(state.step)
    if overwrite:  # now that nothing is left to refuse
      multihost.assert_all_equal("read", {})
      with preemption.deferred():
        if is_main and has_content(workdir):
          aside = move_aside(workdir)
          log(
            f"{workdir}: what was there is moved to {aside}; a new run begins "
            "(--overwrite_output_dir)"
          )
        multihost.assert_all_equal("moved", {})
      if is_main and out.is_dir() and any(out.iterdir()):
        log(f"{out}: the export in it will be replaced when the run ends")
      checkpoints = open_checkpoints()
    if is_main:
      atomic_write(workdir / "config.json", jaxft.config.to_json(config))
      atomic_write(workdir / "data_report.json", data.to_json(config.train))
      export.save_run_model(workdir, source, tokenizer)
    run_info = {  # of about.json
      "step": start,
      "total_steps": total_steps,
      "model": {
        "type": model_type,
        "compute_dtype": program.compute.dtype.name,
        "parameters": num_all,
        "trained": num_trained,
      },
      "memory": {"planned": memory, "host": host_bytes(program)},
    }
    exit_stack.enter_context(record_run(workdir, mesh, run_info, run_page.write))
    model_flops = flops.model_flops(cfg, config.train.batch_size, rows.seq_len)
    target = specs.local_target(device, mesh.size)
    system = SystemMetrics(is_main and config.tracking.system_metrics, workdir)
    exit_stack.enter_context(system)
    reporter = Reporter(
      config=config,
      workdir=workdir,
      start=start,
      total_steps=total_steps,
      tokens_seen=tokens_seen,
      entropy_floor=data.entropy_floor,
      device=device,
      ideal_step_seconds=roofline.ideal_step_seconds(target, mesh.size, model_flops),
      system=system,
      num_rows=len(rows),
    )
    trackers = TrackerGroup(
      config=config,
      workdir=workdir,
      start=start,
      metrics=reporter.metrics,
      samples=reporter.samples,
      writes=is_main,
    )
    reporter.on_entry = exit_stack.enter_context(trackers).log
    evaluator = Evaluator(
      config=config,
      program=program,
      eval_step=eval_step,
      generator=Generator(program.graph, cfg, tokenizer.eos_token_id),
      data=data,
      tokenizer=tokenizer,
      reporter=reporter,
    )
    if start == 0:
      evaluator.evaluate(state.all_params, 0, "before")
      evaluator.sample(state.all_params, 0, "before")

    # ---- Train: step n + 1 is under way before the metrics of step n are read --------------------
    batches = loader.train_batches(
      rows,
      batch_size=config.train.batch_size,
      accumulation=program.batch["ids"].shape[0],
      seed=config.data.shuffle_seed,
      total_rows=total_rows,
      start=start,
      sharding=program.batch_sharding,
    )
    is_due = functools.partial(due_at, rows=len(rows), batch_size=config.train.batch_size)
    patience = config.train.early_stopping_patience
    ended_early = start > 0 and 0 < patience <= reporter.evals_since_best()
    if ended_early and start < total_steps:
      log(
        f"config.train.early_stopping_patience={patience}: no lower eval loss in as many "
        "evaluations, so nothing more is trained; a higher one, or 0, goes on"
      )
    leaf_names = lambda bad_leaves: nonfinite_leaf_names(bad_leaves, program.state)
    profiler = Profiler(
      folder=workdir / "profile",
      first=start + 3,
      count=config.train.profile_steps,
      total=total_steps,
      paused=reporter.clock.paused,
    )
    # A signal while trackers are waited for changes nothing of how the run ended.
    exit_stack.callback(preemption.defer)
    reporter.clock.restart()
    step = start
    pending = None  # metrics of a step, on the device
    eval_metrics = {}
    with preemption.deferred(), profiler, ProgressBar("training", total_steps, start) as progress:
      for step in range(start + 1, 0 if ended_early else total_steps + 1):
        profiler.on_step_begin(step, pending)
        state, metrics = train_step(state, next(batches))
        run_info["reached"] = step
        if step == start + 1:
          jax.block_until_ready(metrics)
          log(f"first step after {time.monotonic() - start_time:.1f} s")
        if pending:
          reporter.log_step(step - 1, jax.device_get(pending), progress, leaf_names)
        profiler.on_step_end(step, metrics)
        # A save goes on beside one step, so that a kill costs at most save_every + 1 of them.
        checkpoints.wait()
        pending = metrics
        is_last = step == total_steps
        intervals = {
          what: getattr(config.train, f"{what}_every") for what in ("eval", "save", "sample")
        }
        due = {what for what, every in intervals.items() if is_due(every, step)}
        if is_last:  # what is exported is sampled, below
          due = (due | {"eval", "save"}) - {"sample"}
        stopping = preemption.should_stop(step)
        if due or stopping:
          reporter.log_step(step, jax.device_get(pending), progress, leaf_names)
          pending = None
          with reporter.clock.paused():
            if "eval" in due:
              when = "after" if is_last else f"step {step}"
              eval_metrics = evaluator.evaluate(state.all_params, step, when)
              ended_early = 0 < patience <= reporter.evals_since_best()
            if "sample" in due:
              evaluator.sample(state.all_params, step, "during")
            best = "eval" in due and config.train.keep_best_metric
            if "save" in due or stopping or best or ended_early:
              checkpoints.save(
                step,
                state.checkpointable,
                metadata | {"tokens": reporter.tokens_seen},
                eval_metrics if "eval" in due else {},
              )
        if stopping:
          checkpoints.close()
          raise Preempted(
            f"{preemption.received}: saved at step {step} of {total_steps}; {command} continues"
          )
        if ended_early:
          log(
            f"no lower eval loss in {patience} evaluations: ended at step {step} of {total_steps}"
          )
          break
      checkpoints.close()
      if preemption.should_stop(total_steps + 1):
        raise Preempted(f"{preemption.received}: all steps are saved; {command} exports the model")

    # ---- What is exported: the last weights or, with keep_best_metric, the best ------------------
    if config.train.keep_best_metric:
      frozen = state.frozen
      state = None  # there may be no room for two
      step, best_state = restore_best(checkpoints, program.state.checkpointable, strict)
      state = TrainState.from_checkpoint(best_state, frozen)
    evaluator.sample(state.all_params, step, "after")
    run_info["exported_step"] = step

    # ---- Export: a Hugging Face folder, read back and compared -----------------------------------
    # The frozen weights are read again, as precise as they are in the base model.
    params = state.params
    del state
    if cfg.lora_rank:
      peft.save_adapters(workdir / "adapter", params, cfg, source, config)
    parity = export.export_model(
      out,
      merge_params(params, cfg, source, merged_shapes(program)),
      source,
      dtype=config.export.dtype,
      max_shard_size=config.export.max_shard_size,
      card=model_card(workdir, step, metadata["local_model"]),
      tokenizer=tokenizer,
    )
    if is_main:
      facts = {key: it for key, it in parity.items() if key != "sha256"}
      run_info["export"] = {"folder": str(out.absolute())} | facts
      if cfg.lora_rank:
        run_info["export"]["adapter"] = str((workdir / "adapter").absolute())
      log(f"exported to {out}: {format_parity(parity)}")
    if is_main and config.export.push_to_hub:
      log(f"uploaded to {push.push_to_hub(out, config.export.push_to_hub)}")
    log(reporter.summary(step) if data.validation else "no eval loss: nothing was held out")
  return TrainOutput(
    workdir=workdir, metrics=reporter.metrics.entries, samples=reporter.samples.entries, export=out
  )


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
