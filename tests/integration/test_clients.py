"""Exports in other tools: the last transformers 4, its pipelines, and CTranslate2 match jaxft."""

import json
import os
import random
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from processes import ROOT

import jaxft
import jaxft.hf.tokenizer
import jaxft.tokenizer
from jaxft.hf import added_tokens, export, load_weights, repo, verify
from jaxft.model.compute import ComputeConfig
from jaxft.model.decoder import abstract_model

pytestmark = pytest.mark.slow
pytest.importorskip("torch", reason="transformers 4 computes with it")
HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
# The last of transformers 4, and what it allows. They are put into a folder: an environment can
# hold one transformers.
PACKAGES = (
  "transformers==4.57.6",
  "tokenizers==0.22.1",
  "huggingface_hub==0.36.2",
  "ctranslate2==4.8.5",
)
ASKED = {
  "texts": ["the cat sat on the mat", "cat", "once upon a time, naïve 東京"],
  "prompts": ["the cat", "Once upon"],
}
NAMES = (
  "quickstart",
  "scratch",
  "added",
  "gpt2",
  "gpt_neo",
  "gptj",
  "prefix",
  "wordpiece",
  "classifier",
)


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
  """A folder of packages that go before those of the environment."""
  home = tmp_path_factory.mktemp("clients")
  command = [
    sys.executable,
    "-m",
    "pip",
    "install",
    "--quiet",
    "--no-compile",
    "--no-deps",
    "--target",
    home,
    *PACKAGES,
  ]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return home


def saved_by_transformers_5(source, out):
  """The folder as transformers 5 writes it: TokenizersBackend, arguments, pad_token_id null."""
  import transformers

  transformers.AutoModelForCausalLM.from_pretrained(source).save_pretrained(out)
  transformers.AutoTokenizer.from_pretrained(source).save_pretrained(out)
  says = json.loads((out / "tokenizer_config.json").read_text())
  (out / "tokenizer_config.json").write_text(
    json.dumps(says | {"tokenizer_class": "TokenizersBackend"})
  )
  return out


def prefix_space(source, out):
  """A tokenizer that reads a text as if a blank were before it."""
  shutil.copytree(source, out)
  said = json.loads((out / "tokenizer.json").read_text())
  said["pre_tokenizer"]["add_prefix_space"] = True
  (out / "tokenizer.json").write_text(json.dumps(said))
  about = json.loads((out / "tokenizer_config.json").read_text())
  (out / "tokenizer_config.json").write_text(json.dumps(about | {"add_prefix_space": True}))


def as_classifier(source, out):
  read = jaxft.hf.tokenizer.load_tokenizer(source, 293)
  checkpoint = repo.with_class_head(repo.resolve(str(source)), ["bad", "good", "so so"], read)
  _, shapes, _ = abstract_model(checkpoint.cfg, ComputeConfig())
  params = load_weights.load_params(checkpoint, shapes, jax.tree.map(lambda _: HERE, shapes))
  export.export_model(out, params, checkpoint, tokenizer=read)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
  home = tmp_path_factory.mktemp("exports")
  sources = {name: home / f"{name}-in" for name in NAMES}
  for family in tiny.FAMILIES:
    first = home / f"{family}-first"
    if family == "gpt2":
      tiny.write_gpt2(first, seed=5)
    else:
      tiny.write_family(first, family, seed=5, P=71, std=0.2)
    saved_by_transformers_5(first, sources[family])
  sources["quickstart"] = ROOT / "assets" / "quickstart" / "model"
  tiny.write_gpt2(sources["scratch"], seed=6, V=300, tokenizer=False)
  jaxft.tokenizer.train_tokenizer(
    (tiny.story(random.Random(i)) for i in range(40)), 300, home / "own", n_positions=71
  )
  for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copyfile(home / "own" / name, sources["scratch"] / name)
  added_tokens.add_tokens(repo.resolve(str(sources["gpt2"])), ["<|title|>"], sources["added"])
  tiny.write_gpt2(sources["wordpiece"], seed=7, V=12, tokenizer=False)
  words = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "cat",
    "sat",
    "on",
    "mat",
    "once",
    "upon",
  ]
  (sources["wordpiece"] / "vocab.txt").write_text("\n".join(words) + "\n")
  about = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "eos_token": "[SEP]"}
  (sources["wordpiece"] / "tokenizer_config.json").write_text(json.dumps(about))
  prefix_space(sources["gpt2"], sources["prefix"])
  for name in NAMES[:-1]:
    jaxft.load(sources[name]).export(home / name)
  as_classifier(sources["gpt2"], home / "classifier")
  return {name: home / name for name in NAMES}


@pytest.fixture(scope="module")
def found(clients, exports):
  """What the clients read in each export."""
  environment = os.environ | {"PYTHONPATH": str(clients), "PYTHONDONTWRITEBYTECODE": "1"}
  command = [
    sys.executable,
    "-W",
    "ignore",
    str(ROOT / "tests" / "support" / "clients.py"),
    *map(str, exports.values()),
  ]
  done = subprocess.run(
    command, input=json.dumps(ASKED), env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return dict(zip(exports, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", NAMES[:-1])
def test_clients_read_exported_language_models(found, exports, name):
  ours, theirs = jaxft.load(exports[name]), found[name]
  assert theirs["transformers"].startswith("4.")
  for i, text in enumerate(ASKED["texts"]):
    ids = ours.tokenizer(text)["input_ids"]
    assert theirs["ids"][i] == ids
    logits = verify.compute_logits(ours.graph, ours.params, np.array([ids], np.int32))[0]
    for what in ("logits", "padded"):
      np.testing.assert_allclose(
        np.array(theirs[what][i]), logits[:, : ours.source.cfg.V], atol=1e-4, err_msg=what
      )
  if name != "wordpiece":  # whose [SEP] ends a prompt for a pipeline, and none for jaxft
    wrote = ours.generate(ASKED["prompts"], temperature=0, max_new_tokens=24)
    assert theirs["generated"] == [completion.text for completion in wrote]
    if "converted" in theirs:
      assert [
        ids[: len(one.token_ids)] for ids, one in zip(theirs["converted"], wrote, strict=True)
      ] == [one.token_ids for one in wrote]


def test_clients_get_the_same_class_probabilities(found, exports):
  ours = jaxft.load(exports["classifier"]).classify(ASKED["texts"])
  np.testing.assert_allclose(
    found["classifier"]["padded"], [label.logits_C for label in ours], atol=1e-4
  )
  for label, theirs in zip(ours, found["classifier"]["probabilities"], strict=True):
    assert theirs == pytest.approx(label.probabilities, abs=1e-5)
