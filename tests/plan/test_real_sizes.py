"""GPT-2 at real sizes and with its tokenizer, by the command: memory, and transformers' losses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

ROOT = Path(__file__).parents[2]
STEPS, BATCH, T = 3, 4, 128


def write_model(folder, **sizes):
  """A published shape with random weights, and GPT-2's own BPE (encoder.json, vocab.bpe)."""
  tiny.write_gpt2(folder, seed=0, V=50257, P=1024, std=0.02, tokenizer=False, **sizes)
  return tiny.write_gpt2_bpe(folder)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
  return write_model(tmp_path_factory.mktemp("gpt2") / "gpt2", D=768, F=3072, L=12, N=12)


def train(folder, tmp_path, **more):
  """Trains on some of the stories; returns the text, the command's log and its peak KiB."""
  text = " ".join(
    json.loads(line)["text"]
    for line in (ROOT / "assets/quickstart/stories.jsonl").read_text().splitlines()[:40]
  )
  (tmp_path / "train.txt").write_text(text)
  (tmp_path / "validation.txt").write_text(text[:2000])
  settings = {
    "model.path": folder,
    "data.train": tmp_path / "train.txt",
    "data.validation": tmp_path / "validation.txt",
    "data.nats_column": "",
    "data.cache_dir": tmp_path / "tokens",
    "data.sequence_length": T,
    "train.epochs": 0,
    "train.steps": STEPS,
    "train.batch_size": BATCH,
    "train.log_every": 1,
    "train.sample_tokens": 2,
    "train.eval_every": 0,
    "optim.warmup_steps": 0,
    "optim.learning_rate": 1e-4,
    "optim.schedule": "linear",
    "optim.b2": 0.999,
    **{name.replace("__", "."): value for name, value in more.items()},
  }
  command = [
    sys.executable,
    "-m",
    "jaxft.train",
    "--config",
    ROOT / "configs/quickstart.py",
    "--workdir",
    tmp_path / "w",
    *(f"--config.{name}={value}" for name, value in settings.items()),
  ]
  with open(tmp_path / "log", "w+") as log:
    process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT)
    _, status, usage = os.wait4(process.pid, 0)  # the memory of this process alone
    process.returncode = os.waitstatus_to_exitcode(status)
    log.seek(0)
    log_text = log.read()
  print(f"peak memory {usage.ru_maxrss / 2**20:.2f} GiB\n{log_text}")
  assert process.returncode == 0
  return text, log_text, usage.ru_maxrss


@pytest.mark.slow
@pytest.mark.wide
def test_offload_trains_355m_in_less_than_its_weights(tmp_path):
  """A model of 355M parameters is trained on a device that could not hold its weights."""
  folder = write_model(tmp_path / "medium", D=1024, F=4096, L=24, N=16)
  flags = dict(
    memory__offload="all", memory__remat="full", memory__loss_chunk=64, train__micro_batch_size=1
  )
  _, log_text, _ = train(folder, tmp_path, train__batch_size=2, **flags)
  needs = float(re.search(r"a device needs ([0-9.]+) MiB", log_text)[1]) * 2**20  # less than a GiB
  assert needs < 4 * 354_823_168, "less than its weights"
  assert "tensors bit for bit, logits within" in log_text
  assert (tmp_path / "w" / "export" / "model.safetensors").stat().st_size > 4 * 354_823_168


@pytest.mark.slow
@pytest.mark.wide
def test_gpt2_small_training_parity_on_cpu(gpt2, tmp_path):
  """Three steps of GPT-2 small have the losses of transformers."""
  text, _, peak_kib = train(gpt2, tmp_path)
  assert peak_kib < 6 * 2**20
  metrics = [
    json.loads(line) for line in (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()
  ]
  ours = [line["train/loss"] for line in metrics if "train/loss" in line]

  torch = pytest.importorskip("torch", reason="parity is measured where torch is installed")
  transformers = pytest.importorskip("transformers")
  tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
  ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
  # The rows of each step, as the loader of the run orders them.
  import jax

  from jaxft.data import loader
  from jaxft.data.packing import ConcatDataset
  from jaxft.data.tokenize import TokenArrays

  stored = TokenArrays(
    np.array(ids), np.array([0, len(ids)]), np.zeros(1, np.int32), np.zeros(0), np.zeros(0)
  )
  batches = loader.train_batches(
    ConcatDataset(stored, T, tokenizer.eos_token_id),
    batch_size=BATCH,
    accumulation=1,
    seed=0,
    total_rows=STEPS * BATCH,
    start=0,
    sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
  )
  model = transformers.GPT2LMHeadModel.from_pretrained(gpt2)
  matrices = [p for p in model.parameters() if p.ndim == 2]
  vectors = [p for p in model.parameters() if p.ndim == 1]
  adamw = torch.optim.AdamW(
    [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
    lr=1e-4,
    betas=(0.9, 0.999),
    eps=1e-8,
  )
  schedule = transformers.get_linear_schedule_with_warmup(adamw, 0, STEPS)
  theirs = []
  for _, batch in zip(range(STEPS), batches):
    batch = {name: torch.from_numpy(np.array(x[0])) for name, x in batch.items()}
    logits = model(batch["ids"].long()).logits[batch["mask"]]
    loss = torch.nn.functional.cross_entropy(logits, batch["targets"][batch["mask"]].long())
    adamw.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adamw.step()
    schedule.step()
    theirs.append(loss.item())
  print(f"losses: jaxft {ours}, transformers {theirs}")
  np.testing.assert_allclose(ours, theirs, rtol=1e-4)
