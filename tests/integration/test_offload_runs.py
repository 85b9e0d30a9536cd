"""Whole runs with weights in the host's memory: every layout, task and state, killed and resumed, by several processes."""

import json
import random
import shutil
import signal

import fault_points
import numpy as np
import preloaded
import processes
import pytest
import tiny

from jaxft.train import finetune

wide = pytest.mark.wide
BFLOAT16 = {"optim.state_dtype": "bfloat16"}
CHANGES = {
  "pack": {"data.layout": "pack"},
  "pad": {"data.layout": "pad"},
  "classification": {
    "data.format": "classification",
    "model.head": "classification",
    "data.layout": "pad",
  },
  "bfloat16 moments": BFLOAT16,
  "lion": {"optim.name": "lion", "optim.learning_rate": 1e-4} | BFLOAT16,
  "adafactor": {"optim.name": "adafactor"},
}


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
  rng, file = random.Random(0), tmp_path_factory.mktemp("data") / "reviews.jsonl"
  rows = ({"text": tiny.story(rng), "label": rng.choice(["bad", "good"])} for _ in range(80))
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return file


@pytest.mark.slow
@pytest.mark.parametrize("kept", [pytest.param("optimizer", marks=wide), "all"])
@pytest.mark.parametrize(
  "change", [pytest.param(name, marks=() if name == "pack" else wide) for name in CHANGES]
)
def test_losses_are_those_of_a_run_on_the_device(folder, stories, reviews, tmp_path, change, kept):
  config = tiny.config(folder, reviews if change == "classification" else stories)
  config.train.steps, config.train.micro_batch_size, config.train.sample_prompts = 6, 4, ()
  for name, value in CHANGES[change].items():
    section, key = name.split(".")
    config[section][key] = value
  found = {}
  for memory in ("none", kept):
    config.memory.offload = memory
    found[memory] = finetune(config.copy_and_resolve_references(), tmp_path / memory)
    config.export.out = ""
  assert [line["step"] for line in found[kept].metrics] == [
    line["step"] for line in found["none"].metrics
  ]
  # A moment in bfloat16 is rounded to 1/256 of itself: two sums in another order may fall on two sides of a middle.
  rtol = 1e-3 if BFLOAT16.items() <= CHANGES[change].items() else 1e-5
  for ours, theirs in zip(found[kept].metrics, found["none"].metrics, strict=True):
    for name in ("train/loss", "eval/loss", "eval/accuracy"):
      np.testing.assert_allclose(
        ours.get(name, 0), theirs.get(name, 0), rtol=rtol, err_msg=f"{name}: {ours}"
      )


@pytest.mark.slow
@pytest.mark.parametrize(
  "kept", [pytest.param("optimizer", marks=wide), pytest.param("all", marks=wide)]
)
def test_a_killed_run_goes_on_bit_for_bit(config_file, tmp_path, kept):
  flags = (
    f"--config.memory.offload={kept}",
    "--config.model.dropout=0.1",
    "--config.train.micro_batch_size=4",
  )
  processes.train(config_file, tmp_path / "whole", *flags)
  for place, count in (
    ("step logged", 8),
    ("save handed over", 1),
    ("state restored", 1),
    ("export begun", 1),
  ):
    command = [
      fault_points.__file__,
      place,
      count,
      "SIGKILL",
      "--config",
      config_file,
      "--workdir",
      tmp_path / "run",
    ]
    done = preloaded.run([*command, *flags], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
  processes.train(config_file, tmp_path / "run", *flags)
  assert processes.losses(tmp_path / "run") == processes.losses(tmp_path / "whole")
  weights = [
    (tmp_path / of / "export" / "model.safetensors").read_bytes() for of in ("run", "whole")
  ]
  assert weights[0] == weights[1]
  # And what the run on the host has saved, a run on the device goes on from.
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
  done = processes.train(config_file, tmp_path / "run", *flags[1:])
  assert "continuing at step 10" in done.stdout
