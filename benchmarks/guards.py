"""What safety costs a step of GPT-2 124M.

  python benchmarks/guards.py [--rows 8] [--length 512]

The train step with and without the look for numbers that are not finite (and what follows from it:
the old state where there are some), in turns; then, beside them, a step's line in metrics.jsonl and
the checksums of a checkpoint, which come once in `train.save_every` steps. Random weights; nothing
is read.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import page
from flax import nnx

import jaxft.config
import jaxft.training.build
from jaxft.checkpoint.checksums import checksums, nonfinite_leaves
from jaxft.hf import model_config
from jaxft.hf.known_models import PUBLISHED
from jaxft.metrics.logger import MetricsLogger
from jaxft.metrics.sinks import ConsoleSink, JsonlSink
from jaxft.model.decoder import init_model
from jaxft.sharding import per_device
from jaxft.sharding.mesh import make_mesh
from jaxft.training.train_state import TrainState
from jaxft.utils.console import ProgressBar, console

TURNS = 5


def build(config, unguarded: bool):
  cfg = model_config.from_hf_config(PUBLISHED["gpt2"]).with_dropout(0.0)
  T = config.data.sequence_length
  row = {"ids": np.zeros(T, np.int32), "targets": np.zeros(T, np.int32), "mask": np.zeros(T, bool)}
  found = per_device.make_nonfinite_check
  # "Nothing is wrong" is then known at compile time, and all that depends on it is left out.
  if unguarded:
    per_device.make_nonfinite_check = lambda shardings: (
      lambda tree: jnp.zeros(len(jax.tree.leaves(tree)), bool)
    )
    finite, jnp.isfinite = jnp.isfinite, lambda x: jnp.ones(jnp.shape(x), bool)
  try:
    run = jaxft.training.build.build_train_program(config, cfg, make_mesh(config.mesh), 100, row)
    return cfg, run, run.train_step.lower(run.state, run.batch).compile()
  finally:
    per_device.make_nonfinite_check = found
    if unguarded:
      jnp.isfinite = finite


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rows", type=int, default=8)
  parser.add_argument("--length", type=int, default=512)
  arguments = parser.parse_args()
  config = jaxft.config.default()
  config.train.batch_size, config.data.sequence_length = arguments.rows, arguments.length
  cfg, run, guarded = build(config, False)
  _, _, bare = build(config, True)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, run.state)

  def new():
    params = nnx.to_pure_dict(nnx.state(init_model(cfg, run.compute)))
    return TrainState(step=jnp.int32(0), params=params, opt_state=run.tx.init(params))

  state = jax.jit(new, out_shardings=shardings)()
  rng = np.random.default_rng(0)
  ids = rng.integers(cfg.V, size=run.batch["ids"].shape, dtype=np.int32)
  batch = jax.device_put(
    {"ids": ids, "targets": ids, "mask": np.ones(ids.shape, bool)}, run.batch_sharding
  )
  seconds = {"guarded": [], "bare": []}
  for turn in range(TURNS + 1):
    for name, step in (("guarded", guarded), ("bare", bare)):
      started = time.monotonic()
      state, numbers = step(state, batch)
      jax.block_until_ready((state, numbers))
      if turn:  # the first is to warm up
        seconds[name].append(time.monotonic() - started)
  median = {name: statistics.median(values) for name, values in seconds.items()}

  started = time.monotonic()
  checksums(state), nonfinite_leaves(state)  # compiles
  compiled = time.monotonic()
  checksums(state), nonfinite_leaves(state)
  sums = time.monotonic() - compiled
  console.quiet = True
  with tempfile.TemporaryDirectory() as folder, ProgressBar("training", 1) as meter:
    logger = MetricsLogger(
      train=config.train,
      sinks=(JsonlSink(Path(folder), 0, True), ConsoleSink()),
      total_steps=10**9,
      num_rows=1,
      device=jax.devices()[0],
      nonfinite_names=lambda bad: [],
    )
    host = jax.device_get(numbers)
    started = time.monotonic()
    for step in range(1, 1001):
      logger.log_step(step, host, meter)
    log_seconds = (time.monotonic() - started) / 1000

  every, bare = config.train.save_every, median["bare"]
  share = lambda more: f"{100 * more / bare:+.2f} %"
  spread = (max(seconds["bare"]) - min(seconds["bare"])) / bare
  lines = [
    f"{page.machine(jax.devices()[0].device_kind, 'jax')}, GPT-2 124M shape, {arguments.rows} x "
    f"{arguments.length} tokens: medians of {TURNS} steps of each kind, in turns.",
    "",
    "| | a step | of a step |",
    "|---|---|---|",
    f"| without guards | {bare:.2f} s | (the turns differ by {100 * spread:.0f} %) |",
    "| with the check of gradients, weights and optimizer state, and the conditional update "
    f"| {median['guarded']:.2f} s | {share(median['guarded'] - bare)} |",
    f"| a line of metrics | {1000 * log_seconds:.2f} ms | {share(log_seconds)} |",
    f"| checksums of a checkpoint, once in {every} steps | {1000 * sums / every:.1f} ms | "
    f"{share(sums / every)} |",
  ]
  print("\n".join(lines))
  page.put("what safety costs", "benchmarks/guards.py", "\n".join(lines))


if __name__ == "__main__":
  main()
