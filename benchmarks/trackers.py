"""What trackers cost a step of GPT-2 124M: python benchmarks/trackers.py [--rows 1] [--length 128] [--writers ...]

Steps in turns: with a line sent to every tracker after each step (a run sends one in `train.log_every`), and without. Trackers
have written what they got before the turn without them begins. Random weights; nothing is read.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from page import put

from jaxft import config as settings
from jaxft import model, program, sharding
from jaxft.checks import TRACKERS
from jaxft.hf import facts
from jaxft.hf.published import PUBLISHED
from jaxft.run.tracking import Lines, console
from jaxft.run.writers import Writers
from jaxft.step import State

TURNS, STEPS = 8, 5
LINE = {"train/loss": 3.2, "train/learning_rate": 5e-5, "train/grad_norm": 1.1, "train/tokens": 10**6}
LINE |= {"perf/tokens_per_second": 1e4, "perf/step_seconds": 0.1, "memory/peak_bytes": 10**9}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rows", type=int, default=1)
  parser.add_argument("--length", type=int, default=128)
  parser.add_argument("--writers", default=",".join(TRACKERS))
  arguments = parser.parse_args()
  config = settings.default()
  config.train.batch_size, config.data.sequence_length = arguments.rows, arguments.length
  config.tracking.writers = tuple(arguments.writers.split(","))
  cfg, T = facts.model_config(PUBLISHED["gpt2"]).with_dropout(0.0), arguments.length
  row = {"ids": np.zeros(T, np.int32), "targets": np.zeros(T, np.int32), "mask": np.zeros(T, bool)}
  run = program.build(config, cfg, sharding.make_mesh(config.mesh), 100, row)
  train_step = run.train_step.lower(run.state, run.batch).compile()
  places = jax.tree.map(lambda leaf: leaf.sharding, run.state)
  new = lambda: nnx.to_pure_dict(nnx.state(model.build(cfg, run.compute)))
  state = jax.jit(lambda: State(jnp.int32(0), params := new(), run.tx.init(params)), out_shardings=places)()
  ids = np.random.default_rng(0).integers(cfg.V, size=run.batch["ids"].shape, dtype=np.int32)
  batch = jax.device_put({"ids": ids, "targets": ids, "mask": np.ones(ids.shape, bool)}, run.batch_sharding)

  console.quiet = True
  seconds = {"with": [], "without": []}
  with tempfile.TemporaryDirectory() as folder:
    lines = [Lines(Path(folder) / name, -1, True) for name in ("metrics.jsonl", "samples.jsonl")]
    with Writers(config, Path(folder), 0, *lines, True) as trackers:
      step = 0
      for turn in range(TURNS + 1):
        for what in ("with", "without") if turn % 2 else ("without", "with"):
          for _ in range(STEPS):
            started, step = time.monotonic(), step + 1
            state, numbers = train_step(state, batch)
            jax.block_until_ready((state, numbers))
            if what == "with":
              trackers.put("metrics", {"step": step} | LINE)
            if turn:  # the first opens the trackers
              seconds[what].append(time.monotonic() - started)
          while any(it._arrived < it._given for it in trackers._writers):
            time.sleep(0.1)
  median = {what: statistics.median(found) for what, found in seconds.items()}
  spread = (max(seconds["without"]) - min(seconds["without"])) / median["without"]
  change = median["with"] / median["without"] - 1
  where = f"{jax.devices()[0].device_kind}, {arguments.rows} x {T} tokens"
  text = f"{where}, {TURNS} turns of {STEPS} steps each way, the medians:\n\n"
  text += "| | a step | of a step |\n|---|---|---|\n"
  text += f"| without trackers | {median['without']:.3f} s | |\n"
  names = ", ".join(config.tracking.writers)
  text += (
    f"| a line after each step to {names} | {median['with']:.3f} s | {change:+.1%} (steps differ by {spread:.0%}) |"
  )
  print(text)
  put("what trackers cost", "benchmarks/trackers.py", text)


if __name__ == "__main__":
  main()
