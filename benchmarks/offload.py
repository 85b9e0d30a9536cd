"""Optimizer steps of a model that is larger than the device.

  python benchmarks/offload.py [--model EleutherAI/gpt-j-6b]

On a GPU XLA's pool is held to `--pool` GiB, so that a large card stands in for a small one;
elsewhere there is no such limit. Weights and tokens are random; nothing is read. The plan's peak
beside the measured one, tokens/s and bytes over the bus go into docs/benchmarks.md.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import time

import children
import numpy as np
import page


def parsed() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--model",
    default="EleutherAI/gpt-j-6b",
    help="one of the published sizes (jaxft.hf.known_models)",
  )
  parser.add_argument("--rows", type=int, default=1, help="of a batch")
  parser.add_argument("--micro", type=int, default=0, help="rows at once; 0: all")
  parser.add_argument("--length", type=int, default=2048, help="tokens a row")
  parser.add_argument("--steps", type=int, default=10)
  parser.add_argument("--offload", default="all", choices=("none", "optimizer", "all"))
  parser.add_argument("--remat", default="full", choices=("none", "dots", "full"))
  parser.add_argument("--optimizer", default="adamw")
  parser.add_argument(
    "--pool",
    type=float,
    default=8.0,
    help="GiB of the GPU that XLA may use; 0: as much as it wants",
  )
  parser.add_argument("--json", action="store_true", help="end with a line of JSON")
  return parser.parse_args()


def config_of(args: argparse.Namespace):
  """The run's settings; jaxft is imported late: the size of the pool is set before JAX starts."""
  import jaxft.config

  config = jaxft.config.default()
  config.model.path = args.model
  config.memory.offload = args.offload
  config.optim.name = args.optimizer
  config.model.dropout, config.data.train, config.train.steps = 0.0, ("random",), args.steps
  config.train.batch_size, config.train.micro_batch_size = args.rows, args.micro
  config.data.sequence_length = args.length
  config.memory.remat, config.memory.loss_chunk = args.remat, 256
  return config


def hold_pool(gib: float) -> None:
  """A share of the card's memory."""
  if gib and shutil.which("nvidia-smi"):
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    mib = int(
      subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    )
    os.environ["XLA_CLIENT_MEM_FRACTION"] = f"{gib * 1024 / mib:.6f}"


def repeated(block: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """The numbers of `block` again and again: to draw each of 6 billion takes a minute."""
  return np.resize(block, shape)


def prepared(args: argparse.Namespace) -> tuple:
  """The run, its random state, its compiled step, and what is planned of it."""
  import jax
  import models

  import jaxft.sharding.mesh
  from jaxft.hf import known_models
  from jaxft.plan import measure, planner, rendering
  from jaxft.training.build import build_train_program
  from jaxft.training.init import init_train_state
  from jaxft.training.memory import check_fits

  device = children.jax_device()
  config = config_of(args)
  known_models.PUBLISHED.update(models.TINY)  # for answer.model_facts
  cfg = planner.resolve_model_config(config)
  mesh = jaxft.sharding.mesh.make_mesh(config.mesh, [device])
  run = build_train_program(config, cfg, mesh, args.steps, measure.dummy_row(config, cfg))
  check_fits(run, config)
  # A prime number of them: rows of a matrix are not alike.
  block = np.random.default_rng(0).standard_normal(2**24 + 43, np.float32) * np.float32(0.02)
  placed = lambda leaf: jax.make_array_from_callback(
    leaf.shape, leaf.sharding, lambda index: repeated(block, leaf.sharding.shard_shape(leaf.shape))
  )
  started = time.monotonic()
  state = init_train_state(run, jax.tree.map(placed, run.state.params), {})
  drawn = time.monotonic()
  traced = run.train_step.trace(run.state, run.batch)
  step = traced.lower().compile()
  planned = measure.measure_traced(run, config, cfg, traced) | measure.measure_compiled(run, step)
  print(
    f"state made in {drawn - started:.1f} s, compiled in {time.monotonic() - drawn:.1f} s; planned "
    f"peak {rendering.format_bytes(planned['peak_bytes'])}, on the host "
    f"{rendering.format_bytes(planned['host_bytes'])}",
    flush=True,
  )
  return run, cfg.V, state, step, planned


def taken(args: argparse.Namespace, run, vocabulary: int, state, step) -> list[dict]:
  """Steps of random tokens."""
  import jax

  rng, found = np.random.default_rng(1), []
  for i in range(args.steps):
    ids = rng.integers(
      vocabulary, size=(*run.batch["ids"].shape[:2], args.length + 1), dtype=np.int32
    )
    batch = {
      "ids": ids[..., :-1],
      "targets": ids[..., 1:],
      "mask": np.ones(ids[..., 1:].shape, bool),
    }
    started = time.monotonic()
    state, numbers = step(state, jax.device_put(batch, run.batch_sharding))
    loss = float(numbers["loss"])
    found.append({"loss": loss, "step_seconds": time.monotonic() - started})
    print(
      f"step {i + 1}/{args.steps}  loss {loss:.4f}  {found[-1]['step_seconds']:.2f} s", flush=True
    )
  return found


def main() -> None:
  args = parsed()
  hold_pool(args.pool)
  import jax

  from jaxft.plan import rendering

  run, vocabulary, state, step, planned = prepared(args)
  steps = taken(args, run, vocabulary, state, step)
  device = jax.devices()[0]
  found = {
    "settings": {key: value for key, value in vars(args).items() if key != "json"},
    "device": device.device_kind,
    "jax": jax.__version__,
    "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    "planned_peak_bytes": planned["peak_bytes"],
    "host_bytes": planned["host_bytes"],
    "bus_bytes": planned["bus_bytes"],
    "step_seconds": statistics.median(it["step_seconds"] for it in steps),
    "loss": [it["loss"] for it in steps],
  }
  found["tokens_per_second"] = args.rows * args.length / found["step_seconds"]
  if args.json:
    return print(json.dumps(found))
  page.note("offload", **found)
  pool = f", {args.pool:g} GiB of the card for XLA" if args.pool else ""
  text = (
    f"{page.machine(device.device_kind, 'jax')}: {args.model}, {args.rows} x {args.length} "
    f"tokens, `memory.offload={args.offload}`{pool}. Measured peak "
    f"{rendering.format_bytes(found['peak_bytes'])}, planned "
    f"{rendering.format_bytes(found['planned_peak_bytes'])}; {found['step_seconds']:.2f} s a step, "
    f"{found['tokens_per_second']:,.0f} tokens/s, {rendering.format_bytes(found['bus_bytes'])} "
    "over the bus a step."
  )
  print(text)
  if page.OUT or device.platform != "cpu":
    what = f"a model larger than the device, {args.model} on {page.where(device.device_kind)}"
    page.put(what, "benchmarks/offload.py", text, device.device_kind)


if __name__ == "__main__":
  main()
