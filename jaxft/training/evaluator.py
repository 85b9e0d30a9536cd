"""Evaluation during a run: the loss on held-out and on unrelated text, and samples."""

from typing import Any

from jaxft.config import Config
from jaxft.data import loader, memorization, tokenize
from jaxft.data.dataset import PreparedData
from jaxft.data.packing import TokenDataset
from jaxft.generation.sampler import Generator
from jaxft.generation.sampling_config import Sampling
from jaxft.metrics.reporter import Reporter
from jaxft.training.build import TrainProgram
from jaxft.training.eval_step import EvalResult, evaluate


class Evaluator:
  """Evaluates and samples, and reports the results."""

  def __init__(
    self,
    config: Config,
    program: TrainProgram,
    eval_step: Any,
    generator: Generator,
    data: PreparedData,
    tokenizer: Any,
    reporter: Reporter,
  ):
    """`eval_step`: compiled for `program.eval_batch`."""
    self._config = config.train
    self._program = program
    self._eval_step = eval_step
    self._generator = generator
    self._data = data
    self._tokenizer = tokenizer
    self._reporter = reporter
    limit = config.train.eval_batches * program.eval_rows
    has_text = data.validation and not data.labels
    self._target_bytes = tokenize.target_bytes(data.validation, tokenizer, limit) if has_text else 0

  def evaluate(self, params: Any, step: int, when: str) -> dict[str, float]:
    """Returns the metrics of metrics.jsonl, {} where nothing is held out.

    Raises NumericsError when the loss is not finite.
    """
    unrelated = self._evaluate(params, self._data.unrelated) if self._data.unrelated else None
    if not self._data.validation:
      if unrelated:
        self._reporter.log_unrelated(step, when, unrelated)
      return {}
    result = self._evaluate(params, self._data.validation)
    return self._reporter.log_eval(step, when, result, self._target_bytes, unrelated)

  def _evaluate(self, params: Any, rows: TokenDataset) -> EvalResult:
    batches = loader.eval_batches(
      rows,
      batch_size=self._program.eval_rows,
      limit=self._config.eval_batches,
      sharding=self._program.batch_sharding,
    )
    return evaluate(self._eval_step, params, batches)

  def sample(self, params: Any, step: int, when: str) -> None:
    """Completes the prompts, and says how much of each completion is in the training text."""
    prompts = list(self._config.sample_prompts)
    if not prompts:
      return  # without a look through the training text
    sampling = Sampling(
      max_new_tokens=self._config.sample_tokens,
      temperature=0.8,
      top_k=0,
      top_p=0.95,
      seed=self._config.seed,
    )
    prompt_ids = [tokenize.encode_prompt(self._tokenizer, prompt) for prompt in prompts]
    completions = self._generator(params, prompt_ids, sampling)
    shares = memorization.ngram_overlap(completions, self._data.train.tokens.ids)
    for prompt, ids, share in zip(prompts, completions, shares, strict=True):
      self._reporter.log_sample(step, when, prompt, self._tokenizer.decode(ids), share)
