"""Make assets/quickstart: story data, a tokenizer, and a small GPT-2 trained on the other genre.

    python scripts/make_quickstart_assets.py          # about a quarter of an hour on two cores

Everything follows from the seeds in this file; on the same machine and package versions the weights
come out the same.
"""

import json
import shutil
import tempfile
from pathlib import Path

import story_grammar

import jaxft
import jaxft.config
from jaxft import tokenizer

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "quickstart"
VOCABULARY = 768
# Seeds of the stories: no story of the validation set is in the training set.
TRAIN, VALIDATION, PRETRAIN = range(0, 2000), range(10_000, 10_200), range(20_000, 26_000)
UNRELATED = range(30_000, 30_040)
SHAPE = {"n_positions": 256, "n_embd": 128, "n_layer": 4, "n_head": 4}


def write_stories(file: Path, genre: str, seeds: range) -> None:
  stories = [story_grammar.write(genre, seed) for seed in seeds]
  rows = [{"text": story.text, "nats": round(story.nats, 9)} for story in stories]
  file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_tokenizer(folder: Path) -> None:
  """A tokenizer learned from both genres, and GPT-2's config.json at another size."""
  texts = (
    story_grammar.write(genre, seed).text
    for genre in story_grammar.GENRES
    for seed in PRETRAIN[:2000]
  )
  tokenizer.train_tokenizer(texts, VOCABULARY, folder, **SHAPE)


def pretrain(empty: Path, text: Path, workdir: Path) -> Path:
  """Trains the model in `empty` from new weights on ships' logs; returns the exported folder."""
  c = jaxft.config.default()
  c.model.path, c.model.init = str(empty), "scratch"
  c.data.train, c.data.validation_fraction, c.data.nats_column = (str(text),), 0.02, "nats"
  c.data.sequence_length = 256
  c.train.epochs, c.train.batch_size, c.train.eval_every = 5.0, 8, 500
  c.train.sample_prompts = ("Brig Petrel,",)
  c.optim.learning_rate, c.optim.schedule, c.optim.warmup_steps = 2e-3, "cosine", 100
  c.optim.b2, c.optim.weight_decay = 0.99, 0.1
  return jaxft.finetune(c, workdir).export


def main() -> None:
  model = ASSETS / "model"
  model.mkdir(parents=True, exist_ok=True)
  write_stories(ASSETS / "stories.jsonl", "village", TRAIN)
  write_stories(ASSETS / "validation.jsonl", "village", VALIDATION)
  write_stories(ASSETS / "ships_logs.jsonl", "sea", UNRELATED)
  with tempfile.TemporaryDirectory() as scratch:
    empty = Path(scratch) / "empty"
    empty.mkdir()
    write_tokenizer(empty)
    write_stories(Path(scratch) / "logs.jsonl", "sea", PRETRAIN)
    trained = pretrain(empty, Path(scratch) / "logs.jsonl", Path(scratch) / "run")
    for file in trained.iterdir():
      if file.name not in ("parity.json", "README.md"):
        shutil.copyfile(file, model / file.name)


if __name__ == "__main__":
  main()
