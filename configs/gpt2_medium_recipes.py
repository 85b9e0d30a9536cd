"""Recipes with special tokens: GPT-2 medium (355M), one recipe per sequence, three passes.

    jaxft tokenizer --model gpt2-medium \\
      --add "<|title|>" "<|ingredients|>" "<|steps|>" --out gpt2_medium_with_marks
    jaxft train --config configs/gpt2_medium_recipes.py --config.data.train=recipes.jsonl
    jaxft generate --workdir runs/gpt2_medium_recipes \\
      --prompt "<|endoftext|><|title|>Pancakes<|ingredients|>"
    jaxft plan --config configs/gpt2_medium_recipes.py \\
      --config.model.path=gpt2-medium --device rtx3070

A special token precedes each part. The first command writes the model with three more tokens. Their
rows in the table start as the mean of all rows. A row of recipes.jsonl is {"text":
"<|title|>Pancakes<|ingredients|>2 eggs, ...<|steps|>Whisk ..."}. In training the end token precedes
each sequence, as after another text. It should precede a prompt too.

Hardware   one 8 GB GPU: 6.9 GiB of 7.4 (XLA's own analysis, jax 0.10.2, 2026-11-22; not yet run on
           one).
Sequences  at most 180 tokens, longer ones are truncated; a tenth is held out.
           --config.data.layout=pack puts several recipes into a sequence, which do not see each
           other: less padding, the same loss.
Expect     not measured yet: it needs the weights and a GPU. Each part should follow its mark, and
           the text should end by itself.
"""

from jaxft import config


def get_config():
  c = config.default()
  c.model.path = "gpt2_medium_with_marks"
  c.data.train = ("recipes.jsonl",)
  c.data.validation_fraction = 0.1
  c.data.layout = "pad"
  c.data.sequence_length = 180

  c.train.epochs = 3.0
  c.train.batch_size = 32
  c.train.micro_batch_size = 4
  c.train.eval_every = 200
  c.train.save_every = 200
  c.train.sample_prompts = (
    "<|endoftext|><|title|>Pancakes<|ingredients|>",
    "<|endoftext|><|title|>Tomato soup<|ingredients|>",
  )
  c.train.sample_tokens = 150

  c.optim.learning_rate = 5e-5
  c.optim.schedule = "linear"
  c.optim.warmup_steps = 100
  c.optim.weight_decay = 0.01

  c.memory.remat = "full"
  return c
