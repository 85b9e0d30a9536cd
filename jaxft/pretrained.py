"""A model to use: generate, evaluate, classify, export; what the commands of these names call."""

import collections
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

import jaxft.config
from jaxft import config_checks
from jaxft.checkpoint import manager
from jaxft.checkpoint.manager import PLACEHOLDER, CheckpointManager, CheckpointState
from jaxft.config import Config, DataSection, MeshSection
from jaxft.data import formats, loader, tokenize
from jaxft.data.dataset import build_dataset, prepare_data, read_examples
from jaxft.data.packing import LayoutDataset, SlidingWindowDataset
from jaxft.errors import RequestError
from jaxft.generation import generation_config
from jaxft.generation.sampler import Generator
from jaxft.hf import base_model, load_weights, repo, trainable_params
from jaxft.hf.card import model_card
from jaxft.hf.export import export_model, find_run_model
from jaxft.hf.export_tensors import EXPORT_DTYPES
from jaxft.hf.tokenizer import fingerprint, load_tokenizer
from jaxft.model import attention
from jaxft.model.compute import ComputeConfig, resolve_dtype
from jaxft.model.config import RUN_FIELDS, ModelConfig
from jaxft.model.decoder import Decoder, abstract_model, parameter_count
from jaxft.sharding import rules
from jaxft.sharding.mesh import make_mesh
from jaxft.training import offload, optimizer, trainable
from jaxft.training.eval_step import evaluate, make_eval_step
from jaxft.training.evaluator import bits_per_byte
from jaxft.training.init import merge_params
from jaxft.training.train_state import shardings_of
from jaxft.utils.backend import configure_jax, device_memory_bytes, require_device
from jaxft.utils.files import exists, is_encodable
from jaxft.utils.types import Json, Params


class Completion(NamedTuple):
  prompt: str
  text: str  # without the prompt
  token_ids: list[int]  # without the prompt and the end token


class Label(NamedTuple):
  label: str
  probabilities: dict[str, float]
  logits_C: np.ndarray  # float32, one of each class


class Pretrained:
  """A checkpoint in memory, sharded over all devices."""

  def __init__(self, source: repo.HFCheckpoint, compute_dtype: str = "auto", on_host: bool = False):
    configure_jax()
    require_device(None)
    self.source = source
    self.tokenizer = load_tokenizer(source.tokenizer_folder, source.cfg.V)
    self.mesh = make_mesh(MeshSection())
    device = self.mesh.devices.flat[0]
    dtype = resolve_dtype(compute_dtype, device)
    compute = ComputeConfig(
      dtype=dtype,
      mesh=self.mesh,
      attention=attention.fastest_kernel(device, dtype, source.cfg.H),
      vocab_multiple=rules.VOCAB_MULTIPLE,
      to_device=offload.to_device if on_host else lambda x: x,
    )
    self._on_host = on_host  # and a layer at a time on the device
    self.graph, self.shapes = self._abstract_model(source.cfg, compute)
    self.params: Params = {}  # set by load and load_workdir
    # The workdir and step that the weights are from; None: from `source`.
    self.run: tuple[Path, int] | None = None
    self._record: Json = {}  # of the checkpoint
    self._generator = Generator(self.graph, source.cfg, self.tokenizer.eos_token_id)

    def last_logits(params, ids_BT, last_B):
      decoder = nnx.merge(self.graph, params)
      return decoder.logits(decoder(ids_BT)[0][jnp.arange(len(last_B)), last_B])

    self._last_logits = jax.jit(last_logits)
    self._eval_step = jax.jit(make_eval_step(self.graph, loss_chunk=128))

  def trained_shapes(self, cfg: ModelConfig) -> Params:
    """Shapes of what a run of `cfg` trains, sharded as the weights of this model are."""
    compute = ComputeConfig(vocab_multiple=rules.VOCAB_MULTIPLE)
    return trainable.partition(self._abstract_model(cfg, compute)[1], cfg.trained)[0]

  def _abstract_model(
    self, cfg: ModelConfig, compute: ComputeConfig
  ) -> tuple[nnx.GraphDef[Decoder], Params]:
    graph, shapes, axes = abstract_model(cfg, compute)
    shardings = rules.tree_shardings("parameters", shapes, axes, self.mesh)
    shapes = rules.with_shardings(shapes, shardings)
    return graph, offload.with_host_memory(shapes) if self._on_host else shapes

  def generate(
    self,
    prompts: list[str],
    *,
    stop_strings: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
    **sampling: float,
  ) -> list[Completion]:
    """Completes each prompt, `num_return_sequences` times.

    `sampling` takes the fields of `jaxft.generation.sampling_config.Sampling`, whose names are
    transformers', and `do_sample`. What is not given is as the model's generation_config.json says.

    `max_new_tokens` counts, and not `max_length`, where both are given, as in transformers; so does
    `min_new_tokens`, and not `min_length`.

    Args:
      stop_strings: a text ends when one of these is in it, with the token that makes it so.
      on_text: gets the number of a completion and what was added to its text, as it comes.
    """
    if self.source.cfg.classes:
      raise RequestError(
        f"{self.source.folder}: a model with a classification head writes no text; `classify` "
        "labels it"
      )
    config = generation_config.load(self.source.folder, sampling)
    if stop_strings and config.sampling.num_beams > 1:
      raise RequestError(f"--stop_strings={list(stop_strings)}: beams end at the end token alone")
    if isinstance(prompts, str):
      raise RequestError(f"prompts={prompts!r}: give a list of texts")
    for prompt in prompts:
      if not is_encodable(prompt):
        raise RequestError(f"prompt {prompt!r}: not valid text (UTF-8)")
    streamer = generation_config.TextStreamer(self.tokenizer, stop_strings, on_text)
    prompt_ids = [tokenize.encode_prompt(self.tokenizer, prompt) for prompt in prompts]
    try:
      token_ids = self._generator(
        self.params, prompt_ids, config.sampling, stop_ids=config.stop_ids, on_token=streamer
      )
    except RequestError as error:
      raise config.with_context(error) from error
    repeated = [prompt for prompt in prompts for _ in range(config.sampling.num_return_sequences)]
    completions = [
      Completion(prompt, str(self.tokenizer.decode(ids)), ids)
      for prompt, ids in zip(repeated, token_ids, strict=True)
    ]
    for i, completion in enumerate(completions):
      streamer.flush(i, completion.text)
    return completions

  def evaluate(
    self,
    *data: str | Path,
    sequence_length: int = 0,
    batch_size: int = 8,
    stride: int = 0,
    like: DataSection | ConfigDict | None = None,
    **settings_of_data: Any,
  ) -> Json:
    """Evaluates all rows of the sources, end tokens included.

    Returns {"loss": nats per token, "perplexity", "tokens", "bits_per_byte"}. The text is one
    stream cut into rows of `sequence_length` tokens (0: as many as the model has positions), each
    token weighs the same, and the batch size changes nothing but speed. Bits per byte, of the UTF-8
    bytes that the target tokens stand for, compare models of different tokenizers; they are left
    out where a tokenizer does not work on bytes.

    Of a classifier: {"loss": nats per text, "perplexity", "tokens": texts, "accuracy", "f1",
    "confusion": {label: {predicted label: texts}}}, of rows with a text and a label; f1 is that of
    the second of two classes, or the mean of more. Raises RequestError when there is nothing to
    read.

    Args:
      stride: rows of the stream that overlap, this many tokens apart, as transformers' page on
        perplexity has them: each token counts once, and sees at least sequence_length - stride
        tokens before it. It takes sequence_length / stride as long.
      like: the `data` section of a run, whose format and layout are then used.
      settings_of_data: settings of that section by name, such as text_column.
    """
    length = sequence_length or self.source.cfg.P
    if not 2 <= length <= self.source.cfg.P:
      raise RequestError(
        f"--sequence_length={length}: must be from 2 to {self.source.cfg.P}, the model's positions"
      )
    if batch_size < 1:
      raise RequestError(f"--batch_size={batch_size}: must be at least 1")
    if not isinstance(like, DataSection):
      like = DataSection(**like.to_dict()) if like else DataSection()
    changes = settings_of_data | {"sequence_length": length}
    if "text_column" in changes or changes.get("format", like.format) != like.format:
      changes.setdefault("template", formats.DEFAULT_TEMPLATE)
    if self.source.cfg.classes:
      changes["format"] = "classification"
    self._check_stride(stride, length)
    layout = changes.get("layout", like.layout)
    if stride and layout != "concat":
      if "layout" in settings_of_data:
        raise RequestError(
          f"--stride={stride}: its rows overlap in one stream, --layout=concat, not {layout}"
        )
      changes["layout"] = "concat"
    config = dataclasses.replace(like, **changes)
    names = tuple(map(str, data))
    unused = collections.Counter()  # nobody asks what was counted
    examples = read_examples(names, "validation", config, unused, unused, _print_stderr)
    text = tokenize.encode_in_memory(examples, self.tokenizer, self.labels)
    if not len(text):
      raise RequestError(f"data source {names}: no rows in it")
    rows = build_dataset(text, config, self.tokenizer.eos_token_id)
    if not len(rows):
      raise RequestError(
        f"data source {names}: its rows leave nothing to predict in rows of {length} tokens"
      )
    return self._evaluate(rows, batch_size, stride)

  def evaluate_held_out(
    self, *, sequence_length: int = 0, batch_size: int = 8, stride: int = 0
  ) -> Json:
    """Evaluates all that the run of these weights has held out, made or cached as the run has.

    Raises RequestError for weights that are no run's, and where the text is not what it was.
    """
    if not self.run:
      raise RequestError(f"{self.source.folder}: no run, so nothing was held out; name a text")
    workdir = self.run[0]
    config = jaxft.config.load_run_config(workdir / "config.json").data
    config = dataclasses.replace(_resolve_sources(config, workdir, self._record), unrelated=())
    self._check_stride(stride, sequence_length or config.sequence_length)
    tokenizer_fingerprint = fingerprint(self.tokenizer)
    data = prepare_data(config, self.tokenizer, tokenizer_fingerprint)
    if "held_out" in self._record:
      is_same = data.validation_fingerprint == self._record["held_out"]
    else:  # a run of before 2026-11-28
      is_same = data.fingerprint == self._record["data"]
    if not is_same:
      raise RequestError(
        f"{workdir}: the text of config.data is not what it was, and what is held out of it now "
        "may have been trained on; name a text with --data"
      )
    if sequence_length:
      config = dataclasses.replace(config, sequence_length=sequence_length)
      data = prepare_data(config, self.tokenizer, tokenizer_fingerprint)
    if data.validation and self.labels:
      data = data.with_class_ids(self.labels)
    if not data.validation:
      raise RequestError(f"{workdir}: the run held nothing out; name a text with --data")
    return self._evaluate(data.validation, batch_size, stride)

  def _check_stride(self, stride: int, length: int) -> None:
    if stride and self.labels:
      raise RequestError(f"--stride={stride}: a model that classifies reads each text once")
    if stride and not 1 <= stride < length:
      raise RequestError(
        f"--stride={stride}: must be from 1 to {length - 1}, below the {length} tokens of a row"
      )

  def _evaluate(self, rows: LayoutDataset, batch_size: int, stride: int) -> Json:
    eos_id = self.tokenizer.eos_token_id
    sequences = rows
    if stride:
      sequences = SlidingWindowDataset(rows.tokens, rows.seq_len, eos_id=eos_id, stride=stride)
    size = rules.data_parallel_size(self.mesh)
    batch_size = -(-batch_size // size) * size  # devices take equal shares
    sharding = rules.batch_sharding(self.mesh)
    batches = loader.eval_batches(sequences, batch_size=batch_size, sharding=sharding)
    result = evaluate(self._eval_step, self.params, batches)
    metrics = {"loss": result.loss, "perplexity": result.perplexity, "tokens": result.tokens}
    if result.confusion_CC is not None:
      counts = [dict(zip(self.labels, row, strict=True)) for row in result.confusion_CC.tolist()]
      confusion = dict(zip(self.labels, counts, strict=True))
      return metrics | {"accuracy": result.accuracy, "f1": result.f1, "confusion": confusion}
    if nbytes := tokenize.target_bytes(sequences, self.tokenizer):
      metrics["bits_per_byte"] = bits_per_byte(result.loss, result.tokens, nbytes)
    return metrics

  @property
  def labels(self) -> list[str]:
    """Names of the classes, in the order of their numbers; [] for a language model."""
    return self.source.labels

  def classify(self, texts: list[str], batch_size: int = 8) -> list[Label]:
    """Predicts the class of each text, by a model with a classification head.

    Texts are read up to the model's positions. Raises RequestError for a model without such a head.
    """
    cfg = self.source.cfg
    if not cfg.classes:
      raise RequestError(f"{self.source.folder}: a language model has no classes to choose from")
    ids = [tokenize.encode_text(self.tokenizer, text)[: cfg.P] for text in texts]
    labels = []
    for start in range(0, len(ids), batch_size):
      batch = ids[start : start + batch_size]
      T = max(map(len, batch))
      ids_BT = np.array([row + [0] * (T - len(row)) for row in batch], np.int32)
      last_B = np.array([len(row) - 1 for row in batch], np.int32)
      for logits_C in np.asarray(self._last_logits(self.params, ids_BT, last_B)):
        exp_C = np.exp(logits_C - logits_C.max())
        probabilities = dict(zip(self.labels, map(float, exp_C / exp_C.sum()), strict=True))
        labels.append(Label(self.labels[int(logits_C.argmax())], probabilities, logits_C))
    return labels

  def export(
    self, out: str | Path, *, dtype: str | None = None, max_shard_size: str = "5GB", card: str = ""
  ) -> Json:
    """Writes a verified Hugging Face folder, as `jaxft.hf.export.export_model`; returns its parity.

    Args:
      dtype: None: float32 for a run's weights, and for those of a checkpoint the dtype that each is
        stored in, so that nothing is rounded. "source", of a run: what each has in the model that
        the run began with.
      card: "": the facts of the run, or the checkpoint's own card.
    """
    if self.run and not card:
      card = model_card(*self.run, bool(self._record.get("local_model", True)))
    dtype = dtype or ("float32" if self.run else "source")
    if dtype not in (*EXPORT_DTYPES, "source"):
      raise RequestError(f"dtype={dtype!r}: must be one of {', '.join(EXPORT_DTYPES)}, source")
    if expected := config_checks.file_size(max_shard_size):
      raise RequestError(f"max_shard_size={max_shard_size!r}: must be {expected}")
    return export_model(
      Path(out),
      self.params,
      self.source,
      dtype=dtype,
      max_shard_size=max_shard_size,
      card=card,
      tokenizer=self.tokenizer,
      stored=self._base_model(self.run[0]) if self.run and dtype == "source" else None,
    )

  def _base_model(self, workdir: Path) -> repo.HFCheckpoint:
    """The model that the run began with; raises RequestError where there was or is none."""
    config = jaxft.config.load_run_config(workdir / "config.json")
    if config.model.init == "scratch":
      raise RequestError(
        f"dtype='source': the run began with new weights; name one of {', '.join(EXPORT_DTYPES)}"
      )
    return _base_model(config, workdir, self._record)


def load(
  path_or_id: str | Path,
  revision: str = "main",
  compute_dtype: str = "auto",
  torch_bin: bool = False,
) -> Pretrained:
  """Loads the model of a Hugging Face folder or hub id; raises RequestError when it has none.

  torch_bin: also from pytorch_model*.bin, where there is nothing else, by torch (weights_only).
  """
  source = repo.resolve(str(path_or_id), revision, torch_bin=torch_bin)
  model = Pretrained(source, compute_dtype)
  model.params = load_weights.load_params(source, model.shapes, shardings_of(model.shapes))
  return model


def load_workdir(
  workdir: str | Path, step: int | None = None, compute_dtype: str = "auto"
) -> Pretrained:
  """Loads a run's checkpoint: of `step`, else the best of a run that keeps it, else the newest.

  Raises RequestError when the run has none.
  """
  configure_jax()  # before a checkpoint asks for devices
  workdir = Path(workdir)
  file = workdir / "config.json"
  if not file.is_file():
    raise RequestError(
      f"workdir {str(workdir)!r}: no config.json in it, so it is not a run's folder"
    )
  if lines := manager.validate_path(workdir / "checkpoints"):
    raise RequestError("\n".join(lines))
  config = jaxft.config.load_run_config(file)
  checkpoints = CheckpointManager(
    workdir / "checkpoints", best_metric=config.train.keep_best_metric
  )
  steps = checkpoints.steps()
  if not steps or step is not None and step not in steps:
    raise RequestError(
      f"workdir {str(workdir)!r}: no checkpoint{'' if step is None else f' of step {step}'}; it "
      f"has {steps or 'none'}"
    )
  if step is None:
    step = checkpoints.best_step() or steps[-1]
  record = checkpoints.metadata(step)
  source = _model_of_run(workdir, config, record)
  if record.get("frozen") and repo.fingerprint(source, whole=True) != record["frozen"]:
    raise RequestError(
      f"config.model.path={config.model.path!r}: its weights, of which the run of "
      f"{str(workdir)!r} has trained a part, are not what they were"
    )
  if record["labels"]:
    tokenizer = load_tokenizer(source.tokenizer_folder, source.cfg.V)
    source = repo.with_class_head(source, record["labels"], tokenizer)
  saved_config = jaxft.config.from_json(json.dumps(record["config"]))
  cfg = trainable_params.apply_config(source.cfg, saved_config, source.hf_config["model_type"])
  _check_model_config(cfg, source.folder / "config.json", record, workdir)
  # Where a part of it was trained, the whole in float32 may be more than the device holds.
  device = jax.local_devices()[0]
  fits = not cfg.trained or 5 * parameter_count(source.cfg) <= device_memory_bytes(device)
  model = Pretrained(source, compute_dtype, on_host=config.memory.offload == "all" or not fits)
  param_dtype = saved_config.model.param_dtype
  params = optimizer.with_param_dtype(param_dtype, model.trained_shapes(cfg), cfg.trained)
  init = optimizer.make_optimizer(config.optim).init
  not_read = (step, jax.eval_shape(init, params))
  step_like, opt_like = jax.tree.map(lambda _: PLACEHOLDER, not_read)
  like = CheckpointState(step=step_like, params=params, opt=opt_like)
  model.run = (workdir, step)
  model._record = record
  model.params = merge_params(checkpoints.restore(step, like).params, cfg, source, model.shapes)
  checkpoints.close()
  return model


def _check_model_config(cfg: ModelConfig, file: Path, record: Json, workdir: Path) -> None:
  """Raises RequestError where a run's model is not what it was when the run was started."""
  fields = json.loads(json.dumps(dataclasses.asdict(cfg)))
  for name, was in record.get("model", {}).items():
    is_checked = name not in RUN_FIELDS and not name.endswith("dropout")
    if is_checked and fields.get(name) != was:
      raise RequestError(
        f"{file}: {name} is {fields.get(name)!r}, and was {was!r} when the run of "
        f"{str(workdir)!r} was started"
      )


def _model_of_run(workdir: Path, config: Config, record: Json) -> repo.HFCheckpoint:
  """The model that a run trains: as the workdir has it, or its base model if a part is frozen."""
  folder = find_run_model(workdir)
  has_frozen = bool(config.lora.rank or config.train.trainable_params)
  if folder and not has_frozen:
    return repo.read_checkpoint(folder)
  source = _base_model(config, workdir, record, weights=has_frozen)
  if name := config.model.tokenizer:
    name = _resolve_path(name, workdir, record) if repo.is_local(name) else name
    source = source._replace(tokenizer=base_model.resolve_tokenizer(name))
  if config.model.init == "scratch":
    file = config.model.config and _resolve_path(config.model.config, workdir, record)
    model = dataclasses.replace(config.model, config=file)
    return base_model.scratch_checkpoint(model, source)
  return source


def _base_model(
  config: Config, workdir: Path, record: Json, weights: bool = True
) -> repo.HFCheckpoint:
  """Resolves `config.model.path`: a folder, if it was one, and never the hub's of its name."""
  model = config.model
  path = _resolve_path(model.path, workdir, record) if record.get("local_model") else model.path
  return repo.resolve(path, model.revision, weights=weights, torch_bin=model.torch_bin)


def _print_stderr(line: str) -> None:
  print(line, file=sys.stderr)


def _resolve_sources(data: DataSection, workdir: Path, record: Json) -> DataSection:
  """Resolves the sources of `config.data` from where the run was started, not from here."""

  def resolve(name: str) -> str:
    return name if name.startswith("hub:") else _resolve_path(name, workdir, record)

  cache = _resolve_path(data.cache_dir, workdir, record) if data.cache_dir else ""
  return dataclasses.replace(
    data,
    train=tuple(map(resolve, data.train)),
    validation=tuple(map(resolve, data.validation)),
    cache_dir=cache if cache and exists(Path(cache)) else "",
  )


def _resolve_path(path: str, workdir: Path, record: Json) -> str:
  """Resolves a path of a run's config.

  From the folder in which the run was started; beside the workdir, as far as it was then, where
  both have been moved; or from here.
  """
  original = moved = Path(record.get("started_in", "")) / path
  if "workdir" in record:
    moved = workdir.absolute() / os.path.relpath(original, record["workdir"])
  return str(next((it for it in (original, moved, Path(path)) if exists(it)), original))
