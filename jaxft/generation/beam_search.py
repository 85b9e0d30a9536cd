"""Track beams as in transformers (5.x, `early_stopping=False`), outside jit."""

from typing import NamedTuple

import numpy as np

NEG_INF = -1e9  # the score of a beam that does not exist yet


class Hypothesis(NamedTuple):
  """A text of one beam, finished or running."""

  score: float  # sum of log-probabilities; once finished, divided by length ** length_penalty
  ids: list[int]


class Beams:
  """The beams of one prompt."""

  def __init__(self, num_beams: int, length_penalty: float, max_new: int):
    # One beam at first, because equal beams would all continue in the same way.
    self.running = [Hypothesis(NEG_INF if beam else 0.0, []) for beam in range(num_beams)]
    self.finished: list[Hypothesis] = []
    self.done = False
    self._num_beams = num_beams
    self._length_penalty = length_penalty
    self._max_new = max_new

  def advance(
    self, scores: np.ndarray, beams: np.ndarray, tokens: np.ndarray, stop_ids: frozenset[int]
  ) -> list[int]:
    """Advance all beams by one token.

    Args:
      scores: sums of log-probabilities of the 2 x num_beams best candidates, best first.
      beams: the beam that each candidate extends.
      tokens: the token that extends it.
      stop_ids: tokens that finish a candidate.

    Returns:
      For each new beam, the old beam that it extends.
    """
    length = len(self.running[0].ids) + 1
    is_last = length == self._max_new
    running = []
    sources = []
    for rank, (score, beam, token) in enumerate(
      zip(scores.tolist(), beams.tolist(), tokens.tolist(), strict=True)
    ):
      ids = [*self.running[beam].ids, token]
      if token not in stop_ids and not is_last:
        running.append(Hypothesis(score, ids))
        sources.append(beam)
      elif (
        rank < self._num_beams and not self.done
      ):  # only the num_beams best candidates may finish
        self.finished.append(Hypothesis(score / length**self._length_penalty, ids))
    best_first = sorted(self.finished, key=lambda hypothesis: -hypothesis.score)
    self.finished = best_first[: self._num_beams]
    if is_last:
      self.done = True
      return list(range(self._num_beams))
    self.running = running[: self._num_beams]
    # With early_stopping=False, the search ends when the best running beam, at its present length,
    # scores no better than the worst finished text.
    best = self.running[0].score / length**self._length_penalty
    is_full = len(self.finished) == self._num_beams
    self.done = self.done or is_full and best <= self.finished[-1].score
    return sources[: self._num_beams]

  def best(self, num: int, stop_ids: frozenset[int]) -> list[list[int]]:
    """Return the ids of the `num` best texts, without their stop token."""
    best = [hypothesis.ids for hypothesis in self.finished[:num]]
    return [ids[:-1] if ids[-1] in stop_ids else ids for ids in best]
