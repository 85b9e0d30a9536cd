"""Train with jaxft's model, data and train step in a loop of your own.

    python examples/own_loop.py

The losses are those of `jaxft.finetune` with the same config, bit for bit. Your loop does without
what `finetune` adds: checkpoints, resume, evaluation, metrics.jsonl and the report.
"""

from pathlib import Path

import jax
from ml_collections import ConfigDict

import jaxft
from jaxft import config
from jaxft.training.inputs import RunRequest, load_inputs
from jaxft.training.loop import train_batches
from jaxft.training.stages import build_run, initial_state

QUICKSTART = Path(__file__).resolve().parent.parent / "assets" / "quickstart"


def train(c: ConfigDict, export_dir: str) -> list[float]:
  """Train as `c` says, export the model, and return the loss of each step."""
  request = RunRequest(config=config.resolve(c), workdir=Path(export_dir))
  inputs = load_inputs(request)  # the mesh, the tokenizer, the packed sequences
  run = build_run(request, inputs)  # the jitted train step and the shardings of its state
  state = initial_state(run)  # weights and optimizer state, on the devices

  losses = []
  batches = train_batches(run)
  for step in range(1, inputs.total_steps + 1):
    state, metrics = run.program.train_step(state, next(batches))  # donates the old state
    losses.append(float(metrics["loss"]))
    print(f"step {step}: loss {losses[-1]:.4f}, gradient norm {float(metrics['grad_norm']):.3f}")

  model = jaxft.load(c.model.path)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, model.params)  # over all devices
  model.params = jax.device_put(state.params, shardings)
  print(model.generate(["Once upon a time"], max_new_tokens=20)[0].text)
  model.export(export_dir)  # read back and compared, like every export
  return losses


if __name__ == "__main__":
  c = config.default()
  c.model.path = str(QUICKSTART / "model")
  c.data.train = (str(QUICKSTART / "stories.jsonl"),)
  c.train.steps, c.train.batch_size = 20, 8
  c.data.sequence_length = 128
  c.optim.learning_rate = 2e-3
  train(c, "runs/own_loop")
