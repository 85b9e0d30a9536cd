"""Loads, checks and saves a Hugging Face folder's tokenizer.

Both transformers 4 and 5 can read the saved files.

We check what AutoTokenizer returns. For a folder without a vocabulary, transformers 5 makes a
tokenizer of one token. For a vocab.json without merges it makes one that splits every word into
characters (5.24, measured).
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.pre_tokenizers import ByteLevel

from jaxft.errors import RequestError, first_line
from jaxft.utils import environment
from jaxft.utils.files import read_json_object, write_json
from jaxft.utils.types import Json

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

CONFIG_FILE = "tokenizer_config.json"
# Copied if the source folder has one. tokenizer.json is always written as well.
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.model")
# A folder with one of these files has a tokenizer.
VOCAB_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", *SENTENCEPIECE)
# All files that `save_tokenizer` may write.
TOKENIZER_FILES = ("tokenizer.json", CONFIG_FILE, "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES += ("vocab.json", "merges.txt", "vocab.txt", *SENTENCEPIECE, "chat_template.jinja")
# A class of both transformers 4 and 5 that reads everything from tokenizer.json. transformers 5
# would save TokenizersBackend, which 4 lacks.
GENERIC_CLASS = "PreTrainedTokenizerFast"
# Loader arguments that transformers 5 also writes to tokenizer_config.json. They describe where a
# file was, not the tokenizer.
LOADER_KEYS = (
  "is_local local_files_only name_or_path tokenizer_file vocab_file merges_file "
  "special_tokens_map_file added_tokens_file auto_map trust_remote_code backend files_loaded "
  "device_map slow_tokenizer_class use_fast from_slow cache_dir revision token"
).split()
SPECIAL_TOKENS = tuple(
  f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
SAMPLE_SIZE = 1000  # number of tokens that `_vocab_error` tries
REPLACEMENT_CHAR = "\ufffd"
# Texts that compare two tokenizers: every byte of UTF-8, and ordinary texts.
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


def load_tokenizer(folder: Path, V: int) -> "PreTrainedTokenizerFast":
  """Load a folder's tokenizer, and check that it can tokenize text.

  Args:
    folder: the folder with the tokenizer's files.
    V: number of rows of the model's vocabulary table.

  Raises:
    RequestError: the folder has no vocabulary, or its files contradict each other. Or the tokenizer
      has no end token, has more than V tokens, or cannot produce its own tokens from text.
  """
  try:
    tokenizer = _prefer_tokenizer_json(_from_pretrained(folder), folder)
  except Exception as error:  # transformers' readers raise many classes
    raise RequestError(
      f"{folder}: cannot read a tokenizer ({first_line(error)}); the folder needs "
      "tokenizer.json, or vocab.json and merges.txt"
    ) from error
  backend = tokenizer.backend_tokenizer
  # A tokenizer saved by HF's Trainer may still truncate or pad to the length used in training.
  backend.no_truncation()
  backend.no_padding()
  if isinstance(backend.pre_tokenizer, ByteLevel) and not backend.decoder:
    # Without a decoder, text decodes to one letter per byte: "Ġthe" for " the".
    backend.decoder = decoders.ByteLevel()
  if reason := _vocab_error(tokenizer, folder):
    raise RequestError(f"{folder}: {reason}")
  if tokenizer.eos_token_id is None:
    raise RequestError(f"{folder}: the tokenizer has no end token; set eos_token in {CONFIG_FILE}")
  largest = max(tokenizer.get_vocab().values())
  if largest >= V:
    raise RequestError(
      f"{folder}: the tokenizer has {len(tokenizer)} tokens, up to id {largest}, but the model's "
      f"table has only {V} rows; to add rows, run python -m jaxft.tokenizer --model MODEL --add "
      f"TOKEN; for new weights, set config.model.config_overrides=vocab_size={largest + 1}"
    )
  return tokenizer


def _from_pretrained(folder: Path) -> "PreTrainedTokenizerFast":
  environment.quiet_transformers()
  # The import takes most of a second. Errors in a config should appear before that.
  from transformers import AutoTokenizer, PreTrainedTokenizerFast

  tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
  if not isinstance(tokenizer, PreTrainedTokenizerFast):
    raise TypeError(f"{type(tokenizer).__name__} is not a fast (Rust) tokenizer")
  return tokenizer


def _prefer_tokenizer_json(
  tokenizer: "PreTrainedTokenizerFast", folder: Path
) -> "PreTrainedTokenizerFast":
  """Return `tokenizer`, or that of tokenizer.json if the two differ on texts.

  Classes of transformers 5, such as GPT2Tokenizer, read the vocabulary from tokenizer.json and
  define the rest in code. Those of transformers 4 read everything except add_prefix_space from the
  file (5.24 and 4.57, measured).
  """
  file = folder / "tokenizer.json"
  if not file.is_file() or type(tokenizer).__name__ in (GENERIC_CLASS, "TokenizersBackend"):
    return tokenizer
  from_file = Tokenizer.from_file(str(file))
  from_file.no_truncation()
  # The class or tokenizer_config.json decides whether a space is put before a text, in
  # transformers 4 too. So that is not a difference.
  backend = tokenizer.backend_tokenizer
  file_pre = from_file.pre_tokenizer
  class_pre = backend.pre_tokenizer
  if isinstance(file_pre, ByteLevel) and isinstance(class_pre, ByteLevel):
    file_pre.add_prefix_space = class_pre.add_prefix_space
  if all(_encode(from_file, text) == _encode(backend, text) for text in PROBE_TEXTS):
    return tokenizer
  from transformers import PreTrainedTokenizerFast

  return PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)


def _vocab_error(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> str:
  """Return the reason why this cannot be a model's tokenizer, or ""."""
  vocab = tokenizer.get_vocab()
  backend = tokenizer.backend_tokenizer
  added = backend.get_added_tokens_decoder()
  ordinary = [id for id in sorted(vocab.values()) if id not in added or not added[id].special]
  advice = "the folder needs tokenizer.json, or vocab.json and merges.txt, from the original model"
  if (folder / "encoder.json").is_file() and (folder / "vocab.bpe").is_file():
    advice = "rename encoder.json to vocab.json, and vocab.bpe to merges.txt"
  sample = ordinary[:: max(1, len(ordinary) // SAMPLE_SIZE)]
  texts = backend.decode_batch([[id] for id in sample], skip_special_tokens=False)
  decoded = list(zip(sample, texts, strict=True))
  unknown = tokenizer.unk_token_id
  if not any(text.strip() for id, text in decoded if id != unknown):
    return f"not a usable tokenizer: its {len(vocab)} tokens contain no text; {advice}"
  words = [(id, text) for id, text in decoded if _is_word(text)]
  if len(words) > 9 and not any(_encode(backend, text) == [id] for id, text in words):
    return (
      f"the tokenizer splits {words[-1][1]!r}, which is one of its tokens, and all others that we "
      f"tried: its merges are missing or belong to another vocabulary; {advice}"
    )
  return _added_tokens_error(vocab, folder / "added_tokens.json")


def _is_word(text: str) -> bool:
  return len(text.strip()) > 1 and REPLACEMENT_CHAR not in text


def _added_tokens_error(vocab: dict[str, int], file: Path) -> str:
  """Return how added_tokens.json contradicts the tokenizer, or "".

  transformers 5 ignores that file if a tokenizer.json exists.
  """
  if not file.is_file():
    return ""
  try:
    added = json.loads(file.read_text(encoding="utf-8"))
    other = [(token, id) for token, id in added.items() if vocab.get(token, id) != id]
  except (OSError, ValueError, RecursionError, AttributeError) as error:
    return f"{file.name}: {first_line(error)}"
  return "".join(
    f"{token!r} is {id} in {file.name}, but {vocab[token]} in the tokenizer"
    for token, id in other[:1]
  )


def _encode(backend: Tokenizer, text: str, add_special_tokens: bool = False) -> list[int]:
  return backend.encode(text, add_special_tokens=add_special_tokens).ids


def fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
  """Return a hash of everything that affects a text's tokens.

  That is the vocabulary, the rules, and the begin and end tokens.
  """
  begin = bos_token_id(tokenizer)
  end = tokenizer.eos_token_id
  # Since 2026-11-29, documents start with the begin token if it differs from the end token. The
  # extra entry invalidates token caches from before.
  content = json.dumps([begin, end, *(["begins"] if begin != end else [])])
  content += tokenizer.backend_tokenizer.to_str()
  return hashlib.sha256(content.encode()).hexdigest()


def save_tokenizer(
  tokenizer: "PreTrainedTokenizerFast",
  source: Path,
  out: Path,
  more: Mapping[str, object] = MappingProxyType({}),
  *,
  positions: int,
  pad_token_id: int | None,
) -> None:
  """Write a tokenizer for transformers 4 and 5 and for converters.

  Args:
    tokenizer: from `load_tokenizer`.
    source: the folder that it was read from. Its tokenizer_config.json is copied, except for keys
      that are not true of `out`.
    out: an existing folder.
    more: further keys of tokenizer_config.json.
    positions: the model's number of positions. `truncation=True` truncates to it, or to a shorter
      length that `source` sets.
    pad_token_id: from the model's config.json. It becomes the padding token if it is special and
      the tokenizer has no padding token. An ordinary token cannot, because transformers would then
      drop it from texts.
  """
  backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
  model = backend["model"]
  added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
  merges = model.get("merges") or []
  if merges and not any(isinstance(merge, str) or " " in "".join(merge) for merge in merges):
    model["merges"] = [" ".join(merge) for merge in merges]  # the format before tokenizers 0.20
  write_json(out / "tokenizer.json", backend)

  special = _special_tokens(tokenizer, backend, pad_token_id)
  extra = [str(token) for token in getattr(tokenizer, "extra_special_tokens", ()) or ()]
  additional = {"additional_special_tokens": extra} if extra else {}
  config = read_json_object(source / CONFIG_FILE, [])  # optional
  config = {key: value for key, value in config.items() if key not in LOADER_KEYS}
  # transformers 4 cannot read a list under this key.
  if not isinstance(config.get("extra_special_tokens"), dict):
    config.pop("extra_special_tokens", None)
  config.pop("add_prefix_space", None)
  if "add_prefix_space" in (backend["pre_tokenizer"] or {}):  # transformers 4 would set its default
    config["add_prefix_space"] = backend["pre_tokenizer"]["add_prefix_space"]
  length = config.get("model_max_length")
  length = min(positions, length) if isinstance(length, int) and length > 0 else positions
  config |= special
  tokenizer_class = _tokenizer_class(config, tokenizer)
  config |= {"tokenizer_class": tokenizer_class, "model_max_length": length, **additional, **more}
  # Classes of transformers 4 return token_type_ids by default, and GPT-2 would add the embeddings
  # of these ids to those of the text.
  config["model_input_names"] = ["input_ids", "attention_mask"]
  config.setdefault("clean_up_tokenization_spaces", bool(tokenizer.clean_up_tokenization_spaces))
  config["added_tokens_decoder"] = {
    str(id): _token_to_dict(token) for id, token in sorted(added.items())
  }
  write_json(out / CONFIG_FILE, config)
  write_json(out / "special_tokens_map.json", special | additional)

  files = _legacy_vocab_files(backend)
  for name, text in files.items():
    (out / name).write_text(text, encoding="utf-8")
  vocab = model.get("vocab") or {}
  added_ids = {
    token.content: id for id, token in sorted(added.items()) if token.content not in vocab
  }
  if files and added_ids:
    write_json(out / "added_tokens.json", added_ids)
  for name in (*SENTENCEPIECE, "chat_template.jinja"):
    if (source / name).is_file():
      shutil.copyfile(source / name, out / name)


def _special_tokens(
  tokenizer: "PreTrainedTokenizerFast", backend: Json, pad_token_id: int | None
) -> dict[str, str]:
  """Return the special tokens by name.

  Converters require a begin token and an unknown token. If the tokenizer lacks one, the end token
  is used. jaxft starts texts with it too.
  """
  special = {
    name: str(token) for name in SPECIAL_TOKENS if (token := getattr(tokenizer, name)) is not None
  }
  model = backend["model"]
  unknown = model.get("unk_token")
  if unknown is None and isinstance(model.get("unk_id"), int):
    unknown = model["vocab"][model["unk_id"]][0]
  special.setdefault("bos_token", special["eos_token"])
  special.setdefault("unk_token", unknown or special["eos_token"])
  if pad_token_id is not None and is_special(tokenizer, pad_token_id):
    special.setdefault("pad_token", str(tokenizer.convert_ids_to_tokens(pad_token_id)))
  return special


def is_special(tokenizer: "PreTrainedTokenizerFast", id: object) -> bool:
  """Return whether this is a special token, which ordinary text never contains."""
  if not isinstance(id, int):  # null in a config.json
    return False
  added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
  if id in added:
    return added[id].special
  return id in (tokenizer.eos_token_id, tokenizer.pad_token_id)


def _tokenizer_class(config: Json, tokenizer: "PreTrainedTokenizerFast") -> str:
  """Return the class for tokenizer_config.json.

  It is the class that the source names, if transformers 4 and 5 both have it and 5 loaded it.
  Otherwise it is `GENERIC_CLASS`.
  """
  import transformers

  name = str(config.get("tokenizer_class") or type(tokenizer).__name__)
  same = name.removesuffix("Fast") == type(tokenizer).__name__.removesuffix("Fast")
  usable = same and not name.endswith("Backend") and hasattr(transformers, name)
  return name if usable else GENERIC_CLASS


def _legacy_vocab_files(backend: Json) -> dict[str, str]:
  """Return vocabulary files for tools older than tokenizer.json, as {name: text}.

  Returns {} if these formats cannot express the tokenizer exactly.
  """
  model = backend["model"]
  vocab = model.get("vocab")
  if not isinstance(vocab, dict) or sorted(vocab.values()) != list(range(len(vocab))):
    return {}
  if model["type"] == "WordPiece" and not any("\n" in token for token in vocab):
    return {"vocab.txt": "".join(token + "\n" for token in sorted(vocab, key=vocab.__getitem__))}
  pre = backend["pre_tokenizer"] or {}
  byte_level = pre.get("type") == "ByteLevel" and pre.get("use_regex", True)
  as_gpt2 = byte_level and not backend["normalizer"]
  if model["type"] == "BPE" and as_gpt2 and all(isinstance(m, str) for m in model["merges"]):
    merges = "".join(merge + "\n" for merge in model["merges"])
    vocab_json = json.dumps(vocab, ensure_ascii=False)
    return {"vocab.json": vocab_json, "merges.txt": f"#version: 0.2\n{merges}"}
  return {}


def verify_tokenizer(folder: Path, tokenizer: "PreTrainedTokenizerFast", source: Path) -> None:
  """Check that transformers reads a saved tokenizer back unchanged.

  Args:
    folder: the folder that it was saved in.
    tokenizer: the tokenizer that was saved.
    source: the folder that it was loaded from, for the message.

  Raises:
    RequestError: a text or a special token has different ids when read back.
  """
  again = _from_pretrained(folder)
  backends = [tokenizer.backend_tokenizer, again.backend_tokenizer]
  added = [token for it in backends for token in it.get_added_tokens_decoder().values()]
  special = sorted({token.content for token in added})
  what = f"{source}: its tokenizer cannot be exported"
  for text in (*PROBE_TEXTS, *(f"word{t}word {t}, {t} {t}" for t in special[:20])):
    for add_special_tokens in (False, True):
      expected, actual = (_encode(backend, text, add_special_tokens) for backend in backends)
      if expected != actual:
        raise RequestError(
          f"{what}: read back by transformers, it splits {text[:60]!r} into {len(actual)} other "
          f"tokens ({actual[:8]} ..., not {expected[:8]} ...)"
        )
    if tokenizer.decode(expected, skip_special_tokens=True) != again.decode(
      expected, skip_special_tokens=True
    ):
      raise RequestError(
        f"{what}: read back by transformers, it decodes the tokens of {text[:60]!r} differently"
      )
  ids = {"bos_token_id": bos_token_id(tokenizer), "eos_token_id": tokenizer.eos_token_id}
  for name, id in ids.items():
    if getattr(again, name) != id:
      raise RequestError(f"{what}: {name} is {getattr(again, name)} when read back, not {id}")


def bos_token_id(tokenizer: "PreTrainedTokenizerFast") -> int:
  """Return the id of the begin token; without one, that of the end token."""
  return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _token_to_dict(token: AddedToken) -> dict[str, object]:
  fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
  return {field: getattr(token, field) for field in fields}
