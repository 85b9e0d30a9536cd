"""Fine-tune a model: python -m jaxft.train --config configs/X.py [--workdir DIR] [--config.a.b=value ...]

The same command again continues a run that was stopped or killed. `finetune` is the same thing for notebooks.
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
from jaxft.data import loader, sources, tokenize
from jaxft.data.accounting import HELD_OUT_TAILS, num_rows_and_steps
from jaxft.data.dataset import PreparedData, prepare_data
from jaxft.distributed import multihost
from jaxft.errors import Preempted, RequestError, first_line, run_command, same_command
from jaxft.generation.sampler import Generator
from jaxft.hardware import flops, roofline, specs
from jaxft.hf import base_model, peft, push, repo, trainable_params
from jaxft.hf.card import model_card
from jaxft.hf.export import (
  check_exportable,
  export_model,
  is_hf_model,
  save_run_model,
  validate_export,
  validate_workdir,
)
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
from jaxft.training import optimizer, trainable
from jaxft.training.build import (
  build_train_program,
  check_fits,
  host_bytes,
  max_host_bytes,
  pinned_memory_warning,
)
from jaxft.training.evaluator import Evaluator
from jaxft.training.init import init_train_state, load_or_init_params, merge_params, merged_shapes
from jaxft.training.preemption import PreemptionHandler
from jaxft.training.profiler import Profiler
from jaxft.training.resume import check_same_run, restore_best, restore_latest
from jaxft.training.run_info import record_run
from jaxft.training.train_state import TrainState
from jaxft.training.train_step import nonfinite_leaf_names
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

OOM_ADVICE = "a smaller config.train.micro_batch_size, config.memory.remat=full or config.memory.loss_chunk=128 need less memory"


class TrainOutput(NamedTuple):
  """A finished run."""

  workdir: Path
  metrics: list[dict[str, Any]]  # the lines of metrics.jsonl
  samples: list[dict[str, Any]]  # the lines of samples.jsonl
  export: Path  # the Hugging Face folder


def validate_run(config: ConfigDict, workdir: Path, overwrite: bool = False) -> None:
  """Raises RequestError with every fault that can be seen without building anything."""
  lines = jaxft.config.validate(config)
  if not lines:
    out = export_dir(config, workdir)
    lines += [f"config.export.out: {line}" for line in validate_export(out)]
    lines += [f"--workdir: {line}" for line in manager.validate_path(workdir / "checkpoints")]
    lines += [f"--workdir: {line}" for line in validate_workdir(workdir)]
    there, here = out.resolve(), workdir.resolve()
    own = [here / name for name in sources.RUN_FOLDERS if name != "export"]
    if there in (here, *here.parents) or any(there.is_relative_to(folder) for folder in own):
      lines.append(
        f"config.export.out={str(out)!r}: the run itself is written there; name a folder of its own"
      )
    if (
      config.model.path
      and repo.is_local(config.model.path)
      and Path(config.model.path).resolve() == here
    ):
      lines.append(
        f"--workdir: {str(workdir)!r} is config.model.path, whose config.json the run would replace by its own"
      )
    elif is_hf_model(workdir) and not overwrite:
      lines.append(
        f"--workdir: {str(workdir)!r} has the config.json of a model, which the run would replace by its own; name another "
        "folder, or have all of it moved aside by --overwrite_output_dir"
      )
    if config.export.push_to_hub:
      lines += [f"config.export.{line}" for line in push.validate_push(config.export.push_to_hub)]
    lines += sources.validate_sources(config.data)
    lines += missing_packages(config)
  if not lines:  # reading a model's config takes seconds, most of them to import transformers
    lines += repo.validate_model(
      config.model.path, config.model.init == "pretrained", config.model.torch_bin
    )
  if lines:
    raise RequestError("\n".join(lines))


def small_data_warnings(config: ConfigDict, data: PreparedData, total_steps: int) -> list[str]:
  """A line for each thing that this run does in another way than `config` says, as its data is too small for it.

  Raises RequestError for what needs an evaluation where nothing is held out.
  """
  lines, rows, train = [], len(data.train), config.train
  if rows < train.batch_size:
    lines.append(
      f"config.train.batch_size={train.batch_size}: the training text fills only {format_count(rows, 'row')}, so each step takes "
      "all of it and masks the rest of the batch"
    )
  if config.optim.warmup_steps > total_steps:
    steps = optimizer.warmup_steps(config.optim, total_steps)
    lines.append(
      f"config.optim.warmup_steps={config.optim.warmup_steps}: more than the {format_count(total_steps, 'step')} of the run; "
      f"{format_count(steps, 'step')} instead, a tenth of them"
    )
  if not data.validation:
    for name in ("keep_best_metric", "early_stopping_patience"):
      if train[name]:
        raise RequestError(
          f"config.train.{name}={train[name]!r}: nothing is held out of {format_count(data.report['rows']['read'], 'row')}; "
          "name sources in config.data.validation"
        )
    lines.append(
      "nothing is held out, so there is no eval loss; config.data.validation names text to evaluate on"
    )
  return lines


def _data_summary(report: dict[str, Any], rows: int) -> str:
  """What is trained on, held out and left out, in a line."""
  documents, of_tokens, ends = (
    report["rows"],
    report["tokens"],
    report["notes"].get(HELD_OUT_TAILS, 0),
  )
  held_out = (
    f"the ends of {format_count(ends, 'document')}"
    if ends
    else format_count(documents["held_out"], "document")
  )
  left_out = ", ".join(f"{reason}: {n:,}" for reason, n in documents["dropped"].items() if n)
  return (
    f"{format_count(documents['trained'], 'document')} with {format_count(of_tokens['trained'], 'token')} to train on, in "
    f"{format_count(rows, 'row')} of {report['sequence_length']}; {held_out} with {format_count(of_tokens['held_out'], 'token')} held out"
    + (f"; left out: {left_out}" if left_out else "")
  )


def export_dir(config: ConfigDict, workdir: Path) -> Path:
  return Path(config.export.out) if config.export.out else workdir / "export"


def _input_paths(config: ConfigDict) -> list[Path]:
  """The files and folders that a run reads."""
  data = config.data
  named = [sources.parse_weight(name)[0] for name in data.train] + [
    *data.validation,
    *data.unrelated,
  ]
  named += [config.model.path, config.model.config, config.model.tokenizer, data.cache_dir]
  return [Path(name) for name in named if name and not name.startswith("hub:")]


def finetune(
  config: ConfigDict,
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
    dry_run: compile, tell the memory, and return None: no weights are read and nothing is written.
    strict: a damaged checkpoint ends the run, instead of being set aside for the one before it.
    allow_change: continue although settings that shape what is learned have changed since the run was started.
    overwrite: begin a new run; one that is in `workdir` is moved to a folder beside it, which is told.
    require: "gpu" or "tpu": what JAX must compute on; None: whatever it finds.

  Raises:
    RequestError, NumericsError, StorageError, Preempted: see `jaxft.errors`.
  """
  workdir, config = Path(workdir), jaxft.config.normalize(config)
  backend.validate_require(require)
  backend.configure_jax()
  flags = {
    "--workdir": workdir,
    "--dry_run": dry_run,
    "--strict": strict,
    "--allow_change": allow_change,
  }
  flags |= {"--overwrite_output_dir": overwrite}
  multihost.assert_all_equal(
    "command", flags | jaxft.config.with_prefix(config) | multihost.package_versions()
  )
  validate_run(config, workdir, overwrite)
  if config.memory.offload != "none":
    backend.limit_pinned_memory(max_host_bytes(config, resolve_model_config(config)))
  backend.require_device(require)
  beginning = time.monotonic()
  with contextlib.ExitStack() as until_the_end:
    stop = until_the_end.enter_context(PreemptionHandler())
    if not dry_run:
      if overwrite:
        check_not_an_input(workdir, _input_paths(config))
      until_the_end.enter_context(lock_workdir(workdir))
      multihost.check_shared_folder(workdir)
      if overwrite and jax.process_index() == 0 and has_content(workdir):
        check_movable(workdir)
    # ---- Mesh ----------------------------------------------------------------------------------------------------------
    mesh = make_mesh(config.mesh)
    device = mesh.local_devices[0]
    log(
      f"{mesh.size} x {device.device_kind}, mesh "
      + " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
    )

    # ---- Source: facts and tokenizer; no weights yet --------------------------------------------------------------------
    pretrained = config.model.init == "pretrained"
    source = base_model.resolve(config.model)
    if overwrite:  # adapters name a model of their own
      check_not_an_input(workdir, [source.folder, source.tokenizer_folder])
    if source.adapter and config.lora.rank:
      raise RequestError(
        f"config.model.path={config.model.path!r}: a folder of adapters, and adapters on top of it could not be used "
        f"without it; merge it first: python -m jaxft.export --model {config.model.path} --out MERGED"
      )
    if config.data.sequence_length > source.cfg.P:
      raise RequestError(
        f"config.data.sequence_length={config.data.sequence_length}: the model has {source.cfg.P} positions"
      )
    tokenizer = load_tokenizer(source.tokenizer_folder, source.cfg.V)

    for prompt in config.train.sample_prompts:
      if (length := len(tokenize.encode_prompt(tokenizer, prompt))) >= source.cfg.P:
        raise RequestError(
          f"config.train.sample_prompts: {prompt[:40]!r}... has {length} tokens and the model {source.cfg.P} positions; "
          "shorten it"
        )

    # ---- Data: every document and every token accounted for ------------------------------------------------------------
    with ProgressBar("tokenising", 1) as meter:
      told = lambda done, total: meter.update(done, total=total)
      data = prepare_data(config.data, tokenizer, fingerprint(tokenizer), told, log)
    if data.labels:
      some = ", ".join(map(str, data.labels[:20])) + ", ..." * (len(data.labels) > 20)
      log(f"{len(data.labels)} classes: {some}")
      source = repo.with_class_head(source, data.labels, tokenizer)
      data = data.with_class_ids(source.labels)
    elif source.cfg.classes:
      raise RequestError(
        f"config.model.path={config.model.path!r}: a model that classifies; set config.model.head"
      )
    check_exportable(source, tokenizer)
    frozen = bool(config.lora.rank or config.train.only)
    weights = (
      repo.fingerprint(source, whole=frozen or jax.process_count() > 1) if pretrained else ""
    )
    same = {
      "config.data, as it is cut into tokens": data.fingerprint,
      "its validation text": data.validation_fingerprint,
    }
    same |= {"config.data.unrelated": data.unrelated_fingerprint}
    same |= {"the files of config.model.path": weights}
    multihost.assert_all_equal(
      "data",
      same | {f"config.json of the model: {key}": it for key, it in source.hf_config.items()},
    )
    rows = data.train
    total_rows, total_steps = num_rows_and_steps(rows, config.train)
    if total_steps > jaxft.config.MAX_INT:
      raise RequestError(
        f"config.train.epochs={config.train.epochs}: more than {jaxft.config.MAX_INT:,} steps"
      )
    for line in small_data_warnings(config, data, total_steps):
      log(line)
    about = {
      "config": config.to_dict(),
      "total_steps": total_steps,
      "data": data.fingerprint,
      "held_out": data.validation_fingerprint,
      "rows_in_all": total_rows,
      "rows_of_step": min(len(rows), config.train.batch_size),
    }
    about |= {
      "versions": dict(multihost.package_versions()),
      "started_in": str(Path.cwd()),
      "workdir": str(workdir.absolute()),
    }
    about["local_model"] = repo.is_local(config.model.path)
    log(f"{_data_summary(data.report, len(rows))}; {format_count(total_steps, 'step')}")

    # ---- Model: shapes and shardings -------------------------------------------------------------------------------------
    cfg = trainable_params.apply_config(source.cfg, config, source.hf_config["model_type"])
    program = build_train_program(config, cfg, mesh, total_steps, rows[0])
    check_fits(program, config)
    if warning := pinned_memory_warning(program):
      log(warning)
    log(
      f"{source.hf_config['model_type']} from {config.model.path}: {trainable.num_params(program.state.all_params, cfg):,} parameters, "
      + (
        f"{trainable.num_params(program.state.params, cfg):,} of them trained, "
        if cfg.trained
        else ""
      )
      + f"computing in {program.compute.dtype}"
    )

    # ---- Workdir: is it this run's? ------------------------------------------------------------------------------------
    about |= {
      "model": dataclasses.asdict(cfg),
      "labels": data.labels,
      "frozen": weights if frozen else "",
    }
    out = export_dir(config, workdir)

    def opened() -> CheckpointManager:
      """The checkpoints of this run; raises where they are of another."""
      best, low_memory = config.train.keep_best_metric, program.offload != "none"
      found = CheckpointManager(
        workdir / "checkpoints", config.train.keep, best, writes=True, low_memory=low_memory
      )
      until_the_end.callback(found.close_quietly)
      check_same_run(found, program.state.checkpointable, config, about, allow_change)
      return found

    checkpoints = None if dry_run or overwrite else opened()
    again = same_command(overwrite)
    if not dry_run:
      steps_of_epoch = -(-len(rows) // config.train.batch_size)
      to_come = manager.num_new_checkpoints(
        checkpoints.steps() if checkpoints else [], total_steps, config.train, steps_of_epoch
      )
      exported = EXPORT_DTYPES[config.export.dtype].itemsize * parameter_count(source.cfg)
      needed = {
        workdir / "checkpoints": to_come * tree_nbytes(program.state.checkpointable),
        out: exported,
      }
      check_disk_space(needed, f"{to_come} checkpoints of this run and its export")

    # ---- Compile: what the step needs is known before any of it is taken ----------------------------------------------
    started = time.monotonic()
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
    log(
      f"compiled in {time.monotonic() - started:.1f} s; a device needs {rendering.format_bytes(sum(memory.values()))}: "
      + ", ".join(
        f"{what} {rendering.format_bytes(nbytes)}" for what, nbytes in memory.items() if nbytes
      )
    )
    if dry_run:
      if jax.process_index() == 0:
        console.print(
          rendering.render_plan(
            plan_from_compiled(config, cfg, program, traced, train_step, eval_step)
          )
        )
      return None
    multihost.assert_all_equal(
      "compiled", {}
    )  # a collective gives up on a process that comes 30 s late

    # ---- State. The order is important: 1. a checkpoint of this run, the newest sound one; 2. the pretrained weights;
    # 3. new weights. Only 2 and 3 are beginnings, so only they are evaluated and sampled as "before".
    saved, tokens_seen = None, 0
    if checkpoints:
      saved, tokens_seen = restore_latest(
        checkpoints, program.state.checkpointable, total_steps, strict
      )
    if saved is None:
      state = init_train_state(program, *load_or_init_params(program, cfg, source, config))
    else:
      state = TrainState(
        *saved, load_or_init_params(program, cfg, source, config)[1] if cfg.trained else {}
      )
    start = int(state.step)
    if overwrite:  # now that nothing is left to refuse
      multihost.assert_all_equal("read", {})
      with stop.deferred():
        if jax.process_index() == 0 and has_content(workdir):
          log(
            f"{workdir}: what was there is moved to {move_aside(workdir)}; a new run begins (--overwrite_output_dir)"
          )
        multihost.assert_all_equal("moved", {})
      if jax.process_index() == 0 and out.is_dir() and any(out.iterdir()):
        log(f"{out}: the export in it will be replaced when the run ends")
      checkpoints = opened()
    if jax.process_index() == 0:
      atomic_write(workdir / "config.json", jaxft.config.to_json(config))
      atomic_write(workdir / "data_report.json", data.to_json(config.train))
      save_run_model(workdir, source, tokenizer)
    kind = {"type": source.hf_config["model_type"], "compute_dtype": program.compute.dtype.name}
    sizes = {
      "parameters": trainable.num_params(program.state.all_params, cfg),
      "trained": trainable.num_params(program.state.params, cfg),
    }
    needs = {"planned": memory, "host": host_bytes(program)}
    told = {"step": start, "total_steps": total_steps, "model": kind | sizes, "memory": needs}
    until_the_end.enter_context(record_run(workdir, mesh, told, run_page.write))
    model_flops = flops.model_flops(cfg, config.train.batch_size, rows.seq_len)
    at_peak = roofline.ideal_step_seconds(
      specs.local_target(device, mesh.size), mesh.size, model_flops
    )
    first = jax.process_index() == 0
    system = until_the_end.enter_context(
      SystemMetrics(first and config.tracking.system_metrics, workdir)
    )
    reporter = Reporter(
      config,
      workdir,
      start,
      total_steps,
      tokens_seen,
      data.entropy_floor,
      device,
      at_peak,
      system,
      len(rows),
    )
    writers = TrackerGroup(config, workdir, start, reporter.metrics, reporter.samples, first)
    reporter.on_entry = until_the_end.enter_context(writers).log
    generator = Generator(program.graph, cfg, tokenizer.eos_token_id)
    judge = Evaluator(config, program, eval_step, generator, data, tokenizer, reporter)
    if start == 0:
      judge.evaluate(state.all_params, 0, "before")
      judge.sample(state.all_params, 0, "before")

    # ---- Train: step n + 1 is under way before the numbers of step n are read -----------------------------------------
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
    step, pending, found, patience = start, None, {}, config.train.early_stopping_patience
    ended_early = start > 0 and 0 < patience <= reporter.evals_since_best()
    if ended_early and start < total_steps:
      log(
        f"config.train.early_stopping_patience={patience}: no lower eval loss in as many evaluations, so nothing more is "
        "trained; a higher one, or 0, goes on"
      )
    name_leaves = lambda bad: nonfinite_leaf_names(bad, program.state)
    profile = Profiler(
      workdir / "profile", start + 3, config.train.profile_steps, total_steps, reporter.clock.paused
    )
    until_the_end.callback(
      stop.defer
    )  # a signal while trackers are waited for changes nothing of how the run ended
    reporter.clock.restart()
    with stop.deferred(), profile, ProgressBar("training", total_steps, start) as meter:
      for step in range(start + 1, 0 if ended_early else total_steps + 1):
        profile.on_step_begin(step, pending)
        state, numbers = train_step(state, next(batches))
        told["reached"] = step
        if step == start + 1:
          jax.block_until_ready(numbers)
          log(f"first step after {time.monotonic() - beginning:.1f} s")
        if pending:
          reporter.log_step(step - 1, jax.device_get(pending), meter, name_leaves)
        profile.on_step_end(step, numbers)
        checkpoints.wait()  # a save goes on beside one step, so that a kill costs at most save_every + 1 of them
        pending, last = numbers, step == total_steps
        due = {
          what for what in ("eval", "save", "sample") if is_due(config.train[f"{what}_every"], step)
        }
        due = (
          (due | {"eval", "save"}) - {"sample"} if last else due
        )  # what is exported is sampled, below
        stopping = stop.should_stop(step)
        if due or stopping:
          reporter.log_step(step, jax.device_get(pending), meter, name_leaves)
          pending = None
          with reporter.clock.paused():
            if "eval" in due:
              found = judge.evaluate(state.all_params, step, "after" if last else f"step {step}")
              ended_early = 0 < patience <= reporter.evals_since_best()
            if "sample" in due:
              judge.sample(state.all_params, step, "during")
            best = "eval" in due and config.train.keep_best_metric
            if "save" in due or stopping or best or ended_early:
              checkpoints.save(
                step,
                state.checkpointable,
                about | {"tokens": reporter.tokens_seen},
                found if "eval" in due else {},
              )
        if stopping:
          checkpoints.close()
          raise Preempted(
            f"{stop.received}: saved at step {step} of {total_steps}; {again} continues"
          )
        if ended_early:
          log(
            f"no lower eval loss in {patience} evaluations: ended at step {step} of {total_steps}"
          )
          break
      checkpoints.close()
      if stop.should_stop(total_steps + 1):
        raise Preempted(f"{stop.received}: all steps are saved; {again} exports the model")

    # ---- What goes out: the last weights or, where they are kept, the best -----------------------------------------------
    if config.train.keep_best_metric:
      frozen, state = state.frozen, None  # there may be no room for two
      step, best = restore_best(checkpoints, program.state.checkpointable, strict)
      state = TrainState(*best, frozen)
    judge.sample(state.all_params, step, "after")
    told["exported_step"] = step

    # ---- Export: a Hugging Face folder, read back and compared -----------------------------------------------------------
    state = (
      state.checkpointable
    )  # the frozen weights are read again, as precise as they are in the checkpoint
    if cfg.lora_rank:
      peft.save_adapters(workdir / "adapter", state.params, cfg, source, config)
    parity = export_model(
      out,
      merge_params(state.params, cfg, source, merged_shapes(program)),
      source,
      dtype=config.export.dtype,
      max_shard_size=config.export.max_shard_size,
      card=model_card(workdir, step, about["local_model"]),
      tokenizer=tokenizer,
    )
    if jax.process_index() == 0:
      told["export"] = {"folder": str(out.absolute())} | {
        key: it for key, it in parity.items() if key != "sha256"
      }
      told["export"] |= {"adapter": str((workdir / "adapter").absolute())} if cfg.lora_rank else {}
      log(f"exported to {out}: {format_parity(parity)}")
    if jax.process_index() == 0 and config.export.push_to_hub:
      log(f"uploaded to {push.push_to_hub(out, config.export.push_to_hub)}")
    log(reporter.summary(step) if data.validation else "no eval loss: nothing was held out")
  return TrainOutput(workdir, reporter.metrics.entries, reporter.samples.entries, out)


def main() -> None:
  arguments = parse_train()
  if arguments.print_config:
    if arguments.per_device:
      backend.configure_jax()
      backend.require_device(arguments.require)
      arguments.per_device.apply_to(arguments.config, jax.device_count())
    print(jaxft.config.describe(arguments.config))
    return
  if arguments.overwrite_output_dir:
    check_not_an_input(arguments.workdir, [arguments.config_file])
  with multihost.distributed_context(
    arguments.process_info, arguments.start_timeout, arguments.peer_timeout
  ):
    if arguments.per_device:
      backend.configure_jax()
      backend.require_device(arguments.require)
      arguments.per_device.apply_to(arguments.config, jax.device_count())
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
