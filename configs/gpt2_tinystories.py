"""GPT-2 124M on 100,000 TinyStories, full fine-tuning, one pass.

    jaxft train --config configs/gpt2_tinystories.py
    jaxft plan --config configs/gpt2_tinystories.py --device rtx4090   # needs no card

Without a network: --config.model.path=FOLDER_OF_GPT2 --config.data.train=stories.jsonl
--config.data.validation=held_out.jsonl (.txt, .csv and .parquet too; --config.data.text_column
names the column).

Hardware   one 24 GB GPU: the step needs 4.3 GiB (XLA's own analysis for an H100, jax 0.10.2,
           2026-11-22; not yet run on one). --config.train.micro_batch_size=8 needs 3.3 GiB, and =4
           with --config.memory.remat=full 2.7 GiB.
Length     100,000 stories are about 22 M tokens: some 1,350 steps of 32 x 512 tokens.
Expect     not measured yet: it needs the hub and a GPU. Compare the eval loss before and after. The
           completions should keep the child and the animal they began with.
Tracker    metrics.jsonl has load, memory, disk, network and GPU power. The flag
           --config.tracking.writers=mlflow sends them to MLflow too (docs/trackers.md).

The usual recipe is AdamW, 5e-5, batch 8, padded sequences. Here sequences are packed, so no token
of a batch is padding. The batch and the learning rate are larger. The schedule is a cosine with a
warm-up, because one pass ends while a linear decay is still moving.
"""

from jaxft import config


def get_config():
  c = config.default()
  c.model.path = "gpt2"
  c.data.train = ("hub:roneneldan/TinyStories:train",)
  c.data.validation = ("hub:roneneldan/TinyStories:validation",)
  c.data.limit_train = 100_000
  c.data.limit_validation = 5_000
  c.data.sequence_length = 512

  c.train.epochs = 1.0
  c.train.batch_size = 32
  c.train.micro_batch_size = 16
  c.train.eval_every = 250
  c.train.save_every = 250
  c.train.sample_prompts = (
    "There was a cat with magic powers. It could turn invisible. But one day, the cat lost its "
    "magic and",
    "There was a cloud that could laugh. It laughed every day. But one day, the cloud didn't "
    "laugh. The animals in the forest decided to",
    "Every night, Mia looked at the stars. But one night, one star twinkled differently. It seemed "
    "to be sending a message. Mia thought hard about what it could mean and",
  )
  c.train.sample_tokens = 250

  c.optim.learning_rate = 2e-4
  c.optim.schedule = "cosine"
  c.optim.warmup_steps = 50
  c.optim.weight_decay = 0.1
  c.optim.b2 = 0.95

  c.tracking.system_metrics = True

  # 50,257 logits per token: without chunks they would be the largest array of the step.
  c.memory.loss_chunk = 128
  return c
