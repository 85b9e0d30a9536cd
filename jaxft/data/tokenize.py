"""Encode examples as token ids.

`TokenArrays` holds them in memory or in memory-mapped files.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from jaxft.data.formats import Example, class_ids
from jaxft.utils.types import Json

if TYPE_CHECKING:
  from _typeshed import SupportsLenAndGetItem
  from tokenizers import Encoding, Tokenizer
  from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")
# Limits of one tokenizer call. A call spreads texts over the cores, and needs some 200 bytes per
# character (tokenizers 0.23).
MAX_BATCH_EXAMPLES = 1000
MAX_BATCH_CHARS = 2**20
# The letter of each byte in the vocabulary of GPT-2 and ByteLevel: the byte itself if it is
# printable, else a letter from 256 on.
PRINTABLE_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_TO_UNICODE = {byte: chr(byte) for byte in PRINTABLE_BYTES}
BYTE_TO_UNICODE |= {
  byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE_BYTES)))
}
WORD_BOUNDARY = re.compile(r"(?<=\S) (?=\S)")


@dataclasses.dataclass(frozen=True)
class TokenArrays:
  """N examples in a flat array of token ids.

  An end token follows each example, except those with a label.

  Each begins with its document's bos token, if the tokenizer has one (see `document_bos_id`).
  Arrays may be memory-mapped.
  """

  ids: np.ndarray  # uint16 or uint32, of all examples
  starts_N1: np.ndarray  # int64: example i is ids[starts[i] : starts[i + 1]]
  prompts_N: np.ndarray  # int32: tokens at the beginning that are not learned
  labels_N: np.ndarray  # int32 class of each, if the format has labels; else empty
  nats_N: np.ndarray  # float64 -log p of each, if the source gives it; else empty

  def __len__(self) -> int:
    return len(self.starts_N1) - 1

  @property
  def lengths_N(self) -> np.ndarray:
    """Return the tokens of each example."""
    return np.diff(self.starts_N1)


class EncodedBatch(NamedTuple):
  """The result of one tokenizer call."""

  ids: list[np.ndarray]
  prompts: list[int]
  straddling: int  # examples with a token across the end of the prompt
  unknown_chars: int  # characters without a token: dropped, or encoded as the unknown token


def ids_dtype(tokenizer: "PreTrainedTokenizerBase") -> np.dtype:
  """Return the narrowest dtype that holds every id."""
  return np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32)


def token_byte_lengths(tokenizer: "PreTrainedTokenizerBase") -> np.ndarray | None:
  """Return the bytes of text per token, (V,).

  None if the tokenizer is not byte-level.

  The end token and the special tokens that the tokenizer adds around a text count 0.
  """
  backend = tokenizer.backend_tokenizer
  if not _is_byte_level(json.loads(backend.to_str())):
    return None
  vocab = tokenizer.get_vocab()
  added = backend.get_added_tokens_decoder()
  lengths_V = np.zeros(max(vocab.values()) + 1, np.int64)
  for token, i in vocab.items():  # one letter per byte, except in added tokens
    lengths_V[i] = len(added[i].content.encode()) if i in added else len(token)
  before, after = special_ids_around(tokenizer)
  bos_id = document_bos_id(tokenizer, before)
  lengths_V[[tokenizer.eos_token_id, *before, *after, *([] if bos_id is None else [bos_id])]] = 0
  return lengths_V


def _is_byte_level(spec: Json) -> bool:
  """Return whether a tokenizer.json encodes each byte of text as one letter."""
  return (spec["decoder"] or {}).get("type") == "ByteLevel"


def target_bytes(
  rows: "SupportsLenAndGetItem[dict[str, np.ndarray]]",
  tokenizer: "PreTrainedTokenizerBase",
  limit: int = 0,
) -> int:
  """Return the bytes of text of all targets in the first `limit` rows.

  With limit 0, all rows count. The result is 0 if the bytes are unknown.
  """
  lengths_V = token_byte_lengths(tokenizer)
  if lengths_V is None:
    return 0
  limited = (rows[i] for i in range(min(len(rows), limit or len(rows))))
  return sum(int(lengths_V[row["targets"][row["mask"]]].sum()) for row in limited)


def special_ids_around(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
  """Return the ids that a tokenizer adds before and after a text.

  BERT's tokenizer adds [CLS] and [SEP].
  """
  backend = tokenizer.backend_tokenizer
  texts = itertools.islice(_probe_texts(tokenizer), 9)
  text = next((text for text in texts if _encode_plain(backend, text)), "a")
  encoding = backend.encode(text)
  ids = encoding.ids
  special = encoding.special_tokens_mask
  if 0 not in special:
    return [], []
  return ids[: special.index(0)], ids[len(special) - special[::-1].index(0) :]


def _probe_texts(tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
  yield from ("a", "1")
  # Done last, because it takes a tenth of a second with a large vocabulary.
  added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
  yield from (token for token, id in tokenizer.get_vocab().items() if id not in added)


def document_bos_id(tokenizer: "PreTrainedTokenizerBase", before: list[int]) -> int | None:
  """Return the token that begins each document.

  This is bos, unless bos is also the end token.

  Args:
    tokenizer: the model's tokenizer.
    before: ids that the tokenizer itself adds before a text, from `special_ids_around`.

  Returns:
    The bos token. None if bos is also the end token: the first token of a text is then predicted
    from the end token of the previous document. None also if the tokenizer itself adds another
    token before a text: its texts begin with that token.
  """
  bos_id = tokenizer.bos_token_id
  return bos_id if bos_id != tokenizer.eos_token_id and before[:1] in ([], [bos_id]) else None


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
  """Return the ids of a prompt, equal to those of transformers' `tokenizer(text)`.

  GPT-2's tokenizer adds no bos token before a text. So this function does not add one either, and
  the same prompt has the same continuation in transformers. To begin a document, begin the prompt
  with the text of the bos token. An empty prompt always begins a document.
  """
  before = special_ids_around(tokenizer)[0]
  if ids := before + _encode_plain(tokenizer.backend_tokenizer, text):
    return ids
  bos_id = document_bos_id(tokenizer, before)
  return [] if bos_id is None else [bos_id]


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
  """Return the ids of a whole text, for classification.

  An empty text is the end token.
  """
  before, after = special_ids_around(tokenizer)
  ids = before + _encode_plain(tokenizer.backend_tokenizer, text) + after
  return ids or [tokenizer.eos_token_id]


def _encode_plain(backend: "Tokenizer", text: str) -> list[int]:
  return backend.encode(text, add_special_tokens=False).ids


class TokenizerInfo:
  """Properties of a tokenizer that take long to look up.

  One look-up takes 0.1 s for a large vocabulary.
  """

  def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
    self.backend = tokenizer.backend_tokenizer
    self.before, self.after = special_ids_around(tokenizer)
    self.eos_id = tokenizer.eos_token_id
    self.bos_id = document_bos_id(tokenizer, self.before)
    spec = json.loads(self.backend.to_str())
    self.splits_at_spaces = _splits_at_spaces(spec)
    model = spec["model"]
    vocab = tokenizer.get_vocab()
    missing = [byte for byte, letter in BYTE_TO_UNICODE.items() if letter not in vocab]
    byte_level = _is_byte_level(spec)
    # A normalizer may change the bytes of a text, so the set of missing bytes would not apply.
    self._missing_bytes = missing if byte_level and spec["normalizer"] is None else None
    self._added = [added["content"] for added in spec["added_tokens"]]
    byte_tokens = (f"<0x{byte:02X}>" for byte in range(256))
    byte_fallback = model.get("byte_fallback") and all(token in vocab for token in byte_tokens)
    self.is_lossless = byte_level and not missing or byte_fallback
    unk = model.get("unk_token")
    self._unk_id = vocab.get(unk, -1) if unk is not None else model.get("unk_id", -1)

  def count_unknown(self, text: str, encoding: "Encoding") -> int:
    """Count non-blank characters that were dropped or encoded as the unknown token."""
    if self._missing_bytes is not None:
      for token in self._added:
        text = text.replace(token, "")
      code = np.frombuffer(text.encode(), np.uint8)
      char = np.cumsum((code & 0xC0) != 0x80)  # the character that each byte belongs to
      return len(np.unique(char[np.isin(code, self._missing_bytes)]))
    unknown = np.ones(len(text), bool)
    # The last token of a character decides, because the first may be the blank before it.
    for id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
      unknown[start:stop] = id == self._unk_id
    return sum(not text[i].isspace() for i in np.flatnonzero(unknown))


def encode_examples(examples: list[Example], info: TokenizerInfo, dtype: np.dtype) -> EncodedBatch:
  """Encode the examples on all cores, without truncation.

  Only the special ids around a document are added (see `_special_ids`).

  The end of a prompt is found from the offsets of tokens in the text, never by searching for ids. A
  token that holds both the end of the prompt and the beginning of the completion is learned.
  """
  backend = info.backend
  prompts = [0] * len(examples)
  straddling = unknown_chars = 0
  ids = [[] for _ in examples]
  if any(example.prompt_chars for example in examples):
    encodings = backend.encode_batch([e.text for e in examples], add_special_tokens=False)
    for i, (example, encoding) in enumerate(zip(examples, encodings, strict=True)):
      prompts[i] = sum(stop <= example.prompt_chars for _, stop in encoding.offsets)
      end = encoding.offsets[prompts[i] - 1][1] if prompts[i] else 0
      straddling += end < example.prompt_chars and prompts[i] < len(encoding.offsets)
      unknown_chars += 0 if info.is_lossless else info.count_unknown(example.text, encoding)
      ids[i].append(np.array(encoding.ids, dtype))
  else:
    split = lambda example: _split_long_text(example.text, info)
    chunks = ((i, chunk) for i, example in enumerate(examples) for chunk in split(example))
    # `count_unknown` needs offsets, which encode_batch_fast does not return.
    encode_batch = backend.encode_batch_fast if info.is_lossless else backend.encode_batch
    for group in _batched(chunks, lambda chunk: len(chunk[1])):
      encodings = encode_batch([chunk for _, chunk in group], add_special_tokens=False)
      for (i, chunk), encoding in zip(group, encodings, strict=True):
        ids[i].append(np.array(encoding.ids, dtype))
        unknown_chars += 0 if info.is_lossless else info.count_unknown(chunk, encoding)
  all_ids = []
  for i, example in enumerate(examples):
    text_ids = np.concatenate([np.zeros(0, dtype), *ids[i]])
    before, after = _special_ids(example, info, text_ids)
    prompts[i] += len(before) if prompts[i] else 0
    if info.bos_id is not None and example.label is None:
      prompts[i] = max(1, prompts[i])  # the bos token of a document is an input only
    all_ids.append(np.concatenate([np.array(before, dtype), text_ids, np.array(after, dtype)]))
  return EncodedBatch(
    ids=all_ids, prompts=prompts, straddling=straddling, unknown_chars=unknown_chars
  )


def _special_ids(
  example: Example, info: TokenizerInfo, text_ids: np.ndarray
) -> tuple[list[int], list[int]]:
  """Return the special ids before and after the tokens of an example's text.

  A document ends with the end token, which is learned. The first token of a text is predicted from
  the end token of the previous document, so no second one is added there. If bos differs from the
  end token, the document begins with bos (`bos text eos`). The first token of the text, or of the
  prompt, then follows bos, and bos itself is never a target. If the text already begins with bos,
  or if the tokenizer adds bos itself, it is not added again.
  """
  if example.label is not None:
    return info.before, info.after
  before = [] if info.before == [info.eos_id] else info.before
  if info.bos_id is not None and before in ([], [info.bos_id]):
    before = [] if text_ids[:1].tolist() == [info.bos_id] else [info.bos_id]
  return before, info.after if info.after[-1:] == [info.eos_id] else [*info.after, info.eos_id]


def _split_long_text(text: str, info: TokenizerInfo) -> list[str]:
  """Split a long text into chunks that encode to the same tokens.

  The chunks use all cores and little memory.

  GPT-2's pre-tokenizer, which is ByteLevel in the tokenizers library, never merges text across a
  single blank between words. So a cut there changes no token. Other tokenizers get the whole text.
  """
  if len(text) <= MAX_BATCH_CHARS or not info.splits_at_spaces:
    return [text]
  chunks = []
  start = 0
  while blank := WORD_BOUNDARY.search(text, start + MAX_BATCH_CHARS // 8):
    chunks.append(text[start : blank.start()])
    start = blank.start()
  return [*chunks, text[start:]]


def _splits_at_spaces(spec: Json) -> bool:
  has_spaces = any(" " in added["content"] for added in spec["added_tokens"])
  if spec["normalizer"] is not None or has_spaces:
    return False
  split = spec["pre_tokenizer"] or {}
  byte_level = split.get("type") == "ByteLevel"
  return byte_level and not split.get("add_prefix_space") and split.get("use_regex", True)


def encode_in_memory(
  examples: Iterable[Example], tokenizer: "PreTrainedTokenizerBase", labels: Sequence[str] = ()
) -> TokenArrays:
  """Encode examples in memory, without the token cache.

  Args:
    examples: the examples to encode.
    tokenizer: the model's tokenizer.
    labels: the classes of the model; the label of an example becomes an index into them.

  Raises:
    RequestError: a label matches none of `labels`.
  """
  dtype = ids_dtype(tokenizer)
  ids, prompts, example_labels = [], [], []
  for batch, encoded in encode_batches(examples, tokenizer, dtype):
    example_labels += [example.label for example in batch if example.label is not None]
    ids += encoded.ids
    prompts += encoded.prompts
  names = sorted(set(example_labels))
  label_ids = dict(zip(names, class_ids(names, labels), strict=True))
  return TokenArrays(
    ids=np.concatenate([np.zeros(0, dtype), *ids]),
    starts_N1=np.cumsum([0, *map(len, ids)], dtype=np.int64),
    prompts_N=np.array(prompts, np.int32),
    labels_N=np.array([label_ids[label] for label in example_labels], np.int32),
    nats_N=np.zeros(0, np.float64),
  )


def encode_batches(
  examples: Iterable[Example], tokenizer: "PreTrainedTokenizerBase", dtype: np.dtype
) -> Iterator[tuple[list[Example], EncodedBatch]]:
  """Yield the examples in encoded batches.

  Another thread encodes the next batch meanwhile.
  """
  info = TokenizerInfo(tokenizer)
  pending = None
  with ThreadPoolExecutor(1) as worker:  # the tokenizer releases the GIL
    for batch in _batched(examples, lambda example: len(example.text)):
      future = worker.submit(encode_examples, batch, info, dtype)
      if pending:
        yield pending[0], pending[1].result()
      pending = batch, future
    if pending:
      yield pending[0], pending[1].result()


def _batched(items: Iterable[Item], num_chars: Callable[[Item], int]) -> Iterator[list[Item]]:
  """Yield the items in batches for the tokenizer.

  A batch has enough items for every core, but a limited amount of text.
  """
  batch = []
  size = 0
  for item in items:
    batch.append(item)
    size += num_chars(item)
    if len(batch) == MAX_BATCH_EXAMPLES or size > MAX_BATCH_CHARS:
      yield batch
      batch = []
      size = 0
  if batch:
    yield batch
