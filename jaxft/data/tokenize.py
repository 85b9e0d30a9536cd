"""Examples to token ids, and how examples lie in memory or in a file."""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from jaxft.data.formats import Example, class_ids

# Given to the tokenizer together: it spreads texts over the cores, and takes some 200 bytes a character (tokenizers 0.23).
MAX_BATCH_EXAMPLES, MAX_BATCH_CHARS = 1000, 2**20
# The letter that stands for each byte in GPT-2's vocabulary and ByteLevel's: itself where it can be seen, else one from 256 on.
PRINTABLE_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_TO_UNICODE = {byte: chr(byte) for byte in PRINTABLE_BYTES}
BYTE_TO_UNICODE |= {
  byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE_BYTES)))
}
WORD_BOUNDARY = re.compile(r"(?<=\S) (?=\S)")


@dataclasses.dataclass(frozen=True)
class TokenArrays:
  """Examples one after another, each with the end token after it (but for those that have a label).

  Before each is the token that begins a document, where the tokenizer has one (see `document_bos_id`).
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


class EncodedBatch(NamedTuple):
  """The examples of one call of the tokenizer."""

  ids: list[np.ndarray]
  prompts: list[int]
  straddling: int  # examples in which one token holds the end of the prompt and the beginning of the completion
  unknown_chars: (
    int  # characters without a token in the vocabulary: dropped, or read as the unknown token
  )


def ids_dtype(tokenizer: Any) -> np.dtype:
  """The narrowest type that holds every id."""
  return np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32)


def token_byte_lengths(tokenizer: Any) -> np.ndarray | None:
  """(V,) bytes of text that each token stands for, 0 for the end token and what the tokenizer itself puts around a text.

  None of a tokenizer that does not work on bytes.
  """
  backend = tokenizer.backend_tokenizer
  if (json.loads(backend.to_str())["decoder"] or {}).get("type") != "ByteLevel":
    return None
  vocabulary, added = tokenizer.get_vocab(), backend.get_added_tokens_decoder()
  lengths_V = np.zeros(max(vocabulary.values()) + 1, np.int64)
  for (
    token,
    i,
  ) in (
    vocabulary.items()
  ):  # each byte is a letter of its own there; tokens that were added stand as they are
    lengths_V[i] = len(added[i].content.encode()) if i in added else len(token)
  before, after = special_ids_around(tokenizer)
  begin = document_bos_id(tokenizer, before)
  lengths_V[[tokenizer.eos_token_id, *before, *after, *([] if begin is None else [begin])]] = 0
  return lengths_V


def target_bytes(rows: Any, tokenizer: Any, limit: int = 0) -> int:
  """Bytes of text that the targets of the rows stand for, of the first `limit` (0: all); 0 where that is not known."""
  lengths_V = token_byte_lengths(tokenizer)
  if lengths_V is None:
    return 0
  some = (rows[i] for i in range(min(len(rows), limit or len(rows))))
  return sum(int(lengths_V[row["targets"][row["mask"]]].sum()) for row in some)


def special_ids_around(tokenizer: Any) -> tuple[list[int], list[int]]:
  """The ids that a tokenizer itself puts before and after a text, as BERT's [CLS] and [SEP]; mostly none."""
  backend = tokenizer.backend_tokenizer
  text = next(
    (text for text in itertools.islice(_probe_texts(tokenizer), 9) if _encode_plain(backend, text)),
    "a",
  )
  whole = backend.encode(text)
  special = whole.special_tokens_mask
  if 0 not in special:
    return [], []
  return whole.ids[: special.index(0)], whole.ids[len(special) - special[::-1].index(0) :]


def _probe_texts(tokenizer: Any) -> Iterator[str]:
  yield from ("a", "1")
  added = (
    tokenizer.backend_tokenizer.get_added_tokens_decoder()
  )  # with a large vocabulary a tenth of a second
  yield from (token for token, id in tokenizer.get_vocab().items() if id not in added)


def document_bos_id(tokenizer: Any, before: list[int]) -> int | None:
  """The token that begins each document: the tokenizer's bos token, where that is another than its end token.

  None where documents have no such token: their texts are learned from the end token of the
  document before. So it is too where the tokenizer itself puts another token than bos before a
  text: its texts begin with that one.

  Args:
    before: what the tokenizer itself puts before a text, of `special_ids_around`.
  """
  begin = tokenizer.bos_token_id
  return begin if begin != tokenizer.eos_token_id and before[:1] in ([], [begin]) else None


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
  """The tokens of a text that is to be continued, as transformers' `tokenizer(text)` gives them.

  GPT-2's tokenizer puts no bos token before a text. So none is put here, for the same prompt to
  have the same continuation in transformers; a prompt that is to begin a document begins with that
  token's text. No text at all does begin a document.
  """
  before = special_ids_around(tokenizer)[0]
  if ids := before + _encode_plain(tokenizer.backend_tokenizer, text):
    return ids
  begin = document_bos_id(tokenizer, before)
  return [] if begin is None else [begin]


def encode_text(tokenizer: Any, text: str) -> list[int]:
  """The tokens of a whole text, to classify: an empty one is the end token."""
  before, after = special_ids_around(tokenizer)
  return before + _encode_plain(tokenizer.backend_tokenizer, text) + after or [
    tokenizer.eos_token_id
  ]


def _encode_plain(backend: Any, text: str) -> list[int]:
  return backend.encode(text, add_special_tokens=False).ids


class TokenizerInfo:
  """What there is to know of a tokenizer before it reads many texts: looked up once, for a large one takes 0.1 s."""

  def __init__(self, tokenizer: Any):
    self.tokenizer, self.backend = tokenizer, tokenizer.backend_tokenizer
    rules = json.loads(self.backend.to_str())
    self.before, self.after = special_ids_around(tokenizer)
    self.eos_id, self.bos_id = tokenizer.eos_token_id, document_bos_id(tokenizer, self.before)
    self.cuts_at_blanks = _splits_at_spaces(rules)
    model, vocabulary = rules["model"], tokenizer.get_vocab()
    works_on_bytes = (rules["decoder"] or {}).get("type") == "ByteLevel"
    plain = (
      works_on_bytes and rules["normalizer"] is None
    )  # else the bytes of a text are not those that are looked up
    self._missing = (
      [byte for byte, letter in BYTE_TO_UNICODE.items() if letter not in vocabulary]
      if plain
      else None
    )
    self._added = [added["content"] for added in rules["added_tokens"]]
    letters = all(letter in vocabulary for letter in BYTE_TO_UNICODE.values())
    falls_back = model.get("byte_fallback") and all(
      f"<0x{byte:02X}>" in vocabulary for byte in range(256)
    )
    self.loses_nothing = works_on_bytes and letters or falls_back
    unknown = model.get("unk_token")
    self._unknown = vocabulary.get(unknown, -1) if unknown is not None else model.get("unk_id", -1)

  def lost(self, text: str, encoding: Any) -> int:
    """Characters of a text without a token in the vocabulary: dropped, or read as the unknown one. Blanks are not counted."""
    if self._missing is not None:
      for token in self._added:
        text = text.replace(token, "")
      code = np.frombuffer(text.encode(), np.uint8)
      number = np.cumsum((code & 0xC0) != 0x80)  # of the character that each byte is of
      return len(np.unique(number[np.isin(code, self._missing)]))
    gone = np.ones(len(text), bool)
    for id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
      gone[start:stop] = (
        id == self._unknown
      )  # the last of a character's tokens: the first may be the blank before it
    return sum(not text[i].isspace() for i in np.flatnonzero(gone))


def encode_examples(examples: list[Example], info: TokenizerInfo, dtype: np.dtype) -> EncodedBatch:
  """Token ids of the examples, made on all cores. Nothing is added but what begins and ends a
  document (see `_special_ids`), and nothing trimmed.

  Where a prompt ends among the tokens is found by their places in the text, never by searching for ids: a token that holds
  the end of the prompt and the beginning of the completion is learned.
  """
  fast, lost = info.backend, 0
  texts, prompts, merged = [example.text for example in examples], [0] * len(examples), 0
  if any(example.prompt_chars for example in examples):
    found = fast.encode_batch(texts, add_special_tokens=False)
    for i, (example, encoding) in enumerate(zip(examples, found, strict=True)):
      prompts[i] = sum(stop <= example.prompt_chars for _, stop in encoding.offsets)
      before = encoding.offsets[prompts[i] - 1][1] if prompts[i] else 0
      merged += before < example.prompt_chars and prompts[i] < len(encoding.offsets)
      lost += 0 if info.loses_nothing else info.lost(example.text, encoding)
    ids = [[np.array(encoding.ids, dtype)] for encoding in found]
  else:
    ids = [[] for _ in texts]
    parts = ((i, part) for i, text in enumerate(texts) for part in _split_long_text(text, info))
    encode_batch = (
      fast.encode_batch_fast if info.loses_nothing else fast.encode_batch
    )  # the fast one tells no places
    for group in _batched(parts, lambda part: len(part[1])):
      found = encode_batch([part for _, part in group], add_special_tokens=False)
      for (i, part), encoding in zip(group, found, strict=True):
        ids[i].append(np.array(encoding.ids, dtype))
        lost += 0 if info.loses_nothing else info.lost(part, encoding)
  for i, example in enumerate(examples):
    of_text = np.concatenate([np.zeros(0, dtype), *ids[i]])
    before, after = _special_ids(example, info, of_text)
    prompts[i] += len(before) if prompts[i] else 0
    if info.bos_id is not None and example.label is None:
      prompts[i] = max(1, prompts[i])  # the token that begins a document is given, never learned
    ids[i] = np.concatenate([np.array(before, dtype), of_text, np.array(after, dtype)])
  return EncodedBatch(ids, prompts, merged, lost)


def _special_ids(
  example: Example, info: TokenizerInfo, of_text: np.ndarray
) -> tuple[list[int], list[int]]:
  """Special ids that are put before and after the tokens of an example's text.

  A document has the end token after it, which is learned. Before it there is one too, of the
  document before, so none is put there, and the first token of a text is learned from that one. A
  tokenizer whose bos token is another than its end token has the document begin with it (`bos text
  eos`): the first token of the text, or of the prompt, then follows bos, and bos itself is never a
  target. A text that begins with it already, or a tokenizer that puts it there by itself, does not
  get it twice.
  """
  if example.label is not None:
    return info.before, info.after
  before = [] if info.before == [info.eos_id] else info.before
  if info.bos_id is not None and before in ([], [info.bos_id]):
    before = [] if of_text[:1].tolist() == [info.bos_id] else [info.bos_id]
  return before, info.after if info.after[-1:] == [info.eos_id] else [*info.after, info.eos_id]


def _split_long_text(text: str, info: TokenizerInfo) -> list[str]:
  """A long text in parts that give the same tokens as the whole, so that all cores and little memory will do.

  GPT-2's way to cut a text into words, which is ByteLevel's in the tokenizers library, never joins what stands before a single
  blank with what stands after it. A text of a tokenizer with another way is left whole.
  """
  if len(text) <= MAX_BATCH_CHARS or not info.cuts_at_blanks:
    return [text]
  parts, start = [], 0
  while blank := WORD_BOUNDARY.search(text, start + MAX_BATCH_CHARS // 8):
    parts.append(text[start : blank.start()])
    start = blank.start()
  return [*parts, text[start:]]


def _splits_at_spaces(rules: dict[str, Any]) -> bool:
  if rules["normalizer"] is not None or any(
    " " in added["content"] for added in rules["added_tokens"]
  ):
    return False
  way = rules["pre_tokenizer"] or {}
  return (
    way.get("type") == "ByteLevel"
    and not way.get("add_prefix_space")
    and way.get("use_regex", True)
  )


def encode_in_memory(
  examples: Iterable[Example], tokenizer: Any, labels: Sequence[str] = ()
) -> TokenArrays:
  """Examples as Tokens that no file holds; raises RequestError for a label that is none of `labels`."""
  dtype, ids, prompts, found = ids_dtype(tokenizer), [], [], []
  for some, encoded in encode_batches(examples, tokenizer, dtype):
    found += [example.label for example in some if example.label is not None]
    ids += encoded.ids
    prompts += encoded.prompts
  number = dict(zip(names := sorted(set(found)), class_ids(names, labels), strict=True))
  return TokenArrays(
    np.concatenate([np.zeros(0, dtype), *ids]),
    np.cumsum([0, *map(len, ids)], dtype=np.int64),
    np.array(prompts, np.int32),
    np.array([number[label] for label in found], np.int32),
    np.zeros(0, np.float64),
  )


def encode_batches(
  examples: Iterable[Example], tokenizer: Any, dtype: np.dtype
) -> Iterator[tuple[list[Example], EncodedBatch]]:
  """The examples in lists, each with what `encode_examples` makes of it; the next list is read meanwhile."""
  before, info = None, TokenizerInfo(tokenizer)
  with ThreadPoolExecutor(1) as worker:  # the tokenizer lets go of Python's lock
    for group in _batched(examples, lambda example: len(example.text)):
      begun = worker.submit(encode_examples, group, info, dtype)
      if before:
        yield before[0], before[1].result()
      before = group, begun
    if before:
      yield before[0], before[1].result()


def _batched(items: Iterable[Any], characters: Callable[[Any], int]) -> Iterator[list[Any]]:
  """The items in lists that the tokenizer takes at once: many, for all cores to have some, but no more text than memory."""
  group, size = [], 0
  for item in items:
    group.append(item)
    size += characters(item)
    if len(group) == MAX_BATCH_EXAMPLES or size > MAX_BATCH_CHARS:
      yield group
      group, size = [], 0
  if group:
    yield group
