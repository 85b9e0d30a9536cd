"""A model to use: complete prompts, measure text, export. What the commands evaluate, generate and export are made of."""

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
from jaxft.checkpoint.manager import PLACEHOLDER, CheckpointManager
from jaxft.data import formats, loader, tokenize
from jaxft.data.dataset import build_dataset, prepare_data, read_examples
from jaxft.data.packing import SlidingWindowDataset, TokenDataset
from jaxft.errors import RequestError
from jaxft.generation import generation_config
from jaxft.generation.sampler import Generator
from jaxft.hf import base_model, load_weights, repo, tokenizer, trainable_params
from jaxft.hf.card import model_card
from jaxft.hf.export import export_model, find_run_model
from jaxft.hf.export_tensors import EXPORT_DTYPES
from jaxft.metrics.reporter import bits_per_byte
from jaxft.model import attention
from jaxft.model.compute import ComputeConfig, resolve_dtype
from jaxft.model.config import RUN_FIELDS, ModelConfig
from jaxft.model.decoder import abstract_model, parameter_count
from jaxft.sharding import per_device, rules
from jaxft.sharding.mesh import make_mesh
from jaxft.training import offload, optimizer, trainable
from jaxft.training.eval_step import evaluate, make_eval_step
from jaxft.training.init import merge_params
from jaxft.training.train_state import CheckpointState
from jaxft.utils.backend import configure_jax, device_memory_bytes, require_device
from jaxft.utils.files import exists, is_encodable


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
    self.tokenizer = tokenizer.load_tokenizer(source.tokenizer_folder, source.cfg.V)
    self.mesh = make_mesh(jaxft.config.default().mesh)
    dtype = resolve_dtype(compute_dtype, self.mesh.devices.flat[0])
    compute = ComputeConfig(
      dtype,
      constrain=rules.make_constrain(self.mesh),
      gather=rules.make_gather(self.mesh),
      shard_rows=rules.make_shard_rows(self.mesh, 3, "parameters"),
      attention=attention.fastest_kernel(self.mesh.devices.flat[0], dtype, source.cfg.H),
      shard_map=per_device.make_shard_map(self.mesh),
      vocab_multiple=rules.VOCAB_MULTIPLE,
      to_device=offload.to_device if on_host else lambda x: x,
    )
    self._on_host = on_host  # and a layer at a time on the device
    self.graph, self.shapes = self._placed(source.cfg, compute)
    self.params: Any = None  # set by load and load_workdir
    self.run: tuple[Path, int] | None = (
      None  # the workdir and step that the weights are from; None: from `source`
    )
    self._record: dict[str, Any] = {}  # of the checkpoint
    self._generator = Generator(self.graph, source.cfg, self.tokenizer.eos_token_id)

    def scores(params, ids_BT, last_B):
      decoder = nnx.merge(self.graph, params)
      return decoder.logits(decoder(ids_BT)[jnp.arange(len(last_B)), last_B])

    self._scores = jax.jit(scores)
    self._eval_step = jax.jit(make_eval_step(self.graph, loss_chunk=128))

  def trained_shapes(self, cfg: ModelConfig) -> Any:
    """Shapes of what a run of `cfg` trains, placed as the weights of this model are."""
    return trainable.partition(
      self._placed(cfg, ComputeConfig(vocab_multiple=rules.VOCAB_MULTIPLE))[1], cfg.trained
    )[0]

  def _placed(self, cfg: ModelConfig, compute: ComputeConfig) -> tuple[nnx.GraphDef, Any]:
    graph, shapes, axes = abstract_model(cfg, compute)
    placed = rules.with_shardings(
      shapes, rules.tree_shardings("parameters", shapes, axes, self.mesh)
    )
    return graph, offload.with_host_memory(placed) if self._on_host else placed

  def generate(
    self,
    prompts: list[str],
    *,
    stop_strings: Sequence[str] = (),
    tell: Callable[[int, str], None] | None = None,
    **sampling: Any,
  ) -> list[Completion]:
    """Completes each prompt, `num_return_sequences` times; `sampling` takes the fields of `jaxft.generation.sampler.Sampling`, whose names
    are transformers', and `do_sample`. What is not given is as the model's generation_config.json says.

    `max_new_tokens` counts, and not `max_length`, where both are given, as in transformers; so does
    `min_new_tokens`, and not `min_length`.

    Args:
      stop_strings: a text ends when one of these is in it, with the token that makes it so.
      tell: gets the number of a completion and what was added to its text, as it comes.
    """
    self._must_write_text()
    config = generation_config.load(self.source.folder, sampling)
    if stop_strings and config.sampling.num_beams > 1:
      raise RequestError(f"--stop_strings={list(stop_strings)}: beams end at the end token alone")
    if isinstance(prompts, str):
      raise RequestError(f"prompts={prompts!r}: give a list of texts")
    for prompt in prompts:
      if not is_encodable(prompt):
        raise RequestError(f"prompt {prompt!r}: not valid text (UTF-8)")
    listener = generation_config.TextStreamer(self.tokenizer, stop_strings, tell)
    try:
      ids = self._generator(
        self.params,
        [tokenize.encode_prompt(self.tokenizer, prompt) for prompt in prompts],
        config.sampling,
        stop_ids=config.stop_ids,
        on_token=listener,
      )
    except RequestError as error:
      raise config.with_context(error) from error
    each = [prompt for prompt in prompts for _ in range(config.sampling.num_return_sequences)]
    found = [
      Completion(prompt, self.tokenizer.decode(new), new)
      for prompt, new in zip(each, ids, strict=True)
    ]
    for text, completion in enumerate(found):
      listener.flush(text, completion.text)
    return found

  def evaluate(
    self,
    *data: str | Path,
    sequence_length: int = 0,
    batch_size: int = 8,
    stride: int = 0,
    like: ConfigDict | None = None,
    **settings_of_data: Any,
  ) -> dict[str, Any]:
    """{"loss": nats per token, "perplexity", "tokens", "bits_per_byte"} over all rows of the sources, end tokens included.

    The text is one stream cut into rows of `sequence_length` tokens (0: as many as the model has positions), each token
    weighs the same, and the batch size changes nothing but speed. Bits per byte, of the UTF-8 bytes that the tokens learned
    stand for, compare models of different tokenizers; they are left out where a tokenizer does not work on bytes. Of a model
    that classifies: {"loss": nats per text, "perplexity", "tokens": texts, "accuracy", "f1", "confusion": {label: {what it was
    taken for: texts}}}, of rows with a text and a label;
    f1 is that of the second of two classes, or the mean of more. Raises RequestError when there is nothing to read.

    Args:
      stride: rows of the stream that overlap, this many tokens apart, as transformers' page on perplexity has them: each token
        counts once, and sees at least sequence_length - stride tokens before it. It takes sequence_length / stride as long.
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
    how = ConfigDict(like or jaxft.config.default().data)
    how.update(settings_of_data, sequence_length=length)
    if "text_column" in settings_of_data or how.format != (like or how).format:
      how.template = settings_of_data.get("template", formats.DEFAULT_TEMPLATE)
    if self.source.cfg.classes:
      how.format = "classification"
    self._must_overlap(stride, length)
    if stride and how.layout != "concat":
      if "layout" in settings_of_data:
        raise RequestError(
          f"--stride={stride}: its rows overlap in one stream, --layout=concat, not {how.layout}"
        )
      how.layout = "concat"
    nothing, data = collections.Counter(), tuple(map(str, data))
    text = tokenize.encode_in_memory(
      read_examples(data, "validation", how, nothing, nothing, _print_stderr),
      self.tokenizer,
      self.labels,
    )
    if not len(text):
      raise RequestError(f"data source {data}: no rows in it")
    rows = build_dataset(text, how, self.tokenizer.eos_token_id)
    if not len(rows):
      raise RequestError(
        f"data source {data}: its rows leave nothing to predict in rows of {length} tokens"
      )
    return self._evaluate(
      SlidingWindowDataset(text, length, self.tokenizer.eos_token_id, stride) if stride else rows,
      batch_size,
    )

  def evaluate_held_out(
    self, *, sequence_length: int = 0, batch_size: int = 8, stride: int = 0
  ) -> dict[str, Any]:
    """`evaluate` over what the run that the weights are from has held out: all rows of it, made or cached as the run has.

    Raises RequestError for weights that are no run's, and where the text is not what it was.
    """
    if not self.run:
      raise RequestError(f"{self.source.folder}: no run, so nothing was held out; name a text")
    how = _resolve_sources(
      jaxft.config.load_run_config(self.run[0] / "config.json").data, self.run[0], self._record
    )
    how.unrelated = ()
    self._must_overlap(stride, sequence_length or how.sequence_length)
    data = prepare_data(how, self.tokenizer, tokenizer.fingerprint(self.tokenizer))
    if "held_out" in self._record:
      same = data.validation_fingerprint == self._record["held_out"]
    else:  # a run of before 2026-11-28
      same = data.fingerprint == self._record["data"]
    if same and sequence_length:
      how.sequence_length = sequence_length
      data = prepare_data(how, self.tokenizer, tokenizer.fingerprint(self.tokenizer))
    if not same:
      raise RequestError(
        f"{self.run[0]}: the text of config.data is not what it was, and what is held out of it now may have been trained on; "
        "name a text with --data"
      )
    if not data.validation:
      raise RequestError(f"{self.run[0]}: the run held nothing out; name a text with --data")
    rows = data.with_class_ids(self.labels).validation if self.labels else data.validation
    if stride:
      rows = SlidingWindowDataset(
        rows.tokens, how.sequence_length, self.tokenizer.eos_token_id, stride
      )
    return self._evaluate(rows, batch_size)

  def _must_overlap(self, stride: int, length: int) -> None:
    if stride and self.labels:
      raise RequestError(f"--stride={stride}: a model that classifies reads each text once")
    if stride and not 1 <= stride < length:
      raise RequestError(
        f"--stride={stride}: must be from 1 to {length - 1}, below the {length} tokens of a row"
      )

  def _evaluate(self, rows: TokenDataset, batch_size: int) -> dict[str, Any]:
    parts = rules.data_parallel_size(self.mesh)
    whole_batches = -(-batch_size // parts) * parts
    found = evaluate(
      self._eval_step,
      self.params,
      loader.eval_batches(rows, batch_size=whole_batches, sharding=rules.batch_sharding(self.mesh)),
    )
    told = {"loss": found.loss, "perplexity": found.perplexity, "tokens": found.tokens}
    if found.confusion_CC is not None:
      confusion = {
        name: dict(zip(self.labels, row, strict=True))
        for name, row in zip(self.labels, found.confusion_CC.tolist(), strict=True)
      }
      return told | {"accuracy": found.accuracy, "f1": found.f1, "confusion": confusion}
    nbytes = tokenize.target_bytes(rows, self.tokenizer)
    return told | (
      {"bits_per_byte": bits_per_byte(found.loss, found.tokens, nbytes)} if nbytes else {}
    )

  @property
  def labels(self) -> list[str]:
    """Names of the classes, in the order of their numbers; [] for a language model."""
    return self.source.labels

  def classify(self, texts: list[str], batch_size: int = 8) -> list[Label]:
    """The likeliest class of each text, by a model with a classification head; texts are read up to the model's positions.

    Raises RequestError for a model without one.
    """
    cfg = self.source.cfg
    if not cfg.classes:
      raise RequestError(f"{self.source.folder}: a language model has no classes to choose from")
    ids = [tokenize.encode_text(self.tokenizer, text)[: cfg.P] for text in texts]
    labels = []
    for start in range(0, len(ids), batch_size):
      part = ids[start : start + batch_size]
      T = max(len(row) for row in part)
      ids_BT = np.array([row + [0] * (T - len(row)) for row in part], np.int32)
      logits_BC = self._scores(
        self.params, ids_BT, np.array([len(row) - 1 for row in part], np.int32)
      )
      for logits_C in np.asarray(logits_BC):
        winner, odds_C = int(logits_C.argmax()), np.exp(logits_C - logits_C.max())
        probabilities = {
          name: float(p) for name, p in zip(self.labels, odds_C / odds_C.sum(), strict=True)
        }
        labels.append(Label(self.labels[winner], probabilities, logits_C))
    return labels

  def export(
    self, out: str | Path, *, dtype: str | None = None, max_shard_size: str = "5GB", card: str = ""
  ) -> dict[str, Any]:
    """Writes a verified Hugging Face folder and returns its parity report; see `jaxft.hf.export.export_model`.

    dtype None: float32 for a run's weights, and for those of a checkpoint the dtype that each is stored in, so that nothing is
    rounded. dtype "source", of a run: what each has in the model that the run began with. card "": the facts of the run, or the
    checkpoint's own card.
    """
    if self.run and not card:
      card = model_card(*self.run, bool(self._record.get("local_model", True)))
    dtype = dtype or ("float32" if self.run else "source")
    if dtype not in (*EXPORT_DTYPES, "source"):
      raise RequestError(f"dtype={dtype!r}: must be one of {', '.join(EXPORT_DTYPES)}, source")
    if wanted := config_checks.file_size(max_shard_size):
      raise RequestError(f"max_shard_size={max_shard_size!r}: must be {wanted}")
    return export_model(
      Path(out),
      self.params,
      self.source,
      dtype=dtype,
      max_shard_size=max_shard_size,
      card=card,
      tokenizer=self.tokenizer,
      stored=self._begun_with() if self.run and dtype == "source" else None,
    )

  def _begun_with(self) -> repo.HFCheckpoint:
    """The model that the run of these weights began with; raises RequestError where there was none, or is none any more."""
    config = jaxft.config.load_run_config(self.run[0] / "config.json")
    if config.model.init == "scratch":
      raise RequestError(
        f"dtype='source': the run began with new weights; name one of {', '.join(EXPORT_DTYPES)}"
      )
    return _base_model(config, self.run[0], self._record)

  def _must_write_text(self) -> None:
    if self.source.cfg.classes:
      raise RequestError(
        f"{self.source.folder}: a model with a classification head writes no text; `classify` labels it"
      )


def load(
  path_or_id: str | Path,
  revision: str = "main",
  compute_dtype: str = "auto",
  torch_bin: bool = False,
) -> Pretrained:
  """The model of a Hugging Face folder or hub id, ready to use; raises RequestError when there is none to read.

  torch_bin: also where it has nothing but pytorch_model*.bin, which torch then reads (weights_only).
  """
  ready = Pretrained(repo.resolve(str(path_or_id), revision, torch_bin=torch_bin), compute_dtype)
  ready.params = load_weights.load_params(
    ready.source, ready.shapes, jax.tree.map(lambda leaf: leaf.sharding, ready.shapes)
  )
  return ready


def load_workdir(
  workdir: str | Path, step: int | None = None, compute_dtype: str = "auto"
) -> Pretrained:
  """The model of a run's checkpoint: that of `step`, else the best of a run that keeps it, else the newest.

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
      f"workdir {str(workdir)!r}: no checkpoint{'' if step is None else f' of step {step}'}; it has {steps or 'none'}"
    )
  at = step if step is not None else checkpoints.best_step() or steps[-1]
  meta = checkpoints.metadata(at)
  source = _model_of_run(workdir, config, meta)
  if meta.get("frozen") and repo.fingerprint(source, whole=True) != meta["frozen"]:
    raise RequestError(
      f"config.model.path={config.model.path!r}: its weights, of which the run of {str(workdir)!r} has trained a part, are not "
      "what they were"
    )
  if meta["labels"]:
    source = repo.with_class_head(
      source, meta["labels"], tokenizer.load_tokenizer(source.tokenizer_folder, source.cfg.V)
    )
  trained_as = jaxft.config.from_json(json.dumps(meta["config"]))
  cfg = trainable_params.apply_config(source.cfg, trained_as, source.hf_config["model_type"])
  now, was = json.loads(json.dumps(dataclasses.asdict(cfg))), meta.get("model", {})
  if other := [
    name
    for name in was
    if now.get(name) != was[name] and name not in RUN_FIELDS and not name.endswith("dropout")
  ]:
    raise RequestError(
      f"{source.folder / 'config.json'}: {other[0]} is {now.get(other[0])!r}, and was {was[other[0]]!r} "
      f"when the run of {str(workdir)!r} was started"
    )
  # Where a part of it was trained, the whole in float32 may be more than the device holds.
  too_large = bool(cfg.trained) and 5 * parameter_count(source.cfg) > device_memory_bytes(
    jax.local_devices()[0]
  )
  ready = Pretrained(source, compute_dtype, on_host=config.memory.offload == "all" or too_large)
  trained = optimizer.with_param_dtype(
    trained_as.model.param_dtype, ready.trained_shapes(cfg), cfg.trained
  )
  states = jax.eval_shape(optimizer.make_optimizer(config.optim).init, trained)
  unread = CheckpointState(PLACEHOLDER, trained, jax.tree.map(lambda _: PLACEHOLDER, states))
  ready.run, ready._record = (workdir, at), meta
  ready.params = merge_params(checkpoints.restore(at, unread).params, cfg, source, ready.shapes)
  checkpoints.close()
  return ready


def _model_of_run(workdir: Path, config: ConfigDict, record: dict[str, Any]) -> repo.HFCheckpoint:
  """The model that a run trains: what the workdir keeps of it, or the folder itself where some of the weights are frozen."""
  folder = find_run_model(workdir)
  if folder and not (config.lora.rank or config.train.only):
    return repo.HFCheckpoint(folder, *repo.read_config(folder / "config.json"))
  source = _base_model(config, workdir, record, weights=bool(config.lora.rank or config.train.only))
  if config.model.tokenizer:
    local = repo.is_local(config.model.tokenizer)
    name = (
      _resolve_path(config.model.tokenizer, workdir, record) if local else config.model.tokenizer
    )
    source = source._replace(tokenizer=base_model.resolve_tokenizer(name))
  if config.model.init == "scratch":
    named = ConfigDict(config.model.to_dict())
    named.config = _resolve_path(named.config, workdir, record) if named.config else ""
    found = base_model.scratch_config(named, source.hf_config, source.folder / "config.json")
    source = repo.HFCheckpoint(source.folder, *found, tokenizer=source.tokenizer)
  return source


def _base_model(
  config: ConfigDict, workdir: Path, record: dict[str, Any], weights: bool = True
) -> repo.HFCheckpoint:
  """What `config.model.path` names: a folder where the run was started, and then never the hub's model of that name."""
  path = (
    _resolve_path(config.model.path, workdir, record)
    if record.get("local_model")
    else config.model.path
  )
  return repo.resolve(
    path, config.model.revision, weights=weights, torch_bin=config.model.torch_bin
  )


def _print_stderr(line: str) -> None:
  print(line, file=sys.stderr)


def _resolve_sources(data: ConfigDict, workdir: Path, record: dict[str, Any]) -> ConfigDict:
  """`config.data` with the sources where they were when the run was started, wherever this command is."""
  found = ConfigDict(data)
  for key in ("train", "validation"):
    found[key] = tuple(
      name if name.startswith("hub:") else _resolve_path(name, workdir, record)
      for name in data[key]
    )
  cache = _resolve_path(data.cache_dir, workdir, record) if data.cache_dir else ""
  found.cache_dir = cache if cache and exists(Path(cache)) else ""
  return found


def _resolve_path(path: str, workdir: Path, record: dict[str, Any]) -> str:
  """Where a path of the config leads: from the folder in which the run was started; beside the workdir, as far as it was then,
  where both have been moved; or from here."""
  then = Path(record.get("started_in", "")) / path
  moved = (
    workdir.absolute() / os.path.relpath(then, record["workdir"]) if "workdir" in record else then
  )
  return str(next((found for found in (then, moved, Path(path)) if exists(found)), then))
