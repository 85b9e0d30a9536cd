r"""All of GPT-J-6B on eight TPU v5e chips (16 GB each), or on eight GPUs of 24 GB or more.

  jaxft train --config configs/gptj_6b_v5e8.py --config.data.train=my_texts/ \
    --config.data.validation=
  # the memory it takes, without chips or data
  jaxft plan --config configs/gptj_6b_v5e8.py --device v5e:2x4,rtx4090x8

The 6.05 billion float32 weights and Adam's moments, 73 GB, are split over the chips, 9.1 GB each.
Each layer is gathered in bfloat16 when it runs. The TPU compiler reports 13.6 GiB a chip of 15.75
(2026-11-22, `tests/plan/test_aot_compiler.py`), and less with more chips. Not run on a TPU yet.
"""

from jaxft import config


def get_config():
  c = config.default()
  c.model.path = "EleutherAI/gpt-j-6b"
  c.data.train = ("hub:roneneldan/TinyStories",)
  c.data.validation = ("hub:roneneldan/TinyStories:validation",)
  c.data.limit_train, c.data.limit_validation = 100_000, 1_000
  c.data.sequence_length = 2048
  c.train.epochs = 1.0
  c.train.batch_size = 8  # one sequence a chip
  c.train.sample_prompts = ("Once upon a time there was a cat who could do magic.",)
  c.optim.learning_rate, c.optim.warmup_steps = 1e-5, 50
  c.optim.weight_decay = 0.01
  c.memory.remat, c.memory.loss_chunk = "full", 256
  c.export.dtype = "bfloat16"
  return c
