"""Reading files: every newline survives, every bad row is named or counted, in all formats."""

import collections
import csv
import dataclasses
import glob
import gzip
import io
import json
import os
import pathlib
import random
import socket
import urllib.parse
import warnings
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from jaxft.config import DataSection
from jaxft.data import dataset, sources
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


def read(*names, notes=None, dropped=None, **settings):
  data = DataSection(**settings)
  dropped = collections.Counter() if dropped is None else dropped
  return list(
    dataset.read_examples(
      names, "train", data, dropped, collections.Counter() if notes is None else notes
    )
  )


def texts(*names, **settings):
  return [example.text for example in read(*names, **settings)]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_every_character_survives_reading(tmp_path, compression):
  assert texts(write(tmp_path, f"a.txt{compression}", TEXT)) == [TEXT]
  assert texts(write(tmp_path, f"a.jsonl{compression}", json.dumps({"text": TEXT}) + "\r\n\n")) == [
    TEXT
  ]
  rows = io.StringIO(newline="")
  csv.writer(rows).writerows([["text", "x"], [TEXT, "1"], ["b", "2"]])
  assert texts(write(tmp_path, f"a.csv{compression}", rows.getvalue())) == [TEXT, "b"]
  pyarrow.parquet.write_table(pyarrow.table({"text": [TEXT, "z"]}), tmp_path / "a.parquet")
  assert texts(str(tmp_path / "a.parquet")) == [TEXT, "z"]
  everything = [TEXT, "b", TEXT, TEXT, "z", TEXT]
  assert collections.Counter(texts(str(tmp_path))) == collections.Counter(everything)  # a folder
  assert texts(str(tmp_path / "*.txt*"), str(tmp_path / f"a.csv{compression}")) == [TEXT, TEXT, "b"]


def test_txt_file_is_split_at_the_separator(tmp_path):
  """Without a separator it is one document."""
  file = write(tmp_path, "a.txt", "one\n<|end|>\ntwo<|end|>\n")
  assert texts(file) == ["one\n<|end|>\ntwo<|end|>\n"]
  assert texts(file, separator="<|end|>") == ["one\n", "\ntwo"]


def test_folder_skips_hidden_and_counts_unknown(tmp_path):
  """Hidden files are skipped, files of unknown formats are counted."""
  (tmp_path / ".checkpoints").mkdir()
  for name in ("a.txt", "B.TXT", "sub.pdf", ".hidden.txt", ".checkpoints/c.txt"):
    write(tmp_path, name, name)
  notes = collections.Counter()
  assert sorted(texts(str(tmp_path), notes=notes)) == ["B.TXT", "a.txt"]
  assert notes["files in folders with an unsupported format, skipped"] == 1
  os.mkfifo(tmp_path / "pipe.txt")
  data = DataSection(train=(str(tmp_path / "pipe.txt"),))
  assert "not an ordinary file" in sources.validate_sources(data)[0]


def test_byte_order_marks_and_crlf_are_reported(tmp_path):
  notes = collections.Counter()
  write(tmp_path, "a.txt", b"\xef\xbb\xbfx\r\ny")
  write(tmp_path, "b.csv", b"\xef\xbb\xbftext\r\nz\r\n")
  write(tmp_path, "c.txt", b"plain\n")
  assert texts(str(tmp_path), notes=notes) == ["x\r\ny", "z", "plain\n"]
  assert +notes == {"files with a byte order mark": 2, ".txt files with \\r\\n, which is kept": 1}


def test_prompts_completions_and_labels(tmp_path):
  file = write(
    tmp_path,
    "a.jsonl",
    json.dumps({"prompt": "Q{completion}", "completion": "A", "text": "t", "label": 1}),
  )
  data = dict(format="prompt_completion", template="[{prompt}] -> {completion}!")
  (example,) = read(file, **data)
  assert example.text == "[Q{completion}] -> A!" and example.text[example.prompt_chars :] == "A!"
  (example,) = read(file, format="classification")
  assert (example.text, example.label) == ("t", "1")


BAD = [
  ("a.jsonl", '{"text": "x"}\n{"body": "x"}\n', "row 2: no column 'text' .columns: 'body'"),
  ("a.jsonl", '{"text": null}\n', "row 1: column 'text' is not text .NoneType"),
  ("a.jsonl", '{"text": NaN}\n', "row 1: column 'text' is not text .float"),
  ("a.jsonl", '{"text": {"a": ["b"]}}\n', "row 1: column 'text' is not text .dict"),
  ("a.jsonl", '{"text": ""}\n', "row 1: column 'text' is empty"),
  ("a.jsonl", "[1]\n", "row 1: not a JSON object"),
  ("a.jsonl", '{"text": "x"}\n{\n', "row 2: not JSON"),
  ("a.jsonl", "[" * 100_000, "row 1: not JSON"),
  ("a.jsonl", '{"text": "a\\ud800b"}\n', "row 1: column 'text' is not UTF-8"),
  ("a.jsonl", b'{"text": "\xff"}\n', "row 1: not UTF-8 .invalid start byte at byte 10"),
  ("a.txt", b"\xff\xfd", "a.txt: not UTF-8 .invalid start byte at byte 0"),
  ("a.txt", b"", "a.txt: the file is empty"),
  ("a.csv", "body,title\nx,y\n", "row 1: no column 'text'"),
  ("a.csv", b"text\nfine\n\xff\n", "row 2: column 'text' is not UTF-8"),
  ("a.csv", "x,text\n1\n", "row 1: no column 'text'"),
  ("a.csv", "text\nthe cat, dog\n", "row 1: more cells than column names .2 and 1"),
  ("a.csv", b'text\nfine\n"open\nfor ever\n', "row 2: not CSV .unexpected end of data"),
]


@pytest.mark.parametrize("name, content, message", BAD)
def test_bad_row_is_an_error_or_counted(tmp_path, name, content, message):
  file = write(tmp_path, name, content)
  with pytest.raises(RequestError, match=f"{message}.*on_bad_row=skip"):
    read(file)
  dropped = collections.Counter()
  good = read(file, on_bad_row="skip", dropped=dropped)
  assert sum(dropped.values()) == 1 and len(good) == content.count(
    b"fine" if isinstance(content, bytes) else '"x"}\n{'
  )
  assert "(" not in "".join(dropped)  # a reason, not a row's own details


def test_duplicate_column_names_are_rejected(tmp_path):
  with pytest.raises(RequestError, match="a.csv: has two columns named 'text'"):
    read(write(tmp_path, "a.csv", "text,text\na,b\n"))


def test_unreadable_value_is_an_error_of_its_row(tmp_path):
  raw = pyarrow.array([b"fine", b"\xff", b"too"], pyarrow.binary())
  text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
  pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
  with pytest.raises(RequestError, match="row 2: cannot read a value .*skip"):
    read(str(tmp_path / "a.parquet"))
  assert texts(str(tmp_path / "a.parquet"), on_bad_row="skip") == ["fine", "too"]


def test_parquet_bytes_are_not_text(tmp_path):
  pyarrow.parquet.write_table(pyarrow.table({"text": [b"x", b"y"]}), tmp_path / "a.parquet")
  with pytest.raises(RequestError, match="row 1: column 'text' is not text .bytes"):
    read(str(tmp_path / "a.parquet"))


def test_long_csv_and_jsonl_lines_are_read(tmp_path):
  long = "ab " * 4_000_000
  assert texts(write(tmp_path, "a.jsonl", json.dumps({"text": long}))) == [long]
  assert texts(write(tmp_path, "a.csv", f"text\n{long}\n")) == [long]


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("a.parquet", b"x", "a.parquet: "),
    ("a.txt.gz", None, "a.txt.gz: "),
    ("a.doc", b"x", "cannot read .doc"),
    ("a.parquet.gz", b"x", "cannot read .gz"),
  ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
  file = write(tmp_path, name, content or b"x" * 1000)
  if content is None:  # cut short
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-12])
  with pytest.raises(RequestError, match=message):
    read(file, on_bad_row="skip")


@pytest.mark.parametrize("source", ["nowhere.txt", "no*where", "."])
def test_missing_sources_are_named(tmp_path, monkeypatch, source):
  monkeypatch.chdir(tmp_path)
  for train, validation in (((source,), ()), ((), (source,)), ((f"{source}@2",), ())):
    (line,) = sources.validate_sources(DataSection(train=train, validation=validation))
    assert repr(source) in line


def test_unreachable_hub_is_a_one_line_error():
  with pytest.raises(RequestError, match="^data source 'hub:nobody/nothing:train': .*name them$"):
    read("hub:nobody/nothing:train")


def test_fingerprint_covers_content_not_names(tmp_path):
  one, other = write(tmp_path, "a.txt", "abc"), write(tmp_path, "b.txt", "abc")
  before = sources.fingerprint((one,), "train")
  assert before == sources.fingerprint((other,), "train")
  write(tmp_path, "a.txt", "abd")
  assert before != sources.fingerprint((one,), "train")
  # Read otherwise.
  assert sources.fingerprint((write(tmp_path, "a.csv", "abc"),), "train") != before


def test_source_weight_follows_an_at_sign(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert sources.parse_weight("a.txt@0.5") == ("a.txt", 0.5) and sources.parse_weight(
    "hub:x/y:train@3"
  ) == (
    "hub:x/y:train",
    3.0,
  )
  assert sources.parse_weight("a@b.txt") == ("a@b.txt", 1.0)
  (tmp_path / "folder@2").mkdir()
  assert sources.parse_weight("folder@2") == ("folder@2", 1.0)
  write(tmp_path, "a.txt", "x")
  for weight in ("0", "101", "nan", "-1", "1e3", "x", ""):
    assert (
      "a number above 0 and at most 100"
      in sources.validate_sources(DataSection(train=(f"a.txt@{weight}",)))[0]
    )
  assert sources.parse_weight("a.txt@1.") == ("a.txt", 1.0)
  data = DataSection(validation=("a.txt@2",))
  assert sources.validate_sources(data)  # what is evaluated is read once


def test_class_label_names_of_datasets_are_used(tmp_path, monkeypatch):
  datasets = pytest.importorskip("datasets")
  monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
  features = datasets.Features(
    {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
  )
  rows = datasets.Dataset.from_dict(
    {"text": ["good", "bad", "so so"], "label": [1, 0, -1]}, features=features
  )
  (tmp_path / "imdb").mkdir()
  rows.to_parquet(str(tmp_path / "imdb" / "train.parquet"))
  data = DataSection(format="classification", on_bad_row="skip")
  for source in (str(tmp_path / "imdb"), f"hub:{tmp_path / 'imdb'}"):
    dropped, notes = collections.Counter(), collections.Counter()
    found = list(dataset.read_examples((source,), "train", data, dropped, notes))
    assert [(example.text, example.label) for example in found] == [("good", "pos"), ("bad", "neg")]
    assert sum(dropped.values()) == 1


def test_classes_have_the_order_of_the_data_set(tmp_path, folder):
  """As before their names were known, and as run_classification.py has it."""
  datasets = pytest.importorskip("datasets")
  import jaxft.hf.tokenizer

  features = datasets.Features(
    {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg", "a"])}
  )
  rows = datasets.Dataset.from_dict(
    {"text": ["the cat"] * 20, "label": [0, 1] * 10}, features=features
  )
  rows.to_parquet(str(tmp_path / "train.parquet"))
  data = DataSection(
    train=(str(tmp_path),),
    format="classification",
    sequence_length=8,
    cache_dir=str(tmp_path / "c"),
  )
  for _ in range(2):  # the second is read from the cache
    found = dataset.prepare_data(data, jaxft.hf.tokenizer.load_tokenizer(folder, 293), "")
    assert found.labels == ["pos", "neg"]
  mixed = tmp_path / "mixed"
  mixed.mkdir()
  (tmp_path / "train.parquet").rename(mixed / "a.parquet")
  (mixed / "b.jsonl").write_text('{"text": "the dog", "label": "zzz"}\n' * 9)
  data = dataclasses.replace(data, train=(str(mixed),))
  assert dataset.prepare_data(data, jaxft.hf.tokenizer.load_tokenizer(folder, 293), "").labels == [
    "neg",
    "pos",
    "zzz",
  ]


def test_integer_labels_of_any_type_are_labels(tmp_path):
  (tmp_path / "a.jsonl").write_text(
    '{"text": "a", "label": 1.0}\n{"text": "b", "label": 0}\n'
    '{"text": "c", "label": 0.5}\n{"text": "d", "label": NaN}\n'
  )
  data = DataSection(format="classification", on_bad_row="skip")
  found = dataset.read_examples(
    (str(tmp_path / "a.jsonl"),), "train", data, collections.Counter(), collections.Counter()
  )
  assert [example.label for example in found] == ["1", "0"]


def test_malformed_hf_features_are_ignored(tmp_path):
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


def compressed(content, suffix):
  import bz2
  import lzma

  ways = {".bz2": bz2.compress, ".xz": lzma.compress, ".gz": gzip.compress, "": bytes}
  return ways[suffix](content.encode())


@pytest.mark.parametrize("suffix", ["", ".bz2", ".xz"])
def test_file_formats_and_compressions_are_read(tmp_path, suffix):
  rows = [{"text": TEXT, "x": 1}, {"text": "b", "x": [2]}]
  table = io.StringIO(newline="")
  csv.writer(table, delimiter="\t").writerows([["x", "text"], [1, TEXT], [2, "b"]])
  for name, content in (
    ("a.json", json.dumps(rows)),
    ("b.json", json.dumps(rows, indent=2)),
    ("c.json", "\n".join(map(json.dumps, rows))),
    ("d.ndjson", "\n".join(map(json.dumps, rows))),
    ("e.tsv", table.getvalue()),
    ("f.csv", table.getvalue().replace("\t", ";")),
  ):
    if name == "f.csv":
      content = "x;text\n1;a, b\n2;c\n"
    file = tmp_path / (name + suffix)
    file.write_bytes(compressed(content, suffix))
    assert texts(str(file)) == (["a, b", "c"] if name == "f.csv" else [TEXT, "b"]), name
  (tmp_path / f"g.md{suffix}").write_bytes(compressed("# A\n", suffix))
  assert texts(str(tmp_path / f"g.md{suffix}")) == ["# A\n"]


def test_zip_archive_is_the_files_in_it(tmp_path):
  table = io.BytesIO()
  pyarrow.parquet.write_table(pyarrow.table({"text": ["p"]}), table)
  with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
    for name, content in (
      ("b/z.txt", TEXT), ("a.csv", "text\nx\n"), ("c.parquet", table.getvalue()),
      ("d.pdf", "no"), ("e.zip", "no"), ("__MACOSX/b/._z.txt", "no"), (".hidden/f.txt", "no"),
    ):  # fmt: skip
      archive.writestr(name, content)
  notes = collections.Counter()
  assert texts(str(tmp_path / "a.zip"), notes=notes) == ["x", TEXT, "p"]
  assert notes["files in archives with an unsupported format, skipped"] == 2
  (tmp_path / "cut.zip").write_bytes((tmp_path / "a.zip").read_bytes()[:-30])
  with pytest.raises(RequestError, match="cut.zip: "):
    texts(str(tmp_path / "cut.zip"))
  with zipfile.ZipFile(tmp_path / "beside.zip", "w") as archive, warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Duplicate name")
    for name, content in (
      ("a.csv", "text\nx\n"),
      ("README.md", "no"),
      ("info.json", "{}"),
      (".", "no"),
      ("a.csv", "text\ny\n"),
    ):
      archive.writestr(name, content)
  notes = collections.Counter()
  assert texts(str(tmp_path / "beside.zip"), notes=notes) == ["x", "y"]
  assert sum(count for note, count in notes.items() if "archives" in note) == 2
  with pytest.raises(RequestError, match="bad.csv, row 1: no column 'text'"):
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
      archive.writestr("bad.csv", "a,c\nb,d\n")
    texts(str(tmp_path / "b.zip"))


def test_save_to_disk_folders_are_read(tmp_path, monkeypatch):
  datasets = pytest.importorskip("datasets")
  features = datasets.Features(
    {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
  )
  rows = datasets.Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]}, features=features)
  saved = datasets.DatasetDict({"train": rows, "test": rows.select([1])})
  saved.save_to_disk(str(tmp_path / "saved"), num_shards={"train": 2, "test": 1})
  found = read(str(tmp_path / "saved"), format="classification")
  assert [(example.text, example.label) for example in found] == [("good", "pos"), ("bad", "neg")]
  assert texts(str(tmp_path / "saved" / "test")) == ["bad"]
  (file,) = (tmp_path / "saved" / "test").glob("*.arrow")
  assert texts(str(file)) == ["bad"]
  assert (
    "no split 'validation' (splits: test, train)"
    in sources.validate_sources(DataSection(validation=(str(tmp_path / "saved"),)))[0]
  )
  with (
    pyarrow.OSFile(str(tmp_path / "b.arrow"), "wb") as out,
    pyarrow.ipc.new_file(out, rows.data.schema) as writer,
  ):
    writer.write_table(rows.data.table)
  assert texts(str(tmp_path / "b.arrow")) == ["good", "bad"]
  file.unlink()
  with pytest.raises(RequestError, match="state.json names .*, which does not exist"):
    texts(str(tmp_path / "saved" / "test"))


def test_tsv_quotes_are_letters_if_not_csv(tmp_path):
  stray = "\n".join(
    ["label\ttext", *(f"{i}\t{chr(34) * (i == 3)}row {i}{chr(34) * (i == 6)}" for i in range(20))]
  )
  notes = collections.Counter()
  assert (
    texts(write(tmp_path, "a.tsv", stray), notes=notes)
    == stray.replace("\t", "\n").split("\n")[3::2]
  )
  assert notes[".tsv files with quotes that are ordinary characters"] == 1
  assert texts(write(tmp_path, "b.tsv", 'text\tx\na "quoted" word\t1\n"so" it goes\t2\n')) == [
    'a "quoted" word',
    '"so" it goes',
  ]
  assert texts(write(tmp_path, "c.tsv", 'text\tx\n"two\nlines"\t1\n"a ""b"""\t2\n')) == [
    "two\nlines",
    'a "b"',
  ]


def test_files_with_odd_names_are_read(tmp_path):
  (tmp_path / "A.TXT.GZ").write_bytes(gzip.compress(b"a"))
  (tmp_path / "B.JSONL").write_text('{"text": "b"}')
  table = pyarrow.table({"text": ["c"]})
  pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
  with pyarrow.ipc.new_file(tmp_path / "d.arrow", table.schema) as file:
    file.write(table)
  (tmp_path / "d.arrow").rename(tmp_path / "arrow")
  os.rename(tmp_path / "c.parquet", os.fsencode(tmp_path) + b"/caf\xe9.parquet")
  (tmp_path / os.fsdecode(b"caf\xe9.txt.bz2")).write_bytes(compressed("e", ".bz2"))
  assert sorted(texts(str(tmp_path))) == ["a", "b", "c", "e"]
  os.rename(tmp_path / "arrow", os.fsencode(tmp_path) + b"/caf\xe9.arrow")
  assert texts(str(tmp_path / os.fsdecode(b"caf\xe9.arrow"))) == ["c"]


def test_state_json_of_other_tools_is_ignored(tmp_path):
  """Files of other tools with the names of the datasets library's are not its."""
  write(tmp_path, "a.txt", "a")
  for name in ("state.json", "dataset_dict.json"):
    for content in ('{"last_page": 3}', "[1]", "no JSON"):
      write(tmp_path, name, content)
      assert texts(str(tmp_path)) == ["a"]


def test_json_of_one_row_may_have_lists(tmp_path):
  assert texts(write(tmp_path, "a.json", '{"text": "a", "tags": [1, 2]}')) == ["a"]
  with pytest.raises(RequestError, match="one JSON object with 'rows', not a list of rows"):
    texts(write(tmp_path, "b.json", '{"rows": [{"text": "a"}]}'))


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16", "utf-8-sig", "UTF_8"])
def test_configured_encoding_is_decoded(tmp_path, encoding):
  text = "naïve café\r\n" * 20_000  # longer than a piece
  (tmp_path / "a.txt").write_bytes(text.encode(encoding))
  (tmp_path / "b.csv").write_bytes(f'text,x\n"{text}",1\n'.encode(encoding))
  (tmp_path / "c.jsonl").write_bytes(
    (json.dumps({"text": text}, ensure_ascii=False) + "\n").encode(encoding)
  )
  for name in ("a.txt", "b.csv", "c.jsonl"):
    assert texts(str(tmp_path / name), encoding=encoding) == [text], name
  if encoding in ("cp1252", "latin-1"):
    for name in ("a.txt", "c.jsonl"):
      with pytest.raises(RequestError, match="set config.data.encoding"):
        texts(str(tmp_path / name))
  (tmp_path / "d.txt").write_bytes(b"\x81")
  if encoding == "cp1252":
    with pytest.raises(RequestError, match="d.txt: "):
      texts(str(tmp_path / "d.txt"), encoding=encoding)


def test_links_are_followed_once(tmp_path, monkeypatch):
  """Folders that may not be read are rejected."""
  for name in ("data/a.txt", "data/sub/b.txt", "elsewhere/c.txt", "elsewhere/deep/d.txt"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name[-5:])
  data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
  (data / "linked").symlink_to(elsewhere)
  (data / "again").symlink_to(elsewhere)
  (data / "sub" / "loop").symlink_to(data)
  (elsewhere / "up").symlink_to(tmp_path)
  (data / "nothing").symlink_to(tmp_path / "gone")
  notes = collections.Counter()
  assert sorted(texts(str(data), notes=notes)) == ["a.txt", "b.txt", "c.txt", "d.txt"]
  assert notes[sources.SEEN_NOTE] == 3
  assert notes["broken links, skipped"] == 1
  notes = collections.Counter()
  assert texts(f"{data}/*", notes=notes) == ["a.txt"] and notes["broken links, skipped"] == 1
  notes = collections.Counter()  # of patterns; with glob.glob two loops would be 2^40 folders
  assert sorted(texts(f"{data}/**/*.txt", notes=notes)) == ["a.txt", "b.txt", "c.txt", "d.txt"]
  assert notes[sources.SEEN_NOTE] == 3 and texts(f"{data}/*/b.txt") == ["b.txt"]
  assert sorted(texts(f"{data}/**")) == ["a.txt", "b.txt", "c.txt", "d.txt"]

  def refusing(function):
    def refuse(path, *more, **options):
      if str(path).endswith(("deep", "d.txt")):
        raise PermissionError(13, "Permission denied", str(path))
      return function(path, *more, **options)

    return refuse

  folder, pattern, stars = str(data), f"{data}/**/*.txt", f"{data}/l*/d*/*.txt"
  for module, name, those in (  # root may read everything
    (os, "scandir", [folder, pattern]),
    (os, "listdir", [stars]),
    (pathlib.Path, "stat", [folder, pattern, stars]),
  ):
    with monkeypatch.context() as patch:
      patch.setattr(module, name, refusing(getattr(module, name)))
      patch.setattr(os, "access", lambda path, _: not str(path).endswith("deep"))
      for source in those:
        with pytest.raises(RequestError, match="(deep|d.txt): Permission denied"):
          texts(source)


def test_glob_patterns_match_python_glob(tmp_path):
  for name in (
    "a.txt",
    "b/a.txt",
    "b/.h.txt",
    ".c/a.txt",
    "b/c/d.txt",
    "b/c/e[1].txt",
    "B.TXT",
    "f/b/c/d.txt",
  ):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
  for pattern in (
    "*", "*.txt", "**", "**/*.txt", "**/c/*", "b/**/*", "*/a.txt", "?.txt", "[ab].txt", "b/**",
    "**/.h.txt", ".*/*.txt", "**/b/**/*.txt", "b/c/e[[]1].txt", "b/c/*[!1].txt", "b/.*",
    "**/**/d.txt", "*/*/*.txt", "b/../*.txt", "../*/a.txt",
  ):  # fmt: skip
    expected = sorted(
      Path(it).resolve()
      for it in glob.glob(f"{tmp_path}/{pattern}", recursive=True)
      if os.path.isfile(it)
    )
    found = sources._match_glob(f"{tmp_path}/{pattern}", collections.Counter())
    assert sorted(it.resolve() for it in found) == sorted({*expected}), pattern


def test_only_requested_columns_are_decoded(tmp_path, monkeypatch):
  assert texts(write(tmp_path, "spam.csv", "label,text,,,\nham,hello,,,\n")) == ["hello"]
  assert texts(write(tmp_path, "b.csv", "x,x,text\n1,2,hello\n")) == ["hello"]
  dates = pyarrow.array([10**15], pyarrow.timestamp("ms"))  # after the year 9999
  pyarrow.parquet.write_table(
    pyarrow.table({"text": ["hello"], "when": dates}), tmp_path / "a.parquet"
  )
  assert texts(str(tmp_path / "a.parquet")) == ["hello"]
  datasets = pytest.importorskip("datasets")
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
  (tmp_path / "hub").mkdir()
  (tmp_path / "a.parquet").rename(tmp_path / "hub" / "train.parquet")
  assert texts(f"hub:{tmp_path / 'hub'}:train") == ["hello"]
  (tmp_path / "hub" / "train.parquet").rename(tmp_path / "a.parquet")
  with pytest.raises(RequestError, match="row 1: no column 'body' .columns: 'text', 'when'"):
    read(str(tmp_path / "a.parquet"), text_column="body")
  twice = pyarrow.Table.from_arrays(
    [pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"]
  )
  pyarrow.parquet.write_table(twice, tmp_path / "b.parquet")
  with pytest.raises(RequestError, match="b.parquet: has two columns named 'text'"):
    read(str(tmp_path / "b.parquet"))


def test_folder_of_several_odd_formats_is_an_error(tmp_path):
  """A folder of one unusual format is read."""
  write(tmp_path, "a.json", '[{"text": "a"}]')
  assert texts(str(tmp_path)) == ["a"]
  write(tmp_path, "README.md", "what this is")
  with pytest.raises(
    RequestError,
    match=r"several formats \(.json, .md\); name the files to read, for example .*/\*.SUFFIX",
  ):
    texts(str(tmp_path))
  write(tmp_path, "b.jsonl", '{"text": "b"}')
  notes = collections.Counter()
  assert texts(str(tmp_path), notes=notes) == ["b"]
  assert notes["files in folders that are read only if named (.json, .md, .zip, ...), skipped"] == 2
  with pytest.raises(RequestError, match="one JSON object with 'data', not a list of rows"):
    texts(write(tmp_path, "c.json", json.dumps({"data": [{"text": "a"}]}, indent=1)))


def a_folder(rng, home):
  """A data folder as people have them, and how many documents are in it."""
  good = 0
  for number in range(rng.randint(1, 4)):
    folder = home / rng.choice(["", "a", "b", "a/c"])
    folder.mkdir(parents=True, exist_ok=True)
    kind = rng.choice([".txt", ".jsonl", ".csv", ".parquet", ".jsonl.gz", ".csv.xz", ".txt.bz2"])
    count = rng.randint(1, 5)
    texts = [
      rng.choice(["a cat", "é\r\n", " x ", "🐈" * 9]) + str(rng.random()) for _ in range(count)
    ]
    name = f"{rng.choice(['x', 'part [1]', '日本'])}{number}{kind}"
    if kind == ".parquet":
      pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / name)
    else:
      table = io.StringIO(newline="")
      csv.writer(table).writerows([["text", "", ""], *([text, 1, 2] for text in texts)])
      lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
      content = lines if "jsonl" in kind else table.getvalue() if "csv" in kind else "".join(texts)
      last = kind if kind in (".xz", ".gz", ".bz2") else "." + kind.split(".")[-1]
      (folder / name).write_bytes(
        compressed(content, last if last in (".xz", ".gz", ".bz2") else "")
      )
      count = 1 if ".txt" in kind else count
    good += count
  bad = 0
  if rng.random() < 0.5:
    bad = rng.randint(1, 3)
    (home / "bad.jsonl").write_text('{"text": null}\n' * bad)
  if rng.random() < 0.5:  # linked from elsewhere, twice
    away = home.parent / f"{home.name}-away"
    away.mkdir()
    (away / "w.txt").write_text(f"away {rng.random()}")
    (home / "link").symlink_to(away)
    (home / "link2").symlink_to(away)
    good += 1
  if rng.random() < 0.3:
    (home / "loop").symlink_to(home)
  if rng.random() < 0.3:
    (home / "gone.txt").symlink_to(home / "nowhere")
  if rng.random() < 0.4:  # a run, which holds no text
    (home / "runs" / "one").mkdir(parents=True)
    for name in ("run.lock", "samples.jsonl"):
      (home / "runs" / "one" / name).write_text('{"text": "written by a model"}\n')
  if rng.random() < 0.3:
    (home / "README.md").write_text("no data")
  return good, bad


@pytest.mark.parametrize("part", range(3))
def test_random_folders_are_accounted_for(tmp_path, folder, part):
  """For sixty folders, read = trained + held out + dropped."""
  import jaxft.hf.tokenizer

  tokenizer = jaxft.hf.tokenizer.load_tokenizer(folder, 293)
  for i in range(20):
    home = tmp_path / str(i)
    home.mkdir()
    good, bad = a_folder(random.Random(f"{part} {i}"), home)
    data = DataSection(
      train=(str(home),),
      validation_fraction=0.3,
      sequence_length=8,
      on_bad_row="skip",
      cache_dir=str(tmp_path / "c"),
    )
    if good < 3:
      continue  # too few to be divided
    rows = dataset.prepare_data(data, tokenizer, "").report
    dropped = sum(rows["rows"]["dropped"].values())
    assert rows["rows"]["read"] == good + bad and dropped == bad, (i, rows)
    assert rows["rows"]["read"] == rows["rows"]["trained"] + rows["rows"]["held_out"] + dropped, (
      i,
      rows,
    )


def test_missing_configuration_lists_the_choices(tmp_path):
  for name, text in (("a", "x"), ("b", "y")):
    (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
  files = "".join(
    f"- config_name: {config}\n  data_files: {file}.jsonl\n"
    for config, file in (("raw", "a"), ("clean", "b"))
  )
  (tmp_path / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
  with pytest.raises(
    RequestError,
    match=r"name one of its configurations as hub:.*/CONFIGURATION\[:SPLIT\]: raw, clean$",
  ):
    read(f"hub:{tmp_path}")
  assert texts(f"hub:{tmp_path}/clean") == ["y"] and texts(f"hub:{tmp_path}/raw:train") == ["x"]
  with pytest.raises(RequestError, match="/CONFIGURATION.*: raw, clean$"):
    read(f"hub:{tmp_path}/dirty")
  assert sources._split_configuration("owner/name/raw") == ("owner/name", "raw")
  assert sources._split_configuration("owner/name") == (
    "owner/name",
    None,
  ) and sources._split_configuration("imdb") == (
    "imdb",
    None,
  )


def test_hub_id_without_owner_has_configuration(monkeypatch):
  datasets = pytest.importorskip("datasets")
  calls = []

  def load(name, configuration, split):
    calls.append((name, configuration, split))
    if configuration is None:
      raise datasets.exceptions.DatasetNotFoundError(f"{name} is not there")
    return "rows"

  monkeypatch.setattr(datasets, "load_dataset", load)
  assert sources._open_hub("hub:glue/sst2:validation", "train") == "rows"
  assert calls == [("glue/sst2", None, "validation"), ("glue", "sst2", "validation")]


def test_silent_hub_fails_within_seconds(monkeypatch):
  pytest.importorskip("datasets")
  from huggingface_hub import constants

  for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
  with socket.create_server(("127.0.0.1", 0)) as server:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    assert sources._is_reachable(urllib.parse.urlsplit(constants.ENDPOINT))
  sources._is_reachable.cache_clear()  # now it is gone
  with pytest.raises(
    RequestError, match="127.0.0.1 does not answer, and the data set is not in the cache; check"
  ):
    read("hub:nobody/nothing")
  assert constants.HF_HUB_OFFLINE is False
  for rest in ("", "/viewer/plain_text/train", "?x=1"):
    with pytest.raises(RequestError, match="is a URL; give hub:imdb$"):
      texts(f"https://huggingface.co/datasets/imdb{rest}")
  with pytest.raises(RequestError, match="no such file or folder"):
    texts("https://huggingface.co/gpt2")
  with pytest.raises(RequestError, match="is a URL; give hub:stanfordnlp/imdb"):
    read("https://huggingface.co/datasets/stanfordnlp/imdb/viewer")


def test_git_lfs_pointer_is_rejected(tmp_path):
  with pytest.raises(RequestError, match="a.parquet: a git-lfs pointer"):
    read(
      write(
        tmp_path, "a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
      )
    )
