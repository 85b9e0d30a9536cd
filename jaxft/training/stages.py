"""The stages before the first step and after the last: build, start, export."""

import contextlib
import dataclasses
import functools
from collections.abc import Generator
from pathlib import Path

import jax

import jaxft.config
from jaxft.checkpoint import manager
from jaxft.checkpoint.manager import CheckpointManager, tree_nbytes
from jaxft.config import Config
from jaxft.distributed import multihost
from jaxft.hf import export, peft, push, repo, trainable_params
from jaxft.hf.card import model_card
from jaxft.hf.export_tensors import EXPORT_DTYPES
from jaxft.hf.verify import format_parity
from jaxft.model.config import ModelConfig
from jaxft.model.decoder import parameter_count
from jaxft.training import build, init, memory
from jaxft.training.build import TrainProgram
from jaxft.training.inputs import RunInputs, RunRequest, has_frozen
from jaxft.training.resume import check_same_run, restore_latest
from jaxft.training.train_state import TrainState
from jaxft.training.trainable import num_params
from jaxft.training.workdir import check_disk_space
from jaxft.utils.files import atomic_write
from jaxft.utils.logger import log
from jaxft.utils.types import Json, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuiltRun:
  """A run that is ready to start: its request, its inputs and its programs."""

  request: RunRequest
  inputs: RunInputs
  cfg: ModelConfig  # with the dropout and the adapters of this run
  program: TrainProgram

  @property
  def config(self) -> Config:
    """The config of the run."""
    return self.request.config

  @property
  def model_facts(self) -> Json:
    """The model's entry in about.json."""
    return {
      "type": self.inputs.model_type,
      "compute_dtype": self.program.compute.dtype.name,
      "parameters": num_params(self.program.state.all_params, self.cfg),
      "trained": num_params(self.program.state.params, self.cfg),
    }

  @functools.cached_property
  def checkpoint_metadata(self) -> Json:
    """The metadata of every checkpoint of this run, except its step and its tokens."""
    config = self.config
    inputs = self.inputs
    return {
      "config": config.to_dict(),
      "total_steps": inputs.total_steps,
      "data": inputs.data.fingerprint,
      "held_out": inputs.data.validation_fingerprint,
      "rows_in_all": inputs.total_rows,
      "rows_of_step": min(len(inputs.data.train), config.train.batch_size),
      "versions": dict(multihost.package_versions()),
      "started_in": str(Path.cwd()),
      "workdir": str(self.request.workdir.absolute()),
      "local_model": repo.is_local(config.model.path),
      "model": dataclasses.asdict(self.cfg),
      "labels": inputs.data.labels,
      "frozen": inputs.weights_fingerprint if has_frozen(config) else "",
    }


def build_run(request: RunRequest, inputs: RunInputs) -> BuiltRun:
  """Build a run's programs; raises RequestError if its state exceeds memory."""
  config = request.config
  cfg = trainable_params.apply_config(inputs.source.cfg, config, inputs.model_type)
  row = inputs.data.train[0]
  program = build.build_train_program(config, cfg, inputs.mesh, inputs.total_steps, row)
  memory.check_fits(program, config)
  if warning := memory.pinned_memory_warning(program):
    log(warning)
  run = BuiltRun(request=request, inputs=inputs, cfg=cfg, program=program)
  facts = run.model_facts
  log(
    f"{facts['type']} from {config.model.path}: {facts['parameters']:,} parameters, "
    + (f"{facts['trained']:,} of them trained, " if cfg.trained else "")
    + f"computing in {program.compute.dtype}"
  )
  return run


@contextlib.contextmanager
def open_checkpoints(run: BuiltRun) -> Generator[CheckpointManager]:
  """Open the run's checkpoints; raises RequestError if another run wrote them."""
  train = run.config.train
  checkpoints = CheckpointManager(
    folder=run.request.workdir / "checkpoints",
    max_to_keep=train.keep,
    best_metric=train.keep_best_metric,
    writes=True,
    low_memory=run.program.offload != "none",
  )
  like = run.program.state.checkpointable
  try:
    metadata = run.checkpoint_metadata
    check_same_run(checkpoints, like, run.config, metadata, run.request.allow_change)
    yield checkpoints
  finally:
    checkpoints.close_quietly()


def check_room(run: BuiltRun, saved_steps: list[int]) -> None:
  """Check that the disk has room for the remaining checkpoints and the export.

  Args:
    run: the built run.
    saved_steps: steps of the checkpoints already on the disk.

  Raises:
    StorageError: the disk has too little room.
  """
  train = run.config.train
  total_steps = run.inputs.total_steps
  steps_of_epoch = -(-len(run.inputs.data.train) // train.batch_size)
  num_new = manager.num_new_checkpoints(saved_steps, total_steps, train, steps_of_epoch)
  itemsize = EXPORT_DTYPES[run.config.export.dtype].itemsize
  needed = {
    run.request.workdir / "checkpoints": num_new * tree_nbytes(run.program.state.checkpointable),
    run.request.export_dir: itemsize * parameter_count(run.inputs.source.cfg),
  }
  check_disk_space(needed, f"{num_new} checkpoints of this run and its export")


def initial_state(run: BuiltRun) -> TrainState:
  """Return the initial state of a new run, with pretrained or random weights."""
  params, frozen = init.load_or_init_params(run.program, run.cfg, run.inputs.source, run.config)
  return init.init_train_state(run.program, params, frozen)


def restore_or_init(run: BuiltRun, checkpoints: CheckpointManager) -> tuple[TrainState, int]:
  """Return the restored or initial state, and the tokens trained on so far."""
  like = run.program.state.checkpointable
  strict = run.request.strict
  saved, tokens_seen = restore_latest(checkpoints, like, run.inputs.total_steps, strict)
  if saved is None:
    return initial_state(run), 0
  if not run.cfg.trained:
    return TrainState.from_checkpoint(saved, {}), tokens_seen
  _, frozen = init.load_or_init_params(run.program, run.cfg, run.inputs.source, run.config)
  return TrainState.from_checkpoint(saved, frozen), tokens_seen


def write_run_files(run: BuiltRun) -> None:
  """Write settings, data report and base model's config, from process 0."""
  if jax.process_index() > 0:
    return
  workdir = run.request.workdir
  inputs = run.inputs
  atomic_write(workdir / "config.json", jaxft.config.to_json(run.config))
  atomic_write(workdir / "data_report.json", inputs.data.to_json(run.config.train))
  export.save_run_model(workdir, inputs.source, inputs.tokenizer)


def export_run(run: BuiltRun, params: Params, step: int, about: Json) -> None:
  """Write a Hugging Face folder, read it back and compare the two.

  Frozen weights are loaded again from the base model, because the run stores them in the compute
  dtype and the export needs their full precision.

  Args:
    run: the built run.
    params: the trained weights.
    step: the step that they were saved at, for the model card.
    about: content of about.json, which gets "export".
  """
  config = run.config
  source = run.inputs.source
  workdir = run.request.workdir
  out = run.request.export_dir
  if run.cfg.lora_rank:
    peft.save_adapters(workdir / "adapter", params, run.cfg, source, config)
  parity = export.export_model(
    out,
    init.merge_params(params, run.cfg, source, init.merged_shapes(run.program)),
    source,
    dtype=config.export.dtype,
    max_shard_size=config.export.max_shard_size,
    card=model_card(workdir, step, run.checkpoint_metadata["local_model"]),
    tokenizer=run.inputs.tokenizer,
  )
  if jax.process_index() > 0:
    return
  facts = {key: it for key, it in parity.items() if key != "sha256"}
  adapter = {"adapter": str((workdir / "adapter").absolute())} if run.cfg.lora_rank else {}
  about["export"] = {"folder": str(out.absolute())} | facts | adapter
  log(f"exported to {out}: {format_parity(parity)}")
  if config.export.push_to_hub:
    log(f"uploaded to {push.push_to_hub(out, config.export.push_to_hub)}")
