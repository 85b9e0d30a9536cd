"""Training, side by side with Hugging Face's Trainer: python benchmarks/train.py [--model gpt2] [--rows 4] [--length 512]

The same model with random weights, the same batch, length, optimizer and precision. Each turn is a process of its own, and the
contenders take turns; medians count. jaxft is the whole of `jaxft.finetune`; the peer is Trainer with the attention and compile
settings that its documentation names, those that the model's class offers. The table goes into docs/benchmarks.md, after each
turn. On a GPU bfloat16 is used, on a CPU float32. Caches of compiled programs are empty in the first turn. jaxft also reads,
checks and tokenises its text before its first step. Neither saves anything: a turn ends after its last step. Memory on a GPU is
the most that was in use, by either one's allocator; MFU is by jaxft's formula (docs/speed.md) for all.

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
import traceback
import types
from pathlib import Path

import page
from scratch import ROOT, config_of

from jaxft.hf.published import PUBLISHED

CONTENDERS = {
  "jaxft": {},
  "Trainer, eager": {"attention": "eager"},
  "Trainer, eager, torch.compile": {"attention": "eager", "compiled": True},
  "Trainer, SDPA": {"attention": "sdpa"},
  "Trainer, SDPA, torch.compile": {"attention": "sdpa", "compiled": True},
}
SDPA = (
  "Trainer, SDPA",
  "Trainer, SDPA, torch.compile",
)  # transformers has it for GPT-2, not for GPT-Neo and GPT-J (5.23)
EAGER = "Trainer, eager", "Trainer, eager, torch.compile"


def parsed() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", default="gpt2", help="one of the published sizes (jaxft.hf.published)")
  parser.add_argument("--rows", type=int, default=4, help="of a batch")
  parser.add_argument("--length", type=int, default=512, help="tokens a row")
  parser.add_argument("--steps", type=int, default=4, help="of a turn, after the warm-up")
  parser.add_argument("--warm_up", type=int, default=2, help="steps before them: compiling, and the first allocations")
  parser.add_argument("--turns", type=int, default=3)
  parser.add_argument("--dropout", type=float, default=0.0)
  parser.add_argument(
    "--remat", default="dots", choices=("none", "dots", "full"), help="of jaxft: what it computes again"
  )
  parser.add_argument("--checkpointing", action="store_true", help="Trainer computes activations again")
  parser.add_argument("--measure", choices=list(CONTENDERS), help=argparse.SUPPRESS)
  parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
  return parser.parse_args()


def main() -> None:
  asked = parsed()
  if asked.measure:
    with tempfile.TemporaryDirectory() as folder:
      try:
        measured = (with_jaxft if asked.measure == "jaxft" else with_trainer)(asked, Path(folder))
      except Exception as error:
        traceback.print_exc()
        measured = {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"}
    return print(json.dumps(measured))
  eager = EAGER[:1] if PUBLISHED[asked.model]["model_type"] == "gpt2" else EAGER
  names = ["jaxft", *eager, *(SDPA if len(eager) == 1 else ())]
  found, wrong = {name: [] for name in names}, []
  with tempfile.TemporaryDirectory() as caches:
    for turn in range(asked.turns):
      for name in names:
        now = measure(name, caches)
        found[name].append(now)
        if "error" in now:  # a batch that a peer has no memory for is an answer
          wrong.append(f"turn {turn + 1}, {name}: {now['error']}")
          print(wrong[-1], flush=True)
          continue
        print(
          f"turn {turn + 1}, {name}: first step after {now['first_step']:.1f} s, {now['tokens_per_second']:,.0f} tokens/s, "
          f"loss {now['loss']:.3f}",
          flush=True,
        )
      if device := device_of(found):
        text = table(asked, found, device)
        page.put(f"training {asked.model} on a {'CPU' if device == 'cpu' else 'GPU'}", "benchmarks/train.py", text)
  print(text if device else "nothing could be measured")
  if wrong:
    sys.exit("\n".join(wrong))


def measure(name: str, caches: str) -> dict:
  command = [sys.executable, *sys.argv, "--measure", name, "--began", str(time.time())]
  places = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": caches, "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor"}
  done = subprocess.run(command, stdout=subprocess.PIPE, env=os.environ | places)
  lines = done.stdout.splitlines()
  return json.loads(lines[-1]) if lines else {"error": f"ended with code {done.returncode}"}


class LastStep(Exception):
  """All steps of a turn were measured."""


def with_jaxft(asked: argparse.Namespace, folder: Path) -> dict:
  """A run of `jaxft.finetune`: its steps as its own reporter hears of them."""
  import jax

  from jaxft import train
  from jaxft.run.tracking import peak_bytes

  last = asked.warm_up + asked.steps
  config = config_of(folder, asked.model, asked.rows, asked.length, last + 1, asked.dropout)
  config.memory.remat, config.train.log_every = asked.remat, min(10, asked.steps)
  say, report, first_step, marks, losses = train.say, train.Reporter.step, [], [], []

  def heard(text: str) -> None:
    say(text)
    if text.startswith("first step after"):
      first_step.append(time.time() - asked.began)

  def reported(reporter, step: int, numbers: dict, *rest) -> None:
    report(reporter, step, numbers, *rest)
    if step in (asked.warm_up, last):
      marks.append(time.monotonic())
    if step == last:
      losses.append(float(numbers["loss"]))
      raise LastStep

  # A checkpoint of GPT-J and its export take 90 GiB of disk, which no figure here needs.
  train.say, train.Reporter.step, train.must_have_room = heard, reported, lambda *_: None
  with quiet(), contextlib.suppress(LastStep):
    train.finetune(config, folder / "run")
  return {
    "tokens_per_second": asked.rows * asked.length * asked.steps / (marks[1] - marks[0]),
    "peak": peak_bytes(jax.devices()[0]),
    "loss": losses[0],
    "device": jax.devices()[0].device_kind,
    "first_step": first_step[0],
  }


def with_trainer(asked: argparse.Namespace, folder: Path) -> dict:
  """A run of Trainer on random tokens."""
  import torch
  import transformers

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
      if state.global_step in (1, asked.warm_up, asked.warm_up + asked.steps):
        if cuda:
          torch.cuda.synchronize()
        if state.global_step == 1:
          first_step.append(time.time() - asked.began)
        if state.global_step > 1 or asked.warm_up == 1:
          marks.append(time.monotonic())

  trainer = transformers.Trainer(
    model=model,
    args=transformers.TrainingArguments(
      output_dir=str(folder),
      per_device_train_batch_size=asked.rows,
      max_steps=asked.warm_up + asked.steps,
      logging_steps=min(10, asked.steps),
      logging_nan_inf_filter=False,  # it waits for the device after each step
      save_strategy="no",
      report_to="none",
      disable_tqdm=True,
      torch_compile=how.get("compiled", False),
      bf16=cuda,
      use_cpu=not cuda,
      gradient_checkpointing=asked.checkpointing,
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


def device_of(found: dict[str, list[dict]]) -> str | None:
  """What all ran on; ends where they ran on several."""
  devices = {turn["device"] for turns in found.values() for turn in turns if "device" in turn}
  if len(devices) > 1:
    sys.exit(f"error: the contenders ran on different devices: {', '.join(sorted(devices))}")
  return next(iter(devices), None)


def table(asked: argparse.Namespace, found: dict[str, list[dict]], device: str) -> str:
  precision, full_speed = ("float32" if device == "cpu" else "bfloat16"), tokens_per_second_at_peak(asked, device)
  sound = {name: [turn for turn in turns if "error" not in turn] for name, turns in found.items()}
  peers = {name: turns for name, turns in sound.items() if name != "jaxft" and turns}
  median = lambda name, key: statistics.median(turn[key] for turn in sound[name])
  turns, again = len(found["jaxft"]), "activations computed again" if asked.checkpointing else "nothing computed again"
  speed = lambda name: median(name, "tokens_per_second")
  best = max(peers, key=speed, default=None)
  versions = page.machine(device, "jax", "torch", "transformers", "accelerate")
  columns = ["", "tokens/s", "to Trainer's best", *(["MFU"] if full_speed else []), "peak memory"]
  columns += ["first step, caches empty", "and filled"]
  lines = [
    f"{versions}. {asked.model}, {asked.rows} x {asked.length} tokens, {precision}, AdamW, dropout {asked.dropout:g}; jaxft "
    f"with `memory.remat={asked.remat}`, Trainer with {again}; medians of {turns} turns of {asked.steps} steps, in brackets "
    "the slowest and fastest. First step: how long after the command it is over, in the first turn and in later ones.",
    "",
    f"| {' | '.join(columns)} |",
    f"|{'---|' * len(columns)}",
  ]
  for name, turns in found.items():
    if not sound[name]:
      lines.append(f"| {name} | {turns[0]['error']} |{' |' * (len(columns) - 2)}")
      continue
    speeds = sorted(turn["tokens_per_second"] for turn in sound[name])
    failed = len(turns) - len(speeds)
    cells = [name + (f", {failed} of {len(turns)} turns failed" if failed else "")]
    cells.append(f"{speed(name):,.0f} ({speeds[0]:,.0f} to {speeds[-1]:,.0f})")
    cells.append(f"{speed(name) / speed(best):.2f}" if best else "")
    cells += [f"{speed(name) / full_speed:.1%}"] if full_speed else []
    cells.append(f"{median(name, 'peak') / 2**30:.2f} GiB")
    cells.append("" if "error" in turns[0] else f"{turns[0]['first_step']:.1f} s")
    later = [turn["first_step"] for turn in turns[1:] if "error" not in turn]
    cells.append(f"{statistics.median(later):.1f} s" if later else "")
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def tokens_per_second_at_peak(asked: argparse.Namespace, device: str) -> float | None:
  """Of a device that never waits, by the model's FLOPs and the data sheet; None where jaxft has no data sheet of it."""
  from jaxft.hf import facts
  from jaxft.plan import estimate, flops, targets

  target = targets.here(types.SimpleNamespace(device_kind=device), 1)
  model_flops = flops.of_model(facts.model_config(PUBLISHED[asked.model]), asked.rows, asked.length)
  seconds = estimate.seconds_at_peak(target, 1, model_flops)
  return None if seconds is None else asked.rows * asked.length / seconds


if __name__ == "__main__":
  main()
