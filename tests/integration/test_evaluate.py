"""Evaluation: torch's loss for any batch size and devices, and bits per byte by definition."""

import json
import math

import jax
import numpy as np
import pytest
import tiny
from processes import run

import jaxft.hf.tokenizer
from jaxft import pretrained
from jaxft.config import DataSection
from jaxft.data import packing, tokenize
from jaxft.data.dataset import build_dataset, read_examples
from jaxft.errors import RequestError
from jaxft.sharding.mesh import make_mesh

T = 31


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  """Without characters that a token may be a part of."""
  file = tiny.write_stories(tmp_path_factory.mktemp("text") / "text.jsonl", 23, seed=5)
  texts = [
    json.loads(line)["text"].encode("ascii", "ignore").decode()
    for line in file.read_text().splitlines()
  ]
  file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  return file


@pytest.fixture(scope="module")
def rows(folder, text):
  how = DataSection(sequence_length=T)
  tokenizer = jaxft.hf.tokenizer.load_tokenizer(folder, 293)
  stored = tokenize.encode_in_memory(
    read_examples([str(text)], "validation", how, {}, {}), tokenizer
  )
  laid_out = build_dataset(stored, how, tokenizer.eos_token_id)
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
    each = torch.nn.functional.cross_entropy(
      logits, torch.from_numpy(row["targets"]).long(), reduction="none"
    ).numpy()
    nats, count = nats + each[row["mask"]].sum(), count + int(row["mask"].sum())
  return nats, count


@pytest.mark.parametrize(
  "devices", [*(pytest.param(it, marks=pytest.mark.slow) for it in (1, 2, 4)), 8]
)
def test_eval_loss_matches_torch(devices, folder, text, wanted, monkeypatch):
  """For any batch size and any number of devices."""
  mesh_of = lambda sizes: make_mesh(sizes, jax.devices()[:devices])
  monkeypatch.setattr(pretrained, "make_mesh", mesh_of)
  ready, (nats, count) = pretrained.load(folder), wanted
  assert ready.mesh.size == devices
  for batch_size in range(1, 9):
    found = ready.evaluate(str(text), sequence_length=T, batch_size=batch_size)
    assert found["tokens"] == count and found["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)


def test_bits_per_byte_counts_bytes_of_targets(folder, text, rows, wanted):
  ready, (nats, _) = pretrained.load(folder), wanted
  learned = np.concatenate([row["targets"][row["mask"]] for row in rows])
  nbytes = sum(
    len(ready.tokenizer.decode([int(id)]).encode())
    for id in learned
    if id != ready.tokenizer.eos_token_id
  )
  found = ready.evaluate(str(text), sequence_length=T)
  assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / nbytes, rel=1e-5)


@pytest.mark.slow
def test_evaluate_held_out_uses_the_runs_validation_set(finished):
  workdir, _ = finished
  last = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][-1]
  assert not json.loads((workdir / "config.json").read_text())["data"]["validation"]
  found = json.loads(
    run("jaxft.evaluate", "--workdir", workdir, "--json", "--batch_size", 3).stdout
  )
  assert found["loss"] == pytest.approx(last["eval/loss"], rel=1e-6)
  assert found["bits_per_byte"] == pytest.approx(last["eval/bits_per_byte"], rel=1e-6)


def test_evaluate_held_out_needs_a_run(folder):
  with pytest.raises(RequestError, match="not a run, so it has no held-out text"):
    pretrained.load(folder).evaluate_held_out()


def test_evaluate_command_takes_a_layout(folder, stories, monkeypatch, capsys):
  import sys

  from jaxft import evaluate

  words = [
    "jaxft.evaluate",
    "--model",
    str(folder),
    "--data",
    str(stories),
    "--sequence_length",
    "32",
    "--json",
  ]
  monkeypatch.setattr(sys, "argv", [*words, "--layout", "pad"])
  evaluate.main()
  found, ready = json.loads(capsys.readouterr().out), pretrained.load(folder)
  assert found == ready.evaluate(stories, sequence_length=32, layout="pad")
  assert found["loss"] != ready.evaluate(stories, sequence_length=32)["loss"]
  monkeypatch.setattr(sys, "argv", ["jaxft.evaluate", "--workdir", "x", "--layout", "pad"])
  with pytest.raises(RequestError, match="--layout=pad: needs --data"):
    evaluate.main()


def as_documented(folder, ids, length, stride):
  """Nats and number of all tokens, as transformers' page on perplexity, with windows by targets.

  There the mean of a window is weighed with one target less than it has, where all of them have a
  token before them.
  """
  torch = pytest.importorskip("torch", reason="parity is measured where torch is installed")
  transformers = pytest.importorskip("transformers")
  model, nats, count, prev_end_loc = (
    transformers.AutoModelForCausalLM.from_pretrained(folder),
    0.0,
    0,
    0,
  )
  input_ids = torch.tensor([ids])
  for begin_loc in range(0, input_ids.size(1), stride):
    end_loc = min(begin_loc + length, input_ids.size(1))
    labels = input_ids[:, begin_loc:end_loc].clone()
    labels[:, : -(end_loc - prev_end_loc)] = -100
    targets = int((labels[:, 1:] != -100).sum())
    with torch.no_grad():
      nats += float(model(input_ids[:, begin_loc:end_loc], labels=labels).loss) * targets
    count, prev_end_loc = count + targets, end_loc
    if end_loc == input_ids.size(1):
      break
  return nats / count, count


@pytest.mark.parametrize("length, stride", [(31, 16), (31, 7), (13, 12), (71, 70)])
def test_strided_perplexity_matches_transformers(folder, text, rows, length, stride):
  """The stride is that of transformers' page on perplexity."""
  ready = pretrained.load(folder)
  ids = np.concatenate([row["targets"][row["mask"]] for row in rows])
  loss, count = as_documented(folder, [ready.tokenizer.eos_token_id, *ids.tolist()], length, stride)
  found = ready.evaluate(str(text), sequence_length=length, stride=stride)
  assert found["tokens"] == count == len(ids) and found["loss"] == pytest.approx(loss, rel=1e-5)


def test_each_token_is_a_target_once_for_any_stride():
  rng = np.random.default_rng(0)
  for _ in range(300):
    lengths = rng.integers(1, 9, rng.integers(1, 9))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    prompts = np.minimum(rng.integers(0, 4, len(lengths)), lengths - 1).astype(np.int32)
    stored = tokenize.TokenArrays(
      np.arange(1, starts[-1] + 1), starts, prompts, np.zeros(0, np.int32), np.zeros(0)
    )
    T = int(rng.integers(2, 12))
    rows = packing.SlidingWindowDataset(stored, T, 0, int(rng.integers(1, T)))
    found = [rows[i] for i in range(len(rows))]
    targets = np.concatenate([row["targets"][row["mask"]] for row in found])
    learned = [
      i + 1 for start, stop, p in zip(starts, starts[1:], prompts) for i in range(start + p, stop)
    ]
    assert targets.tolist() == learned
    assert all((row["ids"] + 1 == row["targets"])[row["mask"]].all() for row in found)


def test_invalid_stride_is_refused(folder, stories, finished):
  ready = pretrained.load(folder)
  for stride in (-1, 31, 40):
    with pytest.raises(RequestError, match=f"--stride={stride}: must be from 1 to 30"):
      ready.evaluate(stories, sequence_length=31, stride=stride)
  with pytest.raises(RequestError, match="--layout=concat, not pad"):
    ready.evaluate(stories, stride=2, layout="pad")
  of_run = pretrained.load_workdir(finished[0])
  found = of_run.evaluate_held_out(stride=9)
  assert found["tokens"] == of_run.evaluate_held_out()["tokens"]
  assert found["loss"] != of_run.evaluate_held_out()["loss"]
  with pytest.raises(RequestError, match="--stride=99: must be from 1 to"):
    of_run.evaluate_held_out(stride=99)
