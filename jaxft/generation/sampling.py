"""How the next token is chosen. No jax here: --help tells these settings."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxft.errors import RequestError

# Of the prompt with what follows it, and of what follows alone. Where both are said, the second counts, as in transformers.
LENGTH_LIMITS = (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens"))


class Sampling(NamedTuple):
  """How the next token is chosen; names, meanings and defaults are transformers' own, and temperature 0 is greedy."""

  max_new_tokens: int = 100
  max_length: int = 0  # of the prompt and what follows, and then `max_new_tokens` is of no account; 0: it alone counts
  min_length: int = 0  # of the prompt and what follows: no end token before
  min_new_tokens: int = 0  # no end token before; above 0 it counts, and not `min_length`
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
    """With what needs no other program left out."""
    limits = dict.fromkeys((name for pair in LENGTH_LIMITS for name in pair), 0)
    return self._replace(
      temperature=float(self.temperature > 0),
      seed=0,
      length_penalty=1.0,
      num_return_sequences=1,
      **limits,
    )

  def validate(self) -> None:
    """Raises RequestError on a value that means nothing, alone or with the others."""
    self.validate_values()
    limits = {name: getattr(self, name) for pair in LENGTH_LIMITS for name in pair}
    validate_lengths(limits | ({"max_new_tokens": 0} if self.max_length else {}))
    if self.num_beams > 1 and self.temperature:
      raise RequestError(
        f"--num_beams={self.num_beams}: beams are not drawn; give --temperature=0 too"
      )
    if not self.temperature and self.num_return_sequences > self.num_beams:
      raise RequestError(
        f"--num_return_sequences={self.num_return_sequences}: --temperature=0 gives {self.num_beams} of a prompt; draw, or "
        "give it as many --num_beams"
      )

  def validate_values(self) -> None:
    """Raises RequestError on a value that means nothing."""
    for name, fine, wanted in (
      ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
      ("max_length", self.max_length >= 0, "0 (no such limit) or more"),
      ("min_length", self.min_length >= 0, "0 (no such limit) or more"),
      ("min_new_tokens", self.min_new_tokens >= 0, "0 (no such limit) or more"),
      ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
      ("top_k", self.top_k >= 0, "0 (all) or more"),
      ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
      ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
      (
        "repetition_penalty",
        0 < self.repetition_penalty < float("inf"),
        "above 0; 1 changes nothing",
      ),
      ("num_beams", 1 <= self.num_beams <= 256, "from 1 to 256"),
      ("length_penalty", abs(self.length_penalty) < float("inf"), "a finite number"),
      ("num_return_sequences", self.num_return_sequences >= 1, "at least 1"),
      ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 (no such rule) or more"),
      ("seed", 0 <= self.seed < 2**32, "from 0 to 4294967295"),
    ):
      if not fine:
        raise RequestError(f"--{name}={getattr(self, name)}: must be {wanted}")


def validate_lengths(limits: Mapping[str, int]) -> None:
  """Raises RequestError where a text would have to be longer than it may be; a limit that is 0, or missing, is none."""
  for least, most in (
    ("min_length", "max_length"),
    ("min_new_tokens", "max_new_tokens"),
    ("min_new_tokens", "max_length"),
  ):
    if 0 < limits.get(most, 0) < limits.get(least, 0):
      raise RequestError(
        f"--{least}={limits[least]}: more than --{most}={limits[most]} allows; lower the one or raise the other"
      )


def validate_do_sample(temperature: float | None, num_beams: int) -> None:
  """Raises RequestError for what no text can be drawn with; None is a temperature that nobody has said."""
  if num_beams > 1:
    raise RequestError(
      f"--do_sample=True: --num_beams={num_beams} are not drawn; give --do_sample=False, or --num_beams=1"
    )
  if temperature == 0:
    raise RequestError(
      "--do_sample=True: --temperature=0.0 takes the likeliest token each time; leave one of the two out"
    )


def resolve_sampling(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
  """What is given, without what is of no account then, and a line for each thing that was left out.

  `do_sample` may be among it: False is temperature 0, as in transformers whatever the temperature. Raises RequestError for
  two things that cannot both be.
  """
  found, lines = dict(given), []
  temperature = found.get("temperature")
  if found.get("do_sample"):
    validate_do_sample(temperature, found.get("num_beams", 1))
  if found.get("do_sample") is False:
    if temperature:
      lines.append(
        f"--temperature={temperature}: of no account, as --do_sample=False takes the likeliest token each time"
      )
    found["temperature"] = 0.0
  for whole, new in LENGTH_LIMITS:
    if new in found and found.get(whole):
      lines.append(f"--{whole}={found.pop(whole)}: of no account, as --{new}={found[new]} is given")
  validate_lengths(found)
  return found, lines
