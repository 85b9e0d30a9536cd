"""`finetune` in this process: every family, from new weights, on one device and on eight."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import processes
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import jaxft
from jaxft.errors import NumericsError, RequestError
from jaxft.pretrained import load_workdir
from jaxft.train import finetune
from jaxft.training.profiler import Profiler

ROOT = Path(__file__).parents[2]
CONFIGS = {
  "gpt2": dict(vocab_size=293, n_positions=71, n_embd=40, n_layer=3, n_head=5),
  "gpt_neo": dict(
    vocab_size=293,
    max_position_embeddings=71,
    hidden_size=40,
    num_layers=3,
    num_heads=5,
    attention_types=[[["global"], 1], [["local"], 2]],
    window_size=7,
  ),
  "gptj": dict(vocab_size=293, n_positions=71, n_embd=40, n_layer=3, n_head=5, rotary_dim=4),
}


def test_nonfinite_pretrained_weights_are_refused(config, folder, tmp_path):
  """The run ends before it begins."""
  damaged = shutil.copytree(folder, tmp_path / "damaged")
  tensors = load_file(folder / "model.safetensors")
  tensors["transformer.ln_f.bias"][3] = np.nan
  save_file(tensors, damaged / "model.safetensors")
  config.model.path = str(damaged)
  with pytest.raises(NumericsError, match="before: eval loss nan"):
    finetune(config, tmp_path / "w")


@pytest.mark.parametrize("kernel, device", [("cudnn", "an NVIDIA GPU"), ("splash", "a TPU")])
def test_unsupported_attention_kernel_is_refused(config, tmp_path, kernel, device):
  config.model.attention = kernel
  message = f"config.model.attention={kernel}: it requires {device}, and this device is a cpu"
  with pytest.raises(RequestError, match=message):
    finetune(config, tmp_path, dry_run=True)


def test_profiler_traces_exactly_the_asked_steps(tmp_path, capsys):
  paused = []

  @contextlib.contextmanager
  def pause():
    paused.append(step)
    yield

  with Profiler(folder=tmp_path, first=2, count=2, total=5, paused=pause) as profile:
    for step in range(1, 6):
      profile.on_step_begin(step, None)
      numbers = jax.block_until_ready(jax.numpy.ones(3) + step)
      profile.on_step_end(step, numbers)
  assert paused == [2, 3] and len(list(tmp_path.rglob("*.xplane.pb"))) == 1
  assert f"steps 2 to 3 are traced in {tmp_path}" in capsys.readouterr().out
  Profiler(folder=tmp_path, first=6, count=2, total=5, paused=pause)
  assert (
    "no step is traced: tracing would begin at step 6, and the run ends at step 5"
    in capsys.readouterr().out
  )


@pytest.mark.slow
def test_profile_steps_writes_a_trace_with_waits(config, tmp_path, monkeypatch):
  config.train.steps, config.train.profile_steps, written, stop = 6, 2, [], jax.profiler.stop_trace

  def stopped():
    written.append(
      len(
        [line for line in processes.lines(tmp_path / "w" / "metrics.jsonl") if "train/loss" in line]
      )
    )
    stop()

  monkeypatch.setattr(jax.profiler, "stop_trace", stopped)
  run = finetune(config, tmp_path / "w")
  assert written == [3]  # steps 3 and 4 are traced; the time of 3 is logged before 4 is waited for
  assert len([line for line in run.metrics if "train/loss" in line]) == 6
  command = [sys.executable, str(ROOT / "benchmarks" / "gaps.py"), str(run.workdir), "--steps", "2"]
  done = subprocess.run(
    [*command, "--picture", str(tmp_path / "gaps.svg")], capture_output=True, text=True, check=True
  )
  assert done.stdout.startswith("/host:CPU: ") and "longest wait" in done.stdout
  assert (tmp_path / "gaps.svg").read_text().count("<rect") == 2


@pytest.mark.slow
def test_unwritable_trace_costs_a_line_not_the_run(config, tmp_path, monkeypatch, capsys):
  """The trace ends before the evaluation."""
  config.train.steps, config.train.profile_steps, stopped = 4, 5, []

  def full():
    stopped.append(len(processes.lines(tmp_path / "w" / "metrics.jsonl")))
    raise OSError("No space left on device")

  stop = jax.profiler.stop_trace
  monkeypatch.setattr(jax.profiler, "stop_trace", full)
  try:
    run = finetune(config, tmp_path / "w")
  finally:
    stop()
  # the first evaluation, and steps 1 to 3
  assert stopped == [1 + 3] and run.metrics[-1]["step"] == 4
  assert (
    f"no trace in {tmp_path / 'w' / 'profile'}: No space left on device" in capsys.readouterr().out
  )


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "gptj"])
def test_every_family_trains_from_scratch_and_exports(family, stories, tmp_path):
  empty = tmp_path / "empty"
  empty.mkdir()
  tiny.write_tokenizer(empty, 293)
  (empty / "config.json").write_text(
    json.dumps({"model_type": family, "activation_function": "gelu_new"} | CONFIGS[family])
  )
  losses = {}
  for devices in (1, 8):
    config = tiny.config(empty, stories)
    config.model.init, config.model.dropout, config.mesh.fsdp, config.memory.remat = (
      "scratch",
      0.1,
      devices,
      "dots",
    )
    config.train.micro_batch_size, config.memory.loss_chunk = 8 // devices, 10
    run = finetune(config, tmp_path / f"run{devices}")
    losses[devices] = [line["train/loss"] for line in run.metrics if "train/loss" in line]
  assert losses[1][-1] < losses[1][0] - 0.05
  assert losses[8] == pytest.approx(losses[1], rel=1e-5)
  back = jaxft.load(run.export)
  assert back.source.hf_config["model_type"] == family
  last = run.metrics[-1]["eval/loss"]
  held_out = tmp_path / "held_out.jsonl"
  held_out.write_text(stories.read_text())
  assert back.evaluate(str(held_out), sequence_length=32)["loss"] == pytest.approx(last, abs=0.3)


@pytest.mark.slow
@pytest.mark.parametrize(
  "layout", ["pack", *(pytest.param(it, marks=pytest.mark.wide) for it in ("pad", "concat"))]
)
def test_model_learns_the_end_token(folder, tmp_path, layout):
  """Ten short examples by heart: greedy completions are theirs, and end by themselves."""
  sayings = [
    "the cat sat.",
    "a dog ran.",
    "big red house.",
    "once upon a time.",
    "small blue door.",
  ]
  file = tmp_path / "sayings.jsonl"
  file.write_text("".join(json.dumps({"text": text}) + "\n" for text in sayings * 2))
  config = tiny.config(folder, file)
  config.data.validation, config.data.layout = (str(file),), layout
  config.data.sequence_length, config.train.batch_size, config.train.steps = 40, 4, 300
  config.train.save_every, config.train.sample_prompts, config.optim.weight_decay = 0, (), 0.0
  if layout != "pad":
    config.train.batch_size = 2
  run = finetune(config, tmp_path / "w")
  model = jaxft.load(run.export)
  # its rows begin anywhere: only the first text was ever seen where a prompt stands
  if layout == "concat":
    sayings = sayings[:1]
  starts = ["<|endoftext|>" + saying.split()[0] for saying in sayings]  # as each began in training
  completions = model.generate(starts, temperature=0, max_new_tokens=30)
  assert ["<|endoftext|>" + saying for saying in sayings] == [
    it.prompt + it.text for it in completions
  ]
  assert all(len(completion.token_ids) < 30 for completion in completions)


@pytest.mark.slow
def test_trained_model_answers_prompts(folder, tmp_path):
  file = tmp_path / "pairs.jsonl"
  pairs = [("the cat", " sat on mat"), ("the dog", " ran to house"), ("the red", " door")]
  file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs * 3))
  config = tiny.config(folder, file)
  config.data.update(
    format="prompt_completion",
    layout="pack",
    validation=(str(file),),
    template="{prompt}:{completion}",
  )
  (
    config.train.batch_size,
    config.train.steps,
    config.train.save_every,
    config.train.sample_prompts,
  ) = 2, 200, 0, ()
  run = finetune(config, tmp_path / "w")
  model = jaxft.load(run.export)
  same = model.evaluate(str(file), sequence_length=32, like=config.data)
  assert same["loss"] == pytest.approx(run.metrics[-1]["eval/loss"], rel=1e-5)
  answers = model.generate([prompt + ":" for prompt, _ in pairs], temperature=0, max_new_tokens=20)
  assert [answer.text for answer in answers] == [completion for _, completion in pairs]


@pytest.mark.slow
@pytest.mark.wide
def test_classification_run_exports_a_classifier(folder, tmp_path):
  file = tmp_path / "reviews.jsonl"
  kinds = (("cat", "good"), ("dog", "bad"))
  rows = [
    {"text": f"the {what} {'house ' * i}", "label": label}
    for i in range(8)
    for what, label in kinds
  ]
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  config = tiny.config(folder, file)
  config.model.head, config.data.format, config.data.validation = (
    "classification",
    "classification",
    (str(file),),
  )
  config.train.steps, config.train.sample_prompts, config.mesh.fsdp = 60, (), 8
  run = finetune(config, tmp_path / "w")
  for model in (jaxft.load(run.export), load_workdir(tmp_path / "w")):
    assert [label.label for label in model.classify([row["text"] for row in rows])] == [
      row["label"] for row in rows
    ]
  exported = json.loads((run.export / "config.json").read_text())
  assert exported["architectures"] == ["GPT2ForSequenceClassification"]
  assert exported["id2label"] == {"0": "bad", "1": "good"} and exported["pad_token_id"] == 0
  config.model.path = str(run.export)  # on from a model that has such a head
  again = finetune(config, tmp_path / "on")
  assert again.metrics[0]["eval/loss"] == pytest.approx(run.metrics[-1]["eval/loss"], rel=1e-4)
  file.write_text(file.read_text().replace('"good"', '"fine"'))
  with pytest.raises(
    RequestError, match="label 'fine': must be one of the model's classes, 'bad', 'good'"
  ):
    finetune(config, tmp_path / "other")
