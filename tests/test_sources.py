"""Files in: every newline kept, every bad row named or counted, whatever the format and the compression."""

import collections
import csv
import gzip
import io
import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from jaxft import config as settings
from jaxft.data import report, sources
from jaxft.errors import RequestError

TEXT = 'a\r\nb\n\n"c",\td\n\x00\u2028é東🐈 '


def write(folder, name, content):
  content = content.encode() if isinstance(content, str) else content
  if name.endswith(".gz"):
    content = gzip.compress(content)
  if name.endswith(".zst"):
    content = pyarrow.compress(content, codec="zstd", asbytes=True)
  (folder / name).write_bytes(content)
  return str(folder / name)


def read(*names, notes=None, dropped=None, **how):
  data = settings.default().data
  data.update(how)
  dropped = collections.Counter() if dropped is None else dropped
  return list(report.examples(names, "train", data, dropped, collections.Counter() if notes is None else notes))


def texts(*names, **how):
  return [example.text for example in read(*names, **how)]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_every_character_is_kept(tmp_path, compression):
  assert texts(write(tmp_path, f"a.txt{compression}", TEXT)) == [TEXT]
  assert texts(write(tmp_path, f"a.jsonl{compression}", json.dumps({"text": TEXT}) + "\r\n\n")) == [TEXT]
  rows = io.StringIO(newline="")
  csv.writer(rows).writerows([["text", "x"], [TEXT, "1"], ["b", "2"]])
  assert texts(write(tmp_path, f"a.csv{compression}", rows.getvalue())) == [TEXT, "b"]
  pyarrow.parquet.write_table(pyarrow.table({"text": [TEXT, "z"]}), tmp_path / "a.parquet")
  assert texts(str(tmp_path / "a.parquet")) == [TEXT, "z"]
  everything = [TEXT, "b", TEXT, TEXT, "z", TEXT]
  assert collections.Counter(texts(str(tmp_path))) == collections.Counter(everything)  # a folder
  assert texts(str(tmp_path / "*.txt*"), str(tmp_path / f"a.csv{compression}")) == [TEXT, TEXT, "b"]


def test_a_txt_file_is_one_document_or_cut_at_a_separator(tmp_path):
  file = write(tmp_path, "a.txt", "one\n<|end|>\ntwo<|end|>\n")
  assert texts(file) == ["one\n<|end|>\ntwo<|end|>\n"]
  assert texts(file, separator="<|end|>") == ["one\n", "\ntwo"]


def test_a_folder_is_read_without_what_is_hidden_and_what_is_unknown_is_counted(tmp_path):
  (tmp_path / ".checkpoints").mkdir()
  for name in ("a.txt", "B.TXT", "sub.pdf", ".hidden.txt", ".checkpoints/c.txt"):
    write(tmp_path, name, name)
  notes = collections.Counter()
  assert sorted(texts(str(tmp_path), notes=notes)) == ["B.TXT", "a.txt"]
  assert notes["files in folders that are of no kind that is read"] == 1
  os.mkfifo(tmp_path / "pipe.txt")
  assert "not an ordinary file" in sources.faults({"train": (str(tmp_path / "pipe.txt"),)})[0]


def test_byte_order_marks_and_crlf_are_reported(tmp_path):
  notes = collections.Counter()
  write(tmp_path, "a.txt", b"\xef\xbb\xbfx\r\ny")
  write(tmp_path, "b.csv", b"\xef\xbb\xbftext\r\nz\r\n")
  write(tmp_path, "c.txt", b"plain\n")
  assert texts(str(tmp_path), notes=notes) == ["x\r\ny", "z", "plain\n"]
  assert +notes == {"files with a byte order mark": 2, ".txt files with \\r\\n, which is kept": 1}


def test_prompts_completions_and_labels(tmp_path):
  file = write(tmp_path, "a.jsonl", json.dumps({"prompt": "Q{completion}", "completion": "A", "text": "t", "label": 1}))
  data = dict(format="prompt_completion", template="[{prompt}] -> {completion}!")
  (example,) = read(file, **data)
  assert example.text == "[Q{completion}] -> A!" and example.text[example.prompt :] == "A!"
  (example,) = read(file, format="classification")
  assert (example.text, example.label) == ("t", "1")


BAD = [
  ("a.jsonl", '{"text": "x"}\n{"body": "x"}\n', "row 2: no column 'text' .it has 'body'"),
  ("a.jsonl", '{"text": null}\n', "row 1: column 'text' is no text .NoneType"),
  ("a.jsonl", '{"text": NaN}\n', "row 1: column 'text' is no text .float"),
  ("a.jsonl", '{"text": {"a": ["b"]}}\n', "row 1: column 'text' is no text .dict"),
  ("a.jsonl", '{"text": ""}\n', "row 1: column 'text' is empty"),
  ("a.jsonl", "[1]\n", "row 1: not a JSON object"),
  ("a.jsonl", '{"text": "x"}\n{\n', "row 2: not JSON"),
  ("a.jsonl", "[" * 100_000, "row 1: not JSON"),
  ("a.jsonl", '{"text": "a\\ud800b"}\n', "row 1: column 'text' is not UTF-8"),
  ("a.jsonl", b'{"text": "\xff"}\n', "row 1: not UTF-8 .invalid start byte at byte 10"),
  ("a.txt", b"\xff\xfe", "a.txt: not UTF-8 .invalid start byte at byte 0"),
  ("a.txt", b"", "a.txt: column 'text' is empty"),
  ("a.csv", "body\nx\n", "row 1: no column 'text'"),
  ("a.csv", b"text\nfine\n\xff\n", "row 2: column 'text' is not UTF-8"),
  ("a.csv", "x,text\n1\n", "row 1: no column 'text'"),
  ("a.csv", "text\nthe cat, dog\n", "row 1: more cells than the first line names .2 and 1"),
  ("a.csv", b'text\nfine\n"open\nfor ever\n', "row 2: not CSV .unexpected end of data"),
]


@pytest.mark.parametrize("name, content, told", BAD)
def test_a_bad_row_is_named_or_counted(tmp_path, name, content, told):
  file = write(tmp_path, name, content)
  with pytest.raises(RequestError, match=f"{told}.*on_bad_row=skip"):
    read(file)
  dropped = collections.Counter()
  good = read(file, on_bad_row="skip", dropped=dropped)
  assert sum(dropped.values()) == 1 and len(good) == content.count(b"fine" if isinstance(content, bytes) else '"x"}\n{')
  assert "(" not in "".join(dropped)  # a reason, not a row's own details


def test_two_columns_of_one_name_are_refused(tmp_path):
  with pytest.raises(RequestError, match="a.csv: two columns are called 'text'"):
    read(write(tmp_path, "a.csv", "text,text\na,b\n"))


def test_a_value_that_cannot_be_read_is_the_fault_of_its_row(tmp_path):
  raw = pyarrow.array([b"fine", b"\xff", b"too"], pyarrow.binary())
  text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
  pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
  with pytest.raises(RequestError, match="row 2: a value cannot be read .*skip"):
    read(str(tmp_path / "a.parquet"))
  assert texts(str(tmp_path / "a.parquet"), on_bad_row="skip") == ["fine", "too"]


def test_bytes_in_parquet_are_no_text(tmp_path):
  pyarrow.parquet.write_table(pyarrow.table({"text": [b"x", b"y"]}), tmp_path / "a.parquet")
  with pytest.raises(RequestError, match="row 1: column 'text' is no text .bytes"):
    read(str(tmp_path / "a.parquet"))


def test_a_long_line_is_a_row_like_any_other(tmp_path):
  long = "ab " * 4_000_000
  assert texts(write(tmp_path, "a.jsonl", json.dumps({"text": long}))) == [long]
  assert texts(write(tmp_path, "a.csv", f"text\n{long}\n")) == [long]


@pytest.mark.parametrize(
  "name, content, told",
  [
    ("a.parquet", b"x", "a.parquet: "),
    ("a.txt.gz", None, "a.txt.gz: "),
    ("a.doc", b"x", "cannot read .doc"),
    ("a.parquet.gz", b"x", "cannot read .gz"),
  ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, told):
  file = write(tmp_path, name, content or b"x" * 1000)
  if content is None:  # cut short
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-12])
  with pytest.raises(RequestError, match=told):
    read(file, on_bad_row="skip")


@pytest.mark.parametrize("source", ["nowhere.txt", "no*where", "."])
def test_missing_sources_are_named(tmp_path, monkeypatch, source):
  monkeypatch.chdir(tmp_path)
  for train, validation in (((source,), ()), ((), (source,)), ((f"{source}@2",), ())):
    (line,) = sources.faults({"train": train, "validation": validation})
    assert repr(source) in line


def test_an_unreachable_hub_is_one_line():
  with pytest.raises(RequestError, match="^data source 'hub:nobody/nothing:train': .*give the files$"):
    read("hub:nobody/nothing:train")


def test_a_fingerprint_changes_with_every_byte_and_no_name(tmp_path):
  one, other = write(tmp_path, "a.txt", "abc"), write(tmp_path, "b.txt", "abc")
  before = sources.fingerprint((one,), "train")
  assert before == sources.fingerprint((other,), "train")
  write(tmp_path, "a.txt", "abd")
  assert before != sources.fingerprint((one,), "train")
  assert sources.fingerprint((write(tmp_path, "a.csv", "abc"),), "train") != before  # read otherwise


def test_a_weight_stands_after_its_source(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert sources.weighted("a.txt@0.5") == ("a.txt", 0.5) and sources.weighted("hub:x/y:train@3") == (
    "hub:x/y:train",
    3.0,
  )
  assert sources.weighted("a@b.txt") == ("a@b.txt", 1.0)
  (tmp_path / "folder@2").mkdir()
  assert sources.weighted("folder@2") == ("folder@2", 1.0)
  write(tmp_path, "a.txt", "x")
  for weight in ("0", "101", "nan", "-1", "1e3", "x", ""):
    assert "a number above 0 and at most 100" in sources.faults({"train": (f"a.txt@{weight}",)})[0]
  assert sources.weighted("a.txt@1.") == ("a.txt", 1.0)
  assert sources.faults({"validation": ("a.txt@2",)})  # what is evaluated is read once


def test_a_label_has_the_name_that_the_datasets_library_gives_it(tmp_path, monkeypatch):
  datasets = pytest.importorskip("datasets")
  monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
  features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
  rows = datasets.Dataset.from_dict({"text": ["good", "bad", "so so"], "label": [1, 0, -1]}, features=features)
  (tmp_path / "imdb").mkdir()
  rows.to_parquet(str(tmp_path / "imdb" / "train.parquet"))
  data = settings.default().data
  data.update(format="classification", on_bad_row="skip")
  for source in (str(tmp_path / "imdb"), f"hub:{tmp_path / 'imdb'}"):
    dropped, notes = collections.Counter(), collections.Counter()
    found = list(report.examples((source,), "train", data, dropped, notes))
    assert [(example.text, example.label) for example in found] == [("good", "pos"), ("bad", "neg")]
    assert sum(dropped.values()) == 1


def test_labels_that_are_whole_numbers_are_labels_whatever_their_type(tmp_path):
  (tmp_path / "a.jsonl").write_text(
    '{"text": "a", "label": 1.0}\n{"text": "b", "label": 0}\n{"text": "c", "label": 0.5}\n{"text": "d", "label": NaN}\n'
  )
  data = settings.default().data
  data.update(format="classification", on_bad_row="skip")
  found = report.examples((str(tmp_path / "a.jsonl"),), "train", data, collections.Counter(), collections.Counter())
  assert [example.label for example in found] == ["1", "0"]


def test_features_of_any_kind_are_read_past(tmp_path):
  """As datasets 2 and 3 wrote them: a list of a dict for a list, and null."""
  table = pyarrow.table({"text": ["a", "b"], "label": [0, 1]})
  for features in (
    {"text": {"dtype": "string", "_type": "Value"}, "messages": [{"role": {"_type": "Value"}}]},
    None,
    3,
  ):
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pyarrow.parquet.write_table(table.replace_schema_metadata(about), tmp_path / "a.parquet")
    assert texts(str(tmp_path / "a.parquet")) == ["a", "b"]
