"""LoRA adapters for GPT-J-6B on one 16 GB GPU: 7 of its 6,051 million parameters are trained.

    jaxft train --config configs/gptj_6b_lora.py --config.data.train=my_texts/
    jaxft plan --config configs/gptj_6b_lora.py --device rtx4080   # needs no card

Hardware   one 16 GB GPU with bfloat16, where the frozen weights take 11.3 GiB, and 48 GB of host
           memory. The export merges the adapters into float32 weights there, some 28 GiB.
           8 GB: --config.memory.offload=all, which takes 11.4 GiB of host memory in training.
Result     WORKDIR/adapter, 28 MB, which peft.PeftModel.from_pretrained(model, "WORKDIR/adapter")
           loads. Also WORKDIR/export, a whole model with the adapters merged in.
Expect     not measured yet: it needs the weights and a GPU.

The learning rate is ten times that of full fine-tuning, because adapters start at zero.
"""

from jaxft import config


def get_config():
  c = config.default()
  c.model.path = "EleutherAI/gpt-j-6b"
  c.data.train = ("my_texts/",)
  c.data.sequence_length = 2048

  c.lora.rank = 16
  c.lora.alpha = 32.0
  c.lora.dropout = 0.05

  c.train.epochs = 1.0
  c.train.batch_size = 8
  c.train.micro_batch_size = 1
  c.train.eval_every = 100
  c.train.save_every = 100
  c.train.eval_batches = 50
  c.train.sample_prompts, c.train.sample_tokens = ("Once upon a time",), 60

  c.optim.learning_rate = 1e-4
  c.optim.schedule = "cosine"
  c.optim.warmup_steps = 20

  c.memory.remat = "full"

  c.export.dtype = "bfloat16"
  return c
