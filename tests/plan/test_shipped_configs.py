"""Every config of configs/ as it is shipped, on little data: no other flag, and a model of use.

The models and data that the configs name lie under those names where the command runs. Models have
the published tokenizers, tables and numbers of positions, and next to nothing between; so rows,
tables and the number of steps are those of a user who tries a config on fifty rows.
"""

import json
import math
import os
import runpy

import datasets
import processes
import pytest
import tiny

import jaxft
from jaxft.hf.known_models import PUBLISHED

CONFIGS = {file.stem: file for file in sorted((processes.ROOT / "configs").glob("*.py"))}
ASSETS = processes.ROOT / "assets" / "quickstart"
ROWS, HELD_OUT = 50, 20
MARKS = ("<|title|>", "<|ingredients|>", "<|steps|>")
MODELS = ("gpt2", "gpt2-medium", "gpt2-xl", "EleutherAI/gpt-neo-2.7B", "EleutherAI/gpt-j-6b")
# The one config with a data set of its own, of 2,000 rows: three minutes without it.
MORE = {"quickstart": ["--config.train.steps=5"]}
EIGHT_DEVICES = ("gptj_6b_v5e8",)
WIDE = ("gptj_6b_24gb", "gptj_6b_v5e8", "gptneo_2b7_16gb", "gpt2xl_shakespeare_16gb", "gpt2_jokes")
WIDE += ("gpt2_medium_recipes", "gpt2_tinystories", "gpt2_from_scratch")


@pytest.fixture(scope="module")
def home(shared):
  """A folder with everything that the configs name."""
  return shared("shipped", write_files)


def write_files(home):
  for name in MODELS:
    tiny.write_published(home / name, PUBLISHED[name]["model_type"])
  lines = (ASSETS / "stories.jsonl").read_text().splitlines()[: ROWS + HELD_OUT]
  texts = [json.loads(line)["text"] for line in lines]
  train, held_out = texts[:ROWS], texts[ROWS:]
  first = lambda text: text[: text.index(".") + 1]
  rest = lambda text: text[text.index(".") + 1 :].strip()
  for name in ("my_texts", "shakespeare"):
    (home / name).mkdir()
    for i, text in enumerate(train):
      (home / name / f"{i}.txt").write_text(text)
  jokes = datasets.Dataset.from_dict({"ID": range(ROWS), "Joke": [first(text) for text in train]})
  jokes.to_csv(home / "jokes.csv")
  recipes = [{"text": "".join(map(str.__add__, MARKS, text.split("\n")))} for text in train]
  write(home / "recipes.jsonl", recipes)
  write(home / "pairs.jsonl", [{"question": first(text), "answer": rest(text)} for text in train])
  spoken = [{"prompt": first(text), "response": rest(text)} for text in train]
  write(home / "samdotme/vader-speak/train.jsonl", spoken)
  for split, part in (("train", train), ("validation", held_out)):
    write(home / f"roneneldan/TinyStories/{split}.jsonl", [{"text": text} for text in part])
  label = datasets.ClassLabel(names=["neg", "pos"])  # as in the data set of the hub
  of_hub = datasets.Features(text=datasets.Value("string"), label=label)
  imdb = home / "stanfordnlp/imdb"
  imdb.mkdir(parents=True)
  for split, part in (("train", train), ("test", held_out)):
    rows = {"text": part, "label": [i % 2 for i in range(len(part))]}
    datasets.Dataset.from_dict(rows, features=of_hub).to_parquet(imdb / f"{split}.parquet")
  # As the docstrings of the two configs say.
  new = ["--vocab_size", 16384, "--out", "my_tokenizer"]
  processes.run("jaxft.tokenizer", "--data", "my_texts/", *new, cwd=home)
  about = json.loads((home / "my_tokenizer/config.json").read_text())
  sizes = dict(n_embd=8, n_layer=1, n_head=1)
  (home / "my_tokenizer/config.json").write_text(json.dumps(about | sizes))
  marked = ["--add", *MARKS, "--out", "gpt2_medium_with_marks"]
  processes.run("jaxft.tokenizer", "--model", "gpt2-medium", *marked, cwd=home)


def write(file, rows):
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def cases():
  """Each config; those like another that take longer are wide."""
  for name in CONFIGS:
    yield pytest.param(name, marks=[pytest.mark.wide] * (name in WIDE))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*cases()])
def test_shipped_config_runs_unchanged(name, home, tmp_path):
  config, workdir = runpy.run_path(str(CONFIGS[name]))["get_config"](), tmp_path / "run"
  devices = 8 if name in EIGHT_DEVICES else 1
  done = train(name, home, workdir, devices, tmp_path / "cache")
  assert f"{devices} x cpu, mesh data=1 x fsdp={devices} x" in done.stdout + done.stderr
  report = json.loads((workdir / "data_report.json").read_text())
  rows = report["rows"]
  assert rows["read"] == rows["trained"] + rows["held_out"] + sum(rows["dropped"].values())
  if name not in MORE:
    assert rows["read"] == ROWS + HELD_OUT * bool(config.data.validation) and not rows["dropped"]
  check_warnings(done.stdout + done.stderr, config, report)
  metrics = processes.lines(workdir / "metrics.jsonl")
  losses = {line["step"]: line["eval/loss"] for line in metrics if "eval/loss" in line}
  assert rows["held_out"] and losses.keys() >= {0, report["steps_in_all"]}
  assert all(math.isfinite(loss) for loss in losses.values())
  assert max(line.get("train/learning_rate", 0) for line in metrics) > 0
  check_use(workdir / "export", config.model.head)


def train(name, home, workdir, devices, cache):
  """What became of the command.

  Programs are compiled as users compile them: with 50,000 logits a token, running is most of it.
  """
  env = os.environ | {"XDG_CACHE_HOME": str(cache), "HF_DATASETS_CACHE": str(cache / "datasets")}
  env |= {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
  flags = ["--config", CONFIGS[name], "--workdir", workdir, *MORE.get(name, ())]
  return processes.run("jaxft.train", *flags, cwd=home, env=env, timeout=900)


def check_warnings(log, config, report):
  """Of what such little data changes: each line where it happens, and nowhere else."""
  rows, steps = report["sequences"]["trained"], report["steps_in_all"]
  batch, warmup = config.train.batch_size, config.optim.warmup_steps
  fills = f"config.train.batch_size={batch}: the training text fills only {rows} sequence"
  assert (fills in log) == ("config.train.batch_size=" in log) == (rows < batch)
  shorter = f"config.optim.warmup_steps={warmup}: more than the {steps} step"
  assert (shorter in log) == ("config.optim.warmup_steps=" in log) == (warmup > steps)


def check_use(export, head):
  """The exported folder is opened by itself, and does what it is for."""
  model = jaxft.load(export)
  if head == "classification":
    (found,) = model.classify(["A film with a fox."])
    assert found.label in ("neg", "pos")
  else:
    (completion,) = model.generate(["Once upon a time"], max_new_tokens=4, temperature=0)
    assert 0 < len(completion.token_ids) <= 4
