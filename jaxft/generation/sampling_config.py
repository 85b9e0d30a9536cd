"""Define and validate sampling settings.

This module does not import jax, so that --help stays fast. The filters are in
`logits_processors.py`, the loop in `sampler.py`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from jaxft.errors import RequestError
from jaxft.utils.types import Json

# Pairs of limits: of prompt and new tokens together, and of new tokens alone. If both are set, the
# second wins, as in transformers.
LENGTH_LIMITS = (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens"))
INF = float("inf")
Settings: TypeAlias = Mapping[str, Any]  # fields of `Sampling` by name, and perhaps `do_sample`


class Sampling(NamedTuple):
  """Sampling settings, with the names, meanings and defaults of transformers.

  One difference: temperature 0 is greedy decoding.
  """

  max_new_tokens: int = 100
  max_length: int = 0  # of prompt and new tokens, overriding `max_new_tokens`; 0: not used
  min_length: int = 0  # of prompt and new tokens: no stop token before
  min_new_tokens: int = 0  # no stop token before; above 0 it overrides `min_length`
  temperature: float = 1.0
  top_k: int = 50  # 0: all
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  no_repeat_ngram_size: int = 0  # 0: runs of tokens may be repeated
  num_beams: int = 1
  length_penalty: float = 1.0  # of beams: scores are divided by length to this power
  num_return_sequences: int = 1  # texts for each prompt
  seed: int = 0

  def for_jit(self) -> "Sampling":
    """Reset settings that are not compiled in, to avoid recompilation."""
    limits = dict.fromkeys((name for pair in LENGTH_LIMITS for name in pair), 0)
    is_drawn = float(self.temperature > 0)
    others = {"seed": 0, "length_penalty": 1.0, "num_return_sequences": 1}
    return self._replace(temperature=is_drawn, **others, **limits)

  def validate(self) -> None:
    """Check each value, and the combination.

    Raises:
      RequestError: a value is invalid, alone or together with others.
    """
    self.validate_values()
    limits = {name: getattr(self, name) for pair in LENGTH_LIMITS for name in pair}
    validate_lengths(limits | ({"max_new_tokens": 0} if self.max_length else {}))
    if self.num_beams > 1 and self.temperature:
      raise RequestError(
        f"--num_beams={self.num_beams}: beam search is deterministic; set --temperature=0"
      )
    if not self.temperature and self.num_return_sequences > self.num_beams:
      raise RequestError(
        f"--num_return_sequences={self.num_return_sequences}: --temperature=0 gives only "
        f"{self.num_beams} per prompt; set --temperature above 0, or --num_beams to this number"
      )

  def validate_values(self) -> None:
    """Check each value alone.

    Raises:
      RequestError: a value is invalid.
    """
    for name, is_valid, expected in (
      ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
      ("max_length", self.max_length >= 0, "0 (no such limit) or more"),
      ("min_length", self.min_length >= 0, "0 (no such limit) or more"),
      ("min_new_tokens", self.min_new_tokens >= 0, "0 (no such limit) or more"),
      ("temperature", 0 <= self.temperature < INF, "0 (greedy) or more"),
      ("top_k", self.top_k >= 0, "0 (all) or more"),
      ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
      ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
      ("repetition_penalty", 0 < self.repetition_penalty < INF, "above 0 (1: no penalty)"),
      ("num_beams", 1 <= self.num_beams <= 256, "from 1 to 256"),
      ("length_penalty", abs(self.length_penalty) < INF, "a finite number"),
      ("num_return_sequences", self.num_return_sequences >= 1, "at least 1"),
      ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 (no limit) or more"),
      ("seed", 0 <= self.seed < 2**32, "from 0 to 4294967295"),
    ):
      if not is_valid:
        raise RequestError(f"--{name}={getattr(self, name)}: must be {expected}")


def validate_lengths(limits: Mapping[str, int]) -> None:
  """Check minimum lengths against maximum lengths.

  Args:
    limits: limits by name; 0 or a missing name means no limit.

  Raises:
    RequestError: a minimum is above a maximum.
  """
  for minimum, maximum in (
    ("min_length", "max_length"),
    ("min_new_tokens", "max_new_tokens"),
    ("min_new_tokens", "max_length"),
  ):
    if 0 < limits.get(maximum, 0) < limits.get(minimum, 0):
      raise RequestError(
        f"--{minimum}={limits[minimum]}: more than --{maximum}={limits[maximum]} allows; lower the "
        "minimum or raise the maximum"
      )


def validate_do_sample(temperature: float | None, num_beams: int) -> None:
  """Check the settings that contradict do_sample=True.

  Args:
    temperature: None if it is not set.
    num_beams: beams per prompt.

  Raises:
    RequestError: beams are set, or the temperature is 0.
  """
  if num_beams > 1:
    raise RequestError(
      f"--do_sample=True: --num_beams={num_beams} is deterministic; set --do_sample=False or "
      "--num_beams=1"
    )
  if temperature == 0:
    raise RequestError(
      "--do_sample=True: --temperature=0.0 always takes the likeliest token; use only one of "
      "the two"
    )


def resolve_sampling(given: Settings) -> tuple[Json, list[str]]:
  """Drop settings that others override.

  Args:
    given: fields of `Sampling`, and perhaps `do_sample`. As in transformers, do_sample=False means
      temperature 0, and overrides any other temperature.

  Returns:
    The remaining settings, and a warning for each dropped one.

  Raises:
    RequestError: settings contradict each other.
  """
  settings = dict(given)
  warnings = []
  temperature = settings.get("temperature")
  if settings.get("do_sample"):
    validate_do_sample(temperature, settings.get("num_beams", 1))
  if settings.get("do_sample") is False:
    if temperature:
      warnings.append(
        f"--temperature={temperature}: ignored, because --do_sample=False always takes the "
        "likeliest token"
      )
    settings["temperature"] = 0.0
  for total, new in LENGTH_LIMITS:
    if new in settings and settings.get(total):
      dropped = settings.pop(total)
      warnings.append(f"--{total}={dropped}: ignored, because --{new}={settings[new]} is given")
  validate_lengths(settings)
  return settings, warnings
