"""Data: every token is a target exactly once, batches are a function of (seed, step), and faults name file and row."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies

from jaxft import config as jaxft_config
from jaxft.data import loader, report, sources, tokens
from jaxft.data.pack import ConcatRows
from jaxft.errors import RequestError

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
texts = strategies.lists(
  strategies.text(strategies.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=12
)


@pytest.fixture(scope="module")
def tokenizer(folder):
  return tokens.load_tokenizer(folder, 293)


@settings(max_examples=80, deadline=None)
@given(texts=texts, T=strategies.integers(2, 33))
def test_trained_rows_hold_the_text_byte_for_byte(tokenizer, texts, T):
  stream, lengths = tokens.encode([sources.Document(text, None) for text in texts], tokenizer)
  rows = ConcatRows(stream, T)
  picked = [rows[i] for i in range(len(rows))]
  targets = np.concatenate([row["targets"][row["mask"]] for row in picked])
  np.testing.assert_array_equal(targets, stream[1:])  # every token but the first, once, in order
  assert len(targets) == lengths.sum() == len(stream) - 1
  for row in picked:  # each target follows its input
    np.testing.assert_array_equal(row["ids"][1:][row["mask"][1:]], row["targets"][:-1][row["mask"][1:]])
  assert (targets == tokenizer.eos_token_id).sum() == len(texts)  # end tokens are targets
  ends = np.flatnonzero(targets == tokenizer.eos_token_id)
  decoded = [tokenizer.decode(part) for part in np.split(targets, ends + 1)[:-1]]
  assert [text.removesuffix("<|endoftext|>") for text in decoded] == texts


def collect(rows, steps, **how):
  how = dict(batch_size=6, accumulation=1, seed=3, rows_in_all=10**9, start=0, sharding=HERE) | how
  batches = loader.training_batches(rows, **how)
  return [jax.device_get(next(batches)) for _ in range(steps)]


@pytest.fixture(scope="module")
def rows():
  return ConcatRows(np.arange(1 + 17 * 5, dtype=np.int32), 5)  # 17 rows, told apart by their first id


def test_an_epoch_has_each_row_once_and_its_own_order(rows):
  firsts = np.concatenate([batch["ids"][0, :, 0] for batch in collect(rows, 17)])  # 6 x 17 rows: 6 epochs
  epochs = firsts.reshape(6, 17)
  for epoch in epochs:
    assert sorted(epoch) == list(range(0, 85, 5))
  assert len({tuple(epoch) for epoch in epochs}) == 6


@pytest.mark.parametrize("start", [0, 1, 2, 3, 7, 15])
def test_seeking_equals_going_there(rows, start):
  there = collect(rows, 18)[start : start + 3]
  sought = collect(rows, 3, start=start)
  jax.tree.map(np.testing.assert_array_equal, there, sought)


def test_accumulation_cuts_the_same_batch(rows):
  whole, cut = collect(rows, 3), collect(rows, 3, accumulation=3)
  for a, b in zip(whole, cut):
    assert b["ids"].shape == (3, 2, 5)
    np.testing.assert_array_equal(a["ids"].reshape(6, 5), b["ids"].reshape(6, 5))


def test_what_lies_past_the_last_epoch_is_masked(rows):
  masks = np.concatenate([batch["mask"].reshape(6, 5) for batch in collect(rows, 6, rows_in_all=2 * 17)])
  assert masks[:34].all() and not masks[34:].any()


def test_evaluation_sees_each_row_once(rows):
  batches = list(loader.evaluation_batches(rows, batch_size=6, sharding=HERE))
  counted = np.concatenate([np.asarray(batch["targets"])[np.asarray(batch["mask"])] for batch in batches])
  np.testing.assert_array_equal(counted, rows.stream[1:])
  assert len(list(loader.evaluation_batches(rows, batch_size=6, limit=2, sharding=HERE))) == 2


def write(tmp_path, name, content):
  (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(tmp_path / name)


def read(*names, column="text", nats=""):
  return [document.text for document in sources.read(names, "train", column, nats)]


def test_sources_keep_every_newline(tmp_path):
  text = 'a\r\nb\n\n"c",\td\n'
  assert read(write(tmp_path, "a.txt", text)) == [text]
  assert read(write(tmp_path, "a.jsonl", json.dumps({"text": text}) + "\n")) == [text]
  quoted = text.replace('"', '""')
  assert read(write(tmp_path, "a.csv", f'text,x\n"{quoted}",1\n')) == [text]
  import pyarrow
  import pyarrow.parquet

  pyarrow.parquet.write_table(pyarrow.table({"text": [text, "z"]}), tmp_path / "a.parquet")
  assert read(str(tmp_path / "a.parquet")) == [text, "z"]
  assert read(str(tmp_path)) == [text, text, text, "z", text]  # a folder, in the order of its names
  assert read(str(tmp_path / "*.txt"), str(tmp_path / "a.csv")) == [text, text]


@pytest.mark.parametrize(
  "name, content, told",
  [
    ("a.jsonl", '{"text": "x"}\n{"body": "x"}\n', "row 2: no text in column 'text' .columns body"),
    ("a.jsonl", '{"text": null}\n', "row 1: no text"),
    ("a.jsonl", "[1]\n", "row 1: no text"),
    ("a.jsonl", '{"text": "x"}\n{\n', "a.jsonl, row 2: not JSON"),
    ("a.jsonl", "[" * 100_000, "a.jsonl, row 1: not JSON"),
    ("a.jsonl", '{"text": "a\\ud800b"}\n', "row 1: half of a surrogate pair"),
    ("a.txt", b"\xff\xfe", "a.txt: .*utf-8"),
    ("a.csv", "body\nx\n", "row 1: no text"),
    ("a.parquet", "x", "a.parquet: "),
    ("a.doc", "x", "cannot read .doc"),
  ],
)
def test_bad_sources_are_named(tmp_path, name, content, told):
  with pytest.raises(RequestError, match=told):
    read(write(tmp_path, name, content))


@pytest.mark.parametrize("source", ["nowhere.txt", "no*where", "."])
def test_missing_sources_are_named(tmp_path, monkeypatch, source):
  monkeypatch.chdir(tmp_path)
  assert len(sources.faults((source,))) == 1 and repr(source) in sources.faults((source,))[0]


def test_an_unreachable_hub_is_one_line():
  with pytest.raises(RequestError, match="^data source 'hub:nobody/nothing:train': .*give the files$"):
    read("hub:nobody/nothing:train")


def prepared(tokenizer, file, **data):
  config = jaxft_config.default()
  config.data.update(train=(file,), sequence_length=16, **data)
  return report.prepare(config.data, tokenizer)


def test_every_document_and_token_is_accounted_for(tmp_path, tokenizer):
  texts = [f"cat {'and dog ' * i}" for i in range(50)]
  file = write(tmp_path, "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
  for how in (
    dict(validation_fraction=0.2),
    dict(validation_fraction=0.2, limit_train=7, limit_validation=3),
    dict(validation=(file,)),
  ):
    data = prepared(tokenizer, file, **how)
    counts, count = data.report["rows"], data.report["tokens"]
    assert counts["read"] == counts["trained"] + counts["held_out"] + sum(counts["dropped"].values())
    assert count["read"] == count["trained"] + count["held_out"] + sum(count["dropped"].values())
    assert (
      count["trained"]
      == len(data.train.stream) - 1
      == sum(row["mask"].sum() for row in map(data.train.__getitem__, range(len(data.train))))
    )
  sampled = prepared(tokenizer, file, validation_fraction=0.2, limit_train=7, limit_validation=3).report["rows"]
  assert sampled == {"read": 50, "trained": 7, "held_out": 3, "dropped": {"limit_train": 33, "limit_validation": 7}}


def test_held_out_documents_are_not_trained_on(tmp_path, tokenizer):
  file = write(tmp_path, "a.jsonl", "".join(json.dumps({"text": f"n{i}"}) + "\n" for i in range(40)))
  texts = [
    set(tokenizer.decode(rows.stream).split("<|endoftext|>")) - {""}
    for rows in prepared(tokenizer, file, validation_fraction=0.25)[:2]
  ]
  assert len(texts[0]) == 30 and len(texts[1]) == 10 and not texts[0] & texts[1]


def test_the_floor_is_nats_per_held_out_token(tmp_path, tokenizer):
  file = write(tmp_path, "a.jsonl", '{"text": "cat", "nats": 2.5}\n{"text": "and dog", "nats": 4}\n')
  data = prepared(tokenizer, file, validation=(file,), nats_column="nats")
  assert data.floor == pytest.approx(6.5 / data.report["tokens"]["held_out"])
  with pytest.raises(RequestError, match="row 1: no number in column 'bits'"):
    prepared(tokenizer, file, validation=(file,), nats_column="bits")


def test_nothing_to_train_on_is_told_with_numbers(tmp_path, tokenizer):
  with pytest.raises(RequestError, match="no training documents"):
    prepared(tokenizer, write(tmp_path, "a.jsonl", ""))
  with pytest.raises(RequestError, match="no validation documents .*'train': 1"):
    prepared(tokenizer, write(tmp_path, "b.jsonl", '{"text": "x"}\n'))
