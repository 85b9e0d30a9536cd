"""Generation, side by side with transformers' generate and its cache: python benchmarks/generate.py [--model gpt2] [--new 128]

The same random weights, the same prompts of random tokens, greedy. Each turn is a process of its own, and the two take turns;
the first call of each, which compiles or allocates, does not count; medians do. On a GPU both compute in bfloat16, on a CPU in
float32. The table goes into docs/benchmarks.md. Needs torch and transformers beside jaxft.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import page
from scratch import ROOT
from train import quiet

CONTENDERS = "jaxft", "transformers"


def parsed() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", default="gpt2", help="one of the published sizes (jaxft.hf.published)")
  parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
  parser.add_argument("--new", type=int, default=128, help="tokens that follow it")
  parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="prompts at once")
  parser.add_argument("--turns", type=int, default=3)
  parser.add_argument("--measure", choices=CONTENDERS, help=argparse.SUPPRESS)
  parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
  return parser.parse_args()


def main() -> None:
  asked = parsed()
  if asked.measure:
    with quiet():
      opened = {"jaxft": with_jaxft, "transformers": with_transformers}[asked.measure]
      found = measured(asked, *opened(asked))
    return print(json.dumps(found))
  with tempfile.TemporaryDirectory() as folder:
    write_model(asked, Path(folder))
    turns = {name: [] for name in CONTENDERS}
    for turn in range(asked.turns):
      for name in CONTENDERS:
        command = [sys.executable, *sys.argv, "--measure", name, "--folder", folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        turns[name].append(json.loads(done.stdout.splitlines()[-1]))
        told = ", ".join(f"{speed:,.1f} tokens/s at {rows}" for rows, speed in turns[name][-1]["speed"].items())
        print(f"turn {turn + 1}, {name}: {told}", flush=True)
  text = table(asked, turns)
  print(text)
  where = "CPU" if turns["jaxft"][0]["device"] == "cpu" else "GPU"
  page.put(f"generating with {asked.model} on a {where}", "benchmarks/generate.py", text)


def write_model(asked: argparse.Namespace, folder: Path) -> None:
  """The model with random weights, and GPT-2's tokenizer."""
  import transformers

  sys.path.insert(0, str(ROOT / "tests"))
  import tiny

  from jaxft.hf.published import PUBLISHED

  facts = dict(PUBLISHED[asked.model])
  config = transformers.AutoConfig.for_model(facts.pop("model_type"), **facts)
  transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
  tiny.write_gpt2_bpe(folder)


def with_jaxft(asked: argparse.Namespace) -> tuple[Callable, str]:
  import jax

  import jaxft
  from jaxft.sample import Sampling

  ready = jaxft.load(asked.folder)
  sampling = Sampling(max_new_tokens=asked.new, temperature=0)
  # Token ids in and out, as the peer has them; no end token of random weights should cut a text short.
  generator = ready._generator
  generator.eos_token_id = -1
  return lambda prompts: generator(ready.params, prompts, sampling), jax.devices()[0].device_kind


def with_transformers(asked: argparse.Namespace) -> tuple[Callable, str]:
  import torch
  import transformers

  cuda = torch.cuda.is_available()
  dtype = torch.bfloat16 if cuda else torch.float32
  model = transformers.AutoModelForCausalLM.from_pretrained(asked.folder, dtype=dtype, attn_implementation="sdpa")
  model = model.eval().to("cuda" if cuda else "cpu")

  def generate(prompts: list[list[int]]) -> list[list[int]]:
    ids = torch.tensor(prompts, device=model.device)
    how = dict(max_new_tokens=asked.new, min_new_tokens=asked.new, do_sample=False, use_cache=True)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **how)
    return found[:, ids.shape[1] :].tolist()

  return generate, torch.cuda.get_device_name() if cuda else "cpu"


def measured(asked: argparse.Namespace, generate: Callable, device: str) -> dict:
  """Tokens a second by the number of prompts, and what was written first."""
  speed, written = {}, None
  for rows in asked.rows:
    prompts = np.random.default_rng(0).integers(1000, 40_000, (rows, asked.prompt)).tolist()
    generate(prompts)
    began = time.monotonic()
    found = generate(prompts)
    assert all(len(text) == asked.new for text in found)
    speed[rows] = rows * asked.new / (time.monotonic() - began)
    written = written or found[0]
  return {"speed": speed, "written": written, "device": device}


def table(asked: argparse.Namespace, turns: dict[str, list[dict]]) -> str:
  device = turns["jaxft"][0]["device"]
  ours, theirs = (turns[name][0]["written"] for name in CONTENDERS)
  same = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), len(ours))
  lines = [
    f"{page.machine(device, 'jax', 'torch', 'transformers')}. {asked.model}, prompts of {asked.prompt} tokens, "
    f"{asked.new} new ones, greedy; medians of {asked.turns} turns, in brackets the slowest and fastest. The first {same} "
    "tokens of both are the same.",
    "",
    "| prompts at once | jaxft, tokens/s | transformers, tokens/s | ratio |",
    "|---|---|---|---|",
  ]
  for rows in map(str, asked.rows):
    speeds = {name: sorted(turn["speed"][rows] for turn in turns[name]) for name in CONTENDERS}
    cells = [f"{statistics.median(of):,.1f} ({of[0]:,.1f} to {of[-1]:,.1f})" for of in speeds.values()]
    ratio = statistics.median(speeds["jaxft"]) / statistics.median(speeds["transformers"])
    lines.append(f"| {rows} | {' | '.join(cells)} | {ratio:.2f} |")
  return "\n".join(lines)


if __name__ == "__main__":
  main()
