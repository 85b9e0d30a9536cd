"""Classification heads in and out, against transformers' own."""

import collections
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny

import jaxft
import jaxft.hf.tokenizer
from jaxft.config import DataSection
from jaxft.data import dataset
from jaxft.data.formats import class_ids
from jaxft.errors import RequestError
from jaxft.hf import export, load_weights, model_config, repo
from jaxft.model.compute import ComputeConfig
from jaxft.model.decoder import abstract_model

torch = pytest.importorskip("torch", reason="parity is measured where torch is installed")
transformers = pytest.importorskip("transformers")
HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
SIZES = {
  "gpt2": ("GPT2", dict(n_positions=71, n_embd=40, n_layer=2, n_head=5, n_inner=59)),
  "gpt_neo": (
    "GPTNeo",
    dict(
      max_position_embeddings=71,
      hidden_size=40,
      num_layers=2,
      num_heads=5,
      intermediate_size=59,
      attention_types=[[["global", "local"], 1]],
      window_size=7,
    ),
  ),
  "gptj": ("GPTJ", dict(n_positions=71, n_embd=40, n_layer=2, n_head=5, n_inner=59, rotary_dim=4)),
}
TEXTS = [
  "the cat sat on the mat",
  "once upon a time the big red dog ran to the small blue house",
  "cat",
  "",
]
LABELS = ["bad", "so so", "good"]


@pytest.fixture(params=SIZES, scope="module")
def theirs(request, tmp_path_factory):
  """Their model, all of it random, and its folder."""
  name, sizes = SIZES[request.param]
  config = getattr(transformers, name + "Config")(
    **sizes, vocab_size=293, pad_token_id=292, bos_token_id=0, eos_token_id=0, num_labels=3
  )
  config.id2label, config.label2id = (
    dict(enumerate(LABELS)),
    {label: i for i, label in enumerate(LABELS)},
  )
  torch.manual_seed(0)
  their_model = getattr(transformers, name + "ForSequenceClassification")(config).eval()
  for name, parameter in their_model.named_parameters():
    torch.nn.init.normal_(parameter, mean=float("ln_" in name and name.endswith("weight")), std=0.2)
  folder = tmp_path_factory.mktemp("models") / "m"
  their_model.save_pretrained(folder)
  tiny.write_tokenizer(folder, 293)
  return their_model, folder


def their_logits(their_model, ids):
  """Ragged rows, padded on the right with the padding token."""
  T = max(map(len, ids))
  with torch.no_grad():
    return their_model(torch.tensor([row + [292] * (T - len(row)) for row in ids])).logits.numpy()


def test_classifier_logits_match_transformers(theirs):
  their_model, folder = theirs
  ours = jaxft.load(folder)
  found = ours.classify(TEXTS, batch_size=3)
  expected = their_logits(their_model, [ours.tokenizer(text)["input_ids"] or [0] for text in TEXTS])
  np.testing.assert_allclose(
    [label.logits_C for label in found], expected, atol=1e-5 * np.abs(expected).max()
  )
  assert [label.label for label in found] == [LABELS[i] for i in expected.argmax(-1)]
  assert all(abs(sum(label.probabilities.values()) - 1) < 1e-6 for label in found)


@pytest.mark.slow_for("gpt_neo", "gptj")
def test_any_pad_token_classifies_alike(theirs, tmp_path):
  """Export compares with transformers, which looks for the last token that is not padding."""
  _, folder = theirs
  other = shutil.copytree(folder, tmp_path / "in")
  config = json.loads((other / "config.json").read_text())
  for pad in (0, 5, None):
    (other / "config.json").write_text(json.dumps(config | {"pad_token_id": pad}))
    jaxft.load(other).export(tmp_path / f"out{pad}")


@pytest.mark.slow_for("bfloat16")
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_classifier_export_round_trip(theirs, tmp_path, dtype):
  their_model, folder = theirs
  ours = jaxft.load(folder)
  ours.export(tmp_path / "out", dtype=dtype)
  again, info = transformers.AutoModelForSequenceClassification.from_pretrained(
    tmp_path / "out", output_loading_info=True, dtype=torch.float32
  )
  assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  assert type(again) is type(their_model) and again.config.id2label == dict(enumerate(LABELS))
  ids = [ours.tokenizer(text)["input_ids"] or [0] for text in TEXTS]
  if dtype:
    their_model = type(their_model).from_pretrained(folder)
    for parameter in their_model.parameters():  # not the buffers: GPT-J's table of sines is one
      parameter.data = parameter.data.bfloat16().float()
  np.testing.assert_allclose(their_logits(again, ids), their_logits(their_model, ids), atol=1e-5)
  if not dtype:
    before, after = load_weights.list_tensors(folder), load_weights.list_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before[name].view().tobytes() == after[name].view().tobytes() for name in before)


def test_classifier_refuses_generation(theirs, folder):
  """A classifier refuses what it cannot do, and says why."""
  ours = jaxft.load(theirs[1])
  with pytest.raises(RequestError, match="cannot generate text"):
    ours.generate(["the cat"])
  with pytest.raises(RequestError, match="no classification head"):
    jaxft.load(folder).classify(["the cat"])


def test_number_of_classes_from_config_json(theirs, tmp_path):
  """Two where config.json says nothing, as transformers has it; nonsense is refused."""
  _, folder = theirs
  config = json.loads((folder / "config.json").read_text())
  for names in ("id2label", "label2id", "num_labels"):
    config.pop(names, None)
  assert model_config.from_hf_config(config).classes == 2
  assert model_config.from_hf_config(config | {"architectures": ["GPT2LMHeadModel"]}).classes == 0
  with pytest.raises(RequestError, match="num_labels=-1"):
    model_config.from_hf_config(config | {"num_labels": -1})
  with pytest.raises(RequestError, match="'score.weight' has shape"):
    other = repo.resolve(str(folder))._replace(cfg=model_config.from_hf_config(config))
    _, shapes, _ = abstract_model(other.cfg, ComputeConfig())
    load_weights.load_params(other, shapes, jax.tree.map(lambda _: HERE, shapes))


@pytest.mark.slow_for("gpt2", "gpt_neo")
def test_accuracy_and_f1_match_per_label_counts(theirs, tmp_path):
  ours, file = jaxft.load(theirs[1]), tmp_path / "rows.jsonl"
  rng = np.random.default_rng(0)
  texts = [" ".join(rng.choice(tiny.WORDS, rng.integers(1, 30))) for _ in range(41)]
  true = [LABELS[i] for i in rng.integers(3, size=len(texts))]
  file.write_text(
    "".join(json.dumps({"text": t, "label": l}) + "\n" for t, l in zip(texts, true, strict=True))
  )
  predicted = [label.label for label in ours.classify(texts)]
  each = []
  for label in LABELS:
    right = sum(a == b == label for a, b in zip(true, predicted, strict=True))
    each.append(2 * right / max(true.count(label) + predicted.count(label), 1))
  logits = np.stack([label.logits_C for label in ours.classify(texts)]).astype(np.float64)
  gold = logits[np.arange(len(texts)), [LABELS.index(label) for label in true]]
  for batch_size in (1, 8):
    found = ours.evaluate(str(file), batch_size=batch_size)
    assert found["tokens"] == len(texts)
    assert found["accuracy"] == pytest.approx(
      np.mean([a == b for a, b in zip(true, predicted, strict=True)])
    )
    assert found["f1"] == pytest.approx(np.mean(each))
    pairs = collections.Counter(zip(true, predicted, strict=True))
    assert found["confusion"] == {a: {b: pairs[a, b] for b in LABELS} for a in LABELS}
    assert found["loss"] == pytest.approx(np.mean(np.log(np.exp(logits).sum(-1)) - gold), rel=1e-5)
  file.write_text('{"text": "the cat", "label": "great"}\n')
  with pytest.raises(
    RequestError, match="label 'great': must be one of the model's classes, 'bad', 'so so', 'good'"
  ):
    ours.evaluate(str(file))


def test_binary_f1_is_of_second_class():
  from jaxft.training.eval_step import EvalResult

  found = EvalResult(0.5, 10, np.array([[5, 1], [2, 2]]))
  assert (found.accuracy, found.f1) == (0.7, 2 * 2 / (2 * 2 + 1 + 2))


# What a config.json may say of a head that is not there any more, or of padding.
LEFT_OVER = {
  "pad_token_id": [None, 0, 5, 292, 100_000],
  "num_labels": [1, 2, 3],
  "_num_labels": [1, 7],
  "id2label": [{"0": "LABEL_0"}, {"0": "a", "1": "b"}],
  "label2id": [{"LABEL_0": 0}],
  "problem_type": ["regression", "multi_label_classification", None],
  "finetuning_task": ["sst2"],
  "use_cache": [False],
  "summary_type": ["cls_index"],
}


@pytest.mark.parts(12, 12)
def test_new_head_export_classifies_padded_batches(folder, tmp_path, part):
  """Whatever the config says of another head or padding; its tokenizer pads three texts."""
  for seed in range(5 * part, 5 * part + 5):
    rng = np.random.default_rng(seed)
    source, out = shutil.copytree(folder, tmp_path / str(seed)), tmp_path / f"{seed}-out"
    names = rng.choice(list(LEFT_OVER), rng.integers(1, 6), replace=False)
    more = {name: LEFT_OVER[name][rng.integers(len(LEFT_OVER[name]))] for name in names}
    about = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(about | more))
    if rng.random() < 0.3:  # as people set it for generation
      says = json.loads((source / "tokenizer_config.json").read_text())
      (source / "tokenizer_config.json").write_text(json.dumps(says | {"padding_side": "left"}))
    if rng.random() < 0.3:
      says = json.loads((source / "tokenizer_config.json").read_text())
      (source / "tokenizer_config.json").write_text(json.dumps(says | {"pad_token": "!"}))
    tokenizer = jaxft.hf.tokenizer.load_tokenizer(source, 293)
    labels = [f"class {i}" for i in range(rng.integers(2, 5))]
    checkpoint = repo.with_class_head(repo.resolve(str(source)), labels, tokenizer)
    export.check_exportable(checkpoint, tokenizer)
    _, shapes, _ = abstract_model(checkpoint.cfg, ComputeConfig())
    params = load_weights.load_params(checkpoint, shapes, jax.tree.map(lambda _: HERE, shapes))
    export.export_model(out, params, checkpoint, tokenizer=tokenizer)
    their_model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    texts = ["the cat sat on the mat and ran", "the dog" + tokenizer.decode([5]), "cat"]
    with torch.no_grad():
      found = their_model(
        **transformers.AutoTokenizer.from_pretrained(out)(texts, padding=True, return_tensors="pt")
      ).logits
    ours = np.stack([label.logits_C for label in jaxft.load(out).classify(texts)])
    np.testing.assert_allclose(found.numpy(), ours, atol=1e-4, err_msg=str(more))
    assert their_model.config.num_labels == len(labels) and their_model.config.id2label == dict(
      enumerate(labels)
    ), more


def test_labels_map_to_classes_by_name_case_number():
  """Labels find their class by name, then by case, then by number."""
  names = ["entailment", "neutral", "contradiction"]
  assert class_ids(sorted(names), names) == [2, 0, 1]
  assert class_ids(["neutral"], names) == [1]
  assert class_ids(["ENTAILMENT", "Neutral"], names) == [0, 1]
  assert class_ids(["0", "2"], names) == [0, 2]
  assert class_ids(["1", "0"], ["1", "0"]) == [0, 1]  # names, though they look like numbers
  for labels in (["neutral", "other"], ["0", "3"], ["Neutral", "1"]):
    with pytest.raises(RequestError, match=f"label '{labels[-1]}'|label '{labels[0]}'"):
      class_ids(labels, names)


def test_label_order_follows_existing_head(theirs, tmp_path):
  """The rows get the numbers that the head has; the data may lack a class."""
  _, folder = theirs
  (tmp_path / "rows.jsonl").write_text(
    "".join(
      json.dumps({"text": f"the cat {i}", "label": label}) + "\n"
      for i in range(9)
      for label in ("good", "bad")
    )
  )
  data = DataSection(
    format="classification",
    train=(str(tmp_path / "rows.jsonl"),),
    sequence_length=16,
    validation_fraction=0.2,
    cache_dir=str(tmp_path / "cache"),
  )
  tokenizer = jaxft.hf.tokenizer.load_tokenizer(folder, 293)
  source = repo.with_class_head(repo.resolve(str(folder)), ["bad", "good"], tokenizer)
  assert source.labels == LABELS and not source.new_head
  found = dataset.prepare_data(data, tokenizer, "").with_class_ids(source.labels)
  assert found.labels == LABELS
  assert {
    int(row["targets"].max()) for row in (found.train[i] for i in range(len(found.train)))
  } == {0, 2}


def test_pad_token_is_in_the_vocabulary(theirs):
  _, folder = theirs
  source, tokenizer = repo.resolve(str(folder)), jaxft.hf.tokenizer.load_tokenizer(folder, 293)
  for said, expected in ((5, 5), (None, 0), (100_000, 0)):
    other = source._replace(hf_config=source.hf_config | {"pad_token_id": said})
    assert repo.with_class_head(other, LABELS, tokenizer).hf_config["pad_token_id"] == expected
    # 5 is a letter, which texts may end with
    new = other._replace(cfg=dataclasses.replace(other.cfg, classes=0))
    assert repo.with_class_head(new, LABELS, tokenizer).hf_config["pad_token_id"] == 0


def test_pad_token_equal_to_end_token_is_refused(theirs, tmp_path):
  """transformers would read the class at the token before it."""
  from tokenizers.processors import TemplateProcessing

  _, folder = theirs
  other = shutil.copytree(folder, tmp_path / "m")
  tokenizer = jaxft.hf.tokenizer.load_tokenizer(other, 293)
  ends = TemplateProcessing(single=f"$A {tiny.EOS}", special_tokens=[(tiny.EOS, 0)])
  tokenizer.backend_tokenizer.post_processor = ends
  with pytest.raises(RequestError, match="give the tokenizer a separate pad_token"):
    source = repo.resolve(str(other))
    repo.with_class_head(
      source._replace(hf_config=source.hf_config | {"pad_token_id": None}), LABELS, tokenizer
    )
  assert (
    repo.with_class_head(repo.resolve(str(other)), LABELS, tokenizer).hf_config["pad_token_id"]
    == 292
  )


def test_dataset_label_names_match_unnamed_head():
  from jaxft.data.readers import ClassName

  names = [ClassName("neg", 0), ClassName("pos", 1)]
  assert class_ids(names, ["LABEL_0", "LABEL_1"]) == class_ids(names, ["0", "1"]) == [0, 1]
  assert class_ids(names, ["pos", "neg"]) == [1, 0]
  with pytest.raises(
    RequestError, match="label 'neg': must be one of the model's classes, 'LABEL_0'"
  ):
    class_ids(["neg", "pos"], ["LABEL_0", "LABEL_1"])  # of a file that says no numbers


def test_parity_batch_has_a_padded_row(theirs):
  from jaxft.hf import verify

  ids_BT, lengths_B = verify._random_batch(repo.resolve(str(theirs[1])))
  assert (
    len(ids_BT) == 2 and lengths_B[0] > lengths_B[1] and (ids_BT[1, lengths_B[1] :] == 292).all()
  )


def test_csv_numbers_map_to_classes():
  assert class_ids(["1.0", "0.0", "1.0"], ["neg", "pos"]) == [1, 0, 1]
  assert class_ids(["True", "False"], ["LABEL_0", "LABEL_1"]) == [1, 0]
  with pytest.raises(RequestError, match="label '2.0'"):
    class_ids(["2.0"], ["neg", "pos"])
  with pytest.raises(RequestError, match="label 'True'"):
    class_ids(["True"], ["a", "b", "c"])
