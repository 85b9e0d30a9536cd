"""Each recipe's config on a small stand-in, from training to the export; and that it works."""

import json
import random
import runpy
from pathlib import Path

import jax
import numpy as np
import processes
import pytest
import tiny

import jaxft
import jaxft.hf.tokenizer
from jaxft.data import dataset
from jaxft.errors import StorageError
from jaxft.report_page.formatting import format_number
from jaxft.train import finetune

CONFIGS = Path(__file__).parents[2] / "configs"
GOOD, BAD = "cat house mat red".split(), "dog sat door small".split()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  """A GPT-2 that learns fast: quiet, and with longer rows than most tests want."""
  return tiny.write_gpt2(tmp_path_factory.mktemp("models") / "small", seed=0, std=0.05)


def fresh(name):
  return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()


def recipe(name, folder, train, **more):
  """The config, with this model and data, and as long as the stand-in needs."""
  config = fresh(name)
  config.model.path, config.data.train, config.data.validation = str(folder), (str(train),), ()
  config.data.sequence_length, config.data.limit_validation = 64, 0
  config.data.cache_dir = str(train.parent / "tokens")
  config.train.epochs, config.train.micro_batch_size, config.optim.warmup_steps = 0.0, 0, 5
  config.optim.learning_rate = 3e-3
  config.mesh.data, config.mesh.fsdp = 1, 1  # other tests are about meshes
  for setting, value in more.items():
    section, key = setting.split("__")
    config[section][key] = value
  return config


def write(file, rows):
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return file


@pytest.mark.slow
def test_classifier_learns_reviews(small, tmp_path):
  rng = random.Random(0)

  def review(i):
    words = rng.choices(GOOD if i % 2 else BAD, k=3) + rng.choices(
      tiny.WORDS[:4], k=rng.randint(1, 9)
    )
    return {"text": " ".join(rng.sample(words, len(words))), "label": i % 2}

  rows, unseen = (
    write(tmp_path / f"{name}.jsonl", [review(i) for i in range(n)])
    for name, n in (("rows", 300), ("new", 100))
  )
  run = finetune(
    recipe("gpt2_reviews_classification", small, rows, train__steps=60), tmp_path / "run"
  )
  evals = [line for line in run.metrics if "eval/accuracy" in line]
  assert evals[0]["eval/accuracy"] < 0.8 < 0.9 < evals[-1]["eval/accuracy"]
  card = (run.export / "README.md").read_text()
  assert (
    "tag: text-classification\n" in card and "import AutoModelForSequenceClassification," in card
  )
  for model in (jaxft.pretrained.load_workdir(run.workdir), jaxft.load(run.export)):
    found = model.evaluate(str(unseen))
    assert found["tokens"] == 100 and found["accuracy"] > 0.9 and found["f1"] > 0.9
    assert [it.label for it in model.classify(["cat red", "dog door"])] == ["1", "0"]


@pytest.mark.slow
@pytest.mark.wide
def test_answers_are_learned_up_to_the_end_token(small, tmp_path):
  answers = {"cat": "the red mat", "dog": "a big house", "door": "blue", "sun": "once upon a time"}
  pairs = [
    {"question": f"where is the {what}?", "answer": answer} for what, answer in answers.items()
  ] * 20
  file, other = (
    write(tmp_path / "pairs.jsonl", pairs),
    tiny.write_stories(tmp_path / "other.jsonl", 9, seed=3),
  )
  run = finetune(
    recipe(
      "gpt2_question_answer",
      small,
      file,
      train__steps=120,
      train__sample_prompts=("Question: where is the cat? Answer:",),
      data__unrelated=(str(other),),
    ),
    tmp_path / "run",
  )
  evals = [line for line in run.metrics if "eval/loss" in line]
  assert evals[-1]["eval/loss"] < 0.1 < evals[0]["eval/loss"]
  # What became of other text: reported before and after, in metrics and on the page.
  ends = [format_number(line["eval/unrelated_perplexity"]) for line in (evals[0], evals[-1])]
  assert (
    f"<dt>perplexity, unrelated text</dt><dd>{' → '.join(ends)}"
    in (run.workdir / "report.html").read_text()
  )
  for model in (jaxft.pretrained.load_workdir(run.workdir), jaxft.load(run.export)):
    prompts = [f"Question: where is the {what}? Answer:" for what in answers]
    found = model.generate(prompts, max_new_tokens=20, temperature=0)
    # and nothing after it: the end was learned
    assert [it.text.strip() for it in found] == list(answers.values())
  # What was not learned: the question, whose tokens are masked.
  question = write(tmp_path / "question.jsonl", [{"text": "where is the cat?"}])
  assert model.evaluate(str(question))["loss"] > 1


@pytest.mark.slow
@pytest.mark.wide
def test_training_from_scratch_beats_unigram_entropy(tmp_path):
  text, folder = tmp_path / "text.jsonl", tmp_path / "mine"
  # words in an order that can be learned, which does not follow from their counts
  rng = random.Random(0)
  write(
    text,
    [
      {"text": " ".join(tiny.WORDS[(rng.randrange(20) + i) % 20] for i in range(40))}
      for _ in range(200)
    ],
  )
  processes.run("jaxft.tokenizer", "--data", text, "--vocab_size", 300, "--out", folder)
  about = json.loads((folder / "config.json").read_text())
  assert about["vocab_size"] == 300
  (folder / "config.json").write_text(
    json.dumps(about | dict(n_embd=40, n_layer=2, n_head=5, n_positions=64))
  )
  run = finetune(
    recipe("gpt2_from_scratch", folder, text, train__steps=150, train__batch_size=16),
    tmp_path / "run",
  )
  losses = [line["eval/loss"] for line in run.metrics if "eval/loss" in line]
  exported = jaxft.load(run.export)
  tokenizer = exported.tokenizer
  ids = [
    i
    for line in text.read_text().splitlines()
    for i in [*tokenizer(json.loads(line)["text"])["input_ids"], 0]
  ]
  shares = np.bincount(ids, minlength=300) / len(ids)
  of_counts = -sum(p * np.log(p) for p in shares if p)
  assert abs(losses[0] - np.log(300)) < 0.2 and losses[-1] < of_counts - 0.5, (losses, of_counts)
  held_out = jaxft.pretrained.load_workdir(run.workdir).evaluate_held_out()
  assert held_out["loss"] == pytest.approx(losses[-1], rel=1e-5)
  assert exported.evaluate(str(text), sequence_length=64)["loss"] < of_counts - 0.5
  (completion,) = exported.generate([" ".join(tiny.WORDS[:4])], max_new_tokens=12, temperature=0)
  assert set(completion.text.split()[:-1]) <= set(tiny.WORDS)


@pytest.mark.slow
@pytest.mark.wide
def test_overfit_run_exports_the_best_checkpoint(small, tmp_path):
  """Jokes are learned by heart."""
  rng = random.Random(0)
  joke = lambda: " ".join(rng.choices(tiny.WORDS, k=20))
  file = tmp_path / "jokes.csv"
  file.write_text("Joke\n" + "".join(f"{joke()}\n" for _ in range(40)))
  other = write(
    tmp_path / "other.jsonl", [{"Joke": " ".join(sorted(joke().split()))} for _ in range(9)]
  )
  begin = tuple(tiny.EOS + " ".join(it.split()[:3]) for it in file.read_text().splitlines()[1:5])
  more = dict(
    train__steps=400,
    train__batch_size=16,
    train__eval_every=10,
    train__save_every=80,
    train__sample_every=10,
  )
  more |= dict(train__sample_prompts=begin, train__sample_tokens=20, model__dropout=0.0)
  config = recipe(
    "gpt2_jokes", small, file, **more, optim__learning_rate=1e-2, data__unrelated=(str(other),)
  )
  run = finetune(config, tmp_path / "run")
  evals = {line["step"]: line["eval/loss"] for line in run.metrics if "eval/loss" in line}
  best, last = min(evals, key=evals.get), max(evals)
  assert last == best + 3 * 10 < 400  # patience of three evaluations
  unrelated = {
    line["step"]: line["eval/unrelated_loss"] for line in run.metrics if "eval/loss" in line
  }
  of = lambda model: [np.asarray(leaf) for leaf in jax.tree.leaves(model.params)]
  same = lambda a, b: all(map(np.array_equal, of(a), of(b)))
  wanted, newest = (jaxft.pretrained.load_workdir(run.workdir, step) for step in (best, last))
  assert not same(wanted, newest)
  assert same(jaxft.pretrained.load_workdir(run.workdir), wanted) and same(
    jaxft.load(run.export), wanted
  )
  how = dict(sequence_length=64, like=config.data, format="text")
  assert wanted.evaluate(str(other), **how)["loss"] == pytest.approx(unrelated[best], rel=1e-5)
  assert f"{evals[best]:.4f} at step {best:,}" in (run.export / "README.md").read_text()
  assert [line["step"] for line in run.samples if line["when"] == "after"] == [best] * 4
  # By heart: as a plain search in the training text counts it, of what the model draws with the
  # prompt and seed of the run.
  read = dataset.prepare_data(
    config.data, wanted.tokenizer, jaxft.hf.tokenizer.fingerprint(wanted.tokenizer)
  ).train.tokens.ids.tolist()
  runs_of_8 = lambda ids: [tuple(ids[i : i + 8]) for i in range(len(ids) - 7)]
  known, shares = set(runs_of_8(read)), {}
  for model, step in ((jaxft.load(small), 0), (newest, last)):
    drawn = model.generate(
      list(begin), max_new_tokens=20, temperature=0.8, top_k=0, top_p=0.95, seed=0
    )
    samples = [it for it in run.samples if it["step"] == step]
    assert [it["text"] for it in samples] == [it.text for it in drawn]
    shares[step] = [np.mean([eight in known for eight in runs_of_8(it.token_ids)]) for it in drawn]
    assert [it["memorised_8grams"] for it in samples] == pytest.approx(shares[step], abs=1e-4)
  assert sum(shares[0]) < sum(shares[last])
  again = finetune(config, run.workdir)  # a run that is through says the same once more
  assert again.samples == run.samples and again.metrics == run.metrics
  # The best one damaged: set aside, or refused if that is asked for.
  for file in (run.workdir / f"checkpoints/{best}/state").rglob("*"):
    if file.is_file():
      file.write_bytes(file.read_bytes()[:-9])
  with pytest.raises(StorageError, match=f"checkpoints/{best}: damaged"):
    finetune(config, run.workdir, strict=True)
  finetune(config, run.workdir)
  assert (run.workdir / f"checkpoints/damaged-{best}").is_dir()
  assert same(jaxft.load(run.export), jaxft.pretrained.load_workdir(run.workdir))  # the next best
  assert not same(jaxft.load(run.export), wanted)


@pytest.mark.slow
@pytest.mark.wide
def test_tinystories_recipe_learns_and_ends(small, tmp_path, monkeypatch):
  """Stories are drawn, learned, and end."""
  config = recipe(
    "gpt2_tinystories",
    small,
    tmp_path / "none",
    train__steps=300,
    train__sample_every=150,
    train__sample_tokens=25,
  )
  wanted = fresh("gpt2_tinystories")
  assert (wanted.data.limit_train, wanted.data.limit_validation) == (100_000, 5_000)
  begin = (
    "There was a cat with magic powers. ",
    "There was a cloud that could laugh. ",
    "Every night, Mia looked at ",
  )
  assert (
    all(map(str.startswith, wanted.train.sample_prompts, begin))
    and wanted.train.sample_tokens == 250
  )
  # which fit this model's rows
  prompts = config.train.sample_prompts = tuple(prompt.split(".")[0] for prompt in begin)
  endings = (" and the big cat ran.", " with the small dog.", " on a blue house.")
  stories = [{"text": prompt + ending} for prompt, ending in zip(prompts, endings, strict=True)]
  # The data set of the hub, as its files are in a folder of that name: datasets reads it there.
  (tmp_path / "roneneldan/TinyStories").mkdir(parents=True)
  for split, count in (("train", 100), ("validation", 10)):
    write(tmp_path / f"roneneldan/TinyStories/{split}.jsonl", stories * count)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
  config.data.train, config.data.validation = wanted.data.train, wanted.data.validation
  config.data.limit_train, config.data.limit_validation = 240, 24
  run = finetune(config, tmp_path / "run")

  rows = json.loads((run.workdir / "data_report.json").read_text())["rows"]
  assert (rows["read"], rows["trained"], rows["held_out"]) == (330, 240, 24)
  losses = [line["eval/loss"] for line in run.metrics if "eval/loss" in line]
  assert losses[-1] < 0.3 < 3 < losses[0]
  assert [(it["when"], it["prompt"]) for it in run.samples] == [
    (when, prompt) for when in ("before", "during", "after") for prompt in prompts
  ]
  texts = {
    when: [it["text"] for it in run.samples if it["when"] == when] for when in ("before", "after")
  }
  num_right = lambda when: sum(
    ending in text for ending, text in zip(endings, texts[when], strict=True)
  )
  assert num_right("before") == 0 and num_right("after") >= 2  # drawn, not the likeliest
  for model in (jaxft.pretrained.load_workdir(run.workdir), jaxft.load(run.export)):
    found = model.evaluate(*wanted.data.validation, sequence_length=64)
    assert found["loss"] < 0.3
    assert [
      it.text for it in model.generate(list(prompts), max_new_tokens=20, temperature=0)
    ] == list(endings)
  parity = model.export(tmp_path / "half", dtype="bfloat16")
  assert (
    jaxft.load(tmp_path / "half").evaluate(*wanted.data.validation, sequence_length=64)["loss"]
    < 0.35
  ), parity


MARKS = ["<|title|>", "<|steps|>"]


@pytest.fixture(scope="module", params=["gpt2", pytest.param("gptj", marks=pytest.mark.wide)])
def marked(request, small, tmp_path_factory):
  """A model, and its folder with two more tokens."""
  folder, out = small, tmp_path_factory.mktemp("models") / "marked"
  if request.param == "gptj":
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    sizes = dict(n_embd=40, n_layer=2, n_head=5, n_positions=71, rotary_dim=4, vocab_size=293)
    their = transformers.GPTJForCausalLM(
      transformers.GPTJConfig(**sizes, bos_token_id=0, eos_token_id=0)
    )
    folder = tmp_path_factory.mktemp("models") / "gptj"
    their.to(torch.bfloat16).save_pretrained(folder)
    tiny.write_tokenizer(folder, 293)
  done = processes.run("jaxft.tokenizer", "--model", folder, "--add", *MARKS, "--out", out)
  assert "<|title|> is 293, <|steps|> is 294" in done.stdout
  return folder, out


def test_embedding_resize_matches_transformers(marked):
  folder, out = marked
  transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
  theirs.resize_token_embeddings(295)
  ours = transformers.AutoModelForCausalLM.from_pretrained(out)
  assert ours.config.vocab_size == theirs.config.vocab_size == 295 and ours.dtype == theirs.dtype
  wanted = theirs.state_dict()
  for name, tensor in ours.state_dict().items():
    assert tensor.shape == wanted[name].shape and tensor.dtype == wanted[name].dtype, name
    assert torch.equal(tensor[:293], wanted[name][:293]), name
    torch.testing.assert_close(tensor[293:], wanted[name][293:], atol=2e-3, rtol=0)
  tokenizer = transformers.AutoTokenizer.from_pretrained(out)
  assert len(tokenizer) == 295 and tokenizer("cat<|steps|>")["input_ids"][-1] == 294


@pytest.mark.slow
def test_added_tokens_are_learned_and_exported(marked, tmp_path):
  _, folder = marked
  steps = {"cat": "sat on mat", "dog": "ran to house", "door": "red", "once": "upon a time"}
  rows = [{"text": f"<|title|>{title}<|steps|>{text}"} for title, text in steps.items()] * 20
  file = write(tmp_path / "recipes.jsonl", rows)
  more = dict(
    train__steps=120, train__sample_prompts=("<|title|>cat<|steps|>",), data__layout="pad"
  )
  run = finetune(recipe("gpt2_medium_recipes", folder, file, **more), tmp_path / "run")
  losses = [line["eval/loss"] for line in run.metrics if "eval/loss" in line]
  assert losses[-1] < 0.5 < losses[0]
  held_out = jaxft.pretrained.load_workdir(run.workdir).evaluate_held_out()
  assert held_out["loss"] == pytest.approx(losses[-1], rel=1e-5)
  for model in (jaxft.pretrained.load_workdir(run.workdir), jaxft.load(run.export)):
    assert model.tokenizer(MARKS[0])["input_ids"] == [293]
    prompts = [f"{tiny.EOS}<|title|>{title}<|steps|>" for title in steps]  # as rows begin
    found = model.generate(prompts, max_new_tokens=20, temperature=0)
    assert [it.text for it in found] == list(steps.values())


def test_invalid_added_tokens_are_refused(small, tmp_path):
  for more, message in (
    (["--model", small, "--add", "<a>", "<a>"], "--add '<a>': the tokenizer already has"),
    (["--model", small, "--add", tiny.EOS], "the tokenizer already has this token"),
    (["--model", small, "--add", ""], "must be TOKEN or ROLE=TOKEN"),
    (["--model", small], "--model and --add: use both"),
    (["--data", "x.txt", "--add", "<a>"], "--model and --add: use both"),
  ):
    done = processes.run("jaxft.tokenizer", *more, "--out", tmp_path / "new", check=2)
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()


def test_invalid_tokenizer_settings_are_refused(tmp_path):
  text = tiny.write_stories(tmp_path / "text.jsonl", 3, seed=0)
  for more, message in (
    (["--vocab_size", "256", "--out", tmp_path / "a"], "must be at least 257"),
    (["--out", tmp_path], "already exists; name a new folder"),
  ):
    done = processes.run("jaxft.tokenizer", "--data", text, *more, check=2)
    assert message in done.stderr and "Traceback" not in done.stderr
