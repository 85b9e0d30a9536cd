"""Lowering and compiling the train step: 48 layers against 12, a warm cache against a cold one. python benchmarks/compile.py

Each measurement is a process of its own with its own cache folder; they take turns, and medians count. Nothing is allocated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TURNS = 3
ONE = """
import sys, time
import numpy as np
from jaxft import config, program, sharding
from jaxft.hf import facts
from jaxft.hf.published import PUBLISHED
program.prepare_backend()
c = config.default()
c.train.batch_size, c.memory.loss_chunk = 1, 128
cfg, T = facts.model_config(PUBLISHED[sys.argv[1]]), 512
row = {"ids": np.zeros(T, np.int32), "targets": np.zeros(T, np.int32), "mask": np.zeros(T, bool)}
run = program.build(c, cfg, sharding.make_mesh(c.mesh), 100, row)
started = time.monotonic()
run.train_step.lower(run.state, run.batch).compile()
print(time.monotonic() - started)
"""


def main() -> None:
  argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
  seconds = {(model, start): [] for model in ("gpt2", "gpt2-xl") for start in ("cold", "warm")}
  for _ in range(TURNS):
    for model in ("gpt2", "gpt2-xl"):
      with tempfile.TemporaryDirectory() as cache:
        for start in ("cold", "warm"):
          seconds[model, start].append(measure(model, cache))
  median = {key: statistics.median(values) for key, values in seconds.items()}
  for (model, start), value in median.items():
    print(f"{model:8} {start}  {value:5.2f} s  {json.dumps([round(s, 2) for s in seconds[model, start]])}")
  print(f"48 layers / 12 layers, cold: {median['gpt2-xl', 'cold'] / median['gpt2', 'cold']:.2f}x")
  for model in ("gpt2", "gpt2-xl"):
    print(f"{model}: warm / cold: {median[model, 'warm'] / median[model, 'cold']:.2f}x")


def measure(model: str, cache: str) -> float:
  environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": cache, "JAX_PLATFORMS": "cpu"}
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  done = subprocess.run([sys.executable, "-c", ONE, model], stdout=subprocess.PIPE, check=True, env=environment)
  return float(done.stdout)


if __name__ == "__main__":
  main()
