"""Evaluation during a run: loss on held-out and unrelated text, and samples."""

import math

from jaxft.data import loader, memorization, tokenize
from jaxft.data.packing import TokenDataset
from jaxft.errors import NumericsError
from jaxft.generation.sampler import Generator
from jaxft.generation.sampling_config import Sampling
from jaxft.metrics.logger import MetricsLogger, json_float
from jaxft.metrics.sinks import JsonlLog
from jaxft.training.eval_step import EvalResult, EvalStepFn, evaluate
from jaxft.training.stages import BuiltRun
from jaxft.utils.types import Json, Params


class Evaluator:
  """Evaluates the model, generates samples, and logs both."""

  def __init__(
    self, run: BuiltRun, eval_step: EvalStepFn, logger: MetricsLogger, history: JsonlLog
  ):
    """Prepare the evaluation of a run.

    Args:
      run: the built run.
      eval_step: the compiled eval step of the run.
      logger: writes the metrics and the samples.
      history: entries of metrics.jsonl, which `logger` writes.
    """
    self._train = run.config.train
    self._program = run.program
    self._eval_step = eval_step
    self._data = data = run.inputs.data
    self._tokenizer = run.inputs.tokenizer
    self._generator = Generator(run.program.graph, run.cfg, self._tokenizer.eos_token_id)
    self._logger = logger
    self._history = history
    limit = self._train.eval_batches * run.program.eval_rows
    self._target_bytes = 0
    if data.validation and not data.labels:
      self._target_bytes = tokenize.target_bytes(data.validation, self._tokenizer, limit)

  def evaluate(self, params: Params, step: int, when: str) -> dict[str, float | str]:
    """Evaluate on held-out and unrelated text, and log the result.

    Args:
      params: all parameters of the model.
      step: step of the parameters.
      when: label of the log line, such as "before".

    Returns:
      The metrics, by their names in metrics.jsonl; {} if no text is held out.

    Raises:
      NumericsError: the loss is not finite.
    """
    unrelated = self._evaluate(params, self._data.unrelated) if self._data.unrelated else None
    if not self._data.validation:
      if unrelated:
        line = f"{when}: loss on unrelated text {unrelated.loss:.4f}"
        self._logger.write("metrics", step, _unrelated_metrics(unrelated), line)
      return {}
    result = self._evaluate(params, self._data.validation)
    if not math.isfinite(result.loss):
      problem = "the weights produce NaN or infinity on the held-out text"
      raise NumericsError(f"{when}: eval loss {result.loss}: {problem}")
    metrics = self._metrics(result) | (_unrelated_metrics(unrelated) if unrelated else {})
    details = f"perplexity {result.perplexity:.2f}"
    if result.confusion_CC is not None:
      details = f"accuracy {result.accuracy:.1%}, F1 {result.f1:.3f}"
    if unrelated:
      details += f"; loss on unrelated text {unrelated.loss:.4f}"
    entropy = ""
    floor = {}
    if self._data.entropy_floor is not None:
      entropy = f" (entropy floor {self._data.entropy_floor:.4f})"
      floor = {"eval/floor": self._data.entropy_floor}
    line = f"{when}: eval loss {result.loss:.4f}{entropy}, {details}"
    self._logger.write("metrics", step, metrics | floor, line)
    return metrics

  def _evaluate(self, params: Params, rows: TokenDataset) -> EvalResult:
    batches = loader.eval_batches(
      rows,
      batch_size=self._program.eval_rows,
      limit=self._train.eval_batches,
      sharding=self._program.batch_sharding,
    )
    return evaluate(self._eval_step, params, batches)

  def _metrics(self, result: EvalResult) -> dict[str, float | str]:
    """Return the metrics of the held-out text, by their names in metrics.jsonl."""
    metrics: dict[str, float | str]
    metrics = {"eval/loss": result.loss, "eval/perplexity": result.perplexity}
    if self._target_bytes:
      bits = bits_per_byte(result.loss, result.tokens, self._target_bytes)
      metrics["eval/bits_per_byte"] = bits
    if result.confusion_CC is not None:
      metrics |= {"eval/accuracy": result.accuracy, "eval/f1": result.f1}
    return metrics

  def sample(self, params: Params, step: int, when: str) -> None:
    """Complete the sample prompts, and log the results.

    Each entry has the share of the completion that occurs in the training text.
    """
    prompts = list(self._train.sample_prompts)
    if not prompts:
      return  # skips the search of the training text
    sampling = Sampling(
      max_new_tokens=self._train.sample_tokens,
      temperature=0.8,
      top_k=0,
      top_p=0.95,
      seed=self._train.seed,
    )
    prompt_ids = [tokenize.encode_prompt(self._tokenizer, prompt) for prompt in prompts]
    completions = self._generator(params, prompt_ids, sampling)
    # Share of 8-grams of tokens that occur in the training text; None for a shorter completion.
    shares = memorization.ngram_overlap(completions, self._data.train.tokens.ids)
    for prompt, ids, share in zip(prompts, completions, shares, strict=True):
      text = self._tokenizer.decode(ids)
      entry: Json = {"when": when, "prompt": prompt, "text": text, "seed": self._train.seed}
      if share is not None:
        entry["memorised_8grams"] = round(share, 4)
      line = f"  [{when}] {prompt}|{text}".replace("\n", "\n    ")
      self._logger.write("samples", step, entry, line)

  def evals_since_best(self) -> int:
    """Return the number of evaluations since the one with the lowest loss."""
    losses = self._history.values("eval/loss")
    return len(losses) - 1 - min(range(len(losses)), key=losses.__getitem__) if losses else 0

  def summary(self, step: int) -> str:
    """Return a line with the eval loss at the start and at `step`, and the floor."""
    if not self._data.validation:
      return "no eval loss: no text was held out"
    entries = [entry for entry in self._history.entries if entry["step"] <= step]
    losses = [entry["eval/loss"] for entry in entries if "eval/loss" in entry]
    if not losses:  # the run was finished, and metrics.jsonl was deleted
      return "no eval loss: metrics.jsonl is missing"
    floor = self._data.entropy_floor
    entropy = "" if floor is None else f"; entropy floor {floor:.4f}"
    change = f"{100 * (losses[-1] / losses[0] - 1):+.1f} %"
    return f"eval loss {losses[0]:.4f} -> {losses[-1]:.4f} ({change}){entropy}"


def _unrelated_metrics(result: EvalResult) -> dict[str, float | str]:
  perplexity = json_float(result.perplexity)
  return {"eval/unrelated_loss": json_float(result.loss), "eval/unrelated_perplexity": perplexity}


def bits_per_byte(loss: float, tokens: int, nbytes: int) -> float:
  """Convert a mean loss in nats per token to bits per byte of text.

  Args:
    loss: nats per token.
    tokens: number of tokens that the loss is averaged over.
    nbytes: bytes of the text of those tokens.
  """
  return loss * tokens / (math.log(2) * nbytes)
