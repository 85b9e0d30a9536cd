"""Measure the share of generated n-grams that occur in the training text."""

import numpy as np

CHUNK_TOKENS = 2**20  # tokens of the training text per hashed chunk


def ngram_overlap(texts: list[list[int]], ids: np.ndarray, n: int = 8) -> list[float | None]:
  """Return for each text the share of its n-grams that occur in `ids`.

  The function compares 64-bit hashes. With a billion training tokens, one n-gram in eighteen
  billion is a false match.

  Args:
    texts: token ids of each generated text.
    ids: all token ids of the training text.
    n: tokens per n-gram.

  Returns:
    A share from 0 to 1 per text; None for a text of fewer than n tokens.
  """
  hashes = [_ngram_hashes(np.array(text, np.uint64), n) for text in texts]
  # The zero lets searchsorted run without any text. A hash above all others is clipped to the last.
  unique = np.unique(np.concatenate([*hashes, np.zeros(1, np.uint64)]))
  in_training = np.zeros(len(unique), bool)
  for start in range(0, len(ids), CHUNK_TOKENS):
    # Chunks overlap by n - 1 tokens, so that n-grams across borders are found.
    chunk = _ngram_hashes(ids[start : start + CHUNK_TOKENS + n - 1].astype(np.uint64), n)
    at = np.searchsorted(unique, chunk).clip(max=len(unique) - 1)
    in_training[at[unique[at] == chunk]] = True
  return [
    float(in_training[np.searchsorted(unique, text)].mean()) if len(text) else None
    for text in hashes
  ]


def _ngram_hashes(ids: np.ndarray, n: int) -> np.ndarray:
  """Hash each n-gram of the ids, one token at a time.

  Multiplies and shifts as in splitmix64.
  """
  num_ngrams = max(0, len(ids) - n + 1)
  hashes = np.zeros(num_ngrams, np.uint64)
  for i in range(n):
    hashes = (hashes ^ ids[i : i + num_ngrams]) * np.uint64(0x9E3779B97F4A7C15)
    hashes ^= hashes >> np.uint64(29)
  return hashes
