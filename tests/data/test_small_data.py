"""Data as it comes: other column names, folders as labels, templates, duplicates, little text."""

import collections
import json
import re
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from safetensors.numpy import load_file, save_file

import jaxft.hf.tokenizer
from jaxft.config import DataSection
from jaxft.data import dataset
from jaxft.data.loader import BatchSource
from jaxft.errors import RequestError, StorageError
from jaxft.metrics.logger import due_at
from jaxft.pretrained import load_workdir
from jaxft.train import finetune, validate_run
from jaxft.training import resume
from jaxft.training.workdir import has_content, move_aside


@pytest.fixture(scope="module")
def tokenizer(folder):
  return jaxft.hf.tokenizer.load_tokenizer(folder, 293)


def prepared(tokenizer, tmp_path, *files, **data):
  """The data, and the lines that were said of it."""
  settings = {"sequence_length": 16, "cache_dir": str(tmp_path / "cache"), "layout": "pad", **data}
  section, lines = DataSection(train=tuple(map(str, files)), **settings), []
  return dataset.prepare_data(section, tokenizer, "a tokenizer", log=lines.append), lines


def read(*names, **settings):
  data, lines = DataSection(**settings), []
  nothing = collections.Counter()
  return list(
    dataset.read_examples(tuple(map(str, names)), "train", data, nothing, nothing, lines.append)
  ), lines


def table(tmp_path, kind, rows):
  """The rows as a file of that kind."""
  file = tmp_path / f"rows.{kind}"
  if kind == "jsonl":
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  elif kind == "parquet":
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
  else:
    sign = ";" if kind == "semicolons.csv" else ","
    file.write_text(
      "\n".join([sign.join(rows[0]), *(sign.join(map(str, row.values())) for row in rows)]) + "\n"
    )
  return file


KINDS = ["jsonl", "parquet", "csv", "semicolons.csv"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["joke", "text", "JOKE "])
def test_only_text_column_is_detected_and_logged(tmp_path, kind, name):
  file = table(tmp_path, kind, [{"ID": i, "Joke": f"a cat {i}", "score": 0.5} for i in range(3)])
  found, lines = read(file, text_column=name)
  assert [example.text for example in found] == ["a cat 0", "a cat 1", "a cat 2"]
  assert lines == [
    f"{file}: reading column 'Joke', because the data has no config.data.text_column={name!r}"
  ]
  assert read(file, text_column="Joke")[1] == []


@pytest.mark.parametrize("kind", KINDS[:3])
def test_ambiguous_text_columns_are_an_error(tmp_path, kind):
  file = table(tmp_path, kind, [{"title": "a", "body": "b"}])
  with pytest.raises(
    RequestError,
    match="row 1: no column 'text' .columns: 'title', 'body'; set config.data.text_column",
  ):
    read(file)


@pytest.mark.parametrize(
  "content, expected",
  [
    # the first is blank, and both are text
    ("id,joke,author\n1,,Ann\n2,a cat,Bob\n3,a dog,Cy\n", None),
    ("when,what\n3/5/84,1984\n4/5/84,a cat\n5/5/84,a dog\n", "what"),
    ("ID,Joke\n1,\n2,\n3,a cat\n", "Joke"),
    ("n,m\n1,2\n", None),
  ],
)
def test_text_column_detection_probes_several_rows(tmp_path, content, expected):
  (tmp_path / "a.csv").write_text(content)
  if expected is None:
    with pytest.raises(RequestError, match="row 1: no column 'text'"):
      read(tmp_path / "a.csv")
  else:
    _, lines = read(tmp_path / "a.csv", on_bad_row="skip")
    assert f"reading column {expected!r}" in lines[0]


def test_columns_are_resolved_per_file(tmp_path):
  for name, content in (
    ("a.csv", "ID,Joke\n1,a cat\n"),
    ("b.txt", "a dog"),
    ("c.csv", "Text\na mat\n"),
    ("d.csv", "TEXT\nhat\n"),
  ):
    (tmp_path / name).write_text(content)
  found, lines = read(tmp_path)
  assert [example.text for example in found] == ["a cat", "a dog", "a mat", "hat"]
  assert [line.split(":")[0] for line in lines] == [
    str(tmp_path / name) for name in ("a.csv", "c.csv", "d.csv")
  ]


@pytest.mark.parametrize(
  "first, other, settings, missing",
  [
    ({"title": "a"}, {"title": "b", "text": "c"}, {}, "text"),
    (
      {"question": "a", "answer": "b"},
      {"prompt": "c", "completion": "d"},
      {"format": "prompt_completion"},
      "prompt",
    ),
  ],
)
def test_column_missing_in_first_row_is_not_replaced(tmp_path, first, other, settings, missing):
  file = table(tmp_path, "jsonl", [first, first | other, first | other])
  with pytest.raises(RequestError, match=f"row 1: no column '{missing}'"):
    read(file, **settings)
  assert len(read(file, **settings, on_bad_row="skip")[0]) == 2


def test_label_column_is_not_taken_for_text(tmp_path):
  file = table(
    tmp_path,
    "csv",
    [{"Review": "good", "sentiment": "pos"}, {"Review": "dull", "sentiment": "neg"}],
  )
  found, lines = read(file, format="classification")
  assert [(example.text, example.label) for example in found] == [
    ("good", "pos"),
    ("dull", "neg"),
  ] and len(lines) == 2


def test_utf16_without_encoding_is_an_error(tmp_path):
  (tmp_path / "a.csv").write_bytes("Joke\na cat\n".encode("utf-16"))
  with pytest.raises(
    RequestError, match="a.csv: looks like UTF-16.* set config.data.encoding=utf-16"
  ):
    read(tmp_path / "a.csv")
  assert [example.text for example in read(tmp_path / "a.csv", encoding="utf-16")[0]] == ["a cat"]


@pytest.mark.parametrize(
  "names", [("prompt", "response"), ("Question", "ANSWER"), ("instruction", "output")]
)
def test_prompt_and_completion_column_aliases(tmp_path, names):
  file = table(tmp_path, "jsonl", [dict(zip(names, ("who?", "me"))) | {"id": "x"}])
  settings = {
    "format": "prompt_completion",
    "prompt_column": "question",
    "completion_column": "answer",
  }
  (example,), lines = read(file, **settings, template="Q {prompt} A {completion}")
  assert (
    example.text == "Q who? A me" and example.prompt_chars == len("Q who? A ") and len(lines) == 2
  )
  several = table(tmp_path, "jsonl", [{"prompt": "a", "instruction": "b", "response": "c"}])
  with pytest.raises(RequestError, match="no column 'question'"):
    read(several, **settings)


def test_text_template_is_learned_whole(tmp_path, tokenizer):
  file = table(tmp_path, "jsonl", [{"Prompt": "who?", "response": "me"}])
  (example,), lines = read(file, template="Question: {prompt}. Answer: {response}")
  assert example.text == "Question: who?. Answer: me" and example.prompt_chars == 0
  assert lines == [f"{file}: reading column 'Prompt' for {{prompt}} in config.data.template"]
  with pytest.raises(
    RequestError, match="no column 'reply' .columns: 'Prompt', 'response'; set config.data.template"
  ):
    read(file, template="{prompt} {reply}")
  plain = tmp_path / "a.txt"
  plain.write_text("a cat")
  (example,), lines = read(plain, template="Question: {prompt}. Answer: {response}")
  assert example.text == "a cat" and "so it is read without one" in lines[0]
  with pytest.raises(
    RequestError, match="no column 'asked' .columns: 'Prompt', 'response'; set config.data.template"
  ):
    read(file, template="{asked}")
  # Evaluated on other text, a text that goes through no template.
  other = tmp_path / "other.jsonl"
  other.write_text('{"text": "a cat", "prompt": "a dog", "response": "a mat"}\n')
  data, _ = prepared(
    tokenizer, tmp_path, file, template="Q: {prompt}. A: {response}", unrelated=(str(other),)
  )
  assert tokenizer.decode(data.unrelated.tokens.ids[:-1]) == "a cat"


def test_folder_names_are_class_labels(tmp_path):
  for name, text in (("pos/1", "good"), ("pos/2", "fine"), ("neg/1", "dull")):
    (tmp_path / "reviews" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "reviews" / f"{name}.txt").write_text(text)
  expected = {("good", "pos"), ("fine", "pos"), ("dull", "neg")}
  reviews = tmp_path / "reviews"
  for names in ([reviews], [reviews / "*" / "*.txt"], [reviews / "pos", reviews / "neg"]):
    found, _ = read(*names, format="classification")
    assert {(example.text, example.label) for example in found} == expected
  (tmp_path / "blobs").mkdir()
  for i, file in enumerate(sorted(reviews.glob("*/*.txt"))):  # as the hub's cache has files
    file.rename(tmp_path / "blobs" / str(i))
    file.symlink_to(tmp_path / "blobs" / str(i))
  assert {
    (example.text, example.label) for example in read(reviews, format="classification")[0]
  } == expected
  (reviews / "urls.txt").write_text("https://example.org")
  with pytest.raises(
    RequestError, match="urls.txt: not in one of the folders that name the labels"
  ):
    read(reviews, format="classification")
  assert len(read(reviews, format="classification", on_bad_row="skip")[0]) == 3
  assert len(read(reviews)[0]) == 4  # text without labels


def test_duplicates_are_counted_and_dropped(tokenizer, tmp_path):
  """They are dropped only with data.duplicates=drop."""
  texts = ["a cat", "a dog", "a cat", "a mat", "a dog", "a cat"]
  file = table(tmp_path, "jsonl", [{"text": text} for text in texts])
  data, _ = prepared(tokenizer, tmp_path, file, validation_fraction=0.0)
  assert (data.report["duplicates"], len(data.train)) == (3, 6)
  data, _ = prepared(tokenizer, tmp_path, file, validation_fraction=0.0, duplicates="drop")
  rows = data.report["rows"]
  assert (rows["read"], rows["trained"], rows["dropped"]) == (6, 3, {"duplicates": 3})
  assert {tokenizer.decode(row["targets"][row["mask"]][:-1]) for row in data.train} == {
    "a cat",
    "a dog",
    "a mat",
  }
  # A document that was trained on is not evaluated on.
  other = tmp_path / "other.jsonl"
  other.write_text('{"text": "a mat"}\n{"text": "a hat"}\n')
  data, _ = prepared(tokenizer, tmp_path, file, validation=(str(other),), duplicates="drop")
  assert [tokenizer.decode(row["targets"][row["mask"]][:-1]) for row in data.validation] == [
    "a hat"
  ]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_few_documents_hold_out_their_ends(tokenizer, tmp_path, count):
  texts = [" ".join(f"cat {i} {j}" for j in range(100)) for i in range(count)]
  file = table(tmp_path, "jsonl", [{"text": text} for text in texts])
  data, lines = prepared(tokenizer, tmp_path, file, layout="concat")
  heads, tails = (
    [
      tokenizer.decode(rows.tokens.ids[a : b - 1])
      for a, b in zip(rows.tokens.starts_N1, rows.tokens.starts_N1[1:])
    ]
    for rows in (data.train, data.validation)
  )
  assert [head + tail for head, tail in zip(heads, tails, strict=True)] == texts
  assert all(0.03 < len(tail) / len(text) < 0.08 for tail, text in zip(tails, texts))
  rows = data.report["rows"]
  assert (rows["read"], rows["trained"], rows["held_out"]) == (count, count, 0)
  assert data.report["notes"]["documents whose end is held out"] == count
  assert lines[0].startswith(
    f"{count} document{'s' if count > 1 else ''}: the last 5 % of each is held out"
  )


@pytest.mark.parametrize(
  "text", ["x" * 600 + " " + "y" * 400, "\n".join(["word"] * 300), "字" * 500]
)
@pytest.mark.parametrize("share", [0.05, 0.6])
def test_held_out_end_matches_validation_fraction(tokenizer, tmp_path, text, share):
  (tmp_path / "a.txt").write_text(text)
  data, _ = prepared(
    tokenizer, tmp_path, tmp_path / "a.txt", layout="concat", validation_fraction=share
  )
  of_tail = len(tokenizer.decode(data.validation.tokens.ids[:-1])) / len(text)
  assert share * 0.9 <= of_tail <= 2 * share


def test_document_is_never_held_out_whole(tokenizer, tmp_path):
  file = table(tmp_path, "jsonl", [{"text": text} for text in ("ab", "the cat", "x y")])
  data, _ = prepared(tokenizer, tmp_path, file, layout="concat", validation_fraction=0.999)
  assert "".join(tokenizer.decode(data.validation.tokens.ids).split("<|endoftext|>")) == "bhe cat y"


def test_repeated_document_holds_out_its_end_once(tokenizer, tmp_path):
  file = tmp_path / "a.txt"
  file.write_text(" ".join(f"cat {i}" for i in range(100)))
  once, _ = prepared(tokenizer, tmp_path, file, layout="concat")
  twice, _ = prepared(tokenizer, tmp_path, f"{file}@2", layout="concat")
  assert np.array_equal(once.validation.tokens.ids, twice.validation.tokens.ids)
  assert len(twice.train.tokens.ids) == 2 * len(once.train.tokens.ids)


def test_few_pairs_hold_out_one_and_one_pair_none(tokenizer, tmp_path):
  settings = dict(format="prompt_completion", prompt_column="q", completion_column="a")
  pairs = [{"q": f"cat {i}?", "a": "mat"} for i in range(3)]
  data, _ = prepared(tokenizer, tmp_path, table(tmp_path, "jsonl", pairs), **settings)
  assert (len(data.train), len(data.validation)) == (2, 1)
  data, _ = prepared(tokenizer, tmp_path, table(tmp_path, "jsonl", pairs[:1]), **settings)
  assert (len(data.train), data.validation) == (1, None)


def test_entropy_floor_needs_nats_of_every_document(tokenizer, tmp_path):
  file = table(tmp_path, "jsonl", [{"text": f"cat {i}", "nats": 2.0} for i in range(40)])
  data, lines = prepared(tokenizer, tmp_path, file, nats_column="nats")
  assert data.entropy_floor and not lines
  data, lines = prepared(tokenizer, tmp_path, file, nats_column="bits")
  assert data.entropy_floor is None and lines == [
    f"{file}: no column 'bits' (config.data.nats_column); the entropy floor is unknown"
  ]


@pytest.mark.parametrize(
  "rows, batch_size, accumulation", [(1, 8, 1), (3, 8, 2), (7, 8, 8), (8, 8, 2), (13, 4, 2)]
)
def test_fewer_rows_than_a_batch_are_taken_once(rows, batch_size, accumulation):
  data = [{"ids": np.array([i]), "mask": np.array([True])} for i in range(rows)]
  each, epochs = min(rows, batch_size), 3
  steps = BatchSource(
    data, batch_size=batch_size, accumulation=accumulation, seed=5, total_rows=epochs * rows,
    local_rows=np.arange(batch_size // accumulation),
  )  # fmt: skip
  assert len(steps) == -(-epochs * rows // each)
  seen = collections.Counter()
  for step in range(len(steps)):
    batch = steps[step]
    assert batch["ids"].shape == (accumulation, batch_size // accumulation, 1)
    ids = batch["ids"][batch["mask"]].tolist()
    assert len(ids) <= each
    if rows < batch_size:
      assert sorted(ids) == list(range(rows))
    seen.update(ids)
  assert seen == dict.fromkeys(range(rows), epochs)


@pytest.mark.parametrize("rows, batch_size", [(1, 8), (13, 4), (16, 4), (5, 3), (100, 7)])
def test_epoch_interval_is_due_once_per_epoch(rows, batch_size):
  a_step = min(rows, batch_size)
  steps = range(1, -(-5 * rows // a_step) + 1)
  due = [step for step in steps if due_at("epoch", step, rows, batch_size)]
  assert due == sorted({-(-epoch * rows // a_step) for epoch in range(1, 6)})
  assert [step for step in range(1, 9) if due_at(3, step, rows, batch_size)] == [3, 6]
  assert not any(due_at(0, step, rows, batch_size) for step in steps)


@pytest.fixture(scope="module")
def little(tmp_path_factory):
  file = tmp_path_factory.mktemp("little") / "a.txt"
  file.write_text("the cat sat on the mat and ran to the big red house")
  return file


def test_one_short_document_trains_and_evaluates(config, little, tmp_path, capsys):
  """A single short document is trained on, and its end is evaluated."""
  config.data.train = (str(little),)
  config.train.steps, config.train.epochs, config.optim.warmup_steps = 0, 4.0, 50
  config.train.eval_every = "epoch"
  config.train.save_every = "epoch"
  config.train.eval_batch_size = 16
  run = finetune(config, tmp_path / "run")
  output = capsys.readouterr().out
  assert re.search(
    r"1 document with \d+ tokens to train on, in 1 sequence of 32; "
    r"the ends of 1 document with \d tokens held out;",
    output,
  )
  assert "| steps | 4 of 1 sequence of 32 tokens |" in (run.export / "README.md").read_text()
  assert (
    "config.train.batch_size=8: the training text fills only 1 sequence, so each step uses all "
    "of it" in output
  )
  assert (
    "config.optim.warmup_steps=50: more than the 4 steps of the run; "
    "using 0 steps, a tenth of the run" in output
  )
  assert [line["step"] for line in run.metrics if "eval/loss" in line] == [0, 1, 2, 3, 4]
  rates = [line["train/learning_rate"] for line in run.metrics if "train/loss" in line]
  assert rates == pytest.approx([1e-3, 1e-3 * 3 / 4, 1e-3 / 2, 1e-3 / 4])
  seen = [line["train/tokens"] for line in run.metrics if "train/loss" in line]
  assert seen == [n * seen[0] for n in (1, 2, 3, 4)]
  # The same folder with more epochs goes on; with fewer, or another rate, it is another run.
  config.train.epochs = 6.0
  longer = finetune(config, tmp_path / "run")
  assert "6 steps in total instead of 4: continuing at step 4" in capsys.readouterr().out
  assert [line["step"] for line in longer.metrics if "eval/loss" in line] == [0, 1, 2, 3, 4, 5, 6]
  assert longer.metrics[-2]["train/learning_rate"] == pytest.approx(1e-3 / 6)
  for setting, value in (("epochs", 5.0), ("seed", 3)):
    other = config.copy_and_resolve_references()
    other.train[setting] = value
    with pytest.raises(
      RequestError, match=f"config.train.{setting}={value}: the run was started with"
    ):
      finetune(other, tmp_path / "run")
  # A new run moves it aside, whole; this one holds nothing out.
  config.train.epochs, config.train.seed, config.data.validation_fraction = 1.0, 3, 0.0
  config.data.unrelated = (str(little),)
  before = {it.name for it in (tmp_path / "run").iterdir()}
  run = finetune(config, tmp_path / "run", overwrite=True)
  output = capsys.readouterr().out
  assert f"is moved to {tmp_path / 'run.1'}" in output
  assert {it.name for it in (tmp_path / "run.1").iterdir()} == before - {"run.lock"}
  assert load_workdir(tmp_path / "run.1").run[1] == 6
  assert (
    "no text is held out, so this run has no eval loss" in output
    and "no eval loss: no text was held out\n" in output
  )
  assert not any("eval/loss" in line for line in run.metrics)
  assert [line["step"] for line in run.metrics if "eval/unrelated_loss" in line] == [0, 1]
  assert (run.export / "model.safetensors").exists()
  assert "| eval loss | none: the run held out no text |" in (run.export / "README.md").read_text()
  assert (
    "No text was held out, so the run has no eval loss."
    in (run.workdir / "report.html").read_text()
  )
  with pytest.raises(RequestError, match="the run held out no text; name a text with --data"):
    load_workdir(run.workdir).evaluate_held_out()
  # What is refused moves nothing, and a link stays one.
  config.data.sequence_length = 4096
  (tmp_path / "link").symlink_to(tmp_path / "run")
  with pytest.raises(RequestError, match="must be at most 71, the model's positions"):
    finetune(config, tmp_path / "link", overwrite=True)
  assert load_workdir(tmp_path / "link").run[1] == 1 and not (tmp_path / "run.2").exists()
  # So is a model that cannot be read, and a disk that has no room.
  config.data.sequence_length, files = 32, {it.name for it in (tmp_path / "run").iterdir()}
  shutil.copytree(config.model.path, tmp_path / "model")
  tensors = load_file(tmp_path / "model" / "model.safetensors")
  del tensors["transformer.h.0.mlp.c_fc.weight"]
  save_file(tensors, tmp_path / "model" / "model.safetensors")
  for changes, refusal in (
    ({"model.path": str(tmp_path / "model")}, (RequestError, "h.0.mlp.c_fc.weight' is missing")),
    (
      {"train.keep": 2**31 - 1, "train.save_every": 1, "train.steps": 10**9, "train.epochs": 0.0},
      (StorageError, "need"),
    ),
  ):
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict(changes)
    with pytest.raises(refusal[0], match=refusal[1]):
      finetune(other, tmp_path / "link", overwrite=True)
    assert {it.name for it in (tmp_path / "run").iterdir()} == files and not (
      tmp_path / "run.2"
    ).exists()
  assert move_aside(tmp_path / "link") == tmp_path / "run.2" and {
    it.name for it in (tmp_path / "run").iterdir()
  } == {"run.lock"}
  (tmp_path / "run" / "checkpoints").mkdir()
  config.data.cache_dir = str(tmp_path / "run" / "tokens")
  with pytest.raises(RequestError, match="is in .*run, which would be moved aside"):
    finetune(config, tmp_path / "run", overwrite=True)


def test_model_folder_is_rejected_as_workdir(config, folder, tmp_path):
  (tmp_path / "model").mkdir()
  shutil.copy(folder / "config.json", tmp_path / "model")
  with pytest.raises(
    RequestError, match="model' has the config.json of a model.* --overwrite_output_dir"
  ):
    finetune(config, tmp_path / "model")
  validate_run(jaxft.config.resolve(config), tmp_path / "model", overwrite=True)
  assert has_content(tmp_path / "model") and not has_content(tmp_path)


@pytest.mark.slow
def test_longer_run_reports_what_blocks_resume(config, tmp_path, capsys):
  config.train.steps, config.train.eval_every, config.train.early_stopping_patience = 20, 1, 1
  config.optim.learning_rate, config.optim.warmup_steps = 3.0, 0  # no loss falls with it
  finetune(config, tmp_path / "run")
  config.train.steps = 30
  run = finetune(config, tmp_path / "run")
  assert (
    "early_stopping_patience=1: the eval loss has not improved for this number of evaluations"
    in capsys.readouterr().out
  )
  last = run.metrics[-1]["step"]
  config.train.early_stopping_patience = 0
  assert finetune(config, tmp_path / "run").metrics[-1]["step"] == 30 > last


@pytest.mark.parametrize("step, saved_rows, expected", [(9, 133, 11), (8, 133, 0), (9, 144, 0)])
def test_longer_run_reports_rows_it_has_passed(step, saved_rows, expected):
  meta = {"rows_in_all": saved_rows, "total_steps": 9}
  about = {"rows_in_all": 266, "rows_of_step": 16}
  note = resume._masked_rows_note(meta, about, step)
  assert (
    (f"one epoch lacks {expected} sequences, masked by the shorter run" in note)
    if expected
    else note == ""
  )


def test_keep_best_without_evaluations_is_rejected(config, tmp_path):
  file = table(tmp_path, "jsonl", [{"prompt": "cat", "completion": "mat"}])
  config.data.train, config.data.format = (str(file),), "prompt_completion"
  config.train.eval_every, config.train.keep_best_metric = 1, "eval/loss"
  with pytest.raises(
    RequestError,
    match="config.train.keep_best_metric='eval/loss' needs held-out text, .* .1 row",
  ):
    finetune(config, tmp_path / "other")
