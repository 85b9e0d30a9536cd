"""Any folder's tokenizer reads text back, as its export does, or is refused before training."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from tokenizers import (
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)
from transformers import AutoTokenizer

import jaxft
import jaxft.hf.tokenizer
from jaxft.config import DataSection
from jaxft.data import dataset, tokenize
from jaxft.data.formats import Example
from jaxft.errors import RequestError
from jaxft.generation import sampler
from jaxft.hf import export, load_weights, repo, verify
from jaxft.model.compute import ComputeConfig
from jaxft.model.decoder import abstract_model
from jaxft.train import finetune

END, BEGIN, PAD, UNKNOWN = "<|endoftext|>", "<s>", "<pad>", "<unk>"
WORDPIECE = [
  "[PAD]",
  "[UNK]",
  "[CLS]",
  "[SEP]",
  "[MASK]",
  "the",
  "cat",
  "dog",
  "sat",
  "on",
  "mat",
  ".",
  "ran",
  "far",
]
rng = random.Random(7)
TEXTS = [tiny.story(rng) for _ in range(44)]
TEXTS += [
  "",
  " ",
  f"one{END}two",
  "12 bells: 東京 QUICK!",
  "\ttab\n\n  blanks ",
  "naïve\u0301 🐈‍⬛",
]


def wordpiece(folder):
  """A GPT-2 with BERT's tokenizer, as the Chinese ones have: vocab.txt alone."""
  tiny.write_gpt2(folder, seed=1, V=len(WORDPIECE), tokenizer=False)
  (folder / "vocab.txt").write_text("\n".join(WORDPIECE) + "\n")
  about = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "eos_token": "[SEP]"}
  (folder / "tokenizer_config.json").write_text(json.dumps(about))
  return folder


def trained(kind, special, alphabet=None):
  """A small tokenizer of one kind, learned from the stories."""
  texts = [tiny.story(random.Random(i)) for i in range(40)]
  if kind == "bytes" or kind == "gaps":
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    every = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else []
    trainer = trainers.BpeTrainer(
      vocab_size=340, special_tokens=special, initial_alphabet=every, show_progress=False
    )
    texts = texts if kind == "bytes" else ["the miller found a bell and slept"] * 9
  elif kind == "bpe":
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
      vocab_size=200, special_tokens=[*special, UNKNOWN], show_progress=False
    )
  elif kind == "wordpiece":
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer, tokenizer.decoder = (
      pre_tokenizers.BertPreTokenizer(),
      decoders.WordPiece(),
    )
    trainer = trainers.WordPieceTrainer(
      vocab_size=200, special_tokens=[*special, UNKNOWN], show_progress=False
    )
  else:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
      vocab_size=120, special_tokens=[*special, UNKNOWN], unk_token=UNKNOWN, show_progress=False
    )
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer


KINDS = ("bytes", "gaps", "bpe", "wordpiece", "unigram")
# What people's folders lack or have too much of.
CHANGES = (
  "none",
  "stale",
  "no tokenizer.json",
  "no merges",
  "config alone",
  "nothing",
  "contradiction",
  "trainer's",
)


def write_folder(folder, seed):
  """A random tokenizer folder: kind, post-processor, added tokens, class, and files."""
  tiny.write_gpt2(folder, seed=0, V=400, tokenizer=False)
  rng = random.Random(seed)
  kind = KINDS[seed % len(KINDS)]
  special = [END, BEGIN, PAD][: rng.randint(1, 3)]
  tokenizer = trained(kind, special)
  around = (
    rng.choice(["", "", "begin", "end", "both"]) if BEGIN in special else rng.choice(["", "end"])
  )
  if around:
    before, after = f"{BEGIN} " * (around != "end"), f" {END}" * (around != "begin")
    ids = [(token, tokenizer.token_to_id(token)) for token in (BEGIN, END) if token in special]
    tokenizer.post_processor = processors.TemplateProcessing(
      single=f"{before}$A{after}", special_tokens=ids
    )
  if rng.random() < 0.4:
    tokenizer.add_special_tokens(["<|title|>"])
  if rng.random() < 0.3:
    tokenizer.add_tokens(["quick", "東京都"])
  about = {"eos_token": END} | (
    {"bos_token": BEGIN} if BEGIN in special and rng.random() < 0.7 else {}
  )
  about |= {"pad_token": PAD} if PAD in special and rng.random() < 0.7 else {}
  classes = ["PreTrainedTokenizerFast", "TokenizersBackend", "Stranger"] + [
    "GPT2Tokenizer",
    None,
  ] * (kind == "bytes")
  about |= {"tokenizer_class": name} if (name := rng.choice(classes)) else {}
  about |= rng.choice([{}, {"is_local": True, "model_max_length": 10**30}, {"model_max_length": 9}])
  change = rng.choice(CHANGES) if rng.random() < 0.6 else "none"
  tokenizer.save(str(folder / "tokenizer.json"))
  if kind in ("bytes", "gaps"):
    tokenizer.model.save(str(folder))
  if change == "stale":
    (folder / "special_tokens_map.json").write_text(
      json.dumps({"eos_token": END, "cls_token": END})
    )
  if change == "no tokenizer.json":
    (folder / "tokenizer.json").unlink()
    about["tokenizer_class"] = "GPT2Tokenizer"
  if change == "no merges":
    (folder / "tokenizer.json").unlink()
    (folder / "merges.txt").unlink(missing_ok=True)
    about["tokenizer_class"] = "GPT2Tokenizer"
  if change in ("config alone", "nothing"):
    for file in folder.iterdir():
      if file.name not in ("config.json", "model.safetensors"):
        file.unlink()
    about["tokenizer_class"] = "GPT2Tokenizer"
  if change == "contradiction":
    (folder / "added_tokens.json").write_text(json.dumps({END: 7}))
  if change == "trainer's":
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["truncation"] = {
      "direction": "Right",
      "max_length": 5,
      "strategy": "LongestFirst",
      "stride": 0,
    }
    (folder / "tokenizer.json").write_text(json.dumps(saved))
  if change != "nothing":
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
  return kind, change


def unknown_chars_in(tokenizer, text):
  return next(
    encoded.unknown_chars
    for _, encoded in tokenize.encode_batches([Example(text)], tokenizer, np.dtype(np.uint16))
  )


@pytest.mark.parametrize("part", range(4))
def test_random_tokenizers_round_trip_or_refused(tmp_path, part):
  """A hundred folders are refused, or read alike after the export."""
  refused = 0
  for seed in range(25 * part, 25 * part + 25):
    folder, out = tmp_path / str(seed), tmp_path / f"{seed}-out"
    out.mkdir()
    kind, change = write_folder(folder, seed)
    source = repo.resolve(str(folder))
    try:
      tokenizer = jaxft.hf.tokenizer.load_tokenizer(folder, source.cfg.V)
      export.check_exportable(source, tokenizer)
    except RequestError as error:
      assert change in (
        "no tokenizer.json",
        "no merges",
        "config alone",
        "nothing",
        "contradiction",
      ), (
        seed,
        kind,
        error,
      )
      assert str(error).startswith(str(folder)) and "\n" not in str(error)
      refused += 1
      continue
    assert change not in ("config alone", "nothing", "contradiction"), (seed, kind)
    export.write_config_files(out, source, tokenizer, {})
    again = AutoTokenizer.from_pretrained(out)
    for text in TEXTS:
      for add in (False, True):
        expected = tokenizer(text, add_special_tokens=add)["input_ids"]
        assert again(text, add_special_tokens=add)["input_ids"] == expected, (
          seed,
          kind,
          change,
          text,
        )
      if tokenize.TokenizerInfo(tokenizer).is_lossless and not kind == "unigram":
        assert again.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert jaxft.hf.tokenizer.fingerprint(
      jaxft.hf.tokenizer.load_tokenizer(out, source.cfg.V)
    ) == jaxft.hf.tokenizer.fingerprint(tokenizer), (seed, kind)
    about = json.loads((out / "tokenizer_config.json").read_text())
    assert about["model_max_length"] <= source.cfg.P and "is_local" not in about
    assert about["model_input_names"] == ["input_ids", "attention_mask"] and about["unk_token"]
    assert about["tokenizer_class"] in ("PreTrainedTokenizerFast", "GPT2Tokenizer")
    config = json.loads((out / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id
  assert 0 < refused < 15


def test_missing_vocabulary_is_refused(tmp_path):
  """Of which transformers 5 makes a tokenizer of one token, the end token."""
  for name, files in {
    "none": {},
    "config alone": {"tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}'},
    "OpenAI's names": {"encoder.json": "{}", "vocab.bpe": "#version: 0.2\n"},
  }.items():
    folder = tmp_path / name
    tiny.write_gpt2(folder, seed=0, tokenizer=False)
    for file, text in files.items():
      (folder / file).write_text(text)
    expected = (
      "rename encoder.json to vocab.json"
      if "encoder.json" in files
      else "needs tokenizer.json, or vocab.json and"
    )
    with pytest.raises(RequestError, match=expected):
      jaxft.hf.tokenizer.load_tokenizer(folder, 293)


def test_vocabulary_without_merges_is_refused(tmp_path):
  tiny.write_gpt2_bpe(tmp_path)
  assert len(jaxft.hf.tokenizer.load_tokenizer(tmp_path, 50257)("The cat sat")["input_ids"]) == 3
  (tmp_path / "merges.txt").write_text("#version: 0.2\n")
  with pytest.raises(RequestError, match="its merges are missing"):
    jaxft.hf.tokenizer.load_tokenizer(tmp_path, 50257)


def test_contradicting_token_ids_are_refused(folder, tmp_path):
  """Ids that differ between two files of a folder are refused."""
  other = shutil.copytree(folder, tmp_path / "m")
  (other / "added_tokens.json").write_text(json.dumps({tiny.EOS: 0}))
  jaxft.hf.tokenizer.load_tokenizer(other, 293)
  (other / "added_tokens.json").write_text(json.dumps({tiny.EOS: 5}))
  with pytest.raises(
    RequestError, match=r"'<\|endoftext\|>' is 5 in added_tokens.json, but 0 in the tokenizer"
  ):
    jaxft.hf.tokenizer.load_tokenizer(other, 293)


def test_tokenizer_json_wins_over_python_class(folder, tmp_path):
  """GPT2Tokenizer of transformers 5, not 4, cuts words its own way, against tokenizer.json."""
  other = shutil.copytree(folder, tmp_path / "m")
  about = json.loads((other / "tokenizer.json").read_text())
  about["normalizer"] = {"type": "Lowercase"}
  (other / "tokenizer.json").write_text(json.dumps(about))
  (other / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": tiny.EOS})
  )
  said = Tokenizer.from_file(str(other / "tokenizer.json")).encode("The CAT").ids
  source = repo.resolve(str(other))
  tokenizer = jaxft.hf.tokenizer.load_tokenizer(other, 293)
  assert tokenize.encode_prompt(tokenizer, "The CAT") == said
  export.write_config_files(tmp_path, source, tokenizer, {})
  assert AutoTokenizer.from_pretrained(tmp_path)("The CAT")["input_ids"] == said


def test_wordpiece_vocab_txt_is_exported(tmp_path):
  source = repo.resolve(str(wordpiece(tmp_path / "bert")))
  tokenizer, out = jaxft.hf.tokenizer.load_tokenizer(source.folder, source.cfg.V), tmp_path / "out"
  out.mkdir()
  export.write_config_files(out, source, tokenizer, {})
  assert (out / "vocab.txt").read_text().split() == WORDPIECE
  again = AutoTokenizer.from_pretrained(out)
  assert (
    again("the cat sat")["input_ids"]
    == AutoTokenizer.from_pretrained(source.folder)("the cat sat")["input_ids"]
  )
  assert again("the cat")["input_ids"] == [2, 5, 6, 3]


def test_changed_vocab_txt_is_tokenized_again(tmp_path):
  folder = wordpiece(tmp_path / "bert")
  (tmp_path / "t.jsonl").write_text(
    '{"text": "the cat sat on the mat."}\n{"text": "the dog ran far."}\n' * 9
  )
  data = DataSection(
    train=(str(tmp_path / "t.jsonl"),),
    sequence_length=8,
    validation_fraction=0.2,
    cache_dir=str(tmp_path / "cache"),
  )
  read = []
  for words in (WORDPIECE, WORDPIECE[:5] + WORDPIECE[5:][::-1]):
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = jaxft.hf.tokenizer.load_tokenizer(folder, len(words))
    found = dataset.prepare_data(data, tokenizer, jaxft.hf.tokenizer.fingerprint(tokenizer))
    read.append(tokenizer.decode(found.train[0]["targets"]))
  assert (
    read[0] == read[1]
    and len([entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]) == 2
  )


def test_prompts_are_tokenized_like_training_text(tmp_path):
  """Texts to classify too, and with a tokenizer that puts [CLS] before, [SEP] after a text."""
  tokenizer = jaxft.hf.tokenizer.load_tokenizer(wordpiece(tmp_path / "bert"), len(WORDPIECE))
  document = tokenize.encode_in_memory([Example("the cat")], tokenizer).ids.tolist()
  assert document == tokenizer("the cat")["input_ids"] == [2, 5, 6, 3]
  assert tokenize.encode_prompt(tokenizer, "the cat") == document[:-1]
  assert tokenize.encode_text(tokenizer, "the cat") == document
  labelled = tokenize.encode_in_memory([Example("the cat", label="a")], tokenizer, ["a"])
  assert labelled.ids.tolist() == document
  asked = tokenize.encode_in_memory(
    [Example("the cat sat", prompt_chars=len("the cat"))], tokenizer
  )
  assert asked.ids.tolist() == [2, 5, 6, 8, 3] and asked.prompts_N.tolist() == [3]


def test_commands_tokenize_like_training(tmp_path, monkeypatch):
  """Whatever reads a text tokenizes it as the training does."""
  source, asked = wordpiece(tmp_path / "bert"), []
  call = sampler.Generator.__call__
  monkeypatch.setattr(
    sampler.Generator,
    "__call__",
    lambda self, weights, ids, *more, **how: (
      asked.append(ids),
      call(self, weights, ids, *more, **how),
    )[1],
  )
  ready = jaxft.load(source)
  ready.generate(["the cat"], max_new_tokens=1)
  (tmp_path / "t.jsonl").write_text(
    '{"text": "the cat sat on the mat."}\n{"text": "the dog ran far."}\n' * 9
  )
  config = tiny.config(source, tmp_path / "t.jsonl")
  config.train.steps, config.train.sample_prompts, config.data.sequence_length = 1, ("the cat",), 8
  config.optim.warmup_steps = 0
  run = finetune(config, tmp_path / "run")
  assert asked == [[[2, 5, 6]]] * 3  # generate, before and after
  assert (run.export / "vocab.txt").read_text().split() == WORDPIECE

  classifier = repo.with_class_head(repo.resolve(str(source)), ["a", "b"], ready.tokenizer)
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  _, shapes, _ = abstract_model(classifier.cfg, ComputeConfig())
  params = load_weights.load_params(classifier, shapes, jax.tree.map(lambda _: here, shapes))
  export.export_model(tmp_path / "classifier", params, classifier, tokenizer=ready.tokenizer)
  again = jaxft.load(tmp_path / "classifier")
  expected = verify.compute_logits(again.graph, again.params, np.array([[2, 5, 6, 3]], np.int32))[
    0, -1
  ]
  np.testing.assert_allclose(again.classify(["the cat"])[0].logits_C, expected, atol=1e-5)

  # What cannot be exported is refused before the first step.
  monkeypatch.setattr(
    jaxft.hf.export,
    "verify_tokenizer",
    lambda *_: (_ for _ in ()).throw(RequestError("cannot be exported")),
  )
  with pytest.raises(RequestError, match="cannot be exported"):
    finetune(config, tmp_path / "another")
  assert not (tmp_path / "another" / "metrics.jsonl").exists()


def test_byte_tokens_decode_without_a_decoder(folder, tmp_path):
  other = shutil.copytree(folder, tmp_path / "m")
  about = json.loads((other / "tokenizer.json").read_text())
  (other / "tokenizer.json").write_text(json.dumps(about | {"decoder": None}))
  tokenizer = jaxft.hf.tokenizer.load_tokenizer(other, 293)
  assert tokenizer.decode(tokenize.encode_prompt(tokenizer, "the café, twice")) == "the café, twice"
  export.write_config_files(tmp_path, repo.resolve(str(other)), tokenizer, {})
  assert json.loads((tmp_path / "tokenizer.json").read_text())["decoder"]["type"] == "ByteLevel"


@pytest.mark.parametrize("name", ["T5Tokenizer", "MBartTokenizer"])
def test_class_without_vocabulary_is_refused(tmp_path, name):
  """transformers 5.24 makes one of special tokens alone, which reads every text as unknown."""
  tiny.write_gpt2(tmp_path / "m", seed=0, tokenizer=False)
  (tmp_path / "m" / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": name, "eos_token": "</s>"})
  )
  with pytest.raises(RequestError, match="tokens contain no text|cannot read a tokenizer"):
    jaxft.hf.tokenizer.load_tokenizer(tmp_path / "m", 50257)


def test_ordinary_pad_token_does_not_turn_special(folder, tmp_path):
  """Old checkpoints have 0, "!" there: as a special token it would vanish from every text."""
  other = shutil.copytree(folder, tmp_path / "m")
  tokenizer = jaxft.hf.tokenizer.load_tokenizer(other, 293)
  about = json.loads((other / "config.json").read_text())
  for text in ("!", " the"):
    (pad, *_) = tokenize.encode_prompt(tokenizer, text)
    (other / "config.json").write_text(json.dumps(about | {"pad_token_id": pad}))
    out = tmp_path / f"out{pad}"
    jaxft.load(other).export(out)
    again = AutoTokenizer.from_pretrained(out)
    for said in ("Great movie!", "the the e!"):
      assert again.decode(again(said)["input_ids"], skip_special_tokens=True) == said
    assert json.loads((out / "config.json").read_text())["pad_token_id"] == pad


def test_export_has_pad_token_and_extra_files(folder, tmp_path):
  """The tokenizer's own padding token, and its other files."""
  other = shutil.copytree(folder, tmp_path / "m")
  says = json.loads((other / "tokenizer_config.json").read_text())
  (other / "tokenizer_config.json").write_text(json.dumps(says | {"pad_token": "!"}))
  for name in ("spiece.model", "chat_template.jinja"):
    (other / name).write_text(name)
  tokenizer = jaxft.hf.tokenizer.load_tokenizer(other, 293)
  export.write_config_files(tmp_path, repo.resolve(str(other)), tokenizer, {})
  for name in ("config.json", "generation_config.json"):
    said = json.loads((tmp_path / name).read_text()).get("pad_token_id")
    assert said == tokenizer.pad_token_id is not None, name
  assert (tmp_path / "spiece.model").read_text() == "spiece.model"
  assert (tmp_path / "chat_template.jinja").read_text() == "chat_template.jinja"


def test_eos_that_begins_texts_occurs_once(tmp_path):
  """GPT-2's add_bos_token: before a document there is the end token of the one before."""
  tiny.write_gpt2_bpe(tmp_path)
  about = json.loads((tmp_path / "tokenizer_config.json").read_text())
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(about | {"add_bos_token": True}))
  tokenizer = jaxft.hf.tokenizer.load_tokenizer(tmp_path, 50257)
  assert tokenize.encode_prompt(tokenizer, "The cat") == [50256, 464, 3797]
  assert tokenize.encode_in_memory([Example("The cat")], tokenizer).ids.tolist() == [
    464,
    3797,
    50256,
  ]


def test_unknown_characters_are_counted(tmp_path):
  counts = {}
  for kind in KINDS:
    folder = tmp_path / kind
    folder.mkdir()
    trained(kind, [END]).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
      json.dumps({"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = jaxft.hf.tokenizer.load_tokenizer(folder, 400)
    counts[kind] = [unknown_chars_in(tokenizer, text) for text in ("the miller", "Ж the Ж Ж", "")]
  assert counts["bytes"] == [0, 0, 0] and all(
    count == [0, 3, 0] for kind, count in counts.items() if kind != "bytes"
  ), counts


def test_report_counts_lost_text_or_refuses(tmp_path):
  """A text of another language is refused."""
  folder, said = tmp_path / "gaps", []
  folder.mkdir()
  trained("gaps", [END]).save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"})
  )
  (folder / "config.json").write_text('{"model_type": "gpt2"}')
  tokenizer = jaxft.hf.tokenizer.load_tokenizer(folder, 400)
  for name, text in (("few", "the miller ЖЖ"), ("most", "ЖЖЖЖЖ the")):
    (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{text}"}}\n' * 20)
  data = DataSection(
    train=(str(tmp_path / "few.jsonl"),), sequence_length=8, cache_dir=str(tmp_path / "cache")
  )
  found = dataset.prepare_data(data, tokenizer, "", log=said.append)
  assert found.report["characters"] == {"read": 20 * 13, "without_a_token": 40}
  assert said[-1].startswith("40 of 260 characters have no token in the model's tokenizer")
  data = dataclasses.replace(data, train=(str(tmp_path / "most.jsonl"),))
  with pytest.raises(RequestError, match="no token for 100 of the 180 characters"):
    dataset.prepare_data(data, tokenizer, "")


def test_learned_eos_ends_generation_of_export(tmp_path):
  """And what else the source's configs let end one."""
  folder = tmp_path / "m"
  tiny.write_gpt2(folder, seed=3)
  tokenizer = jaxft.hf.tokenizer.load_tokenizer(folder, 293)
  end, about = (
    tokenizer.convert_ids_to_tokens(7),
    json.loads((folder / "tokenizer_config.json").read_text()),
  )
  (folder / "tokenizer_config.json").write_text(json.dumps(about | {"eos_token": end}))
  (folder / "generation_config.json").write_text(
    json.dumps({"eos_token_id": [0, 7, 9], "temperature": 0.5})
  )
  source = repo.resolve(str(folder))
  export.write_config_files(tmp_path, source, jaxft.hf.tokenizer.load_tokenizer(folder, 293), {})
  read = lambda name: json.loads((tmp_path / name).read_text())
  assert read("config.json")["eos_token_id"] == 7 and read("config.json")["n_ctx"] == source.cfg.P
  assert read("generation_config.json") == {
    "bos_token_id": 0,
    "eos_token_id": [7, 0, 9],
    "temperature": 0.5,
  }


def test_quickstart_model_equals_an_export(tmp_path):
  """The quickstart's model has the files of an export."""
  source = repo.resolve(str(Path(__file__).parents[2] / "assets" / "quickstart" / "model"))
  export.write_config_files(
    tmp_path, source, jaxft.hf.tokenizer.load_tokenizer(source.folder, source.cfg.V), {}
  )
  for file in tmp_path.iterdir():
    read = json.loads if file.suffix == ".json" else str
    assert read((source.folder / file.name).read_text()) == read(file.read_text()), file.name


def test_export_has_files_for_older_readers(folder, tmp_path):
  """tokenizers before 0.20, slow tokenizers, and transformers 4.30 with special_tokens_map.json."""
  source = repo.resolve(str(folder))
  export.write_config_files(tmp_path, source, jaxft.hf.tokenizer.load_tokenizer(folder, 293), {})
  merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
  assert all(isinstance(merge, str) for merge in merges)
  assert (tmp_path / "merges.txt").read_text().splitlines()[1:] == merges
  assert len(json.loads((tmp_path / "vocab.json").read_text())) == 293
  (tmp_path / "tokenizer.json").unlink()
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
  slow, expected = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(folder)
  assert all(slow(text)["input_ids"] == expected(text)["input_ids"] for text in TEXTS)


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "GPT2Tokenizer"])
@pytest.mark.parametrize("said", [True, False, None])
@pytest.mark.parametrize("prefix", [True, False])
def test_add_prefix_space_matches_transformers(tmp_path, name, said, prefix):
  """add_prefix_space is in two files or in none; the export says it in both, for transformers 4."""
  tiny.write_gpt2(tmp_path / "m", seed=0)
  about = json.loads((tmp_path / "m" / "tokenizer.json").read_text())
  about["pre_tokenizer"]["add_prefix_space"] = prefix
  (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(about))
  says = {"tokenizer_class": name, "eos_token": tiny.EOS} | (
    {} if said is None else {"add_prefix_space": said}
  )
  (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(says))
  expected = AutoTokenizer.from_pretrained(tmp_path / "m")("the cat", add_special_tokens=False)[
    "input_ids"
  ]
  tokenizer = jaxft.hf.tokenizer.load_tokenizer(tmp_path / "m", 293)
  assert tokenize.encode_prompt(tokenizer, "the cat") == expected
  export.write_config_files(tmp_path, repo.resolve(str(tmp_path / "m")), tokenizer, {})
  assert AutoTokenizer.from_pretrained(tmp_path)("the cat")["input_ids"] == expected
  written = [
    json.loads((tmp_path / file).read_text())
    for file in ("tokenizer.json", "tokenizer_config.json")
  ]
  assert written[0]["pre_tokenizer"]["add_prefix_space"] == written[1]["add_prefix_space"]


def test_vocabulary_of_added_letters_reads_text(tmp_path):
  tokenizer = Tokenizer(models.BPE())
  tokenizer.add_special_tokens([END])
  tokenizer.add_tokens(list("abcdefgh "))
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END})
  )
  (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
  loaded = jaxft.hf.tokenizer.load_tokenizer(tmp_path, 400)
  assert loaded.decode(tokenize.encode_prompt(loaded, "a bad cab")).replace(" ", "") == "abadcab"


def test_normalized_and_added_text_is_not_lost(tmp_path):
  """What a normalizer or an added token reads does not count as lost."""
  for normalizer in (None, normalizers.Lowercase()):
    tokenizer = trained("gaps", [END])
    tokenizer.normalizer = normalizer or tokenizer.normalizer
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
      json.dumps({"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    loaded = jaxft.hf.tokenizer.load_tokenizer(tmp_path, 400)
    assert unknown_chars_in(loaded, f"the miller{END}found ЖЖ") == 2
    assert unknown_chars_in(loaded, "THE MILLER") == (0 if normalizer else 9)
