"""Generation, side by side with transformers' generate and its cache.

  python benchmarks/generate.py [--model gpt2] [--new 128]

The same random weights, the same prompts of random tokens, greedy. Each turn is a process of its
own, and the contenders take turns; the first call of each, which compiles or allocates, does not
count; medians do. On a GPU all compute in bfloat16, on a CPU in float32. With a static cache
(`cache_implementation="static"`) transformers compiles its forward pass on a GPU. The table goes
into docs/benchmarks.md after each contender; `--contenders jaxft transformers=60` takes these only,
and ends one that has not answered after so many seconds. Needs torch and transformers beside jaxft.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import children
import numpy as np
import page
from children import ROOT, quiet

CONTENDERS = "jaxft", "transformers", "transformers, static cache"


def parsed() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--model", default="gpt2", help="one of the published sizes (jaxft.hf.known_models)"
  )
  parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
  parser.add_argument("--new", type=int, default=128, help="tokens that follow it")
  parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="prompts at once")
  parser.add_argument("--turns", type=int, default=3)
  parser.add_argument(
    "--contenders",
    type=children.contender(CONTENDERS),
    nargs="+",
    metavar="NAME[=SECONDS]",
    default=[(name, None) for name in CONTENDERS],
    help="default: all, without a limit",
  )
  parser.add_argument("--measure", choices=CONTENDERS, help=argparse.SUPPRESS)
  parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
  return parser.parse_args()


def main() -> None:
  args = parsed()
  if args.measure:
    with quiet():
      opened = with_jaxft if args.measure == "jaxft" else with_transformers
      found = measured(args, *opened(args))
    return print(json.dumps(found))
  turns, wrong = {name: [] for name, _ in args.contenders}, []
  with tempfile.TemporaryDirectory() as folder:
    write_model(args, Path(folder))
    for turn in range(1, args.turns + 1):
      for name, seconds in args.contenders:
        now = children.answer(
          [sys.executable, *sys.argv, "--measure", name, "--folder", folder], seconds
        )
        page.note(
          "generate",
          model=args.model,
          contender=name,
          turn=turn,
          prompt=args.prompt,
          new=args.new,
          **now,
        )
        if "error" in now:
          wrong.append(f"turn {turn}, {name}: {now['error']}")
          print(wrong[-1], flush=True)
          continue
        turns[name].append(now)
        speeds = ", ".join(
          f"{speed:,.1f} tokens/s at {rows}" for rows, speed in now["tokens_per_second"].items()
        )
        print(f"turn {turn}, {name}: {speeds}", flush=True)
        device = now["device"]
        what = f"generating with {args.model} on {page.where(device)}"
        page.put(
          what,
          "benchmarks/generate.py",
          text := table(args, {k: of for k, of in turns.items() if of}),
          device,
        )
  if any(turns.values()):
    print(text)
  if wrong:
    sys.exit("\n".join(wrong))


def write_model(args: argparse.Namespace, folder: Path) -> None:
  """The model with random weights, and GPT-2's tokenizer."""
  import transformers

  sys.path.insert(0, str(ROOT / "tests" / "support"))
  import tiny
  from models import PUBLISHED

  facts = dict(PUBLISHED[args.model])
  config = transformers.AutoConfig.for_model(facts.pop("model_type"), **facts)
  transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
  tiny.write_gpt2_bpe(folder)


def with_jaxft(args: argparse.Namespace) -> tuple[Callable, str]:
  import jaxft
  from jaxft.generation.sampling_config import Sampling

  device = children.jax_device()
  ready = jaxft.load(args.folder)
  sampling = Sampling(max_new_tokens=args.new, temperature=0)
  # Token ids in and out, as the peer has them; no end token of random weights should cut a text
  # short.
  generator = ready._generator
  generator.eos_token_id = -1
  return lambda prompts: generator(ready.params, prompts, sampling), device.device_kind


def with_transformers(args: argparse.Namespace) -> tuple[Callable, str]:
  import torch
  import transformers

  cuda = children.torch_device() == "cuda"
  dtype = torch.bfloat16 if cuda else torch.float32
  model = transformers.AutoModelForCausalLM.from_pretrained(
    args.folder, dtype=dtype, attn_implementation="sdpa"
  )
  model = model.eval().to("cuda" if cuda else "cpu")

  def generate(prompts: list[list[int]]) -> list[list[int]]:
    ids = torch.tensor(prompts, device=model.device)
    how = dict(max_new_tokens=args.new, min_new_tokens=args.new, do_sample=False, use_cache=True)
    how |= {"cache_implementation": "static"} if "static" in args.measure else {}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **how)
    return found[:, ids.shape[1] :].tolist()

  return generate, torch.cuda.get_device_name() if cuda else "cpu"


def measured(args: argparse.Namespace, generate: Callable, device: str) -> dict:
  """Tokens a second by the number of prompts, and what was written first."""
  speed, written = {}, None
  for rows in args.rows:
    prompts = np.random.default_rng(0).integers(1000, 40_000, (rows, args.prompt)).tolist()
    generate(prompts)
    began = time.monotonic()
    found = generate(prompts)
    assert all(len(text) == args.new for text in found)
    speed[rows] = rows * args.new / (time.monotonic() - began)
    written = written or found[0]
  return {"tokens_per_second": speed, "first_tokens": written, "device": device}


def table(args: argparse.Namespace, turns: dict[str, list[dict]]) -> str:
  first = {name: of[0]["first_tokens"] for name, of in turns.items()}
  same = sum(
    np.logical_and.accumulate(
      [len(set(tokens)) == 1 for tokens in zip(*first.values(), strict=True)]
    )
  )
  peers = [name for name in turns if name != "jaxft"]
  ratios = [f"to {name}" for name in peers] if "jaxft" in turns else []
  columns = ["prompts at once", *(f"{name}, tokens/s" for name in turns), *ratios]
  lines = [
    f"{page.machine(next(iter(turns.values()))[0]['device'], 'jax', 'torch', 'transformers')}. "
    f"{args.model}, prompts of {args.prompt} tokens, {args.new} new ones, greedy; medians of "
    f"{args.turns} turns, in brackets the slowest and fastest. The first {same} tokens of all are "
    "the same.",
    "",
    f"| {' | '.join(columns)} |",
    f"|{'---|' * len(columns)}",
  ]
  for rows in map(str, args.rows):
    speeds = {
      name: sorted(turn["tokens_per_second"][rows] for turn in of) for name, of in turns.items()
    }
    median = {name: statistics.median(of) for name, of in speeds.items()}
    cells = [f"{median[name]:,.1f} ({of[0]:,.1f} to {of[-1]:,.1f})" for name, of in speeds.items()]
    cells += [f"{median['jaxft'] / median[name]:.2f}" for name in peers if ratios]
    lines.append(f"| {rows} | {' | '.join(cells)} |")
  return "\n".join(lines)


if __name__ == "__main__":
  main()
