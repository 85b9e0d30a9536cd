"""Beam search, as transformers has it (5.x, `early_stopping=False`): which texts go on, which have ended, and when to stop."""

from typing import NamedTuple

import numpy as np

NEG_INF = -1e9  # the score of a beam that is not there


class Hypothesis(NamedTuple):
  score: float  # of one that goes on, the sum of its log-probabilities; of one that has ended, that by its length
  ids: list[int]


class Beams:
  """The beams of one prompt."""

  def __init__(self, count: int, length_penalty: float, most: int):
    """`count` beams of at most `most` tokens; a score is divided by length ** `length_penalty`."""
    self.running = [Hypothesis(0.0 if beam == 0 else NEG_INF, []) for beam in range(count)]
    self.ended: list[Hypothesis] = []
    self.done = False
    self._count, self._penalty, self._most = count, length_penalty, most

  def advance(
    self, scores: np.ndarray, beams: np.ndarray, tokens: np.ndarray, ends: frozenset[int]
  ) -> list[int]:
    """Takes the 2 x count best continuations, best first; returns from which beam each of the next ones comes.

    Args:
      scores: sums of log-probabilities.
      beams, tokens: what each continues, and with which token; one of `ends` ends the text.
    """
    length = len(self.running[0].ids) + 1
    goes_on, sources, last = [], [], length == self._most
    for place, (score, beam, token) in enumerate(
      zip(scores.tolist(), beams.tolist(), tokens.tolist(), strict=True)
    ):
      text = Hypothesis(score, [*self.running[beam].ids, token])
      if token not in ends and not last:
        goes_on.append(text)
        sources.append(beam)
      elif place < self._count and not self.done:  # only what is among the best ends
        self.ended.append(Hypothesis(score / length**self._penalty, text.ids))
    self.ended = sorted(self.ended, key=lambda text: -text.score)[: self._count]
    if last:
      self.done = True
      return list(range(self._count))
    self.running, sources = goes_on[: self._count], sources[: self._count]
    best = self.running[0].score / length**self._penalty
    self.done = self.done or len(self.ended) == self._count and best <= self.ended[-1].score
    return sources

  def best(self, count: int, ends: frozenset[int]) -> list[list[int]]:
    """The ids of the best texts, without the end token."""
    return [text.ids[:-1] if text.ids[-1] in ends else text.ids for text in self.ended[:count]]
