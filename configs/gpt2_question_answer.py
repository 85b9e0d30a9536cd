"""Questions and answers: GPT-2 124M learns to answer and to stop; three passes, loss on answers.

    jaxft train --config configs/gpt2_question_answer.py --config.data.train=pairs.jsonl
    jaxft generate --workdir runs/gpt2_question_answer \\
      --prompt "Question: What is a noun? Answer:"
    jaxft plan --config configs/gpt2_question_answer.py --device rtx3070   # needs no card

A row has a question and an answer. --config.data.prompt_column and --config.data.completion_column
name other columns. --config.data.template joins them.

Hardware   one 8 GB GPU: 3.3 GiB of 7.4 (XLA's own analysis, jax 0.10.2, 2026-11-22; not yet run on
           one).
Expect     not measured yet: it needs the weights and a GPU. Answers should end by themselves,
           before --max_new_tokens.
Forgets    a model forgets text that it does not see. --config.data.unrelated=other_text.txt is
           evaluated before and after.
"""

from jaxft import config


def get_config():
  c = config.default()
  c.model.path = "gpt2"
  c.data.train = ("pairs.jsonl",)
  c.data.format = "prompt_completion"
  c.data.prompt_column, c.data.completion_column = "question", "answer"
  c.data.template = "Question: {prompt} Answer: {completion}"
  c.data.layout = "pack"
  c.data.sequence_length = 512

  c.train.epochs = 3.0
  c.train.batch_size = 16
  c.train.micro_batch_size = 8
  c.train.eval_every = 200
  c.train.save_every = 200
  c.train.sample_prompts = (
    "Question: What is the capital of France? Answer:",
    "The weather today is",
  )
  c.train.sample_tokens = 40

  c.optim.learning_rate = 5e-5
  c.optim.schedule = "cosine"
  c.optim.warmup_steps = 50
  return c
