"""The quickstart: a small GPT-2 that has only read ships' logs learns to tell village stories.

    python -m jaxft.train --config configs/quickstart.py

Offline, on two CPU cores: TIME. The eval loss falls from BEFORE to AFTER nats a token; the stories come from a
grammar whose own entropy, FLOOR nats a token, no model can go below (scripts/story_grammar.py).
"""

from pathlib import Path

from jaxft import config

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "quickstart"


def get_config():
  c = config.default()
  c.model.path = str(ASSETS / "model")
  c.data.train = (str(ASSETS / "stories.jsonl"),)
  c.data.validation = (str(ASSETS / "validation.jsonl"),)
  c.data.nats_column = "nats"
  c.data.sequence_length = 256

  c.train.epochs = 4.0
  c.train.batch_size = 16
  c.train.eval_every = 100
  c.train.save_every = 100
  c.train.sample_prompts = ("Once upon a time in", "Long ago in Willowmere there lived a")
  c.train.sample_tokens = 120

  c.optim.learning_rate = 3e-3
  c.optim.schedule = "cosine"
  c.optim.warmup_steps = 20
  c.optim.b2 = 0.99  # few steps: the second moment must not remember the beginning
  c.optim.weight_decay = 0.1
  return c
