"""Good review or bad: GPT-2 124M with a classification head on 25,000 film reviews, two passes.

    jaxft train --config configs/gpt2_reviews_classification.py
    jaxft evaluate --workdir runs/gpt2_reviews_classification \\
      --data hub:stanfordnlp/imdb:test
    jaxft plan --config configs/gpt2_reviews_classification.py --device rtx3070

For your own reviews, use any .csv, .jsonl or .parquet with a text and a label:
--config.data.train=reviews.csv --config.data.validation= --config.data.text_column=...
--config.data.label_column=... With the empty validation, 5 % of these rows are held out instead.

Hardware   one 8 GB GPU: 3.1 GiB of 7.4 (XLA's own analysis, jax 0.10.2, 2026-11-22; not yet run on
           one).
Expect     not measured yet: it needs the hub and a GPU. Compare eval/accuracy and eval/f1 before
           and after.
"""

from jaxft import config


def get_config():
  c = config.default()
  c.model.path, c.model.head = "gpt2", "classification"
  c.data.train = ("hub:stanfordnlp/imdb:train",)
  c.data.validation = ("hub:stanfordnlp/imdb:test",)
  c.data.limit_validation = 5_000
  c.data.format = "classification"
  c.data.sequence_length = 512

  c.train.epochs = 2.0
  c.train.batch_size = 32
  c.train.micro_batch_size = 8
  c.train.eval_every = 400
  c.train.save_every = 400
  c.train.keep_best_metric = "eval/loss"

  c.optim.learning_rate = 5e-5
  c.optim.schedule = "cosine"
  c.optim.warmup_steps = 100
  c.optim.weight_decay = 0.01
  return c
