"""The tokenizer of a Hugging Face folder: read, looked at, and written so that transformers 4 and 5 and other tools read it.

What AutoTokenizer returns is not believed: of a folder without a vocabulary transformers 5 makes a tokenizer of one token, and
of a vocab.json without its merges one that spells every word (5.24, measured).
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import Tokenizer, decoders
from tokenizers.pre_tokenizers import ByteLevel

from jaxft.errors import RequestError, first_line
from jaxft.utils.files import write_json

CONFIG_FILE = "tokenizer_config.json"
# Copied where a tokenizer was read from one, beside the tokenizer.json that is always written.
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.model")
# A folder with one of them has a tokenizer.
VOCAB_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", *SENTENCEPIECE)
# All that `save_tokenizer` may write.
TOKENIZER_FILES = (
  "tokenizer.json",
  CONFIG_FILE,
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "vocab.txt",
)
TOKENIZER_FILES += (*SENTENCEPIECE, "chat_template.jinja")
# transformers 4 and 5 both know it, and it takes everything from tokenizer.json. 5 saves TokenizersBackend, unknown to 4.
GENERIC_CLASS = "PreTrainedTokenizerFast"
# Arguments of a loader, which transformers 5 writes too: they say where a file was, not what the tokenizer is.
LOADER_KEYS = (
  "is_local local_files_only name_or_path tokenizer_file vocab_file merges_file special_tokens_map_file added_tokens_file "
  "auto_map trust_remote_code backend files_loaded device_map slow_tokenizer_class use_fast from_slow cache_dir revision token"
).split()
SPECIAL_TOKENS = (
  "bos_token",
  "eos_token",
  "unk_token",
  "sep_token",
  "pad_token",
  "cls_token",
  "mask_token",
)
SAMPLE_SIZE = 1000  # tokens of a vocabulary that are looked at
REPLACEMENT_CHAR = "\ufffd"
# Every byte that UTF-8 has, and texts as they come.
CODE_POINTS = itertools.chain(
  range(128),
  range(0x80, 0x800, 0x41),
  range(0x800, 0xD800, 0x3F1),
  range(0xE000, 0x10000, 0x7F1),
  range(0x10000, 0x110000, 0x8F2F),
)
PROBE_TEXTS = (
  "".join(map(chr, CODE_POINTS)),
  "The miller found a bell; it wasn't hers. She slept until 12:30, didn't she?",
  "  two blanks,\ttab,\n\nlines\r\n and   more  ",
  "naïve café, Straße, ÅNGSTRÖM, déjà vu, Ω ≈ 3.14159",
  "東京は日本の首都です。 Привет, мир! مرحبا बिल्ली 🐈‍⬛👍🏽",
  "def f(x): return x**2 == {'a': [1, 2]}  # https://example.org/?q=a&b=c",
)


def load_tokenizer(folder: Path, V: int) -> Any:
  """The tokenizer of a folder, as transformers loads it; it reads text back, or is refused.

  Args:
    V: rows of the model's table.

  Raises RequestError for a folder without a vocabulary, for one whose tokens no text gives, or that contradicts itself, and for
  a tokenizer without an end token or with more tokens than the table has rows.
  """
  from transformers import (
    AutoTokenizer,  # most of a second to import: a mistyped config should not wait for it
  )

  try:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not hasattr(tokenizer, "backend_tokenizer"):
      raise TypeError(f"{type(tokenizer).__name__} is no tokenizer of one text")
    tokenizer = _prefer_tokenizer_json(tokenizer, folder)
  except Exception as error:  # transformers raises whatever its readers raise
    raise RequestError(
      f"{folder}: no tokenizer that can be read ({first_line(error)}); the folder needs "
      "tokenizer.json, or vocab.json and merges.txt"
    ) from error
  # A folder that a Trainer has saved may hold the length it cut texts to, or padded them to.
  tokenizer.backend_tokenizer.no_truncation()
  tokenizer.backend_tokenizer.no_padding()
  if (
    isinstance(tokenizer.backend_tokenizer.pre_tokenizer, ByteLevel)
    and not tokenizer.backend_tokenizer.decoder
  ):
    # Without it a text comes back with a letter for each byte: "Ġthe" for " the".
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
  if fault := _vocab_error(tokenizer, folder):
    raise RequestError(f"{folder}: {fault}")
  if tokenizer.eos_token_id is None:
    raise RequestError(f"{folder}: the tokenizer has no end token; set eos_token in {CONFIG_FILE}")
  largest = max(tokenizer.get_vocab().values())
  if largest >= V:
    raise RequestError(
      f"{folder}: the tokenizer has {len(tokenizer)} tokens, up to id {largest}, and the model's table only {V} rows; "
      "python -m jaxft.tokenizer --model MODEL --add TOKEN makes room for tokens in a model; for new weights set "
      f"config.model.config_overrides=vocab_size={largest + 1}"
    )
  return tokenizer


def _prefer_tokenizer_json(tokenizer: Any, folder: Path) -> Any:
  """`tokenizer`, or what tokenizer.json says where the class that transformers 5 took for it cuts a text into other tokens.

  Classes of transformers 5, such as GPT2Tokenizer, take the vocabulary from tokenizer.json and the rest from their own code;
  those of transformers 4 take all of it but add_prefix_space (5.24 and 4.57, measured).
  """
  file = folder / "tokenizer.json"
  if not file.is_file() or type(tokenizer).__name__ in (GENERIC_CLASS, "TokenizersBackend"):
    return tokenizer
  said = Tokenizer.from_file(str(file))
  said.no_truncation()
  # Whether a text gets a blank before it is the class's or tokenizer_config.json's to say, in transformers 4 too.
  file_way, class_way = said.pre_tokenizer, tokenizer.backend_tokenizer.pre_tokenizer
  if isinstance(file_way, ByteLevel) and isinstance(class_way, ByteLevel):
    file_way.add_prefix_space = class_way.add_prefix_space
  if all(_encode(said, text) == _encode(tokenizer.backend_tokenizer, text) for text in PROBE_TEXTS):
    return tokenizer
  from transformers import PreTrainedTokenizerFast

  return PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)


def _vocab_error(tokenizer: Any, folder: Path) -> str:
  """Why this cannot be the tokenizer of a model; "" where nothing speaks against it."""
  vocabulary, added = tokenizer.get_vocab(), tokenizer.backend_tokenizer.get_added_tokens_decoder()
  ordinary = [id for id in sorted(vocabulary.values()) if id not in added or not added[id].special]
  needs = (
    "the folder needs tokenizer.json, or vocab.json and merges.txt, as its model was saved with"
  )
  if (folder / "encoder.json").is_file() and (folder / "vocab.bpe").is_file():
    needs = "rename encoder.json to vocab.json, and vocab.bpe to merges.txt"
  unknown = tokenizer.unk_token_id
  some = ordinary[:: max(1, len(ordinary) // SAMPLE_SIZE)]
  texts = tokenizer.backend_tokenizer.decode_batch([[id] for id in some], skip_special_tokens=False)
  if not any(text.strip() for id, text in zip(some, texts, strict=True) if id != unknown):
    return f"no tokenizer: {len(vocabulary)} tokens, and none of them is text; {needs}"
  words = [(id, text) for id, text in zip(some, texts, strict=True) if _is_word(text)]
  if len(words) > 9 and not any(
    _encode(tokenizer.backend_tokenizer, text) == [id] for id, text in words
  ):
    return (
      f"the tokenizer cuts {words[-1][1]!r}, and every other of its tokens that was tried, into pieces: its merges are "
      f"missing, or of another vocabulary; {needs}"
    )
  return _added_tokens_error(vocabulary, folder / "added_tokens.json")


def _is_word(text: str) -> bool:
  return len(text.strip()) > 1 and REPLACEMENT_CHAR not in text


def _added_tokens_error(vocabulary: dict[str, int], file: Path) -> str:
  """How added_tokens.json, which transformers 5 does not read beside a tokenizer.json, contradicts the tokenizer."""
  if not file.is_file():
    return ""
  try:
    said = json.loads(file.read_text(encoding="utf-8"))
    other = [(token, id) for token, id in said.items() if vocabulary.get(token, id) != id]
  except (OSError, ValueError, RecursionError, AttributeError) as error:
    return f"{file.name}: {first_line(error)}"
  return "".join(
    f"{file.name} says {token!r} is {id}, and the tokenizer {vocabulary[token]}"
    for token, id in other[:1]
  )


def _encode(backend: Tokenizer, text: str, add_special_tokens: bool = False) -> list[int]:
  return backend.encode(text, add_special_tokens=add_special_tokens).ids


def fingerprint(tokenizer: Any) -> str:
  """Changes with whatever changes the tokens of a text: vocabulary, rules, the tokens that begin and end one."""
  begin, end = bos_token_id(tokenizer), tokenizer.eos_token_id
  # Since 2026-11-29 documents begin with a bos token that is not the end token: tokens from before lack it.
  said = (
    json.dumps([begin, end, *(["begins"] if begin != end else [])])
    + tokenizer.backend_tokenizer.to_str()
  )
  return hashlib.sha256(said.encode()).hexdigest()


def save_tokenizer(
  tokenizer: Any,
  source: Path,
  out: Path,
  more: Mapping[str, Any] = MappingProxyType({}),
  *,
  positions: int,
  pad_token_id: int | None,
) -> None:
  """Writes the files of a tokenizer: the same ids in transformers 4 and 5, and what converters look for beside them.

  Args:
    source: the folder that it was read from, whose tokenizer_config.json is taken over but for what is untrue of `out`.
    more: for tokenizer_config.json.
    positions: of the model: the length that `truncation=True` cuts to, unless the source names a shorter one.
    pad_token_id: of the model's config.json: its token is the padding token, where the tokenizer has none and it is a special
      token. An ordinary one would vanish from texts, as what transformers takes for special does.
  """
  backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
  model, added = backend["model"], tokenizer.backend_tokenizer.get_added_tokens_decoder()
  merges = model.get("merges") or []
  if merges and not any(isinstance(merge, str) or " " in "".join(merge) for merge in merges):
    model["merges"] = [" ".join(merge) for merge in merges]  # what tokenizers before 0.20 read
  write_json(out / "tokenizer.json", backend)

  named = _special_tokens(tokenizer, backend, pad_token_id)
  extra = [str(token) for token in getattr(tokenizer, "extra_special_tokens", ()) or ()]
  about = {key: value for key, value in _read_config(source).items() if key not in LOADER_KEYS}
  if not isinstance(
    about.get("extra_special_tokens"), dict
  ):  # transformers 4 cannot read a list there
    about.pop("extra_special_tokens", None)
  about.pop("add_prefix_space", None)
  if "add_prefix_space" in (backend["pre_tokenizer"] or {}):  # else transformers 4 sets its own
    about["add_prefix_space"] = backend["pre_tokenizer"]["add_prefix_space"]
  longest = about.get("model_max_length")
  longest = min(positions, longest) if isinstance(longest, int) and longest > 0 else positions
  about |= named | {
    "tokenizer_class": _tokenizer_class(about, tokenizer),
    "model_max_length": int(longest),
  }
  about |= ({"additional_special_tokens": extra} if extra else {}) | dict(more)
  # A class of transformers 4 gives token_type_ids unless told not to, and GPT-2 adds their embeddings to a text's.
  about["model_input_names"] = ["input_ids", "attention_mask"]
  about.setdefault("clean_up_tokenization_spaces", bool(tokenizer.clean_up_tokenization_spaces))
  about["added_tokens_decoder"] = {
    str(id): _token_to_dict(token) for id, token in sorted(added.items())
  }
  write_json(out / CONFIG_FILE, about)
  write_json(
    out / "special_tokens_map.json", named | ({"additional_special_tokens": extra} if extra else {})
  )

  files = _legacy_vocab_files(backend)
  for name, text in files.items():
    (out / name).write_text(text, encoding="utf-8")
  beyond = {
    token.content: id
    for id, token in sorted(added.items())
    if token.content not in (model.get("vocab") or {})
  }
  if files and beyond:
    write_json(out / "added_tokens.json", beyond)
  for name in (*SENTENCEPIECE, "chat_template.jinja"):
    if (source / name).is_file():
      shutil.copyfile(source / name, out / name)


def _special_tokens(
  tokenizer: Any, backend: dict[str, Any], pad_token_id: int | None
) -> dict[str, str]:
  """The special tokens by name. Converters ask for one that begins a text, and for an unknown one: where the tokenizer has none
  it is the end token, from which jaxft begins a text too."""
  named = {
    name: str(token) for name in SPECIAL_TOKENS if (token := getattr(tokenizer, name)) is not None
  }
  model = backend["model"]
  unknown = model.get("unk_token")
  if unknown is None and isinstance(model.get("unk_id"), int):
    unknown = model["vocab"][model["unk_id"]][0]
  named.setdefault("bos_token", named["eos_token"])
  named.setdefault("unk_token", unknown or named["eos_token"])
  if is_special(tokenizer, pad_token_id):
    named.setdefault("pad_token", tokenizer.convert_ids_to_tokens(pad_token_id))
  return named


def is_special(tokenizer: Any, id: Any) -> bool:
  """Whether a token is none that a text is made of."""
  if not isinstance(id, int):  # null in a config.json
    return False
  added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
  return (
    added[id].special if id in added else id in (tokenizer.eos_token_id, tokenizer.pad_token_id)
  )


def _tokenizer_class(about: dict[str, Any], tokenizer: Any) -> str:
  """The class that the source names, where both transformers 4 and 5 have it and 5 took it; else one that takes any."""
  import transformers

  name = str(about.get("tokenizer_class") or type(tokenizer).__name__)
  taken = name.removesuffix("Fast") == type(tokenizer).__name__.removesuffix("Fast")
  return (
    name
    if taken and not name.endswith("Backend") and hasattr(transformers, name)
    else GENERIC_CLASS
  )


def _legacy_vocab_files(backend: dict[str, Any]) -> dict[str, str]:
  """The vocabulary in the files that tools from before tokenizer.json read, where they can say all of it."""
  model = backend["model"]
  vocabulary = model.get("vocab")
  if not isinstance(vocabulary, dict) or sorted(vocabulary.values()) != list(
    range(len(vocabulary))
  ):
    return {}
  if model["type"] == "WordPiece" and not any("\n" in token for token in vocabulary):
    return {"vocab.txt": "".join(token + "\n" for token in sorted(vocabulary, key=vocabulary.get))}
  way = backend["pre_tokenizer"] or {}
  as_gpt2 = (
    way.get("type") == "ByteLevel" and way.get("use_regex", True) and not backend["normalizer"]
  )
  if (
    model["type"] == "BPE" and as_gpt2 and all(isinstance(merge, str) for merge in model["merges"])
  ):
    merges = "".join(merge + "\n" for merge in model["merges"])
    return {
      "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
      "merges.txt": f"#version: 0.2\n{merges}",
    }
  return {}


def verify_tokenizer(folder: Path, tokenizer: Any, source: Path) -> None:
  """Raises RequestError where transformers reads the tokenizer of `source` that was written to `folder` as another one."""
  from transformers import AutoTokenizer

  again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
  both = [one.backend_tokenizer.get_added_tokens_decoder().values() for one in (tokenizer, again)]
  special = sorted({str(token.content) for tokens in both for token in tokens})
  what = f"{source}: its tokenizer cannot be written"
  for text in (
    *PROBE_TEXTS,
    *(f"word{token}word {token}, {token} {token}" for token in special[:20]),
  ):
    for how in (False, True):
      wanted, found = (_encode(one.backend_tokenizer, text, how) for one in (tokenizer, again))
      if wanted != found:
        raise RequestError(
          f"{what}: transformers reads {text[:60]!r} back as {len(found)} other tokens ({found[:8]} ..., not {wanted[:8]} ...)"
        )
    if tokenizer.decode(wanted, skip_special_tokens=True) != again.decode(
      wanted, skip_special_tokens=True
    ):
      raise RequestError(f"{what}: transformers makes another text of the tokens of {text[:60]!r}")
  for name, wanted in (
    ("bos_token_id", bos_token_id(tokenizer)),
    ("eos_token_id", tokenizer.eos_token_id),
  ):
    if getattr(again, name) != wanted:
      raise RequestError(f"{what}: {name} is {getattr(again, name)} when read back, not {wanted}")


def bos_token_id(tokenizer: Any) -> int:
  """The token that begins a text: the tokenizer's own, else the end token."""
  return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _read_config(source: Path) -> dict[str, Any]:
  try:
    about = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):  # there need not be one
    return {}
  return about if isinstance(about, dict) else {}


def _token_to_dict(token: Any) -> dict[str, Any]:
  fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
  return {field: getattr(token, field) for field in fields}
