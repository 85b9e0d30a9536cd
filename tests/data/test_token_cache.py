"""Token files: built once, and again when anything changes or is damaged, by one process."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import preloaded
import pytest
import tiny

import jaxft.hf.tokenizer
from jaxft.config import DataSection
from jaxft.data import accounting, dataset
from jaxft.errors import StorageError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer(folder):
  return jaxft.hf.tokenizer.load_tokenizer(folder, 293)


class Log(list):
  """The lines that prepare has logged, and how many examples it has tokenised."""

  tokenised = 0

  def on_progress(self, done, total):
    self.tokenised = done


def prepare(tokenizer, cache, file, fingerprint="a tokenizer", **data):
  settings = {"cache_dir": str(cache), "sequence_length": 16, **data}
  section, log = DataSection(train=(str(file),), **settings), Log()
  return dataset.prepare_data(section, tokenizer, fingerprint, log.on_progress, log.append), log


def entries(cache):
  return [path for path in cache.iterdir() if path.is_dir()]


def test_cache_hit_skips_tokenisation(tokenizer, tmp_path, stories):
  """The same text is tokenised once."""
  first, log = prepare(tokenizer, tmp_path, stories)
  assert log.tokenised == 120
  again, log = prepare(tokenizer, tmp_path, stories)
  assert log.tokenised == 0 and not log and len(entries(tmp_path)) == 1
  assert again.fingerprint == first.fingerprint and again.report == first.report
  np.testing.assert_array_equal(again.train.tokens.ids, first.train.tokens.ids)
  other_rows, log = prepare(tokenizer, tmp_path, stories, layout="pack")
  assert log.tokenised == 0 and other_rows.fingerprint != first.fingerprint


@pytest.mark.parametrize(
  "change",
  [
    dict(fingerprint="another"),
    dict(shuffle_seed=1),
    dict(limit_train=5),
    dict(on_bad_row="skip"),
    "a byte of the text",
  ],
)
def test_cache_key_covers_every_input(tokenizer, tmp_path, stories, change):
  """Whatever the tokens depend on makes another entry."""
  file = tmp_path / "stories.jsonl"
  file.write_text(stories.read_text())
  prepare(tokenizer, tmp_path / "c", file)
  if isinstance(change, str):
    file.write_text(file.read_text().replace("cat", "dog", 1))
    change = {}
  _, log = prepare(tokenizer, tmp_path / "c", file, **change)
  assert log.tokenised and len(entries(tmp_path / "c")) == 2


def test_cache_of_other_manifest_is_rebuilt(tokenizer, tmp_path, stories, monkeypatch):
  """An entry with other fields is built again."""
  with monkeypatch.context() as older:
    older.delitem(accounting.Manifest.__annotations__, "numbers")
    prepare(tokenizer, tmp_path, stories)
  _, log = prepare(tokenizer, tmp_path, stories)
  assert log.tokenised and len(entries(tmp_path)) == 2


def damages(entry):
  """(what is done, to which file) for every file and every kind of damage."""
  for file in sorted(entry.iterdir()):
    size = file.stat().st_size
    yield "deleted", file, lambda file=file: file.unlink()
    yield "extended", file, lambda file=file: file.write_bytes(file.read_bytes() + b"\0")
    if size:
      yield "cut short", file, lambda file=file, size=size: os.truncate(file, size - 1)
      yield "emptied", file, lambda file=file: os.truncate(file, 0)
      yield "a bit flipped", file, lambda file=file, size=size: flip(file, size // 2)


def flip(file, at):
  content = bytearray(file.read_bytes())
  content[at] ^= 1
  file.write_bytes(content)


def test_corrupt_cache_is_detected_and_rebuilt(tokenizer, tmp_path, stories):
  good, _ = prepare(tokenizer, tmp_path, stories)
  (entry,) = entries(tmp_path)
  kinds = [(what, file.name) for what, file, _ in damages(entry)]
  assert len(kinds) > 30
  for i, kind in enumerate(kinds):
    what, file, act = list(damages(entry))[i]
    act()
    again, log = prepare(tokenizer, tmp_path, stories)
    # A manifest with a flipped bit may still say the same, or be taken for that of another text.
    if log:
      assert len(log) == 1 and log[0].endswith("tokenizing again") and log.tokenised == 120, kind
    assert log or file.name == "manifest.json", kind
    np.testing.assert_array_equal(again.train.tokens.ids, good.train.tokens.ids)
    assert again.report == good.report


def test_partial_entry_of_killed_writer_is_removed(tokenizer, tmp_path, stories):
  prepare(tokenizer, tmp_path, stories)
  (entry,) = entries(tmp_path)
  entry.rename(entry.with_name(entry.name + ".partial"))
  _, log = prepare(tokenizer, tmp_path, stories)
  assert log.tokenised == 120 and entries(tmp_path) == [entry]


def test_unwritable_cache_dir_is_named(tokenizer, tmp_path, stories):
  (tmp_path / "file").write_text("x")
  with pytest.raises(StorageError, match="token cache .*file.*--config.data.cache_dir"):
    prepare(tokenizer, tmp_path / "file", stories)


def test_concurrent_writers_leave_one_valid_entry(tmp_path, folder):
  file = tiny.write_stories(tmp_path / "many.jsonl", 8_000, seed=1)
  (tmp_path / "config.py").write_text(
    f"""
import sys; sys.path.insert(0, {str(ROOT / "tests" / "support")!r})
import tiny
from pathlib import Path

def get_config():
  c = tiny.config(Path({str(folder)!r}), Path({str(file)!r}))
  c.data.cache_dir = {str(tmp_path / "cache")!r}
  return c
"""
  )
  command = ["-m", "jaxft.prepare", "--config", tmp_path / "config.py", "--json"]
  both = [
    preloaded.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(2)
  ]
  outputs = [process.communicate() for process in both]
  assert [process.returncode for process in both] == [0, 0], outputs
  one, other = (json.loads(out) for out, _ in outputs)
  assert one == other and one["rows"]["read"] == 8_000
  assert len(entries(tmp_path / "cache")) == 1


def test_fingerprint_of_tokenizer_covers_merges(folder, tmp_path):
  """A tokenizer with one other merge is another one."""
  other = shutil.copytree(folder, tmp_path / "other")
  before = jaxft.hf.tokenizer.fingerprint(jaxft.hf.tokenizer.load_tokenizer(other, 293))
  assert (
    jaxft.hf.tokenizer.fingerprint(
      jaxft.hf.tokenizer.load_tokenizer(shutil.copytree(folder, tmp_path / "same"), 293)
    )
    == before
  )
  about = json.loads((other / "tokenizer.json").read_text())
  about["model"]["merges"][-1] = ["!", "?"]
  about["model"]["vocab"]["!?"] = about["model"]["vocab"].pop(
    max(about["model"]["vocab"], key=about["model"]["vocab"].get)
  )
  (other / "tokenizer.json").write_text(json.dumps(about))
  assert jaxft.hf.tokenizer.fingerprint(jaxft.hf.tokenizer.load_tokenizer(other, 293)) != before
