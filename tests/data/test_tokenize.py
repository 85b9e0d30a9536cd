"""Token ids are transformers' own, however long the text and whatever tokenizer.json carries."""

import json
import shutil

import numpy as np
import pytest
import tiny

import jaxft.hf.tokenizer
from jaxft.data import tokenize
from jaxft.data.formats import Example

EOS = 0


@pytest.mark.parametrize("seed", range(20))
def test_long_text_in_chunks_has_the_same_tokens(tmp_path, monkeypatch, seed):
  tokenizer = jaxft.hf.tokenizer.load_tokenizer(tiny.write_gpt2_bpe(tmp_path), 50257)
  rng = np.random.default_rng(seed)
  pieces = [
    *tiny.PIECES,
    " ",
    " ",
    "\n",
    "'s",
    " 12",
    "\u3000",
    "\x1c",
    "<|endoftext|>",
    "don't",
    "\xa0x",
  ]
  text = "".join(pieces[i] for i in rng.integers(len(pieces), size=400))
  monkeypatch.setattr(tokenize, "MAX_BATCH_CHARS", 64)
  parts = tokenize._split_long_text(text, tokenize.TokenizerInfo(tokenizer))
  assert "".join(parts) == text and len(parts) > 10
  whole = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
  assert tokenize.encode_examples(
    [Example(text)], tokenize.TokenizerInfo(tokenizer), np.uint16
  ).ids[0].tolist() == [
    *whole,
    tokenizer.eos_token_id,
  ]


def test_saved_truncation_and_padding_are_ignored(folder, tmp_path):
  """What a trainer left in the tokenizer is not applied."""
  shutil.copytree(folder, tmp_path / "saved")
  saved = json.loads((folder / "tokenizer.json").read_text())
  saved["truncation"] = {
    "direction": "Right",
    "max_length": 5,
    "strategy": "LongestFirst",
    "stride": 0,
  }
  saved["padding"] = {
    "strategy": {"Fixed": 9},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": tiny.EOS,
  }
  (tmp_path / "saved" / "tokenizer.json").write_text(json.dumps(saved))
  texts = ["the cat sat on the mat and ran", "a"]
  plain, other = (
    tokenize.encode_in_memory(map(Example, texts), jaxft.hf.tokenizer.load_tokenizer(at, 293))
    for at in (folder, tmp_path / "saved")
  )
  np.testing.assert_array_equal(plain.ids, other.ids)


def test_token_ids_match_transformers(tmp_path):
  """Real GPT-2 BPE: digits, control characters, CJK, emoji, blanks, and strings of anything."""
  tokenizer = jaxft.hf.tokenizer.load_tokenizer(tiny.write_gpt2_bpe(tmp_path), 50257)
  rng = np.random.default_rng(0)
  planes = [
    (32, 127),
    (0, 32),
    (128, 0x250),
    (0x4E00, 0x9FFF),
    (0x1F300, 0x1FAFF),
    (0x600, 0x6FF),
    (0x2000, 0x2070),
  ]
  texts = []
  for _ in range(10_000):
    low, high = planes[rng.integers(len(planes))]
    words = [
      "".join(map(chr, rng.integers(low, high, rng.integers(1, 9))))
      for _ in range(rng.integers(1, 8))
    ]
    texts.append(str(rng.choice([" ", "  ", "\n", ""])).join(words))
  ours = tokenize.encode_in_memory([Example(text) for text in texts], tokenizer)
  expected = tokenizer(texts)["input_ids"]
  for i, ids in enumerate(expected):
    np.testing.assert_array_equal(
      ours.ids[ours.starts_N1[i] : ours.starts_N1[i + 1]], [*ids, 50256]
    )
  assert ours.ids.dtype == np.uint16


def test_token_byte_lengths_sum_to_the_text(tmp_path):
  tokenizer = jaxft.hf.tokenizer.load_tokenizer(tiny.write_gpt2_bpe(tmp_path), 50_304)
  lengths_V = tokenize.token_byte_lengths(tokenizer)
  for text in ("Hello world, naïve café 日本 🎉\n\n  x", "a" * 50, "", "<|endoftext|> b"):
    assert lengths_V[tokenizer(text)["input_ids"]].sum() == len(
      text.replace("<|endoftext|>", "").encode()
    )
  rows = [
    {
      "targets": np.array(tokenizer("naïve café")["input_ids"]),
      "mask": np.array([True] * 4 + [False]),
    }
  ]
  rows[0]["mask"] = np.arange(len(rows[0]["targets"])) > 0  # the first, "na", is no target
  assert tokenize.target_bytes(rows * 3, tokenizer, limit=2) == 2 * len("ïve café".encode())
