"""Evaluation: torch's loss, whatever the batch size and the devices, and bits a byte by their definition."""

import json
import math

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from processes import run

from jaxft import config as settings
from jaxft import pretrained, sharding
from jaxft.data import tokens
from jaxft.data.report import examples, lay_out
from jaxft.errors import RequestError
from jaxft.hf import tokenizer as tokenizers

T = 31


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  """Without characters that a token may be a part of."""
  file = tiny.write_stories(tmp_path_factory.mktemp("text") / "text.jsonl", 23, seed=5)
  texts = [json.loads(line)["text"].encode("ascii", "ignore").decode() for line in file.read_text().splitlines()]
  file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  return file


@pytest.fixture(scope="module")
def rows(folder, text):
  how = ConfigDict(settings.default().data)
  how.sequence_length, tokenizer = T, tokenizers.load(folder, 293)
  stored = tokens.in_memory(examples([str(text)], "validation", how, {}, {}), tokenizer)
  laid_out = lay_out(stored, how, tokenizer.eos_token_id)
  return [laid_out[i] for i in range(len(laid_out))]


@pytest.fixture(scope="module")
def wanted(folder, rows):
  """Nats of all tokens, by torch, and how many there are."""
  torch = pytest.importorskip("torch", reason="parity is measured where torch is installed")
  transformers = pytest.importorskip("transformers")
  model, nats, count = transformers.AutoModelForCausalLM.from_pretrained(folder), 0.0, 0
  for row in rows:
    with torch.no_grad():
      logits = model(torch.from_numpy(row["ids"][None]).long()).logits[0].double()
    each = torch.nn.functional.cross_entropy(logits, torch.from_numpy(row["targets"]).long(), reduction="none").numpy()
    nats, count = nats + each[row["mask"]].sum(), count + int(row["mask"].sum())
  return nats, count


@pytest.mark.parametrize("devices", [*(pytest.param(it, marks=pytest.mark.slow) for it in (1, 2, 4)), 8])
def test_the_loss_is_torchs_for_any_batch_size_and_devices(devices, folder, text, wanted, monkeypatch):
  all_of_them = sharding.make_mesh
  monkeypatch.setattr(sharding, "make_mesh", lambda sizes: all_of_them(sizes, jax.devices()[:devices]))
  ready, (nats, count) = pretrained.load(folder), wanted
  for batch_size in range(1, 9):
    found = ready.evaluate(str(text), sequence_length=T, batch_size=batch_size)
    assert found["tokens"] == count and found["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)


def test_bits_a_byte_are_of_the_bytes_that_were_learned(folder, text, rows, wanted):
  ready, (nats, _) = pretrained.load(folder), wanted
  learned = np.concatenate([row["targets"][row["mask"]] for row in rows])
  nbytes = sum(len(ready.tokenizer.decode([int(id)]).encode()) for id in learned if id != ready.tokenizer.eos_token_id)
  found = ready.evaluate(str(text), sequence_length=T)
  assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / nbytes, rel=1e-5)


@pytest.mark.slow
def test_a_run_is_evaluated_on_what_it_held_out(finished):
  workdir, _ = finished
  last = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][-1]
  assert not json.loads((workdir / "config.json").read_text())["data"]["validation"]
  found = json.loads(run("jaxft.evaluate", "--workdir", workdir, "--json", "--batch_size", 3).stdout)
  assert found["loss"] == pytest.approx(last["eval/loss"], rel=1e-6)
  assert found["bits_per_byte"] == pytest.approx(last["eval/bits_per_byte"], rel=1e-6)


def test_weights_of_no_run_have_nothing_held_out(folder):
  with pytest.raises(RequestError, match="no run, so nothing was held out"):
    pretrained.load(folder).evaluate_held_out()


def test_the_layout_may_be_named_on_the_command_line(folder, stories, monkeypatch, capsys):
  import sys

  from jaxft import evaluate

  words = ["jaxft.evaluate", "--model", str(folder), "--data", str(stories), "--sequence_length", "32", "--json"]
  monkeypatch.setattr(sys, "argv", [*words, "--layout", "pad"])
  evaluate.main()
  found, ready = json.loads(capsys.readouterr().out), pretrained.load(folder)
  assert found == ready.evaluate(stories, sequence_length=32, layout="pad")
  assert found["loss"] != ready.evaluate(stories, sequence_length=32)["loss"]
  monkeypatch.setattr(sys, "argv", ["jaxft.evaluate", "--workdir", "x", "--layout", "pad"])
  with pytest.raises(RequestError, match="--layout=pad: goes with --data"):
    evaluate.main()
