"""Lowering and compiling the train step: 48 layers against 12, a warm cache against a cold one.

  python benchmarks/compile.py

Each measurement is a process of its own with its own cache folder; they take turns, and medians
count. Nothing is allocated.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile

import children
import page

TURNS = 3
MODELS = {"gpt2": 12, "gpt2-xl": 48}
ONE = """
import sys, time
import numpy as np
from jaxft import config
from jaxft.hf.known_models import PUBLISHED
from jaxft.hf.model_config import from_hf_config
from jaxft.sharding.mesh import make_mesh
from jaxft.training.build import build_train_program
from jaxft.utils import backend
backend.configure_jax()
c = config.default()
c.train.batch_size, c.memory.loss_chunk = 1, 128
cfg, T = from_hf_config(PUBLISHED[sys.argv[1]]), 512
row = {"ids": np.zeros(T, np.int32), "targets": np.zeros(T, np.int32), "mask": np.zeros(T, bool)}
run = build_train_program(c, cfg, make_mesh(c.mesh), 100, row)
started = time.monotonic()
run.train_step.lower(run.state, run.batch).compile()
print(time.monotonic() - started)
"""


def main() -> None:
  argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  ).parse_args()
  seconds = {(model, start): [] for model in MODELS for start in ("cold", "warm")}
  for _ in range(TURNS):
    for model in MODELS:
      with tempfile.TemporaryDirectory() as cache:
        for start in ("cold", "warm"):
          seconds[model, start].append(measure(model, cache))
  median = {key: statistics.median(values) for key, values in seconds.items()}
  lines = [
    f"{page.machine('cpu', 'jax')}: lowering and compiling the train step for the CPU, batch 1 x "
    f"512, medians of {TURNS} runs that took turns, each a process of its own.",
    "",
    "| | cold | warm cache | warm / cold |",
    "|---|---|---|---|",
  ]
  for model, layers in MODELS.items():
    cold, warm = median[model, "cold"], median[model, "warm"]
    lines.append(f"| {model}, {layers} layers | {cold:.2f} s | {warm:.2f} s | {warm / cold:.2f} |")
  ratio = median["gpt2-xl", "cold"] / median["gpt2", "cold"]
  lines += [
    "",
    f"48 layers take **{ratio:.2f} times** as long as 12: layers are stacked and scanned, so the "
    "program is the same.",
  ]
  print("\n".join(lines))
  page.put("compiling", "benchmarks/compile.py", "\n".join(lines))


def measure(model: str, cache: str) -> float:
  environment = children.environment(XDG_CACHE_HOME=cache, JAX_PLATFORMS="cpu")
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  done = subprocess.run(
    [sys.executable, "-c", ONE, model], stdout=subprocess.PIPE, check=True, env=environment
  )
  return float(done.stdout)


if __name__ == "__main__":
  main()
