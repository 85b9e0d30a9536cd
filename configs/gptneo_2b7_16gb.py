"""All of GPT-Neo 2.7B on one 16 GB GPU: your own texts, one pass.

    jaxft train --config configs/gptneo_2b7_16gb.py --config.data.train=my_texts/
    jaxft plan --config configs/gptneo_2b7_16gb.py --device t4   # needs no card

Hardware   one 16 GB GPU and 64 GB of host memory. Weights, gradient and Adam's moments, 40 GiB,
           stay on the host, and one layer at a time is on the device. A T4, which has no bfloat16,
           takes 8.1 GiB of 14 (XLA's own analysis, jax 0.10.2, 2026-11-21; not yet run on one).
Bus        75 GB a step to the device and 43 back: 11 s of PCI Express 3 at 80 %. By the plan,
           arithmetic takes 89 s on a T4, which computes float32 in its ordinary cores. A card with
           bfloat16 is several times as fast.
Expect     not measured yet: it needs the weights and a GPU.

Half of GPT-Neo's layers look back 256 tokens only. The model sets that, not this config. Less host
memory: --config.optim.name=adafactor, 20 GiB.
"""

from jaxft import config


def get_config():
  c = config.default()
  c.model.path = "EleutherAI/gpt-neo-2.7B"
  c.data.train = ("my_texts/",)
  c.data.sequence_length = 2048

  c.train.epochs = 1.0
  c.train.batch_size = 8
  c.train.micro_batch_size = 2
  c.train.eval_every = 100
  c.train.save_every = 200
  c.train.sample_prompts = ("Once upon a time",)

  c.optim.learning_rate = 1e-5
  c.optim.warmup_steps = 20
  c.optim.weight_decay = 0.01

  c.memory.offload = "all"
  c.memory.remat, c.memory.loss_chunk = "full", 256
  return c
