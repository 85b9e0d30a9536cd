"""Training, side by side with Hugging Face's Trainer: python benchmarks/train.py [--model gpt2] [--rows 4] [--length 512]

The same model with random weights, the same batch, length, optimizer and precision. Each turn is a process of its own, and the
contenders take turns; medians count. jaxft is the whole of `jaxft.finetune`; the peer is Trainer with the attention and compile
settings that its documentation names. The table goes into docs/benchmarks.md. On a GPU bfloat16 is used, on a CPU float32.
Caches of compiled programs are empty in the first turn. jaxft also reads, checks and tokenises its text before its first step.
Neither saves anything: a turn ends after its last step. Memory on a GPU is the most that was in use, by either one's allocator;
MFU is the peer's speed too by jaxft's formula (docs/speed.md).

Needs torch, transformers and accelerate beside jaxft.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import page
from scratch import ROOT, config_of

WARM_UP = 2  # steps that do not count: compiling, and the first allocations
CONTENDERS = {
  "jaxft": {},
  "Trainer, eager": {"attention": "eager"},
  "Trainer, SDPA": {"attention": "sdpa"},
  "Trainer, SDPA, torch.compile": {"attention": "sdpa", "compiled": True},
}


def parsed() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", default="gpt2", help="one of the published sizes (jaxft.hf.published)")
  parser.add_argument("--rows", type=int, default=4, help="of a batch")
  parser.add_argument("--length", type=int, default=512, help="tokens a row")
  parser.add_argument("--steps", type=int, default=4, help="of a turn, after the warm-up")
  parser.add_argument("--turns", type=int, default=3)
  parser.add_argument("--dropout", type=float, default=0.0)
  parser.add_argument(
    "--remat", default="dots", choices=("none", "dots", "full"), help="of jaxft; Trainer keeps everything"
  )
  parser.add_argument("--only", nargs="*", default=list(CONTENDERS), help="contenders")
  parser.add_argument("--measure", choices=list(CONTENDERS), help=argparse.SUPPRESS)
  parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
  return parser.parse_args()


def main() -> None:
  asked = parsed()
  if asked.measure:
    with tempfile.TemporaryDirectory() as folder:
      measured = with_jaxft(asked, Path(folder)) if asked.measure == "jaxft" else with_trainer(asked, Path(folder))
    return print(json.dumps(measured))
  found = {name: [] for name in asked.only}
  with tempfile.TemporaryDirectory() as caches:
    for turn in range(asked.turns):
      for name in list(found):
        try:
          found[name].append(measure(name, caches))
        except subprocess.CalledProcessError:  # a batch that a peer has no memory for is an answer
          print(f"{name}: ended with an error, see above", flush=True)
          found[name].append(None)
          continue
        now = found[name][-1]
        print(
          f"turn {turn + 1}, {name}: first step after {now['first_step']:.1f} s, {now['tokens_per_second']:,.0f} tokens/s, "
          f"loss {now['loss']:.3f}",
          flush=True,
        )
  text = table(asked, {name: [it for it in turns if it] for name, turns in found.items()})
  print(text)
  page.put(f"training {asked.model} on a {'CPU' if device_of(found) == 'cpu' else 'GPU'}", "benchmarks/train.py", text)


def measure(name: str, caches: str) -> dict:
  command = [sys.executable, *sys.argv, "--measure", name, "--began", str(time.time())]
  places = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": caches, "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor"}
  done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ | places)
  return json.loads(done.stdout.splitlines()[-1])


class LastStep(Exception):
  """All steps of a turn were measured."""


def with_jaxft(asked: argparse.Namespace, folder: Path) -> dict:
  """A run of `jaxft.finetune`, by its own metrics."""
  import jax

  from jaxft import train

  config = config_of(folder, asked.model, asked.rows, asked.length, WARM_UP + asked.steps + 1, asked.dropout)
  config.memory.remat = asked.remat
  say, report, first_step = train.say, train.Reporter.step, []

  def heard(text: str) -> None:
    say(text)
    if text.startswith("first step after"):
      first_step.append(time.time() - asked.began)

  def reported(reporter, step: int, *rest) -> None:
    report(reporter, step, *rest)
    if step == WARM_UP + asked.steps:
      raise LastStep

  # A checkpoint of GPT-J and its export take 90 GiB of disk, which no figure here needs.
  train.say, train.Reporter.step, train.must_have_room = heard, reported, lambda *_: None
  with quiet(), contextlib.suppress(LastStep):
    train.finetune(config, folder / "run")
  lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
  lines = [line for line in lines if "train/loss" in line]
  seconds = [line["perf/step_seconds"] for line in lines[WARM_UP:]]
  return {
    "tokens_per_second": asked.rows * asked.length * len(seconds) / sum(seconds),
    "peak": lines[-1]["memory/peak_bytes"],
    "loss": lines[-1]["train/loss"],
    "device": jax.devices()[0].device_kind,
    "first_step": first_step[0],
  }


def with_trainer(asked: argparse.Namespace, folder: Path) -> dict:
  """A run of Trainer on random tokens."""
  import torch
  import transformers

  from jaxft.hf.published import PUBLISHED

  how, facts = CONTENDERS[asked.measure], dict(PUBLISHED[asked.model])
  config = transformers.AutoConfig.for_model(facts.pop("model_type"), **facts)
  rates = [
    name for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "embed_dropout", "resid_dropout")
  ]
  for name in rates:
    if hasattr(config, name):
      setattr(config, name, asked.dropout)
  config.use_cache = False
  cuda, marks, first_step = torch.cuda.is_available(), [], []
  with torch.device("cuda" if cuda else "cpu"):  # drawing six billion numbers on a CPU takes minutes
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=how["attention"])
  rows = torch.randint(config.vocab_size, (64 * asked.rows, asked.length), generator=torch.Generator().manual_seed(0))

  class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
      return len(rows)

    def __getitem__(self, index: int) -> dict:
      return {"input_ids": rows[index], "labels": rows[index]}

  class Watch(transformers.TrainerCallback):
    def on_step_end(self, arguments, state, control, **_) -> None:
      if state.global_step in (1, WARM_UP, WARM_UP + asked.steps):
        if cuda:
          torch.cuda.synchronize()
        if state.global_step == 1:
          first_step.append(time.time() - asked.began)
        else:
          marks.append(time.monotonic())

  trainer = transformers.Trainer(
    model=model,
    args=transformers.TrainingArguments(
      output_dir=str(folder),
      per_device_train_batch_size=asked.rows,
      max_steps=WARM_UP + asked.steps,
      logging_steps=1,
      save_strategy="no",
      report_to="none",
      disable_tqdm=True,
      torch_compile=how.get("compiled", False),
      bf16=cuda,
      use_cpu=not cuda,
      weight_decay=0.01,
    ),
    train_dataset=Rows(),
    callbacks=[Watch()],
  )
  with quiet():
    trainer.train()
  losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
  peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return {
    "tokens_per_second": asked.rows * asked.length * asked.steps / (marks[1] - marks[0]),
    "peak": peak,
    "loss": float(losses[-1]),
    "device": torch.cuda.get_device_name() if cuda else "cpu",
    "first_step": first_step[0],
  }


class quiet:
  """Sends standard output to standard error, whose last line is the result."""

  def __enter__(self) -> None:
    self._stdout = os.dup(1)
    os.dup2(2, 1)

  def __exit__(self, *_) -> None:
    sys.stdout.flush()
    os.dup2(self._stdout, 1)


def device_of(found: dict) -> str:
  return next(turn["device"] for turns in found.values() for turn in turns if turn)


def table(asked: argparse.Namespace, found: dict[str, list[dict]]) -> str:
  device = device_of(found)
  precision, full_speed = ("float32" if device == "cpu" else "bfloat16"), tokens_per_second_at_peak(asked, device)
  peers = {name: turns for name, turns in found.items() if name != "jaxft" and turns}
  median = lambda name, key: statistics.median(turn[key] for turn in found[name])
  speed = lambda name: median(name, "tokens_per_second")
  best = max(peers, key=speed, default=None)
  versions = page.machine(device, "jax", "torch", "transformers", "accelerate")
  columns = ["", "tokens/s", "to Trainer's best", *(["MFU"] if full_speed else []), "peak memory"]
  columns += ["first step, caches empty", "and filled"]
  lines = [
    f"{versions}. {asked.model}, {asked.rows} x {asked.length} tokens, {precision}, AdamW, dropout {asked.dropout:g}, "
    f"`memory.remat={asked.remat}`; medians of {asked.turns} turns of {asked.steps} steps. In brackets the slowest and "
    "fastest. First step: how long after the command it is over, in the first turn and in later ones.",
    "",
    f"| {' | '.join(columns)} |",
    f"|{'---|' * len(columns)}",
  ]
  for name, turns in found.items():
    if not turns:
      lines.append(f"| {name} | it ended with an error |{' |' * (len(columns) - 2)}")
      continue
    speeds = sorted(turn["tokens_per_second"] for turn in turns)
    cells = [name, f"{speed(name):,.0f} ({speeds[0]:,.0f} to {speeds[-1]:,.0f})"]
    cells.append(f"{speed(name) / speed(best):.2f}" if best else "")
    cells += [f"{speed(name) / full_speed:.1%}"] if full_speed else []
    cells += [f"{median(name, 'peak') / 2**30:.2f} GiB", f"{turns[0]['first_step']:.1f} s"]
    cells.append(f"{statistics.median(turn['first_step'] for turn in turns[1:] or turns):.1f} s")
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def tokens_per_second_at_peak(asked: argparse.Namespace, device: str) -> float | None:
  """Of a device that never waits, by the model's FLOPs and the data sheet; None where jaxft has no data sheet of it."""
  from jaxft.hf import facts
  from jaxft.hf.published import PUBLISHED
  from jaxft.plan import estimate, flops, targets

  target = targets.here(types.SimpleNamespace(device_kind=device), 1)
  model_flops = flops.of_model(facts.model_config(PUBLISHED[asked.model]), asked.rows, asked.length)
  seconds = estimate.seconds_at_peak(target, 1, model_flops)
  return None if seconds is None else asked.rows * asked.length / seconds


if __name__ == "__main__":
  main()
