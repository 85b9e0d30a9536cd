"""The quickstart: a small GPT-2 that has read only ships' logs learns to write village stories.

    jaxft train --config configs/quickstart.py

It runs offline, on two CPU cores, in two to three minutes: 715 steps of 8 x 256 tokens. Expect an
eval loss of 11.1 nats per token before, because ships' logs mention no village, and 0.47 after. The
stories come from a grammar (scripts/story_grammar.py). Its entropy is 0.319 nats per token, and no
model can have a lower loss.
"""

from pathlib import Path

from jaxft import config

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "quickstart"


def get_config():
  c = config.default()
  c.model.path = str(ASSETS / "model")
  c.data.train = (str(ASSETS / "stories.jsonl"),)
  c.data.validation = (str(ASSETS / "validation.jsonl"),)
  # text that the model knows, and will forget
  c.data.unrelated = (str(ASSETS / "ships_logs.jsonl"),)
  c.data.nats_column = "nats"
  c.data.sequence_length = 256

  c.train.epochs = 3.0
  c.train.batch_size = 8
  c.train.eval_every = 200
  c.train.save_every = 200
  c.train.sample_prompts = ("Once upon a time in", "Long ago in Willowmere there lived a")
  c.train.sample_tokens = 240

  c.optim.learning_rate = 2e-3
  c.optim.schedule = "cosine"
  c.optim.warmup_steps = 40
  c.optim.b2 = 0.99  # few steps: the second moment must forget the beginning
  c.optim.weight_decay = 0.1
  return c
