"""Training, side by side with Hugging Face's Trainer: python benchmarks/train.py [--model gpt2] [--rows 4] [--length 512]

The same model with random weights, the same batch, length, optimizer and precision. Each turn is a process of its own, and the
contenders take turns; medians count. jaxft is the whole of `jaxft.finetune`; the peer is Trainer with the attention and compile
settings that its documentation names. The table goes into docs/benchmarks.md. On a GPU bfloat16 is used, on a CPU float32.
Caches of compiled programs are empty in the first turn. jaxft also reads, checks and tokenises its text before its first step.

Needs torch, transformers and accelerate beside jaxft.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import page

ROOT = Path(__file__).parent.parent
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


def with_jaxft(asked: argparse.Namespace, folder: Path) -> dict:
  """A run of `jaxft.finetune`, by its own metrics."""
  sys.path.insert(0, str(ROOT / "tests"))
  import jax
  import tiny

  import jaxft
  from jaxft import config as settings
  from jaxft import train
  from jaxft.hf.published import PUBLISHED

  say, first_step = train.say, []

  def heard(text: str) -> None:
    say(text)
    if text.startswith("first step after"):
      first_step.append(time.time() - asked.began)

  train.say = heard
  tiny.write_gpt2_bpe(folder)
  (folder / "config.json").write_text(json.dumps(PUBLISHED[asked.model]))
  texts = (" ".join(str(n * n) for n in range(m, m + asked.length)) for m in range(8 * asked.rows))
  (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  config = settings.default()
  config.model.path, config.model.init, config.model.dropout = str(folder), "scratch", asked.dropout
  config.data.train, config.data.sequence_length, config.data.cache_dir = (
    ("text.txt",),
    asked.length,
    str(folder / "tokens"),
  )
  config.data.train, config.data.limit_validation = (str(folder / "texts.jsonl"),), 1
  config.train.batch_size, config.train.steps, config.train.log_every = asked.rows, WARM_UP + asked.steps, 1
  config.train.eval_every = config.train.save_every = 0
  config.train.sample_prompts, config.memory.remat = (), asked.remat
  with quiet():
    run = jaxft.finetune(config, folder / "run")
  lines = [line for line in run.metrics if "train/loss" in line]
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

  how = CONTENDERS[asked.measure]
  sys.path.insert(0, str(ROOT))
  from jaxft.hf.published import PUBLISHED

  facts = dict(PUBLISHED[asked.model])
  config = transformers.AutoConfig.for_model(facts.pop("model_type"), **facts)
  rates = [
    name for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "embed_dropout", "resid_dropout")
  ]
  for name in rates:
    if hasattr(config, name):
      setattr(config, name, asked.dropout)
  config.use_cache = False
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=how["attention"])
  cuda, marks, first_step = torch.cuda.is_available(), [], []
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
  peak = torch.cuda.max_memory_reserved() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
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
  versions = ", ".join(f"{name} {_version(name)}" for name in ("jax", "torch", "transformers", "accelerate"))
  device = device_of(found)
  precision = "float32" if device == "cpu" else "bfloat16"
  peers = {name: turns for name, turns in found.items() if name != "jaxft" and turns}
  median = lambda name, key: statistics.median(turn[key] for turn in found[name])
  speed = lambda name: median(name, "tokens_per_second")
  best = max(peers, key=speed, default=None)
  lines = [
    f"{datetime.date.today()}, {os.cpu_count()} CPU cores{'' if device == 'cpu' else f', {device}'}, Python "
    f"{platform.python_version()}, {versions}. {asked.model}, {asked.rows} x {asked.length} tokens, {precision}, AdamW, "
    f"dropout {asked.dropout:g}, `memory.remat={asked.remat}`; medians of {asked.turns} turns of {asked.steps} steps. In "
    "brackets the slowest and fastest. First step: how long after the command it is over, in the first turn and in later ones.",
    "",
    "| | tokens/s | to Trainer's best | peak memory | first step, caches empty | and filled |",
    "|---|---|---|---|---|---|",
  ]
  for name, turns in found.items():
    if not turns:
      lines.append(f"| {name} | it ended with an error | | | | |")
      continue
    speeds = sorted(turn["tokens_per_second"] for turn in turns)
    ratio = f"{speed(name) / speed(best):.2f}" if best else ""
    lines.append(
      f"| {name} | {speed(name):,.0f} ({speeds[0]:,.0f} to {speeds[-1]:,.0f}) | {ratio} | "
      f"{median(name, 'peak') / 2**30:.2f} GiB | {turns[0]['first_step']:.1f} s | "
      f"{statistics.median(turn['first_step'] for turn in turns[1:] or turns):.1f} s |"
    )
  return "\n".join(lines)


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "missing"


if __name__ == "__main__":
  main()
