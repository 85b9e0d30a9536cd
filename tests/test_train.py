"""`finetune` in this process: every family, from new weights, on one device and on eight."""

import json
import shutil

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import jaxft
from jaxft.errors import NumericsError, RequestError
from jaxft.train import finetune

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


def test_a_batch_larger_than_the_text_is_refused_with_the_numbers(config, tmp_path):
  config.train.batch_size = 1000
  with pytest.raises(RequestError, match=r"batch_size=1000: the training text fills only \d+ rows of 32 tokens"):
    finetune(config, tmp_path)


def test_weights_that_are_not_finite_end_the_run_before_it_begins(config, folder, tmp_path):
  damaged = shutil.copytree(folder, tmp_path / "damaged")
  tensors = load_file(folder / "model.safetensors")
  tensors["transformer.ln_f.bias"][3] = np.nan
  save_file(tensors, damaged / "model.safetensors")
  config.model.path = str(damaged)
  with pytest.raises(NumericsError, match="before: eval loss nan"):
    finetune(config, tmp_path / "w")


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_trains_from_new_weights_and_comes_back(family, stories, tmp_path):
  empty = tmp_path / "empty"
  empty.mkdir()
  tiny.write_tokenizer(empty, 293)
  (empty / "config.json").write_text(
    json.dumps({"model_type": family, "activation_function": "gelu_new"} | CONFIGS[family])
  )
  losses = {}
  for devices in (1, 8):
    config = tiny.config(empty, stories)
    config.model.init, config.model.dropout, config.mesh.fsdp, config.memory.remat = "scratch", 0.1, devices, "dots"
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


def test_a_warm_up_longer_than_the_run_is_refused(config, tmp_path):
  config.train.steps, config.train.epochs, config.optim.warmup_steps = 0, 0.1, 500
  with pytest.raises(RequestError, match=r"warmup_steps=500: more than the \d+ steps"):
    finetune(config, tmp_path)
