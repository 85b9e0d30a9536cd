"""The commands of the five recipes, from their data to a model that transformers loads.

What a recipe types after the name of its script is here as it stands there; models and data sets
are small stand-ins that lie, by the recipe's own names, in the folder where the commands run.
"""

import csv
import json
import os
import random
import re
import shlex

import processes
import pytest
import tiny

pytestmark = [pytest.mark.slow]
AUTO_OPTIMIZER = {
  "type": "AdamW",
  "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto"),
}
AUTO_SCHEDULER = {
  "type": "WarmupLR",
  "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto"),
}
AUTO_BATCH = dict.fromkeys(
  (
    "gradient_accumulation_steps",
    "gradient_clipping",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
  ),
  "auto",
)
FP16 = {
  "enabled": "auto",
  "loss_scale": 0,
  "loss_scale_window": 1000,
  "hysteresis": 2,
  "min_loss_scale": 1,
}
ZERO_2 = {
  "stage": 2,
  "allgather_partitions": True,
  "allgather_bucket_size": 2e8,
  "overlap_comm": True,
  "reduce_scatter": True,
  "reduce_bucket_size": 2e8,
  "contiguous_gradients": True,
  "cpu_offload": True,
}
ZERO_3 = {
  "stage": 3,
  "offload_optimizer": {"device": "cpu", "pin_memory": False},
  "offload_param": {"device": "cpu", "pin_memory": False},
  "overlap_comm": True,
  "sub_group_size": 1e9,
  "reduce_bucket_size": "auto",
  "stage3_prefetch_bucket_size": "auto",
  "stage3_max_live_parameters": 1e9,
  "gather_16bit_weights_on_model_save": True,
}


def deepspeed(zero, power):
  of_all = {
    "fp16": FP16 | {"initial_scale_power": power},
    "optimizer": AUTO_OPTIMIZER,
    "scheduler": AUTO_SCHEDULER,
  }
  return (
    of_all
    | AUTO_BATCH
    | {"zero_optimization": zero, "steps_per_print": 2000, "wall_clock_breakdown": False}
  )


@pytest.fixture
def there(tmp_path, monkeypatch):
  """A folder to type commands in."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
  return tmp_path


def typed(command, **how):
  """Runs a command line of jaxft; returns what it printed."""
  module, *words = shlex.split(command.replace("\\\n", " "))
  return processes.run(f"jaxft.{module}", *words, cwd=os.getcwd(), **how)


def text(count, seed=0):
  rng = random.Random(seed)
  return " ".join(tiny.WORDS[(rng.randrange(20) + i) % 20] for i in range(count))


def evaluated(workdir):
  losses = [
    (line["step"], line["eval/loss"])
    for line in processes.lines(workdir / "metrics.jsonl")
    if "eval/loss" in line
  ]
  assert losses[-1][1] < losses[0][1]
  return [step for step, _ in losses]


def loads_in_transformers(export, prompt):
  """transformers writes what jaxft writes, token by token."""
  transformers = pytest.importorskip("transformers")
  tokenizer = transformers.AutoTokenizer.from_pretrained(export)
  model = transformers.AutoModelForCausalLM.from_pretrained(export)
  inputs = tokenizer(prompt, return_tensors="pt")
  ids = model.generate(
    **inputs, do_sample=False, max_new_tokens=8, pad_token_id=tokenizer.eos_token_id
  )
  ours = typed(
    f"generate --model {shlex.quote(str(export))} --prompt {shlex.quote(prompt)} --max_new_tokens "
    "8 --do_sample False"
  )
  theirs = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
  assert ours.stdout == f"{prompt}{theirs}\n"


# ---- GPT-2 XL and GPT-Neo 2.7B with DeepSpeed ----------------------------------------------------

GPT2_XL = """
--deepspeed ds_config.json \\
--model_name_or_path gpt2-xl \\
--train_file train.csv \\
--validation_file validation.csv \\
--do_train \\
--do_eval \\
--fp16 \\
--overwrite_cache \\
--evaluation_strategy="steps" \\
--output_dir finetuned \\
--eval_steps 200 \\
--num_train_epochs 1 \\
--gradient_accumulation_steps 2 \\
--per_device_train_batch_size 8
"""
GPT_NEO = """
--deepspeed ds_config_gptneo.json \\
--model_name_or_path EleutherAI/gpt-neo-2.7B \\
--train_file train.csv \\
--validation_file validation.csv \\
--do_train \\
--do_eval \\
--fp16 \\
--overwrite_cache \\
--evaluation_strategy="steps" \\
--output_dir finetuned \\
--num_train_epochs 1 \\
--eval_steps 15 \\
--gradient_accumulation_steps 2 \\
--per_device_train_batch_size 4 \\
--use_fast_tokenizer False \\
--learning_rate 5e-06 \\
--warmup_steps 10
"""


def one_column(name, content):
  """The recipe's text2csv.py: all of a text in one cell."""
  with open(name, "w", encoding="utf-8", newline="") as file:
    writer = csv.DictWriter(file, ["text"])
    writer.writeheader()
    writer.writerow({"text": content})


@pytest.mark.parametrize(
  "command, model, family",
  [(GPT2_XL, "gpt2-xl", "gpt2"), (GPT_NEO, "EleutherAI/gpt-neo-2.7B", "gpt_neo")],
  ids=["gpt2-xl", "gpt-neo"],
)
def test_command_with_a_deepspeed_config(there, command, model, family):
  # One layer and one head of GPT-2, whose eight rows of 1,024 tokens are for a larger machine.
  if family == "gpt2":
    tiny.write_gpt2(there / model, seed=0, P=1024, D=8, F=16, L=1, N=1, std=0.05)
  else:
    tiny.write_family(there / model, family, seed=0, P=1024, std=0.05)
  one_column("train.csv", text(6_000) + "\n\nA line.\n")
  one_column("validation.csv", text(500, seed=1))
  for name in ("ds_config.json", "ds_config_gptneo.json"):
    (there / name).write_text(json.dumps(deepspeed(ZERO_2, 16), indent=4))
  done = typed(f"train {command}")
  assert re.search(
    r"zero_optimization.cpu_offload +true +--config.memory.offload=optimizer", done.stderr
  )
  assert "--fp16: float16 is not supported" in done.stderr
  config = json.loads((there / "finetuned" / "config.json").read_text())
  assert (config["memory"]["offload"], config["mesh"]["zero_stage"]) == ("optimizer", 2)
  evaluated(there / "finetuned")
  # In batches, by the recipe's script, and by the other one, which asks for prompts.
  prompts = "From off a hill whose concave womb\nAnother try\nA third test\n"
  several = typed(
    f"generate --model_type={family} --model_name_or_path=finetuned --length 20", input=prompts
  )
  assert all(f"{prompt}" in several.stdout for prompt in prompts.splitlines())
  assert typed("generate finetuned --max_new_tokens 5", input="the cat\n").stdout.startswith(
    "the cat"
  )
  drawn = (
    "--do_sample True --min_length 0 --max_length 60 --temperature 1.0 --top_p 0.8 --use_cache True"
  )
  assert typed(f"generate --model finetuned/export {drawn} --prompt 'the cat'").stdout.startswith(
    "the cat"
  )
  loads_in_transformers(there / "finetuned" / "export", "the cat sat")


# ---- GPT-J with ZeRO-3, settings in a dictionary -------------------------------------------------


def test_folder_of_texts_with_zero_stage_3(there):
  tiny.write_family(there / "EleutherAI/gpt-j-6B", "gptj", seed=0, P=71, std=0.05)
  (there / "text").mkdir()
  for i in range(12):
    (there / "text" / f"{i}.txt").write_text(text(60, seed=i))
  (there / "ds.json").write_text(json.dumps(deepspeed(ZERO_3, 12)))
  # token_split.py
  split = typed(
    f"prepare --config {processes.ROOT}/configs/gptj_6b_24gb.py "
    "--config.model.path=EleutherAI/gpt-j-6B --config.data.train=text/ "
    "--config.data.sequence_length=64 --json"
  )
  rows = json.loads(split.stdout)["rows"]
  assert rows["read"] == 12 == rows["trained"] + rows["held_out"]
  # TrainingArguments of finetune.py, as flags of the same names
  done = typed(
    "train --deepspeed ds.json --do_train --do_eval --fp16 --evaluation_strategy epoch "
    "--gradient_checkpointing "
    "--output_dir out --eval_steps 1 --learning_rate 5e-06 --warmup_steps 10 "
    "--per_device_train_batch_size 4 "
    "--per_device_eval_batch_size 8 --gradient_accumulation_steps 32 --num_train_epochs 1 "
    "--save_strategy no "
    "--model_name_or_path EleutherAI/gpt-j-6B --train_file text --block_size 64 --local_rank=0"
  )
  assert "--config.memory.offload=all" in done.stderr
  assert "config.train.batch_size=128: the training text fills only" in done.stdout
  assert (
    "config.optim.warmup_steps=10: more than the 1 step of the run; using 0 steps" in done.stdout
  )
  config = json.loads((there / "out" / "config.json").read_text())
  assert (config["train"]["eval_every"], config["train"]["eval_batch_size"]) == ("epoch", 8)
  loads_in_transformers(there / "out" / "export", "once upon a time")
  assert (
    typed("generate out --max_new_tokens 5", input="the cat\nthe dog\n").stdout.count("the ") >= 2
  )
  # More epochs in the same folder: the run goes on.
  more = typed(
    "train --deepspeed ds.json --do_train --fp16 --gradient_checkpointing --output_dir out "
    "--learning_rate 5e-06 "
    "--warmup_steps 10 --per_device_train_batch_size 4 --gradient_accumulation_steps 32 "
    "--num_train_epochs 3 "
    "--save_strategy no --model_name_or_path EleutherAI/gpt-j-6B --train_file text --block_size 64 "
    "--resume_from_checkpoint True"
  )
  assert "3 steps in total instead of 1: continuing at step 1" in more.stdout


# ---- TinyStories ---------------------------------------------------------------------------------


def test_stories_with_hf_trainer_flags(there):
  pytest.importorskip("datasets")
  tiny.write_gpt2(there / "gpt2", seed=0, P=256, std=0.05)
  (there / "roneneldan" / "TinyStories").mkdir(parents=True)
  for split, count in (("train", 200), ("validation", 30)):
    tiny.write_stories(there / "roneneldan" / "TinyStories" / f"{split}.jsonl", count, seed=count)
  done = typed(
    "train --model_name_or_path gpt2 --dataset_name roneneldan/TinyStories --max_train_samples "
    "100 --max_eval_samples 20 "
    "--num_train_epochs 1 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 "
    "--warmup_steps 1 "
    "--weight_decay 0.01 --logging_dir LOGS --logging_steps 10 --evaluation_strategy steps "
    "--eval_steps 10000 --fp16 "
    "--report_to tensorboard --output_dir OUT --block_size 64"
  )
  assert "trains on the split train, evaluates on the split validation" in done.stderr
  rows = json.loads((there / "OUT" / "data_report.json").read_text())["rows"]
  assert (rows["trained"], rows["held_out"], rows["read"]) == (100, 20, 230)
  assert list((there / "LOGS").glob("*/events*"))
  evaluated(there / "OUT")
  prompts = [
    "There was a cat with magic powers. It could turn invisible. But one day, the cat lost its "
    "magic and",
    "There was a cloud that could laugh. It laughed every day. But one day, the cloud didn't "
    "laugh. The animals in the "
    "forest decided to",
    "Every night, Mia looked at the stars. But one night, one star twinkled differently. It "
    "seemed to be sending a message. "
    "Mia thought hard about what it could mean and",
  ]
  output = typed(
    "generate OUT --max_new_tokens 20 --do_sample True --top_p 0.95", input="\n".join(prompts)
  ).stdout
  assert all(prompt in output for prompt in prompts)
  loads_in_transformers(there / "OUT" / "export", prompts[0])


# ---- vader-speak ---------------------------------------------------------------------------------


def test_questions_and_answers_in_one_text_column(there):
  pytest.importorskip("datasets")
  tiny.write_gpt2(there / "gpt2", seed=0, P=256, std=0.05)
  (there / "samdotme" / "vader-speak").mkdir(parents=True)
  rows = [
    {"prompt": f"where is the {what}?", "response": f"[kkshhhh] the {what} ran"}
    for what in ("cat", "dog") * 20
  ]
  (there / "samdotme" / "vader-speak" / "train.jsonl").write_text(
    "".join(json.dumps(row) + "\n" for row in rows)
  )
  done = typed(
    f"train --config {processes.ROOT}/configs/gpt2_vader_speak.py --workdir vader_gpt2 "
    "--overwrite_output_dir"
  )
  assert "exported to vader_gpt2/export" in done.stdout
  assert evaluated(there / "vader_gpt2")[-1] > 1
  how = (
    "--max_length 100 --num_return_sequences 1 --no_repeat_ngram_size 2 --top_k 50 --top_p 0.95 "
    "--temperature 0.7"
  )
  for prompt in (
    "Did you remember to buy your ventilator filters?",
    "The earth is filled with wonder",
  ):
    assert typed(
      f"generate vader_gpt2 {how} --do_sample True --pad_token_id 0 --prompt '{prompt}'"
    ).stdout.startswith(prompt)
  loads_in_transformers(there / "vader_gpt2" / "export", "Question: where is the cat?. Answer:")
  # The recipe's own file: the formatted lines, one a line, and its TrainingArguments.
  lines = [f"Question: {row['prompt']}. Answer: {row['response']}\n" for row in rows]
  (there / "training_dataset.txt").write_text("".join(lines))
  typed(
    "train --model_name_or_path gpt2 --train_file training_dataset.txt --output_dir ./results "
    "--overwrite_output_dir True "
    "--num_train_epochs 3 --per_device_train_batch_size 4 --save_steps 10000 --save_total_limit 2 "
    "--logging_dir ./logs "
    "--logging_steps 200 --block_size 64"
  )
  evaluated(there / "results")


# ---- A mix: jokes, recipes with marks, reviews ---------------------------------------------------


def test_recipe_commands_for_jokes_recipes_reviews(there):
  config = f"{processes.ROOT}/configs"
  tiny.write_gpt2(there / "gpt2", seed=0, P=256, std=0.05)
  (there / "gpt2").rename(there / "small")
  (there / "jokes.csv").write_text(
    "ID,Joke\n" + "".join(f'{i},"{text(12, seed=i)}"\n' for i in range(60))
  )
  typed(
    f"train --config {config}/gpt2_jokes.py --config.model.path=small "
    "--config.data.train=jokes.csv --config.data.text_column=joke --config.train.epochs=3 "
    "--workdir jokes"
  )
  output = typed(
    "generate jokes --prompt 'the cat' --num_return_sequences 3 --max_new_tokens 9"
  ).stdout
  assert output.count("the cat") >= 3

  typed("tokenizer --model small --add 'bos=<|startoftext|>' 'pad=[PAD]' --out marked")
  (there / "recipes.csv").write_text(
    "recipe\n" + "".join(f'"{text(30, seed=i)}"\n' for i in range(60))
  )
  done = typed(
    f"train --config {config}/gpt2_medium_recipes.py --config.model.path=marked "
    "--config.data.train=recipes.csv --config.train.epochs=2 --workdir recipes"
  )
  assert "reading column 'recipe'" in done.stdout
  transformers = pytest.importorskip("transformers")
  tokenizer = transformers.AutoTokenizer.from_pretrained(there / "recipes" / "export")
  assert (tokenizer.bos_token, tokenizer.pad_token) == ("<|startoftext|>", "[PAD]")
  loads_in_transformers(there / "recipes" / "export", "<|startoftext|>the cat")

  for label, words in (("pos", "cat house mat red"), ("neg", "dog sat door small")):
    (there / "reviews" / label).mkdir(parents=True)
    for i in range(40):
      rng = random.Random(f"{label} {i}")
      (there / "reviews" / label / f"{i}.txt").write_text(" ".join(rng.choices(words.split(), k=9)))
  typed(
    f"train --config {config}/gpt2_reviews_classification.py --config.model.path=small "
    "--config.data.train=reviews --config.data.sequence_length=64 --config.train.steps=30 "
    "--config.optim.learning_rate=1e-3 --config.train.eval_every=epoch --workdir sorted"
  )
  found = json.loads(typed("evaluate --workdir sorted --data reviews --json").stdout)
  assert found["tokens"] == 80 and found["accuracy"] > 0.8
  model = transformers.AutoModelForSequenceClassification.from_pretrained(
    there / "sorted" / "export"
  )
  assert model.config.id2label == {0: "neg", 1: "pos"}
