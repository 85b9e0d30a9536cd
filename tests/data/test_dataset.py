"""Prepared data: every row and token is accounted for, and rows hold the text."""

import csv
import gzip
import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny

import jaxft.hf.tokenizer
from jaxft.config import DataSection
from jaxft.data import dataset, tokenize
from jaxft.data.formats import Example
from jaxft.data.packing import ClassificationDataset, ConcatDataset, PackedDataset, best_fit
from jaxft.errors import RequestError

EOS = 0


@pytest.fixture(scope="module")
def tokenizer(folder):
  return jaxft.hf.tokenizer.load_tokenizer(folder, 293)


def prepared(tokenizer, cache, files, **data):
  settings = {"sequence_length": 16, "cache_dir": str(cache), **data}
  section = DataSection(train=tuple(map(str, files)), **settings)
  return dataset.prepare_data(section, tokenizer, "a tokenizer")


def random_text(rng):
  return "".join(tiny.PIECES[i] for i in rng.integers(len(tiny.PIECES), size=rng.integers(1, 30)))


def write_random_source(folder, rng, texts):
  """Write texts and some bad rows in a random format and compression; return how many are bad."""
  kind, bad = rng.choice(["txt", "jsonl", "csv", "parquet"]), int(rng.integers(3))
  bad_rows = set(rng.choice(len(texts) + bad, bad, replace=False).tolist())
  good = iter(texts)
  rows = [None if i in bad_rows else next(good) for i in range(len(texts) + bad)]
  if kind == "parquet":
    pyarrow.parquet.write_table(
      pyarrow.table({"text": pyarrow.array(rows, pyarrow.string())}), folder / "a.parquet"
    )
    return bad
  if kind == "txt":  # a file a row
    for i, row in enumerate(rows):
      (folder / f"{i:03}.txt").write_bytes(b"\xff" if row is None else row.encode())
    return bad
  if kind == "jsonl":
    ascii_only = bool(rng.integers(2))
    content = "".join(
      json.dumps({"text": row}, ensure_ascii=ascii_only) + "\n" for row in rows
    ).encode()
  else:
    sheet = io.StringIO(newline="")
    quoting = csv.QUOTE_ALL if rng.integers(2) else csv.QUOTE_MINIMAL
    csv.writer(sheet, quoting=quoting).writerows(
      [["n", "text"], *(["1", row or ""] for row in rows)]
    )
    content = sheet.getvalue().encode()
  name = f"a.{kind}{rng.choice(['', '.gz', '.zst'])}"
  if name.endswith(".gz"):
    content = gzip.compress(content)
  if name.endswith(".zst"):
    content = pyarrow.compress(content, codec="zstd", asbytes=True)
  (folder / name).write_bytes(content)
  return bad


def learned(rows):
  """All targets that count, in order."""
  return np.concatenate(
    [row["targets"][row["mask"]] for row in map(rows.__getitem__, range(len(rows)))]
  )


def decoded(ids, tokenizer):
  """The texts between end tokens."""
  ends = np.flatnonzero(ids == EOS)
  assert len(ends) and ends[-1] == len(ids) - 1
  return [tokenizer.decode(part[:-1]) for part in np.split(ids, ends + 1)[:-1]]


@pytest.mark.slow
@pytest.mark.parametrize(
  "part", [*range(4), *(pytest.param(i, marks=pytest.mark.wide) for i in range(4, 10))]
)
def test_accounting_is_exact_for_random_sources(tokenizer, tmp_path, part):
  """Nothing is lost of two thousand sources."""
  for n in range(200 * part, 200 * part + 200):
    rng = np.random.default_rng(n)
    folders = [tmp_path / f"{n}{name}" for name in ("train", "validation")]
    texts = [[random_text(rng) for _ in range(rng.integers(1, 9))] for _ in folders]
    bad = 0
    for folder, of in zip(folders, texts):
      folder.mkdir()
      bad += write_random_source(folder, rng, of)
    layout, T = str(rng.choice(["concat", "pack"])), int(rng.integers(2, 40))
    options = dict(on_bad_row="skip", sequence_length=T, layout=layout)
    data = prepared(
      tokenizer, tmp_path / "cache", [folders[0]], validation=(str(folders[1]),), **options
    )
    rows, counts = data.report["rows"], data.report["tokens"]
    assert (
      rows["read"]
      == sum(map(len, texts)) + bad
      == rows["trained"] + rows["held_out"] + sum(rows["dropped"].values())
    )
    assert counts["read"] == counts["trained"] + counts["held_out"] + sum(
      counts["dropped"].values()
    )
    for of, split, name in zip(texts, (data.train, data.validation), ("trained", "held_out")):
      ids = learned(split)
      assert len(ids) == counts[name] and (ids == EOS).sum() == len(of) == rows[name]
      if layout == "concat":
        assert decoded(ids, tokenizer) == of
      else:  # the same tokens, in the order in which examples have found room
        plain = learned(ConcatDataset(split.tokens, 10**4, EOS))
        np.testing.assert_array_equal(np.sort(ids), np.sort(plain))
        assert decoded(plain, tokenizer) == of


def test_source_changed_during_read_leaves_no_cache(tokenizer, tmp_path):
  file = tmp_path / "a.jsonl"
  file.write_text('{"text": "cat"}\n{"text": "dog"}\n')

  def on_progress(done, total):
    file.write_text('{"text": "mat"}\n{"text": "dog"}\n')

  data = DataSection(
    train=(str(file),),
    validation=(str(file),),
    cache_dir=str(tmp_path / "cache"),
    sequence_length=4,
  )
  with pytest.raises(RequestError, match="a source has changed while it was read"):
    dataset.prepare_data(data, tokenizer, "a tokenizer", on_progress)
  assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]


def test_single_class_label_is_rejected(tokenizer, tmp_path):
  file = tmp_path / "a.jsonl"
  file.write_text('{"text": "cat", "label": "x"}\n' * 2)
  with pytest.raises(RequestError, match="all rows have the label 'x'"):
    prepared(tokenizer, tmp_path / "c", [file], validation=(str(file),), format="classification")


def test_numeric_labels_sort_first_by_value(tokenizer):
  labels = ["10", "9", "ten", "\u0663", "9" * 5000, "010"]
  assert sorted(labels, key=dataset._label_sort_key) == [
    "9",
    "010",
    "10",
    "9" * 5000,
    "ten",
    "\u0663",
  ]


def test_split_and_limits_are_by_document(tokenizer, tmp_path):
  texts = [f"cat {'and dog ' * i}" for i in range(50)]
  file = tmp_path / "a.jsonl"
  file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  data = prepared(tokenizer, tmp_path / "c", [file], validation_fraction=0.2)
  trained = decoded(learned(data.train), tokenizer)
  held = decoded(learned(data.validation), tokenizer)
  assert sorted(trained + held) == sorted(texts) and len(held) == 10
  options = dict(validation_fraction=0.2, limit_train=7, limit_validation=3)
  data = prepared(tokenizer, tmp_path / "c", [file], **options)
  few = decoded(learned(data.train), tokenizer)
  held_few = decoded(learned(data.validation), tokenizer)
  assert set(few) <= set(trained) and set(held_few) <= set(held)
  assert data.report["rows"] == {
    "read": 50,
    "trained": 7,
    "held_out": 3,
    "dropped": {"limit_train": 33, "limit_validation": 7},
  }
  other = prepared(tokenizer, tmp_path / "c", [file], shuffle_seed=1, **options)
  assert decoded(learned(other.train), tokenizer) != few


def test_source_weights_repeat_documents(tokenizer, tmp_path):
  """Weights say how often an epoch reads a source."""
  sources = {"a": 2.5, "b": 0.3, "c": 1}
  for name in sources:
    lines = [json.dumps({"text": f"{name} cat {i}"}) + "\n" for i in range(20)]
    (tmp_path / f"{name}.jsonl").write_text("".join(lines))
  held = tmp_path / "held.jsonl"
  held.write_text('{"text": "dog"}\n')
  files = [
    f"{tmp_path / name}.jsonl" + ("" if weight == 1 else f"@{weight}")
    for name, weight in sources.items()
  ]
  data = prepared(tokenizer, tmp_path / "cache", files, validation=(str(held),))
  texts = decoded(learned(data.train), tokenizer)
  count = {name: sorted(texts.count(f"{name} cat {i}") for i in range(20)) for name in sources}
  assert count == {"a": [2] * 10 + [3] * 10, "b": [0] * 14 + [1] * 6, "c": [1] * 20}
  rows = data.report["rows"]
  assert rows == {"read": 91, "trained": 76, "held_out": 1, "dropped": {"weight of the source": 14}}
  assert len(set(texts[:20])) == 20  # a pass over all documents comes before any comes again
  assert data.report["notes"] == {"rows repeated because of their weight": 30}
  plain = prepared(
    tokenizer, tmp_path / "cache", [f.split("@")[0] for f in files], validation=(str(held),)
  )
  assert (
    len(decoded(learned(plain.train), tokenizer)) == 60 and plain.fingerprint != data.fingerprint
  )


def test_report_has_lengths_padding_duplicates(tokenizer, tmp_path):
  file = tmp_path / "a.jsonl"
  file.write_text(
    "".join(
      json.dumps({"text": text}) + "\n" for text in ["cat", "cat", "dog " * 30, "a", "b", "cat"]
    )
  )
  found = prepared(tokenizer, tmp_path / "c", [file], validation=(str(file),), layout="pad").report
  lengths = [
    len(tokenizer(text)["input_ids"]) + 1 for text in ["cat", "cat", "dog " * 30, "a", "b", "cat"]
  ]
  cut = max(lengths) - 16
  assert found["tokens"]["dropped"] == {"truncated to the sequence length": 2 * cut}
  assert found["duplicates"] == 8 and found["longer_than_a_sequence"] == {
    "rows": 1,
    "share": 0.1667,
  }
  assert found["padding_share"] == round(1 - (sum(lengths) - cut) / (6 * 16), 4)


def test_empty_train_split_is_an_error_with_counts(tokenizer, tmp_path):
  (tmp_path / "a.jsonl").write_text("")
  with pytest.raises(RequestError, match="no train examples .0 good rows, 0 dropped"):
    prepared(tokenizer, tmp_path / "c", [tmp_path / "a.jsonl"])


def test_entropy_floor_is_nats_per_validation_token(tokenizer, tmp_path):
  file = tmp_path / "a.jsonl"
  file.write_text('{"text": "cat", "nats": 2.5}\n{"text": "and dog", "nats": 4}\n')
  data = prepared(tokenizer, tmp_path / "c", [file], validation=(str(file),), nats_column="nats")
  assert data.entropy_floor == pytest.approx(6.5 / data.report["tokens"]["held_out"])
  with file.open("a") as more:
    more.write('{"text": "mat", "nats": "many"}\n')
  with pytest.raises(RequestError, match="row 3: column 'nats' is not a finite number"):
    prepared(tokenizer, tmp_path / "c", [file], validation=(str(file),), nats_column="nats")


def test_fingerprint_covers_grouping_of_sources(tokenizer, tmp_path):
  """Sources with the same files in other groups are other data."""
  for name, text in (("1/a", "cat"), ("1/b", "dog"), ("2/b", "dog"), ("2/c", "mat")):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / f"{name}.txt").write_text(text)
  held = tmp_path / "held.txt"
  held.write_text("x")
  one = [f"{tmp_path}/1@2", f"{tmp_path}/2/c.txt@3"]
  other = [f"{tmp_path}/1/a.txt@2", f"{tmp_path}/2@3"]
  for sources, expected in (
    (one, {"cat": 2, "dog": 2, "mat": 3}),
    (other, {"cat": 2, "dog": 3, "mat": 3}),
  ):
    data = prepared(tokenizer, tmp_path / "cache", sources, validation=(str(held),))
    texts = decoded(learned(data.train), tokenizer)
    assert {text: texts.count(text) for text in expected} == expected


def test_rows_without_targets_are_dropped(tokenizer):
  """Rows of nothing but prompt are dropped and counted."""
  examples = [
    Example("the cat sat on mat " * 9 + "dog", prompt_chars=171),
    Example("the dog"),
    Example("a" * 40, prompt_chars=40),
  ]
  text = stored(tokenizer, examples)
  rows = ConcatDataset(text, 7, EOS)
  masks = np.concatenate([rows[i]["mask"] for i in range(len(rows))])
  assert all(rows[i]["mask"].any() for i in range(len(rows))) and len(rows) < len(text.ids) // 7
  assert masks.sum() == (text.lengths_N - text.prompts_N).sum()
  (lost,) = rows.stats.dropped.values()
  assert lost == len(text.ids) - rows.stats.filled > 0
  assert rows.stats.eos_targets == (learned(rows) == EOS).sum() == 3


@pytest.mark.parametrize("layout", ["concat", "pack", "pad"])
def test_report_counts_eos_tokens_and_padding(tokenizer, tmp_path, layout):
  file = tmp_path / "a.jsonl"
  file.write_text(
    "".join(json.dumps({"text": text}) + "\n" for text in ["the cat", "dog " * 40, "mat"])
  )
  data = prepared(tokenizer, tmp_path / "c", [file], validation=(str(file),), layout=layout)
  ids = learned(data.train)
  assert data.report["end_tokens"]["trained"] == (ids == EOS).sum()
  assert data.report["padding_share"] == round(1 - len(ids) / (16 * len(data.train)), 4)


def stored(tokenizer, examples):
  return tokenize.encode_in_memory(examples, tokenizer)


def test_loss_mask_covers_only_the_completion(tokenizer):
  pairs = [("the cat", " sat on"), ("", "the dog"), ("a", "a"), ("once upon a time the", " mat")]
  examples = [
    Example(prompt + completion, prompt_chars=len(prompt)) for prompt, completion in pairs
  ]
  for rows in (
    PackedDataset(stored(tokenizer, examples), 24, EOS, pack=False),
    PackedDataset(stored(tokenizer, examples), 24, EOS, pack=True),
    ConcatDataset(stored(tokenizer, examples), 5, EOS),
  ):
    texts = sorted(decoded(learned(rows), tokenizer))
    # "a" + "a" is one token that holds both: it is learned whole.
    merged = len(tokenizer("aa")["input_ids"]) == 1
    assert texts == sorted([" sat on", "the dog", "aa" if merged else "a", " mat"])
  batch = tokenize.encode_examples(examples, tokenize.TokenizerInfo(tokenizer), np.uint16)
  assert batch.straddling == merged


def test_prompt_that_fills_the_row_is_counted(tokenizer, tmp_path):
  """A prompt that fills the row is dropped, with a reason of its own."""
  file = tmp_path / "a.jsonl"
  rows = [{"prompt": "dog " * 40, "completion": "x"}, {"prompt": "a", "completion": " cat"}]
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  options = dict(format="prompt_completion", layout="pad", validation=(str(file),))
  found = prepared(tokenizer, tmp_path / "c", [file], **options).report
  assert found["rows"] == {
    "read": 4,
    "trained": 1,
    "held_out": 1,
    "dropped": {"the prompt fills the sequence": 2},
  }
  assert found["tokens"]["read"] == sum(
    found["tokens"][name] for name in ("trained", "held_out")
  ) + sum(found["tokens"]["dropped"].values())


def test_class_is_the_target_of_the_last_token(tokenizer, tmp_path):
  file = tmp_path / "a.jsonl"
  labels = ["10", "9", "ten", "9"]
  rows = [
    {"text": text, "label": label}
    for text, label in zip(["the cat", "dog", "sat " * 40, "x"], labels)
  ]
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  data = prepared(
    tokenizer, tmp_path / "c", [file], validation=(str(file),), format="classification"
  )
  assert data.labels == ["9", "10", "ten"] and isinstance(data.train, ClassificationDataset)
  for i, row in enumerate(rows):
    ids = tokenizer(row["text"])["input_ids"][:16]
    got = data.train[i]
    np.testing.assert_array_equal(got["ids"][: len(ids)], ids)
    assert np.flatnonzero(got["mask"]).tolist() == [len(ids) - 1]
    assert got["targets"][len(ids) - 1] == data.labels.index(row["label"])


def test_best_fit_packs_all_with_little_padding():
  rng = np.random.default_rng(0)
  for T in (7, 64, 1024):
    lengths = rng.integers(1, T + 1, 3000).tolist()
    rows = best_fit(lengths, T)
    assert sorted(i for row in rows for i in row) == list(range(3000))
    assert all(sum(lengths[i] for i in row) <= T for row in rows)
    assert len(rows) < 1.12 * sum(lengths) / T + 1
