"""The request of a run and its inputs: devices, base model, tokenizer and data."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

import jaxft.config
from jaxft.checkpoint import manager
from jaxft.config import Config
from jaxft.data import sources, tokenize
from jaxft.data.accounting import HELD_OUT_TAILS, num_rows_and_steps
from jaxft.data.dataset import PreparedData, prepare_data
from jaxft.distributed import multihost
from jaxft.errors import RequestError
from jaxft.hf import base_model, export, push, repo
from jaxft.hf.repo import HFCheckpoint
from jaxft.hf.tokenizer import fingerprint, load_tokenizer
from jaxft.metrics.logger import OnStep
from jaxft.metrics.trackers import missing_packages
from jaxft.sharding.mesh import make_mesh
from jaxft.training import optimizer
from jaxft.training.workdir import check_not_an_input
from jaxft.utils.console import ProgressBar
from jaxft.utils.logger import log
from jaxft.utils.types import Json
from jaxft.utils.units import format_count

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRequest:
  """The arguments of `jaxft.finetune`."""

  config: Config
  workdir: Path
  strict: bool = False  # a damaged checkpoint raises
  allow_change: bool = False  # a run may resume with changed settings
  overwrite: bool = False  # an old run in the workdir is moved aside
  on_step: OnStep | None = None  # called after each train step

  @property
  def export_dir(self) -> Path:
    """The Hugging Face folder that the run exports to."""
    return export_dir(self.config, self.workdir)

  @property
  def input_paths(self) -> list[Path]:
    """The files and folders that the settings name."""
    data = self.config.data
    model = self.config.model
    names = [sources.parse_weight(name)[0] for name in data.train]
    names += [*data.validation, *data.unrelated]
    names += [model.path, model.config, model.tokenizer, data.cache_dir]
    return [Path(name) for name in names if name and not name.startswith("hub:")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunInputs:
  """The inputs of a run. Weights are not read yet, except for their fingerprint."""

  mesh: Mesh
  source: HFCheckpoint  # the base model
  tokenizer: "PreTrainedTokenizerFast"
  data: PreparedData
  weights_fingerprint: str  # of the base model; "" for random weights
  total_rows: int  # over all steps
  total_steps: int

  @property
  def device(self) -> jax.Device:
    """The first device of this process."""
    return self.mesh.local_devices[0]

  @property
  def model_type(self) -> str:
    """The architecture in config.json, such as "gpt2"."""
    return self.source.hf_config["model_type"]


def export_dir(config: Config, workdir: Path) -> Path:
  """Return the folder of the export: `export.out`, or WORKDIR/export."""
  return Path(config.export.out) if config.export.out else workdir / "export"


def validate_run(config: Config, workdir: Path, overwrite: bool = False) -> None:
  """Raise RequestError with all errors that can be found without building the run."""
  lines: list[str] = []
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
      f"config.export.out={str(out)!r}: the run itself is written there; name a separate folder"
    )
  path = config.model.path
  if path and repo.is_local(path) and Path(path).resolve() == run_path:
    lines.append(
      f"--workdir: {str(workdir)!r} is config.model.path, and the run would overwrite its "
      "config.json; name another folder"
    )
  elif export.is_hf_model(workdir) and not overwrite:
    lines.append(
      f"--workdir: {str(workdir)!r} has the config.json of a model, and the run would overwrite "
      "it; name another folder, or pass --overwrite_output_dir to move this one aside"
    )
  if config.export.push_to_hub:
    lines += [f"config.export.{line}" for line in push.validate_push(config.export.push_to_hub)]
  lines += sources.validate_sources(config.data)
  lines += missing_packages(config.tracking)
  if not lines:  # last, because it imports transformers, which takes seconds
    needs_weights = config.model.init == "pretrained"
    lines += repo.validate_model(config.model.path, needs_weights, config.model.torch_bin)
  if lines:
    raise RequestError("\n".join(lines))


def load_inputs(request: RunRequest) -> RunInputs:
  """Read the base model's config, the tokenizer and the data.

  Raises:
    RequestError: an input cannot be used, or the processes have read different inputs.
  """
  config = request.config
  mesh = make_mesh(config.mesh)
  axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
  log(f"{mesh.size} x {mesh.local_devices[0].device_kind}, mesh {axes}")
  base, tokenizer = _load_base_model(request)
  data, source = _load_data(config, base, tokenizer)
  export.check_exportable(source, tokenizer)
  weights_fingerprint = ""
  if config.model.init == "pretrained":
    whole = has_frozen(config) or jax.process_count() > 1
    weights_fingerprint = repo.fingerprint(source, whole=whole)
  facts = {
    "the tokens of config.data": data.fingerprint,
    "its validation text": data.validation_fingerprint,
    "config.data.unrelated": data.unrelated_fingerprint,
    "the files of config.model.path": weights_fingerprint,
  }
  facts |= {f"config.json of the model: {key}": it for key, it in source.hf_config.items()}
  multihost.assert_all_equal("data", facts)
  total_rows, total_steps = num_rows_and_steps(data.train, config.train)
  if total_steps > (limit := jaxft.config.MAX_INT):
    raise RequestError(f"config.train.epochs={config.train.epochs}: more than {limit:,} steps")
  for line in small_data_warnings(config, data, total_steps):
    log(line)
  summary = _data_summary(data.report, len(data.train))
  log(f"{summary}; {format_count(total_steps, 'step')}")
  return RunInputs(
    mesh=mesh,
    source=source,
    tokenizer=tokenizer,
    data=data,
    weights_fingerprint=weights_fingerprint,
    total_rows=total_rows,
    total_steps=total_steps,
  )


def has_frozen(config: Config) -> bool:
  """Return whether some weights are not trained."""
  return bool(config.lora.rank or config.train.trainable_params)


def _load_base_model(request: RunRequest) -> "tuple[HFCheckpoint, PreTrainedTokenizerFast]":
  """Read config and tokenizer, and check lengths against the model's positions."""
  config = request.config
  source = base_model.resolve(config.model)
  P = source.cfg.P  # positions
  if request.overwrite:  # adapters name another folder, their base model
    check_not_an_input(request.workdir, [source.folder, source.tokenizer_folder])
  if source.adapter and config.lora.rank:
    raise RequestError(
      f"config.model.path={config.model.path!r} is a folder of adapters, and new adapters cannot "
      "be trained on top of them; merge them first: python -m jaxft.export --model "
      f"{config.model.path} --out MERGED"
    )
  if (length := config.data.sequence_length) > P:
    raise RequestError(
      f"config.data.sequence_length={length}: must be at most {P}, the model's positions"
    )
  tokenizer = load_tokenizer(source.tokenizer_folder, source.cfg.V)
  for prompt in config.train.sample_prompts:
    if (length := len(tokenize.encode_prompt(tokenizer, prompt))) >= P:
      raise RequestError(
        f"config.train.sample_prompts: {prompt[:40]!r}... has {length} tokens and the model "
        f"{P} positions; shorten it"
      )
  return source, tokenizer


def _load_data(
  config: Config, source: HFCheckpoint, tokenizer: "PreTrainedTokenizerFast"
) -> tuple[PreparedData, HFCheckpoint]:
  """Read all documents; for classification, add a head for the classes in the data."""
  with ProgressBar("tokenizing", 1) as progress:
    on_progress = lambda done, total: progress.update(done, total=total)
    data = prepare_data(config.data, tokenizer, fingerprint(tokenizer), on_progress, log)
  if data.labels:
    labels = ", ".join(map(str, data.labels[:20])) + ", ..." * (len(data.labels) > 20)
    log(f"{len(data.labels)} classes: {labels}")
    classifier = repo.with_class_head(source, data.labels, tokenizer)
    return data.with_class_ids(classifier.labels), classifier
  if source.cfg.classes:
    path = f"config.model.path={config.model.path!r}"
    raise RequestError(f"{path} has a classification head; set config.model.head=classification")
  return data, source


def small_data_warnings(config: Config, data: PreparedData, total_steps: int) -> list[str]:
  """Return a warning for each setting that the data is too small for.

  Raises:
    RequestError: a setting needs an eval loss, and no text is held out.
  """
  lines = []
  rows = len(data.train)
  train = config.train
  if rows < train.batch_size:
    lines.append(
      f"config.train.batch_size={train.batch_size}: the training text fills only "
      f"{format_count(rows, 'sequence')}, so each step uses all of it and masks the rest of the "
      "batch"
    )
  if config.optim.warmup_steps > total_steps:
    steps = optimizer.warmup_steps(config.optim, total_steps)
    lines.append(
      f"config.optim.warmup_steps={config.optim.warmup_steps}: more than the "
      f"{format_count(total_steps, 'step')} of the run; using {format_count(steps, 'step')}, a "
      "tenth of the run"
    )
  if not data.validation:
    for name in ("keep_best_metric", "early_stopping_patience"):
      if value := getattr(train, name):
        read = format_count(data.report["rows"]["read"], "row")
        raise RequestError(
          f"config.train.{name}={value!r} needs held-out text, and the data ({read}) has too "
          "little; name sources in config.data.validation"
        )
    lines.append(
      "no text is held out, so this run has no eval loss; to evaluate, name text in "
      "config.data.validation"
    )
  return lines


def _data_summary(report: Json, rows: int) -> str:
  """Summarize in one line how much text is trained on, held out and dropped."""
  documents = report["rows"]
  tokens = report["tokens"]
  held_out = format_count(documents["held_out"], "document")
  if tails := report["notes"].get(HELD_OUT_TAILS, 0):
    held_out = f"the ends of {format_count(tails, 'document')}"
  dropped = ", ".join(f"{reason}: {n:,}" for reason, n in documents["dropped"].items() if n)
  return (
    f"{format_count(documents['trained'], 'document')} with "
    f"{format_count(tokens['trained'], 'token')} to train on, in "
    f"{format_count(rows, 'sequence')} of {report['sequence_length']}; {held_out} with "
    f"{format_count(tokens['held_out'], 'token')} held out"
    + (f"; dropped: {dropped}" if dropped else "")
  )
