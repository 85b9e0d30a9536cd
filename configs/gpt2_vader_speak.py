"""Prompts with Darth Vader's answers: GPT-2 124M, "Question: ... Answer: ..." lines, three passes.

The loss covers the whole line.

    jaxft train --config configs/gpt2_vader_speak.py
    jaxft generate --workdir runs/gpt2_vader_speak \\
      --prompt "Did you remember to buy your ventilator filters?" \\
      --max_new_tokens 90 --no_repeat_ngram_size 2 --top_k 50 --top_p 0.95 --temperature 0.7
    jaxft plan --config configs/gpt2_vader_speak.py --device t4   # needs no card

Without a network: --config.model.path=FOLDER_OF_GPT2 --config.data.train=pairs.jsonl, rows of
{"prompt": ..., "response": ...}.

Hardware   one 16 GB GPU such as a T4: 2.2 GiB of 13.9 (XLA's own analysis, jax 0.10.2, 2026-11-29;
           not yet run on one).
Sequences  one line each, of at most 128 tokens; longer lines are truncated. The end token after a
           line is learned too. 5 % is held out.
Expect     not measured yet: it needs the hub and a GPU. The answer to a question should have his
           breathing in brackets, [kkshhhh]. The second prompt is not a question, so its completion
           should change little.

The rest matches transformers' TrainingArguments: AdamW, 5e-5 with linear decay to 0, no warm-up, no
weight decay, the gradient clipped to 1.
"""

from jaxft import config


def get_config():
  c = config.default()
  c.model.path = "gpt2"
  c.data.train = ("hub:samdotme/vader-speak",)
  c.data.validation_fraction = 0.05
  c.data.format = "text"
  c.data.template = "Question: {prompt}. Answer: {response}"
  c.data.layout = "pad"
  c.data.sequence_length = 128

  c.train.epochs = 3.0
  c.train.batch_size = 4
  c.train.eval_every = 200
  c.train.sample_prompts = (
    "Did you remember to buy your ventilator filters?",
    "The earth is filled with wonder",
  )

  c.optim.learning_rate = 5e-5
  c.optim.schedule = "linear"
  c.optim.warmup_steps = 0
  c.optim.weight_decay = 0.0
  c.optim.clip_norm = 1.0
  return c
