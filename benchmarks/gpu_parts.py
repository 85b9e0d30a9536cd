"""What only a GPU can show, in parts, each with its own limit. benchmarks/gpu_short.sh calls this.

  python benchmarks/gpu_parts.py PHASE SECONDS --out FOLDER [--parts smoke agree] [--tiny]
    [--turns 3]

Parts run in the order of PARTS, those of a group beside each other. One that hangs, crashes or
finds no GPU costs itself only: when its time is over it is killed with all that it started. Results
are written as they come, so that a run that is cut off has what it had: summary.txt (a line a
part), results.jsonl (figures), logs.txt, benchmarks.md (docs/benchmarks.md with what was measured),
gaps.svg and trace.tar.gz. Ends with code 0 where no part failed (one that was skipped for want of
time is named, and is no failure), 1 where one failed, 2 where the command is wrong, 128 + N where
signal N ended it. Needs the standard library.
"""

import argparse
import contextlib
import math
import signal
import subprocess
import sys
from pathlib import Path

from gpu_runner import Part, Runner

TRAIN = "benchmarks/train.py --caches {caches} --turns {turns} --length 1024 --warm_up 5"
GPT2 = f"{TRAIN} --model gpt2 --rows 8 --steps 40"
TINY = "--model tiny-gpt2 --rows 1 --length 64 --steps 1 --warm_up 1"
SMOKE = (
  "-m jaxft.train --config configs/quickstart.py --workdir {work}/smoke {require} "
  "--config.train.epochs=0 --config.train.steps=30 --config.train.eval_every=0 "
  "--config.train.save_every=0 --config.optim.warmup_steps=5 --config.train.sample_tokens=24"
)
TINY_SMOKE = (
  "--config.train.steps=2 --config.optim.warmup_steps=1 --config.train.sample_prompts=() "
  "--config.data.sequence_length=32 --config.train.eval_batches=1"
)
OFFLOAD = "benchmarks/offload.py --rows 1 --length 2048 --steps 4 --pool 8"
COMPILED = '"Trainer, SDPA, torch.compile'
# In the order of what they are worth.
PARTS = (
  # ---- Phase 1: does it run, is it right; not timed, so beside each other ------------------------
  Part("smoke", 1, 100, 30, SMOKE, TINY_SMOKE, "first", 0.25),
  Part(
    "attention", 1, 100, 30, "benchmarks/attention.py --kernels cudnn --lengths 1031 --rows 0",
    "--heads gpt2 --kernels chunked --lengths 31", "first", 0.15,
    {"XLA_FLAGS": "--xla_gpu_autotune_level=0"},
  ),
  # Fills the caches of torch.compile for train124; its own time is not used.
  Part(
    "warm", 1, 110, 30,
    f'{GPT2} --steps 1 --measure {COMPILED}"', f'{TINY} --measure "Trainer, SDPA"', "first",
  ),
  Part(
    "agree", 1, 100, 40,
    "benchmarks/agree.py --model gpt2 --rows 8 --length 1024 --steps 30 --remat dots",
    "--model tiny-gpt2 --rows 2 --length 64 --steps 2", "second", 0.25,
  ),
  Part(
    "streamed", 1, 110, 40,
    "benchmarks/agree.py --model EleutherAI/gpt-neo-125m --rows 4 --length 1024 --steps 6 "
    "--remat full --offloads all none --trace",
    "--model tiny-gpt-neo --rows 2 --length 64 --steps 2",
    "second", 0.15,
  ),
  Part(
    "train124", 1, 260, 30,
    f'{GPT2} --contenders jaxft={{110}} {COMPILED}={{90}}" "Trainer, SDPA={{60}}" '
    '"Trainer, eager={60}"',
    f'{TINY} --contenders jaxft "Trainer, SDPA"',
  ),
  # ---- Phase 2: what is timed, each alone --------------------------------------------------------
  # XLA's pool of pinned memory grows by doubling: without a limit 90 GiB pin 126. GPT-J's is above
  # the default.
  Part(
    "gptj", 2, 240, 90,
    f"{OFFLOAD} --model EleutherAI/gpt-j-6b",
    "--model tiny-gpt2 --length 64 --steps 1",
    environment={"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": "104"},
  ),
  Part(
    "neo", 2, 130, 60,
    f"{OFFLOAD} --model EleutherAI/gpt-neo-2.7B",
    "--model tiny-gpt2 --length 64 --steps 1",
    environment={"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": "48"}, instead_of="gptj",
  ),
  Part(
    "xl", 2, 150, 50,
    f'{TRAIN} --model gpt2-xl --rows 8 --steps 12 --contenders jaxft={{80}} "Trainer, SDPA={{70}}"',
    f"{TINY} --contenders jaxft",
  ),
  Part(
    "generate", 2, 130, 45,
    'benchmarks/generate.py --turns {turns} --new 128 --rows 1 8 --contenders jaxft={45} '
    'transformers={30} "transformers, static cache={60}"',
    '--model tiny-gpt2 --new 4 --rows 1 --contenders jaxft "transformers, static cache"',
  ),
  Part(
    "trace", 2, 70, 30,
    "benchmarks/gaps.py --rows 8 --length 1024 --dropout 0 --remat dots --picture {out}/gaps.svg "
    "--trace {out}/trace.tar.gz", "--model tiny-gpt2 --rows 1 --length 32 --steps 2",
  ),
  Part(
    "more124", 2, 110, 30,
    f'{TRAIN} --model gpt2 --rows 32 --steps 20 --contenders jaxft={{70}} "Trainer, SDPA={{45}}"',
    f"{TINY} --contenders jaxft",
  ),
  # As most GPT-2 configs are shipped: cuDNN's kernel cannot do dropout.
  Part(
    "dropout", 2, 110, 30, f'{GPT2} --dropout 0.1 --contenders jaxft={{70}} "Trainer, SDPA={{40}}"',
    f"{TINY} --contenders jaxft",
  ),
  Part(
    "none124", 2, 60, 25,
    f"{GPT2} --remat none --contenders jaxft={{55}}", f"{TINY} --contenders jaxft",
  ),
  Part(
    "eager", 2, 50, 25,
    f'{GPT2} --contenders "Trainer, eager={{45}}"', f'{TINY} --contenders "Trainer, eager"',
  ),
  # ---- Phase 3: with more time -------------------------------------------------------------------
  Part(
    "medium", 3, 260, 50,
    f'{TRAIN} --model gpt2-medium --rows 8 --steps 20 --contenders jaxft={{90}} '
    f'{COMPILED}={{150}}" "Trainer, SDPA={{60}}"', f"{TINY} --contenders jaxft",
  ),
  Part(
    "kernels", 3, 400, 60, "benchmarks/attention.py --rows 8",
    "--heads gpt2 --kernels chunked --lengths 31 --rows 1 --length 64",
  ),
  Part("plans", 3, 2400, 120, "benchmarks/plan_vs_measured.py", "--points 0"),
)  # fmt: skip


def gpu() -> str:
  query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
  with contextlib.suppress(OSError, subprocess.SubprocessError):
    return subprocess.run(
      query, capture_output=True, text=True, check=True, timeout=20
    ).stdout.strip()
  return "no GPU"


def parsed(arguments: list[str] | None = None) -> tuple[argparse.Namespace, tuple[Part, ...]]:
  """The command line, and the parts that it asks for."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("phase", choices=("1", "2", "3", "all"))
  parser.add_argument(
    "seconds", type=float, help="that all may take; 0: no deadline, and ten times the limits"
  )
  parser.add_argument("--out", type=Path, required=True, help="folder for the results")
  parser.add_argument("--parts", nargs="+", metavar="PART", help="these only")
  parser.add_argument(
    "--tiny", action="store_true", help="try the commands on a CPU, with tiny shapes"
  )
  parser.add_argument(
    "--check", action="store_true", help="only whether this command line is right"
  )
  parser.add_argument("--turns", type=int, default=1, help="of what is timed beside others")
  args = parser.parse_args(arguments)
  parts = tuple(part for part in PARTS if args.phase in ("all", str(part.phase)))
  names = [part.name for part in parts]
  if wrong := [name for name in args.parts or () if name not in names]:
    parser.error(f"no part of phase {args.phase}: {', '.join(wrong)}; there are {', '.join(names)}")
  if args.seconds < 0 or args.turns < 1:
    parser.error("SECONDS must not be negative, and --turns at least 1")
  return args, tuple(part for part in parts if part.name in (args.parts or names))


def main() -> int:
  args, parts = parsed()
  if args.check:
    return 0
  free = args.tiny or not args.seconds
  runner = Runner(
    args.out, args.seconds or math.inf, args.tiny, args.turns, patience=10 if free else 1
  )

  numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP

  def interrupted(number: int, _) -> None:
    for each in numbers:  # a second one would leave parts running
      signal.signal(each, signal.SIG_IGN)
    runner.stop()
    raise SystemExit(128 + number)

  for number in numbers:
    signal.signal(number, interrupted)
  where = "tiny shapes on the CPU" if args.tiny else gpu()
  runner.say(f"phase {args.phase}, {args.seconds:g} s: {where}")
  runner.note("run", phase=args.phase, seconds=args.seconds, tiny=args.tiny, gpu=where)
  try:
    runner.run(parts)
  except SystemExit as ending:
    runner.say(f"ended by {signal.Signals(ending.code - 128).name}")
    raise
  return runner.end()


if __name__ == "__main__":
  sys.exit(main())
