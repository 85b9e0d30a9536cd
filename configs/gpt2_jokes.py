"""Short jokes: GPT-2 124M, many epochs over little text; exports the best weights.

    jaxft train --config configs/gpt2_jokes.py --config.data.train=jokes.csv
    jaxft generate --workdir runs/gpt2_jokes --prompt "<|endoftext|>Why did" \\
      --num_return_sequences 5
    jaxft plan --config configs/gpt2_jokes.py --device rtx3070   # needs no card

jokes.csv has the joke in the column Joke. --config.data.text_column names another column.

Hardware   one 8 GB GPU: 3.2 GiB of 7.4 (XLA's own analysis, jax 0.10.2, 2026-11-22; not yet run on
           one).
Ends       after three evaluations without a lower eval loss, and after 20 passes at the latest.
Watch      "memorised_8grams" of each sample in samples.jsonl: the share of its 8-token sequences
           that occur in the training text. A model that recites jokes is near 1.
Expect     not measured yet: it needs the weights and a GPU.
"""

from jaxft import config


def get_config():
  c = config.default()
  c.model.path = "gpt2"
  c.model.dropout = 0.1
  c.data.train = ("jokes.csv",)
  c.data.text_column = "Joke"
  c.data.validation_fraction = 0.1
  c.data.layout = "pack"  # jokes do not see each other
  c.data.sequence_length = 128

  c.train.epochs = 20.0
  c.train.batch_size = 64
  c.train.micro_batch_size = 32
  c.train.eval_every = 100
  c.train.save_every = 500
  c.train.keep_best_metric = "eval/loss"
  c.train.early_stopping_patience = 3
  c.train.sample_every = 500
  c.train.sample_prompts = (
    "<|endoftext|>Why did",
    "<|endoftext|>What do you call",
    "<|endoftext|>My wife",
    "<|endoftext|>A man walks into",
  )
  c.train.sample_tokens = 60

  c.optim.learning_rate = 3e-5
  c.optim.schedule = "constant"  # the last step is not known in advance
  c.optim.warmup_steps = 100
  c.optim.weight_decay = 0.1
  return c
