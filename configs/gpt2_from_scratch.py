"""A new GPT-2: your text, your tokenizer, new weights.

    jaxft tokenizer --data my_texts/ --vocab_size 16384 --out my_tokenizer
    jaxft train --config configs/gpt2_from_scratch.py --config.data.train=my_texts/
    jaxft plan --config configs/gpt2_from_scratch.py --device rtx4090 \\
      --config.model.path=gpt2   # needs no text, tokenizer or card

my_tokenizer/config.json is that of GPT-2 124M. For another size, change n_embd, n_layer and n_head
in it. Weights are drawn as GPT-2's were: 0.02 wide, or 0.02 / sqrt(2 x layers) if they add to the
residual stream.

Hardware   one 24 GB GPU: 6.1 GiB with GPT-2's own vocabulary (XLA's own analysis, jax 0.10.2,
           2026-11-22; not yet run on one).
Expect     not measured yet at this size. Within the first hundreds of steps, the eval loss must
           fall far below that of single tokens, some 7 nats.
"""

from jaxft import config


def get_config():
  c = config.default()
  c.model.path, c.model.init = "my_tokenizer", "scratch"
  c.data.train = ("my_texts/",)
  c.data.sequence_length = 512

  c.train.epochs = 4.0
  c.train.batch_size = 64
  c.train.micro_batch_size = 32
  c.train.eval_every = 250
  c.train.save_every = 250
  c.train.sample_prompts = ("",)
  c.train.sample_every = 1000

  c.optim.learning_rate = 6e-4
  c.optim.schedule = "cosine"
  c.optim.warmup_steps = 200
  c.optim.end_learning_rate = 6e-5
  c.optim.weight_decay = 0.1
  c.optim.b2 = 0.95
  return c
