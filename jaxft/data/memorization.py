"""How much of what a model writes it has learned by heart: runs of tokens that stand in its training text."""

import numpy as np

CHUNK_TOKENS = 2**20  # tokens of the training text that are looked at together


def ngram_overlap(texts: list[list[int]], ids: np.ndarray, n: int = 8) -> list[float | None]:
  """Of each text the share of its runs of `n` tokens that also stand in `ids`, the training text; None of a shorter text.

  Runs are compared by hashes of 64 bits: among a billion tokens one of eighteen billion runs is taken for another.
  """
  wanted = [_ngram_hashes(np.array(text, np.uint64), n) for text in texts]
  everything = np.unique(np.concatenate([*wanted, np.zeros(1, np.uint64)]))
  found = np.zeros(len(everything), bool)
  for start in range(0, len(ids), CHUNK_TOKENS):
    there = _ngram_hashes(ids[start : start + CHUNK_TOKENS + n - 1].astype(np.uint64), n)
    at = np.searchsorted(everything, there).clip(max=len(everything) - 1)
    found[at[everything[at] == there]] = True
  return [
    float(found[np.searchsorted(everything, runs)].mean()) if len(runs) else None for runs in wanted
  ]


def _ngram_hashes(ids: np.ndarray, n: int) -> np.ndarray:
  """Of each run of `n` of the ids, mixed token by token (multiplication and shift as in splitmix64)."""
  runs = max(0, len(ids) - n + 1)
  found = np.zeros(runs, np.uint64)
  for i in range(n):
    found = (found ^ ids[i : i + runs]) * np.uint64(0x9E3779B97F4A7C15)
    found ^= found >> np.uint64(29)
  return found
