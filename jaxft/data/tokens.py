"""Examples to token ids, and how examples lie in memory or in a file."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft.data.formats import Example
from jaxft.errors import RequestError, first_line

# Given to the tokenizer together: it spreads texts over the cores, and takes some 200 bytes a character (tokenizers 0.23).
AT_ONCE, CHARACTERS_AT_ONCE = 1000, 2**20
BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Examples one after another, each with the end token after it (but for those that have a label).

  Arrays may be memory-mapped. N examples.
  """

  ids: np.ndarray  # uint16 or uint32, of all examples
  starts_N1: np.ndarray  # int64: example i is ids[starts[i] : starts[i + 1]]
  prompts_N: np.ndarray  # int32: tokens at its beginning that are not learned
  labels_N: np.ndarray  # int32 class of each, where the format has labels; else empty
  nats_N: np.ndarray  # float64 -log p of each, where the source says so; else empty

  def __len__(self) -> int:
    return len(self.starts_N1) - 1

  @property
  def lengths_N(self) -> np.ndarray:
    return np.diff(self.starts_N1)


class Encoded(NamedTuple):
  """The examples of one call of the tokenizer."""

  ids: list[np.ndarray]
  prompts: list[int]
  merged: int  # examples in which one token holds the end of the prompt and the beginning of the completion


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
  # A folder that a Trainer has saved may hold the length it cut texts to, or padded them to.
  tokenizer.backend_tokenizer.no_truncation()
  tokenizer.backend_tokenizer.no_padding()
  if tokenizer.eos_token_id is None:
    raise RequestError(f"{folder}: the tokenizer has no end token; set eos_token in tokenizer_config.json")
  largest = max(tokenizer.get_vocab().values())
  if largest >= V:
    raise RequestError(
      f"{folder}: the tokenizer has {len(tokenizer)} tokens, up to id {largest}, and the model's table only {V} rows"
    )
  return tokenizer


def ids_dtype(tokenizer: Any) -> np.dtype:
  """The narrowest type that holds every id."""
  return np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32)


def byte_lengths(tokenizer: Any) -> np.ndarray | None:
  """(V,) bytes of text that each token stands for, 0 for the end token; None of a tokenizer that does not work on bytes."""
  backend = tokenizer.backend_tokenizer
  if (json.loads(backend.to_str())["decoder"] or {}).get("type") != "ByteLevel":
    return None
  vocabulary, added = tokenizer.get_vocab(), backend.get_added_tokens_decoder()
  lengths_V = np.zeros(max(vocabulary.values()) + 1, np.int64)
  for (
    token,
    i,
  ) in vocabulary.items():  # each byte is a letter of its own there; tokens that were added stand as they are
    lengths_V[i] = len(added[i].content.encode()) if i in added else len(token)
  lengths_V[tokenizer.eos_token_id] = 0
  return lengths_V


def bytes_learned(rows: Any, tokenizer: Any, limit: int = 0) -> int:
  """Bytes of text that the targets of the rows stand for, of the first `limit` (0: all); 0 where that is not known."""
  lengths_V = byte_lengths(tokenizer)
  if lengths_V is None:
    return 0
  some = (rows[i] for i in range(min(len(rows), limit or len(rows))))
  return sum(int(lengths_V[row["targets"][row["mask"]]].sum()) for row in some)


def encode(examples: list[Example], tokenizer: Any, dtype: np.dtype) -> Encoded:
  """Token ids of the examples, made on all cores. Nothing is added but end tokens, and nothing trimmed.

  Where a prompt ends among the tokens is found by their places in the text, never by searching for ids: a token that holds
  the end of the prompt and the beginning of the completion is learned.
  """
  fast = tokenizer.backend_tokenizer
  texts, prompts, merged = [example.text for example in examples], [0] * len(examples), 0
  if any(example.prompt for example in examples):
    found = fast.encode_batch(texts, add_special_tokens=False)
    for i, (example, encoding) in enumerate(zip(examples, found, strict=True)):
      prompts[i] = sum(stop <= example.prompt for _, stop in encoding.offsets)
      before = encoding.offsets[prompts[i] - 1][1] if prompts[i] else 0
      merged += before < example.prompt and prompts[i] < len(encoding.offsets)
    ids = [[np.array(encoding.ids, dtype)] for encoding in found]
  else:
    ids = [[] for _ in texts]
    parts = ((i, part) for i, text in enumerate(texts) for part in _parts(text, tokenizer))
    for group in _grouped(parts, lambda part: len(part[1])):
      found = fast.encode_batch_fast([part for _, part in group], add_special_tokens=False)
      for (i, _), encoding in zip(group, found, strict=True):
        ids[i].append(np.array(encoding.ids, dtype))
  ends = [np.array([] if example.label is not None else [tokenizer.eos_token_id], dtype) for example in examples]
  ids = [np.concatenate([*arrays, end]) for arrays, end in zip(ids, ends, strict=True)]
  return Encoded(ids, prompts, merged)


def _parts(text: str, tokenizer: Any) -> list[str]:
  """A long text in parts that give the same tokens as the whole, so that all cores and little memory will do.

  GPT-2's way to cut a text into words, which is ByteLevel's in the tokenizers library, never joins what stands before a single
  blank with what stands after it. A text of a tokenizer with another way is left whole.
  """
  if len(text) <= CHARACTERS_AT_ONCE or not _cuts_at_blanks(tokenizer):
    return [text]
  parts, start = [], 0
  while blank := BETWEEN_WORDS.search(text, start + CHARACTERS_AT_ONCE // 8):
    parts.append(text[start : blank.start()])
    start = blank.start()
  return [*parts, text[start:]]


def _cuts_at_blanks(tokenizer: Any) -> bool:
  backend = tokenizer.backend_tokenizer
  blank_tokens = any(" " in added.content for added in backend.get_added_tokens_decoder().values())
  if backend.normalizer is not None or blank_tokens:
    return False
  way = json.loads(backend.to_str())["pre_tokenizer"] or {}
  return way.get("type") == "ByteLevel" and not way.get("add_prefix_space") and way.get("use_regex", True)


def in_memory(examples: Iterable[Example], tokenizer: Any, labels: Sequence[str] = ()) -> Tokens:
  """Examples as Tokens that no file holds; raises RequestError for a label that is none of `labels`, in their order."""
  dtype, ids, prompts, numbers = ids_dtype(tokenizer), [], [], []
  number = {label: i for i, label in enumerate(labels)}
  for some, encoded in encode_all(examples, tokenizer, dtype):
    if unknown := [example.label for example in some if example.label is not None and example.label not in number]:
      raise RequestError(f"label {unknown[0]!r}: the model's are {', '.join(map(repr, labels))}")
    numbers += [number[example.label] for example in some if example.label is not None]
    ids += encoded.ids
    prompts += encoded.prompts
  return Tokens(
    np.concatenate([np.zeros(0, dtype), *ids]),
    np.cumsum([0, *map(len, ids)], dtype=np.int64),
    np.array(prompts, np.int32),
    np.array(numbers, np.int32),
    np.zeros(0, np.float64),
  )


def encode_all(examples: Iterable[Example], tokenizer: Any, dtype: np.dtype) -> Iterator[tuple[list[Example], Encoded]]:
  """The examples in lists, each with what `encode` makes of it; the next list is read meanwhile."""
  before = None
  with ThreadPoolExecutor(1) as worker:  # the tokenizer lets go of Python's lock
    for group in _grouped(examples, lambda example: len(example.text)):
      begun = worker.submit(encode, group, tokenizer, dtype)
      if before:
        yield before[0], before[1].result()
      before = group, begun
    if before:
      yield before[0], before[1].result()


def _grouped(items: Iterable[Any], characters: Callable[[Any], int]) -> Iterator[list[Any]]:
  """The items in lists that the tokenizer takes at once: many, for all cores to have some, but no more text than memory."""
  group, size = [], 0
  for item in items:
    group.append(item)
    size += characters(item)
    if len(group) == AT_ONCE or size > CHARACTERS_AT_ONCE:
      yield group
      group, size = [], 0
  if group:
    yield group
