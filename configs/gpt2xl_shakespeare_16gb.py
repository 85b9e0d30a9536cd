"""All of GPT-2 XL (1.5B) on one 16 GB GPU: Shakespeare, three passes.

    jaxft train --config configs/gpt2xl_shakespeare_16gb.py \\
      --config.data.train=shakespeare/
    jaxft plan --config configs/gpt2xl_shakespeare_16gb.py --device t4   # needs no card

Data       any text, as a folder of .txt files, such as one per play; some are held out. A single
           file must be split by --config.data.separator. The complete works are book 100 of
           Project Gutenberg, about 1.8 M tokens.
Hardware   one 16 GB GPU and 48 GB of host memory. Weights, gradient and Adam's moments, 23 GiB,
           stay on the host, and one layer at a time is on the device. With
           --config.optim.state_dtype=bfloat16, 20 GiB, 32 GB are enough. A T4, which has no
           bfloat16, takes 3.8 GiB of 14 (XLA's own analysis, jax 0.10.2, 2026-11-21; not yet run
           on one).
Length     some 220 steps of 8 x 1024 tokens a pass.
Bus        44 GB a step to the device and 25 back: 6 s of PCI Express 3 at 80 %. By the plan,
           arithmetic takes 26 s on a T4.
Expect     not measured yet: it needs the weights and a GPU.

The usual recipe is DeepSpeed ZeRO-2 or 3 with CPU offload, 60 GB of host memory, and float16 with a
loss scale. This config uses bfloat16 if the card has it, and float32 on a T4, so it needs no loss
scale. It needs no JSON, and gives the same losses as a larger card.
"""

from jaxft import config


def get_config():
  c = config.default()
  c.model.path = "gpt2-xl"
  c.data.train = ("shakespeare/",)
  c.data.sequence_length = 1024

  c.train.epochs = 3.0
  c.train.batch_size = 8
  c.train.micro_batch_size = 4
  c.train.eval_every = 100
  c.train.save_every = 200
  c.train.sample_prompts = ("ROMEO.", "To be, or not to be,", "Enter a ghost, who")

  c.optim.learning_rate = 1e-5
  c.optim.warmup_steps = 20
  c.optim.weight_decay = 0.01

  c.memory.offload = "all"
  c.memory.remat, c.memory.loss_chunk = "full", 256
  return c
