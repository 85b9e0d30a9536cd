"""A model to use: complete prompts, measure text, export. What the commands evaluate, generate and export are made of."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxft import config as settings
from jaxft import model, optim, sharding
from jaxft.data import loader, sources, tokens
from jaxft.data.pack import ConcatRows
from jaxft.errors import RequestError
from jaxft.hf import load as hf_load
from jaxft.hf import save
from jaxft.run.checkpoint import Checkpoints
from jaxft.sample import Generator, Sampling
from jaxft.step import State, make_eval_step, mean_loss


class Completion(NamedTuple):
  prompt: str
  text: str  # without the prompt
  token_ids: list[int]  # without the prompt and the end token


class Pretrained:
  """A checkpoint in memory, sharded over all devices."""

  def __init__(self, source: hf_load.Checkpoint, compute_dtype: str = "auto"):
    self.source = source
    self.tokenizer = tokens.load_tokenizer(source.folder, source.cfg.V)
    self.mesh = sharding.make_mesh(settings.default().mesh)
    dtype = model.compute_dtype(compute_dtype, self.mesh.devices.flat[0])
    self.graph, self.shapes, axes = model.abstract(
      source.cfg, model.Compute(dtype, constrain=sharding.constrain_on(self.mesh))
    )
    self.shardings = sharding.parameter_shardings(self.shapes, axes, self.mesh)
    self.params: Any = None  # set by load and load_workdir
    self._generator = Generator(self.graph, source.cfg, self.tokenizer.eos_token_id)
    self._eval_step = jax.jit(make_eval_step(self.graph, loss_chunk=128))

  def generate(self, prompts: list[str], **sampling: Any) -> list[Completion]:
    """Completes each prompt; `sampling` takes the fields of `jaxft.sample.Sampling`, whose names are transformers'."""
    ids = self._generator(
      self.params, [self.tokenizer(prompt)["input_ids"] for prompt in prompts], Sampling(**sampling)
    )
    return [Completion(prompt, self.tokenizer.decode(new), new) for prompt, new in zip(prompts, ids, strict=True)]

  def evaluate(
    self, *data: str, sequence_length: int = 0, batch_size: int = 8, text_column: str = "text"
  ) -> dict[str, Any]:
    """{"loss": nats per token, "perplexity", "tokens"} over all documents of the sources, end tokens included.

    The text is one stream cut into rows of `sequence_length` tokens (0: as many as the model has positions), each token
    weighs the same, and the batch size changes nothing but speed. Raises RequestError when there is nothing to read.
    """
    length = sequence_length or self.source.cfg.P
    if not 2 <= length <= self.source.cfg.P:
      raise RequestError(f"--sequence_length={length}: must be from 2 to {self.source.cfg.P}, the model's positions")
    if batch_size < 1:
      raise RequestError(f"--batch_size={batch_size}: must be at least 1")
    documents = list(sources.read(data, "validation", text_column))
    if not documents:
      raise RequestError(f"data source {data}: no documents in it")
    rows = ConcatRows(tokens.encode(documents, self.tokenizer)[0], length)
    whole_batches = -(-batch_size // self.mesh.size) * self.mesh.size
    loss, count = mean_loss(
      self._eval_step,
      self.params,
      loader.evaluation_batches(rows, batch_size=whole_batches, sharding=sharding.batch_sharding(self.mesh)),
    )
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": count}

  def export(
    self, out: str | Path, *, dtype: str = "float32", max_shard_size: str = "5GB", card: str = ""
  ) -> dict[str, Any]:
    """Writes a verified Hugging Face folder and returns its parity report; see `jaxft.hf.save.export`."""
    return save.export(Path(out), self.params, self.source, dtype=dtype, max_shard_size=max_shard_size, card=card)


def load(path_or_id: str | Path, revision: str = "main", compute_dtype: str = "auto") -> Pretrained:
  """The model of a Hugging Face folder or hub id, ready to use; raises RequestError when there is none to read."""
  ready = Pretrained(hf_load.find(str(path_or_id), revision), compute_dtype)
  ready.params = hf_load.load(ready.source, ready.shapes, ready.shardings)
  return ready


def load_workdir(workdir: str | Path, step: int | None = None, compute_dtype: str = "auto") -> Pretrained:
  """The model of a run's checkpoint, the newest or that of `step`; raises RequestError when the run has none."""
  workdir = Path(workdir)
  file = workdir / "config.json"
  if not file.is_file():
    raise RequestError(f"workdir {str(workdir)!r}: no config.json in it, so it is not a run's folder")
  config = settings.from_json(file.read_text(encoding="utf-8"))
  checkpoints = Checkpoints(workdir / "checkpoints", config.train.keep)
  steps = checkpoints.steps()
  if not steps or step is not None and step not in steps:
    raise RequestError(
      f"workdir {str(workdir)!r}: no checkpoint{'' if step is None else f' of step {step}'}; it has {steps or 'none'}"
    )
  source = hf_load.find(config.model.path, config.model.revision, weights=False)
  if config.model.config and config.model.init == "scratch":
    source = hf_load.Checkpoint(source.folder, *hf_load.read_config(Path(config.model.config)))
  ready = Pretrained(source, compute_dtype)
  tx = optim.optimizer(config.optim)
  like = State(*sharding.state_like(tx, ready.shapes, ready.shardings, ready.mesh))
  ready.params = checkpoints.restore(step or steps[-1], like).params
  checkpoints.close()
  return ready
