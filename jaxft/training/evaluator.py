"""What the weights of a run are worth while it goes on: the loss on held-out and on unrelated text, and what they write."""

from typing import Any

from ml_collections import ConfigDict

from jaxft.data import loader, memorization, tokenize
from jaxft.data.dataset import PreparedData
from jaxft.data.packing import TokenDataset
from jaxft.generation.sampler import Generator
from jaxft.generation.sampling import Sampling
from jaxft.metrics.reporter import Reporter
from jaxft.training.build import TrainProgram
from jaxft.training.eval_step import EvalResult, evaluate


class Evaluator:
  """Evaluates and samples, and has the reporter tell it."""

  def __init__(
    self,
    config: ConfigDict,
    program: TrainProgram,
    eval_step: Any,
    generator: Generator,
    data: PreparedData,
    tokenizer: Any,
    reporter: Reporter,
  ):
    """`eval_step`: compiled for `program.eval_batch`."""
    self._config, self._program, self._eval_step, self._generator = (
      config.train,
      program,
      eval_step,
      generator,
    )
    self._data, self._tokenizer, self._reporter = data, tokenizer, reporter
    limit = config.train.eval_batches * program.eval_rows
    known = data.validation and not data.labels
    self._held_out_bytes = tokenize.target_bytes(data.validation, tokenizer, limit) if known else 0

  def evaluate(self, weights: Any, step: int, when: str) -> dict[str, float]:
    """What of it goes into metrics.jsonl, {} where nothing is held out; raises NumericsError when the loss is not finite."""
    unrelated = self._evaluation(weights, self._data.unrelated) if self._data.unrelated else None
    if not self._data.validation:
      if unrelated:
        self._reporter.log_unrelated(step, when, unrelated)
      return {}
    held_out = self._evaluation(weights, self._data.validation)
    return self._reporter.log_eval(step, when, held_out, self._held_out_bytes, unrelated)

  def _evaluation(self, weights: Any, rows: TokenDataset) -> EvalResult:
    at_once, sharding = self._program.eval_rows, self._program.batch_sharding
    batches = loader.eval_batches(
      rows, batch_size=at_once, limit=self._config.eval_batches, sharding=sharding
    )
    return evaluate(self._eval_step, weights, batches)

  def sample(self, weights: Any, step: int, when: str) -> None:
    prompts, seed = list(self._config.sample_prompts), self._config.seed
    if not prompts:
      return  # without a look through the training text
    sampling = Sampling(self._config.sample_tokens, temperature=0.8, top_k=0, top_p=0.95, seed=seed)
    found = self._generator(
      weights, [tokenize.encode_prompt(self._tokenizer, prompt) for prompt in prompts], sampling
    )
    known = memorization.ngram_overlap(found, self._data.train.tokens.ids)
    for prompt, ids, share in zip(prompts, found, known, strict=True):
      self._reporter.log_sample(step, when, prompt, self._tokenizer.decode(ids), share)
