"""Makes assets/quickstart: the story data, a tokenizer, and a small GPT-2 pre-trained by jaxft on the other genre.

    python scripts/make_quickstart_assets.py          # about a quarter of an hour on two cores

Everything follows from the seeds in this file; on the same machine and package versions the weights come out the same.
"""

import json
import shutil
import tempfile
from pathlib import Path

import story_grammar
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import jaxft
from jaxft import config

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "quickstart"
END = "<|endoftext|>"
VOCABULARY = 768
# Seeds of the stories: no story of the validation set is in the training set.
TRAIN, VALIDATION, PRETRAIN = range(0, 2000), range(10_000, 10_200), range(20_000, 26_000)
SHAPE = {"n_positions": 256, "n_embd": 128, "n_layer": 4, "n_head": 4}


def write_stories(file: Path, genre: str, seeds: range) -> None:
  stories = [story_grammar.write(genre, seed) for seed in seeds]
  rows = [{"text": story.text, "nats": round(story.nats, 9)} for story in stories]
  file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_tokenizer(folder: Path) -> None:
  """A byte-level BPE tokenizer, as GPT-2's, learned from both genres."""
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  texts = (story_grammar.write(genre, seed).text for genre in story_grammar.GENRES for seed in PRETRAIN[:2000])
  tokenizer.train_from_iterator(
    texts,
    trainers.BpeTrainer(
      vocab_size=VOCABULARY,
      special_tokens=[END],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  tokenizer.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}, indent=2) + "\n"
  )


def write_config(folder: Path) -> None:
  """GPT-2's own config.json at another size; no dropout, because a model this small cannot over-fit this much text."""
  (folder / "config.json").write_text(
    json.dumps(
      {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": VOCABULARY,
        **SHAPE,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": True,
      },
      indent=2,
    )
    + "\n"
  )


def pretrain(empty: Path, text: Path, workdir: Path) -> Path:
  """Trains the model in `empty` from new weights on ships' logs; returns the exported folder."""
  c = config.default()
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
  with tempfile.TemporaryDirectory() as scratch:
    empty = Path(scratch) / "empty"
    empty.mkdir()
    write_tokenizer(empty)
    write_config(empty)
    write_stories(Path(scratch) / "logs.jsonl", "sea", PRETRAIN)
    trained = pretrain(empty, Path(scratch) / "logs.jsonl", Path(scratch) / "run")
    for name in (
      "model.safetensors",
      "config.json",
      "generation_config.json",
      "tokenizer.json",
      "tokenizer_config.json",
    ):
      shutil.copyfile(trained / name, model / name)


if __name__ == "__main__":
  main()
