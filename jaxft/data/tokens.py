"""Documents to one stream of token ids."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.data.sources import Document
from jaxft.errors import RequestError, first_line

AT_ONCE = 1000  # documents given to the tokenizer together: it spreads them over the cores


def load_tokenizer(folder: Path, V: int) -> Any:
  """The tokenizer of a checkpoint folder; raises RequestError when there is none that fits a table of V tokens."""
  from transformers import AutoTokenizer  # most of a second to import: a mistyped config should not wait for it

  try:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not hasattr(tokenizer, "backend_tokenizer"):
      raise TypeError(f"{type(tokenizer).__name__} is no tokenizer of one text")
  except Exception as error:  # transformers raises whatever its readers raise
    raise RequestError(
      f"{folder}: no tokenizer that can be read ({first_line(error)}); the folder needs "
      "tokenizer.json, or vocab.json and merges.txt"
    ) from error
  if tokenizer.eos_token_id is None:
    raise RequestError(f"{folder}: the tokenizer has no end token; set eos_token in tokenizer_config.json")
  largest = max(tokenizer.get_vocab().values())
  if largest >= V:
    raise RequestError(
      f"{folder}: the tokenizer has {len(tokenizer)} tokens, up to id {largest}, and the model's table only {V} rows"
    )
  return tokenizer


def encode(documents: list[Document], tokenizer: Any, tell=lambda done: None) -> tuple[np.ndarray, np.ndarray]:
  """An end token, then each document followed by an end token: `stream` (int32) and the `lengths` of the documents.

  A length counts the document's own tokens and its end token, so `len(stream) == 1 + lengths.sum()`. The end token in front
  gives the first document what all others have: a token to be predicted from. Nothing is added, trimmed or normalised.
  """
  pieces, lengths = [[tokenizer.eos_token_id]], []
  for start in range(0, len(documents), AT_ONCE):
    texts = [document.text for document in documents[start : start + AT_ONCE]]
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
      pieces.append(ids + [tokenizer.eos_token_id])
      lengths.append(len(ids) + 1)
    tell(start + len(texts))
  return np.concatenate([np.asarray(piece, np.int32) for piece in pieces]), np.asarray(lengths, np.int64)


def fingerprint(stream: np.ndarray) -> str:
  """Tells one tokenised text from another."""
  return hashlib.sha256(stream).hexdigest()
