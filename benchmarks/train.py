"""Training, side by side with Hugging Face's Trainer.

  python benchmarks/train.py [--model gpt2] [--rows 4] [--length 512]

The same model with random weights, the same batch, length, optimizer and precision. Each turn is a
process of its own, and the contenders take turns; medians count. jaxft is the whole of
`jaxft.finetune`; the peer is Trainer with the attention and compile settings that its documentation
names, those that the model's class offers. The table goes into docs/benchmarks.md, after each
contender. On a GPU bfloat16 is used, on a CPU float32. Caches of compiled programs are empty in the
first turn, but for `--caches FOLDER`. jaxft also reads, checks and tokenises its text before its
first step. Neither saves anything: a turn ends after its last step. Memory on a GPU is the most
that was in use, by either one's allocator; MFU is by jaxft's formula (docs/speed.md) for all.

`--contenders jaxft=110 "Trainer, SDPA=60"` measures these only, and ends one that has not answered
after so many seconds.

Needs torch, transformers and accelerate beside jaxft.
"""

import argparse
import contextlib
import json
import os
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path

import children
import page
import train_tables
from children import quiet
from models import PUBLISHED
from scratch import config_of, finetune_until

CONTENDERS = {
  "jaxft": {},
  "Trainer, eager": {"attention": "eager"},
  "Trainer, eager, torch.compile": {"attention": "eager", "compiled": True},
  "Trainer, SDPA": {"attention": "sdpa"},
  "Trainer, SDPA, torch.compile": {"attention": "sdpa", "compiled": True},
}
SETTINGS = "model", "rows", "length", "steps", "warm_up", "dropout", "remat", "checkpointing"


def parsed() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--model", default="gpt2", help="one of the published sizes (jaxft.hf.known_models)"
  )
  parser.add_argument("--rows", type=int, default=4, help="of a batch")
  parser.add_argument("--length", type=int, default=512, help="tokens a row")
  parser.add_argument("--steps", type=int, default=4, help="of a turn, after the warm-up")
  parser.add_argument(
    "--warm_up", type=int, default=2, help="steps before them: compiling, and the first allocations"
  )
  parser.add_argument("--turns", type=int, default=3)
  parser.add_argument("--dropout", type=float, default=0.0)
  parser.add_argument(
    "--remat",
    default="dots",
    choices=("none", "dots", "full"),
    help="of jaxft: what it computes again",
  )
  parser.add_argument(
    "--checkpointing", action="store_true", help="Trainer computes activations again"
  )
  parser.add_argument("--caches", type=Path, help="folder for compiled programs, which stay there")
  parser.add_argument(
    "--contenders",
    type=children.contender(CONTENDERS),
    nargs="+",
    metavar="NAME[=SECONDS]",
    help="default: jaxft and those of Trainer that the model's class offers, without a limit",
  )
  parser.add_argument(
    "--measure", choices=list(CONTENDERS), help="one turn of one, in this process; no table"
  )
  parser.add_argument("--began", type=float, default=time.time(), help=argparse.SUPPRESS)
  return parser.parse_args()


def main() -> None:
  args = parsed()
  if args.measure:
    print(json.dumps(found := measured(args)))
    sys.exit("error" in found)
  wrong, devices = [], set()
  with contextlib.ExitStack() as until_the_end:
    if not args.caches:
      use_caches(Path(until_the_end.enter_context(tempfile.TemporaryDirectory())))
    for turn in range(1, args.turns + 1):
      for name, seconds in args.contenders or contenders_of(args.model):
        line = measure(args, name, seconds, turn)
        print(describe(line), flush=True)
        devices |= {line["device"]} if "device" in line else set()
        if "error" in line:  # a batch that a peer has no memory for is an answer
          wrong.append(describe(line))
        for what, (device, text) in train_tables.sections(page.noted("train")).items():
          if what == train_tables.name_of(line["settings"], device):
            page.put(what, "benchmarks/train.py", text, device)
  for _, text in train_tables.sections(page.noted("train")).values():
    print(text)
  if len(devices) > 1:
    wrong.append(f"the contenders ran on different devices: {', '.join(sorted(devices))}")
  if wrong:
    sys.exit("\n".join(wrong))


def contenders_of(model: str) -> list[tuple[str, None]]:
  """jaxft and what the model's class offers: transformers (5.23) has SDPA only for GPT-2."""
  eager = ["Trainer, eager", "Trainer, eager, torch.compile"]
  gpt2 = [eager[0], "Trainer, SDPA", "Trainer, SDPA, torch.compile"]
  names = gpt2 if PUBLISHED[model]["model_type"] == "gpt2" else eager
  return [(name, None) for name in ("jaxft", *names)]


def use_caches(folder: Path) -> None:
  """For this process and those that it starts."""
  cache_dirs = {
    "XDG_CACHE_HOME": "",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
  }
  os.environ |= {name: str(folder.absolute() / path) for name, path in cache_dirs.items()}


def measure(args: argparse.Namespace, name: str, seconds: float | None, turn: int) -> dict:
  """A turn of a contender in a process of its own, noted."""
  began = time.time()
  command = [sys.executable, *sys.argv, "--measure", name, "--began", str(began)]
  now = children.answer(command, seconds)
  settings = {key: getattr(args, key) for key in SETTINGS} | {"filled_caches": bool(args.caches)}
  if "device" in now:
    now["versions"] = page.machine(now["device"], "jax", "torch", "transformers", "accelerate")
    if at_peak := train_tables.tokens_per_second_at_peak(settings, now["device"]):
      now["mfu"] = now["tokens_per_second"] / at_peak
  took = {
    "settings": settings,
    "contender": name,
    "turn": turn,
    "wall_seconds": round(time.time() - began, 1),
  }
  return page.note("train", **took, **now)


def describe(line: dict) -> str:
  """A turn in one line."""
  head = f"turn {line['turn']}, {line['contender']}: "
  if "error" in line:
    return head + line["error"]
  mfu = f", MFU {line['mfu']:.1%}" if "mfu" in line else ""
  planned = (
    f" of {line['planned_peak_bytes'] / 2**30:.2f} planned" if "planned_peak_bytes" in line else ""
  )
  return (
    f"{head}{line['tokens_per_second']:,.0f} tokens/s{mfu}, peak {line['peak_bytes'] / 2**30:.2f} "
    f"GiB{planned}, loss {line['loss']:.3f}, first step after {line['first_step_seconds']:.1f} s"
  )


def measured(args: argparse.Namespace) -> dict:
  """A turn in this process, or {"error": what ended it}."""
  if args.caches:
    use_caches(args.caches)
  with tempfile.TemporaryDirectory() as folder, quiet():
    try:
      return (with_jaxft if args.measure == "jaxft" else with_trainer)(args, Path(folder))
    except Exception as error:
      traceback.print_exc()
      return {
        "error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
      }


def with_jaxft(args: argparse.Namespace, folder: Path) -> dict:
  """A run of `jaxft.finetune`: its steps as its own logger hears of them."""
  import jax

  from jaxft.metrics.system import peak_memory_bytes, peak_memory_source

  last = args.warm_up + args.steps
  config = config_of(folder, args.model, args.rows, args.length, last + 1, args.dropout)
  config.memory.remat, config.train.log_every = args.remat, min(10, args.steps)
  first_step, marks, losses = [], [], []

  def after_step(step: int, numbers: dict) -> None:
    if step in (args.warm_up, last):
      marks.append(time.monotonic())
      losses.append(float(numbers["loss"]))

  def said(line: str) -> None:
    if line.startswith("first step after"):
      first_step.append(time.time() - args.began)

  finetune_until(last, config, folder / "run", after_step, said)
  device, found = jax.devices()[0], taken(args, marks, losses, first_step)
  if peak_memory_source(device) == "device":  # a CPU's is that of the process
    about = json.loads((folder / "run" / "about.json").read_text())
    found["planned_peak_bytes"] = sum(about["memory"]["planned"].values())
  return found | {"peak_bytes": peak_memory_bytes(device), "device": device.device_kind}


def taken(
  args: argparse.Namespace, marks: list[float], losses: list[float], first_step: list[float]
) -> dict:
  """The figures of any contender's steps; `marks`: the ends of the warm-up and of the last step."""
  seconds = (marks[1] - marks[0]) / args.steps
  return {
    "tokens_per_second": args.rows * args.length / seconds,
    "step_seconds": seconds,
    "loss": losses[-1],
    "first_step_seconds": first_step[0],
  }


def with_trainer(args: argparse.Namespace, folder: Path) -> dict:
  """A run of Trainer on random tokens."""
  import torch
  import transformers

  how, facts = CONTENDERS[args.measure], dict(PUBLISHED[args.model])
  config = transformers.AutoConfig.for_model(facts.pop("model_type"), **facts)
  rates = [
    name
    for name in (
      "attn_pdrop",
      "embd_pdrop",
      "resid_pdrop",
      "attention_dropout",
      "embed_dropout",
      "resid_dropout",
    )
  ]
  for name in rates:
    if hasattr(config, name):
      setattr(config, name, args.dropout)
  config.use_cache = False
  cuda, marks, first_step = children.torch_device() == "cuda", [], []
  # Drawing six billion numbers on a CPU takes minutes.
  with torch.device("cuda" if cuda else "cpu"):
    model = transformers.AutoModelForCausalLM.from_config(
      config, attn_implementation=how["attention"]
    )
  rows = torch.randint(
    config.vocab_size, (64 * args.rows, args.length), generator=torch.Generator().manual_seed(0)
  )

  class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
      return len(rows)

    def __getitem__(self, index: int) -> dict:
      return {"input_ids": rows[index], "labels": rows[index]}

  class Watch(transformers.TrainerCallback):
    def on_step_end(self, arguments, state, control, **_) -> None:
      if state.global_step in (1, args.warm_up, args.warm_up + args.steps):
        if cuda:
          torch.cuda.synchronize()
        if state.global_step == 1:
          first_step.append(time.time() - args.began)
        if state.global_step > 1 or args.warm_up == 1:
          marks.append(time.monotonic())

  trainer = transformers.Trainer(
    model=model,
    args=transformers.TrainingArguments(
      output_dir=str(folder),
      per_device_train_batch_size=args.rows,
      max_steps=args.warm_up + args.steps,
      logging_steps=min(10, args.steps),
      logging_nan_inf_filter=False,  # it waits for the device after each step
      save_strategy="no",
      report_to="none",
      disable_tqdm=True,
      torch_compile=how.get("compiled", False),
      bf16=cuda,
      use_cpu=not cuda,
      gradient_checkpointing=args.checkpointing,
    ),
    train_dataset=Rows(),
    callbacks=[Watch()],
  )
  trainer.train()
  losses = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
  peak = (
    torch.cuda.max_memory_allocated()
    if cuda
    else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  )
  return taken(args, marks, losses, first_step) | {
    "peak_bytes": peak,
    "device": torch.cuda.get_device_name() if cuda else "cpu",
  }


if __name__ == "__main__":
  main()
