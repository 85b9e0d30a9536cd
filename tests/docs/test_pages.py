"""Run the commands of the pages and of the docstrings of configs/, in order, on small stand-ins.

Each page is followed in a folder of its own, in which the models and data sets that it names are: a
folder `gpt2` is taken before the hub's model of that name, and a folder `stanfordnlp/imdb` before
its data set. So nothing of a command is replaced; SMALL is what is added to it, so that it takes
seconds.
"""

import contextlib
import importlib
import importlib.util
import io
import json
import random
import re
import shutil
import sys
from pathlib import Path

import pages
import pytest
import tiny

import jaxft
import jaxft.config
from jaxft.cli import flags, usage
from jaxft.hardware import specs
from jaxft.hf.known_models import PUBLISHED
from jaxft.plan import __main__, planner

pytestmark = [
  # ml_collections (1.1) loads config files with it.
  pytest.mark.filterwarnings(r"ignore:the load_module\(\) method is deprecated:DeprecationWarning"),
  # peft (0.21) asks transformers so.
  pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
MODELS = ("gpt2", "gpt2-medium", "gpt2-xl", "EleutherAI/gpt-neo-2.7B", "EleutherAI/gpt-j-6b")
SMALL = {
  "train --config": "--config.data.sequence_length=32 --config.train.epochs=0.0 "
  "--config.train.steps=2 --config.train.batch_size=4 --config.train.micro_batch_size=2 "
  "--config.train.sample_tokens=4 --config.optim.warmup_steps=1 --config.mesh.fsdp=1",
  "train --model_name_or_path": "--block_size 32 --max_steps 2 --warmup_steps 1 "
  "--config.mesh.fsdp=1",
  "generate": "--max_new_tokens 4",
  "evaluate": "--sequence_length 32",
  "export --workdir": "--step 2",
  "tokenizer --data": "--vocab_size 300",
}
# All their commands are in a config's docstring, which is followed too.
LIKE_CONFIGS = {"docs/recipes/jokes.md"}
# Read and checked, and no more.
NOT_RUN = {
  "python -m jaxft.train --config configs/X.py --workdir /shared/run --coordinator host0:7777 "
  "--num_processes 4 --process_id 0": (
    "needs four hosts; tests/distributed/test_multihost.py has processes instead"
  ),
}
FOLLOWED = {name: pages.steps(name) for name in (*pages.PAGES, *pages.CONFIGS)}
PLANS = sorted(
  {
    " ".join(pages.words(step.text))
    for steps in FOLLOWED.values()
    for step in steps
    if "jaxft.plan " in step.text
  }
)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
  """A folder with everything that the pages name, but for what they make."""
  folder, rng = tmp_path_factory.mktemp("stand_ins"), random.Random(0)
  for name in ("configs", "assets"):
    (folder / name).symlink_to(pages.ROOT / name)
  first = tiny.write_gpt2(folder / "first", seed=0, P=1024, L=12, std=0.05)  # a page names layer 11
  for name in MODELS:
    if (family := PUBLISHED[name]["model_type"]) == "gpt2":
      shutil.copytree(first, folder / name)
    else:
      tiny.write_family(folder / name, family, seed=0, P=1024, std=0.05)
  story = lambda: tiny.story(rng)
  texts = [{"text": story()} for _ in range(100)]
  for name in (
    "my_texts/stories",
    "roneneldan/TinyStories/train",
    "roneneldan/TinyStories/validation",
  ):
    write(folder / f"{name}.jsonl", texts)
  write(
    folder / "recipes.jsonl", [{"text": f"<|title|>{story()}<|steps|>{story()}"} for _ in range(40)]
  )
  (folder / "jokes.csv").write_text("\n".join(["Joke", *(story() for _ in range(40))]))
  write(folder / "pairs.jsonl", [{"question": "where is the cat?", "answer": "on the mat"}] * 40)
  lines = [
    {"prompt": f"where is the {word}", "response": "[kkshhhh] on the mat"}
    for word in tiny.WORDS * 2
  ]
  for name in ("samdotme/vader-speak/train", "lines"):
    write(folder / f"{name}.jsonl", lines)
  for name in ("stanfordnlp/imdb/train", "stanfordnlp/imdb/test"):
    write(folder / f"{name}.jsonl", [{"text": story(), "label": i % 2} for i in range(40)])
  (folder / "shakespeare").mkdir()
  for i in range(40):
    label = folder / "reviews" / ("pos", "neg")[i % 2]
    label.mkdir(parents=True, exist_ok=True)
    (label / f"{i}.txt").write_text("a fine film" if i % 2 == 0 else "a dull film")
  for name in ("my_texts", "held_out", "other_text", *(f"shakespeare/{i}" for i in range(20))):
    (folder / f"{name}.txt").write_text("\n".join(story() for _ in range(200)))
  return folder


def write(file, rows):
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[pytest.mark.wide] * (name in LIKE_CONFIGS))
    for name, steps in FOLLOWED.items()
    if steps
  ],
)
def test_commands_of_a_page_run(name, stand_ins, tmp_path, monkeypatch):
  import datasets

  monkeypatch.chdir(shutil.copytree(stand_ins, tmp_path / "stand_ins", symlinks=True))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
  names = {"jaxft": jaxft}  # what one block of Python defines, the next may use
  for i, step in enumerate(steps := FOLLOWED[name]):
    if step.kind == "python":
      follow_python(step.text, names)
    elif step not in (plans := [it for it in steps if "jaxft.plan " in it.text]):
      follow(step.text, [later.text for later in steps[i + 1 :] if later not in plans], monkeypatch)


def follow_python(text, names):
  """Run a block of Python; one for transformers or PEFT only if torch is installed."""
  others = [package for package in ("transformers", "peft") if package in text]
  if others and not importlib.util.find_spec("torch"):
    return
  names |= {package: importlib.import_module(package) for package in others}
  exec(compile(text, "<a block of the page>", "exec"), names)


def follow(command, later, monkeypatch):
  """Run a command in this process, which has imported everything.

  A training whose run no later step uses only compiles.
  """
  words = pages.words(command.replace("--config ...", "--config configs/quickstart.py"))
  name = words[2].removeprefix("jaxft.")
  if command in NOT_RUN:
    words[words.index("configs/X.py")] = "configs/quickstart.py"
    monkeypatch.setattr(sys, "argv", words[2:])
    assert flags.parse_train().process_info
    return
  if not {"--length", "--max_length"} & {*words}:  # of generate, which are short enough
    words += SMALL.get(name, SMALL.get(" ".join([name, *words[3:4]]), "")).split()
  if name == "train" and not is_named(run_folder(words), later):
    words.append("--dry_run")
  monkeypatch.setattr(sys, "argv", words[2:])
  try:
    importlib.import_module(f"jaxft.{name}").main()
  except SystemExit as error:  # doctor ends with one
    assert not error.code, command
  if name == "tokenizer" and "--data" in words:  # "change n_embd, n_layer ... for another size"
    file = Path(words[words.index("--out") + 1]) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(n_embd=40, n_layer=2, n_head=5)))


def run_folder(words):
  for flag in ("--workdir", "--output_dir"):
    if flag in words:
      return words[words.index(flag) + 1]
  return f"runs/{Path(words[words.index('--config') + 1]).stem}"


def is_named(folder, texts):
  """The folder or something in it, not one whose name begins as its own."""
  return any(re.search(rf"(?<![\w./-]){re.escape(folder)}(?![\w.-])", text) for text in texts)


def test_is_named_matches_whole_names():
  assert is_named("runs/gptj", ["export --workdir runs/gptj --out x"]) and is_named(
    "runs/a", ['load("runs/a/adapter")']
  )
  assert not is_named(
    "runs/gptj", ["--workdir runs/gptj8", "--workdir runs/gptj_tpu", "--workdir old/runs/gptj"]
  )


@pytest.mark.parametrize("name", FOLLOWED)
def test_different_trainings_have_own_workdirs(name):
  """The second would find its run finished, and do nothing."""
  trainings = {
    step.text for step in FOLLOWED[name] if step.text.startswith(f"{pages.COMMAND}train ")
  }
  folders = [
    run_folder(pages.words(text))
    for text in trainings
    if "--dry_run" not in text and "--config ..." not in text
  ]
  assert len(folders) == len(set(folders)), folders


def test_skipped_commands_are_on_a_page():
  assert NOT_RUN.keys() <= {step.text for steps in FOLLOWED.values() for step in steps}


@pytest.mark.parametrize("command", PLANS)
def test_planned_devices_are_valid(command, monkeypatch):
  """All but the compiling: settings, hardware, and that the models need no network."""
  monkeypatch.chdir(pages.ROOT)
  monkeypatch.setattr(sys, "argv", words_of_plan(command))
  arguments = flags.parse(usage.PLAN, ("fit", "json"), ("html", "prices"), list_flags=("device",))
  assert not jaxft.config.validate(arguments.config)
  assert all(specs.parse_device(name) for text in arguments.device for name in text.split(","))
  assert planner.resolve_model_config(arguments.config).L > 1


@pytest.mark.wide
@pytest.mark.parametrize("command", PLANS)
def test_plans_on_pages_fit(command, monkeypatch):
  monkeypatch.chdir(pages.ROOT)
  monkeypatch.setattr(sys, "argv", [*words_of_plan(command), "--json"])
  with contextlib.redirect_stdout(io.StringIO()) as said:
    __main__.main()
  plan = json.loads(said.getvalue())
  assert all(it["fits"] for it in plan.get("plans", [plan])), plan


def words_of_plan(command):
  return pages.words(command.replace("--config ...", "--config configs/quickstart.py"))[2:]
