"""All of GPT-J-6B on one 24 GB GPU: your own texts, one pass.

    jaxft train --config configs/gptj_6b_24gb.py --config.data.train=my_texts/
    jaxft plan --config configs/gptj_6b_24gb.py --device rtx4090   # needs no card

Hardware   one 24 GB GPU and 128 GB of host memory. Weights, gradient and Adam's moments, 90 GiB,
           stay on the host, and one layer at a time is on the device. An RTX 4090 takes 12.8 GiB
           of 22.3 (XLA's own analysis, jax 0.10.2, 2026-11-22; not yet run on one).
Bus        168 GB a step to the device and 97 back, for any batch size: 12 s of PCI Express 4 at
           80 %. By the plan, arithmetic takes 18 s on an RTX 4090. Each sampled token fetches all
           weights, so samples are short.
Expect     not measured yet: it needs the weights and a GPU.

Less host memory: --config.optim.name=adafactor, 45 GiB; lion with
--config.optim.state_dtype=bfloat16, 56 GiB. On a smaller card: configs/gptj_6b_8gb.py.
"""

from jaxft import config


def get_config():
  c = config.default()
  c.model.path = "EleutherAI/gpt-j-6b"
  c.data.train = ("my_texts/",)
  c.data.sequence_length = 2048

  c.train.epochs = 1.0
  c.train.batch_size = 16
  c.train.micro_batch_size = 4
  c.train.eval_every = 100
  c.train.save_every = 200
  c.train.sample_prompts, c.train.sample_tokens = ("Once upon a time",), 30
  c.train.eval_batches = 20

  c.optim.learning_rate = 1e-5
  c.optim.warmup_steps = 20
  c.optim.weight_decay = 0.01

  c.memory.offload = "all"
  c.memory.remat, c.memory.loss_chunk = "full", 256

  c.export.dtype = "bfloat16"
  return c
