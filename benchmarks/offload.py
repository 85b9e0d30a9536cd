"""Optimizer steps of a model that is larger than the device: python benchmarks/offload.py [--model EleutherAI/gpt-j-6b]

On a GPU XLA's pool is held to `--pool` GiB, so that a large card stands in for a small one; elsewhere there is no such limit.
Weights and tokens are random; nothing is read. The plan's peak beside the measured one, tokens/s and bytes over the bus go into
docs/benchmarks.md.
"""

import argparse
import json
import os
import shutil
import subprocess
import time

import page


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", default="EleutherAI/gpt-j-6b", help="one of the published sizes (jaxft.hf.published)")
  parser.add_argument("--rows", type=int, default=1, help="of a batch")
  parser.add_argument("--micro", type=int, default=0, help="rows at once; 0: all")
  parser.add_argument("--length", type=int, default=2048, help="tokens a row")
  parser.add_argument("--steps", type=int, default=10)
  parser.add_argument("--offload", default="all", choices=("none", "optimizer", "all"))
  parser.add_argument("--remat", default="full", choices=("none", "dots", "full"))
  parser.add_argument("--optimizer", default="adamw")
  parser.add_argument("--pool", type=float, default=8.0, help="GiB of the GPU that XLA may use; 0: as much as it wants")
  parser.add_argument("--json", action="store_true", help="end with a line of JSON")
  return parser.parse_args()


def config_of(asked: argparse.Namespace):
  """The run's settings; jaxft is imported late, because the size of the pool is set before JAX starts."""
  from jaxft import config as settings

  config = settings.default()
  config.model.path, config.memory.offload, config.optim.name = asked.model, asked.offload, asked.optimizer
  config.model.dropout, config.data.train, config.train.steps = 0.0, ("random",), asked.steps
  config.train.batch_size, config.train.micro_batch_size = asked.rows, asked.micro
  config.data.sequence_length = asked.length
  config.memory.remat, config.memory.loss_chunk = asked.remat, 256
  return config


def hold_pool(gib: float) -> None:
  """A share of the card's memory."""
  if gib and shutil.which("nvidia-smi"):
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    mib = int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0])
    os.environ["XLA_CLIENT_MEM_FRACTION"] = f"{gib * 1024 / mib:.6f}"


def main() -> None:
  asked = arguments()
  hold_pool(asked.pool)
  import jax
  import numpy as np

  from jaxft import program, sharding
  from jaxft.plan import answer, figures, show

  program.prepare_backend()
  config = config_of(asked)
  cfg = answer.model_facts(config)
  run = program.build(
    config, cfg, sharding.make_mesh(config.mesh, jax.devices()[:1]), asked.steps, figures.blank_row(config, cfg)
  )
  rng = np.random.default_rng(0)
  program.must_hold(run, config)

  def drawn(leaf) -> np.ndarray:
    numbers = rng.standard_normal(leaf.shape, np.float32)
    numbers *= np.float32(0.02)
    return numbers

  random = lambda leaf: jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: drawn(leaf))
  state = program.begin(run, jax.tree.map(random, run.state.params), {})
  traced = run.train_step.trace(run.state, run.batch)
  started = time.monotonic()
  step = traced.lower().compile()
  planned = figures.of_traced(run, config, cfg, traced) | figures.of_compiled(run, step)
  print(f"compiled in {time.monotonic() - started:.1f} s; planned peak {show.size(planned['peak_bytes'])}", flush=True)
  seconds = []
  for i in range(asked.steps):
    ids = rng.integers(cfg.V, size=(*run.batch["ids"].shape[:2], asked.length + 1), dtype=np.int32)
    batch = {"ids": ids[..., :-1], "targets": ids[..., 1:], "mask": np.ones(ids[..., 1:].shape, bool)}
    started = time.monotonic()
    state, numbers = step(state, jax.device_put(batch, run.batch_sharding))
    loss = float(numbers["loss"])
    seconds.append(time.monotonic() - started)
    print(f"step {i + 1}/{asked.steps}  loss {loss:.4f}  {seconds[-1]:.2f} s", flush=True)
  device = jax.devices()[0]
  measured = (device.memory_stats() or {}).get("peak_bytes_in_use")
  typical = sorted(seconds)[len(seconds) // 2]
  peaks = f"Measured peak {show.size(measured)}, planned {show.size(planned['peak_bytes'])}"
  pool = f", {asked.pool:g} GiB of the card for XLA" if asked.pool else ""
  text = (
    f"{page.machine(device.device_kind, 'jax')}: {asked.model}, {asked.rows} x {asked.length} tokens, "
    f"`memory.offload={asked.offload}`{pool}. {peaks}; {asked.rows * asked.length / typical:,.0f} tokens/s, "
    f"{show.size(planned['bus_bytes'])} over the bus a step."
  )
  print(text)
  if device.platform != "cpu" and not asked.json:
    page.put(f"a model larger than the device, {asked.model}", "benchmarks/offload.py", text)
  if asked.json:
    found = {"measured_bytes": measured, "planned_bytes": planned["peak_bytes"], "seconds": typical}
    print(json.dumps(found | {"device_kind": device.device_kind, "jax": jax.__version__}))


if __name__ == "__main__":
  main()
