"""How the next token is chosen. No jax here: --help tells these settings."""

from typing import NamedTuple

from jaxft.errors import RequestError


class Sampling(NamedTuple):
  """How the next token is chosen; names, meanings and defaults are transformers' own, and temperature 0 is greedy."""

  max_new_tokens: int = 100
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

  def of_program(self) -> "Sampling":
    """With what needs no other program left out."""
    return self._replace(
      temperature=float(self.temperature > 0), seed=0, max_new_tokens=1, length_penalty=1.0, num_return_sequences=1
    )

  def check(self) -> None:
    """Raises RequestError on a value that means nothing, alone or with the others."""
    self.check_values()
    if self.num_beams > 1 and self.temperature:
      raise RequestError(f"--num_beams={self.num_beams}: beams are not drawn; give --temperature=0 too")
    if not self.temperature and self.num_return_sequences > self.num_beams:
      raise RequestError(
        f"--num_return_sequences={self.num_return_sequences}: --temperature=0 gives {self.num_beams} of a prompt; draw, or "
        "give it as many --num_beams"
      )

  def check_values(self) -> None:
    """Raises RequestError on a value that means nothing."""
    for name, fine, wanted in (
      ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
      ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
      ("top_k", self.top_k >= 0, "0 (all) or more"),
      ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
      ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
      ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0; 1 changes nothing"),
      ("num_beams", 1 <= self.num_beams <= 256, "from 1 to 256"),
      ("length_penalty", abs(self.length_penalty) < float("inf"), "a finite number"),
      ("num_return_sequences", self.num_return_sequences >= 1, "at least 1"),
      ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 (no such rule) or more"),
      ("seed", 0 <= self.seed < 2**32, "from 0 to 4294967295"),
    ):
      if not fine:
        raise RequestError(f"--{name}={getattr(self, name)}: must be {wanted}")
