"""What a model writes that it has read: counted as a plain search would."""

import numpy as np
import pytest

from jaxft.data import memorization


@pytest.mark.parametrize("at_once", [7, 64, memorization.CHUNK_TOKENS])
def test_ngram_overlap_matches_naive_search(monkeypatch, at_once):
  monkeypatch.setattr(memorization, "CHUNK_TOKENS", at_once)
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 5, 300).astype(np.uint16)  # few tokens: many runs are there by chance
  texts = [rng.integers(0, 5, n).tolist() for n in (0, 2, 3, 40)] + [ids[20:50].tolist()]
  known = {tuple(ids[i : i + 3].tolist()) for i in range(298)}
  expected = [
    np.mean([tuple(text[i : i + 3]) in known for i in range(len(text) - 2)])
    if len(text) > 2
    else None
    for text in texts
  ]
  assert memorization.ngram_overlap(texts, ids, 3) == expected
  assert expected[0] is expected[1] is None and expected[-1] == 1 and 0 < expected[3] < 1
