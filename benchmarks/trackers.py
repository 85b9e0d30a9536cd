"""What trackers cost a step of GPT-2 124M.

  python benchmarks/trackers.py [--rows 1] [--length 128] [--writers ...]

Steps in turns of `train.log_every`: without trackers; with a line to each at the beginning of the
turn, as a run sends it; and the same with trackers that are broken: servers that take the
connection and never say a word, and a folder that is a file. Random weights; nothing is read.
"""

import argparse
import contextlib
import datetime
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from page import put

import jaxft.config
from jaxft.config_checks import TRACKERS
from jaxft.hf import model_config
from jaxft.hf.known_models import PUBLISHED
from jaxft.metrics.sinks import JsonlSink
from jaxft.metrics.trackers import TrackerGroup
from jaxft.model.decoder import init_model
from jaxft.sharding.mesh import make_mesh
from jaxft.training.build import build_train_program
from jaxft.training.train_state import TrainState
from jaxft.utils.console import console

TURNS = 6
LINE = {
  "train/loss": 3.2,
  "train/learning_rate": 5e-5,
  "train/grad_norm": 1.1,
  "train/tokens": 10**6,
}
LINE |= {"perf/tokens_per_second": 1e4, "perf/step_seconds": 0.1, "memory/peak_bytes": 10**9}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rows", type=int, default=1)
  parser.add_argument("--length", type=int, default=128)
  parser.add_argument("--writers", default=",".join(TRACKERS))
  arguments = parser.parse_args()
  config = jaxft.config.default()
  config.train.batch_size, config.data.sequence_length = arguments.rows, arguments.length
  config.tracking.writers = tuple(arguments.writers.split(","))
  cfg, T = model_config.from_hf_config(PUBLISHED["gpt2"]).with_dropout(0.0), arguments.length
  row = {"ids": np.zeros(T, np.int32), "targets": np.zeros(T, np.int32), "mask": np.zeros(T, bool)}
  run = build_train_program(config, cfg, make_mesh(config.mesh), 100, row)
  train_step = run.train_step.lower(run.state, run.batch).compile()
  shardings = jax.tree.map(lambda leaf: leaf.sharding, run.state)

  def new():
    params = nnx.to_pure_dict(nnx.state(init_model(cfg, run.compute)))
    return TrainState(step=jnp.int32(0), params=params, opt_state=run.tx.init(params))

  state = jax.jit(new, out_shardings=shardings)()
  ids = np.random.default_rng(0).integers(cfg.V, size=run.batch["ids"].shape, dtype=np.int32)
  batch = jax.device_put(
    {"ids": ids, "targets": ids, "mask": np.ones(ids.shape, bool)}, run.batch_sharding
  )

  console.quiet = True
  seconds, steps = {"without": [], "with": [], "broken": []}, config.train.log_every
  with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as silent:
    files = JsonlSink(Path(folder), 0, True)
    group_in = lambda name: TrackerGroup(
      config=config, workdir=Path(folder) / name, start=0, files=files, writes=True
    )
    for name in ("working", "broken"):
      (Path(folder) / name).mkdir()
    with contextlib.ExitStack() as until_the_end:
      working = until_the_end.enter_context(group_in("working"))
      send(working, 0)
      wait_for(working)
      break_all(f"http://127.0.0.1:{silent.getsockname()[1]}", Path(folder) / "file")
      broken = until_the_end.enter_context(group_in("broken"))
      for turn in range(1, TURNS + 1):
        for what, writers in {"without": None, "with": working, "broken": broken}.items():
          started = time.monotonic()
          if writers:
            send(writers, turn)
          for _ in range(steps):
            state, numbers = train_step(state, batch)
            jax.block_until_ready((state, numbers))
          seconds[what].append((time.monotonic() - started) / steps)
          wait_for(working)
  median = {what: statistics.median(found) for what, found in seconds.items()}
  spread = (max(seconds["without"]) - min(seconds["without"])) / median["without"]
  where = f"{jax.devices()[0].device_kind}, {arguments.rows} x {T} tokens"
  names = ", ".join(config.tracking.writers)
  rows = {
    "without": "without trackers",
    "with": f"a line to {names}",
    "broken": "the same, and all of them broken",
  }
  text = f"{datetime.date.today()}, {where}, a line in {steps} steps, the medians of {TURNS} turns "
  text += (
    f"(those without trackers differ by {spread:.0%}):\n\n| | a step | of a step |\n|---|---|---|\n"
  )
  for what, name in rows.items():
    change = "" if what == "without" else f"{median[what] / median['without'] - 1:+.1%}"
    text += f"| {name} | {median[what]:.3f} s | {change} |\n"
  print(text)
  put("what trackers cost", "benchmarks/trackers.py", text.rstrip())


def send(writers: TrackerGroup, turn: int) -> None:
  writers.write("metrics", {"step": turn} | LINE, "")


def wait_for(writers: TrackerGroup) -> None:
  while any(it._arrived < it._given for it in writers._clients):
    time.sleep(0.1)


def break_all(server: str, file: Path) -> None:
  file.touch()
  os.environ |= {
    "MLFLOW_TRACKING_URI": server,
    "WANDB_BASE_URL": server,
    "WANDB_MODE": "online",
    "WANDB_API_KEY": "0" * 40,
  }
  os.environ |= {"TENSORBOARD_LOGGING_DIR": str(file), "TRACKIO_DIR": str(file)}


if __name__ == "__main__":
  main()
