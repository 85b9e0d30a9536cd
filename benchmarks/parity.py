"""Write docs/parity.md: jaxft against transformers in torch, for every published size.

  python benchmarks/parity.py

Random weights of the published shapes, float32, on the CPU. If a model and its reference do not fit
in memory together, the model loses layers, never width. Each framework runs in a separate process;
files carry the numbers between them.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import children
import numpy as np
from children import ROOT

T, PADDING, STEPS, STEP_T = 300, 43, 10, 64  # longer than GPT-Neo's window of 256, with padding too
RATE, DECAY, EPS = 1e-3, 0.1, 1e-6
HEADER = """# Parity with transformers

This page compares jaxft with transformers in torch: the same random weights, float32, on a CPU. \
`python benchmarks/parity.py`
made it on {date} with {versions}, on {machine}. It took {minutes} minutes.

| model | layers | parameters | rounding | logits | left padding | right padding | loss | \
gradient | AdamW | AdamW, table |
|---|---|---|---|---|---|---|---|---|---|---|
"""
FOOTER = """
- **layers**: fewer than published if ten steps of both frameworks would not fit into {memory} GiB.
- **rounding**: torch's rounding error, the largest absolute difference between the logits of \
transformers in float32 and in
  float64 with the same weights. It is the precision that float32 allows for a model. GPT-Neo \
does not scale its attention scores. With random
  weights, the softmax of a wide GPT-Neo is close to a hard choice, and rounding grows from layer \
to layer.
- **logits**: the largest absolute difference over 2 x {T} tokens, and the largest absolute \
logit. With padding, {padding} tokens
  of a sequence are padding, and only the real ones count.
- **loss**: the absolute difference of the mean loss, which is about 10.8 nats.
- **gradient**: the largest difference in a leaf, relative to the largest entry of that leaf. The \
table has the worst leaf.
- **AdamW**: the largest absolute difference of any weight after {steps} steps of 2 x {step_t} \
tokens. The learning rate falls from
  {rate} to 0, decay is {decay}, eps {eps}, and gradients are clipped to a norm of 1. GPT-2's key \
biases are left out: they do not
  change the softmax, so their gradient is only rounding.
- **AdamW, table**: the same for the token table. Most of its rows are in no batch, and their \
gradients are sums that nearly cancel.
  Adam divides the remaining rounding error by its own size. GPT-J's head is also such a table, \
but is counted with the weights.

## Tests

`tests/hf/test_families.py` compares three small models of each family with transformers, with \
tied and untied heads. Their odd sizes
distinguish every axis.

- The logits of up to 600 tokens agree within 1e-5, the gradients and the weights after ten AdamW \
steps within 1e-4.
- The 64 tokens of greedy decoding are the same.
- An export of unchanged weights has the same bytes as the import.
- Tensor names and parameter counts of nine published sizes are exact.

In `tests/plan/test_real_sizes.py`, three AdamW steps of the real 124M shape have the same losses \
within 1e-4.
"""


def reference(name: str, layers: int, folder: Path) -> None:
  """transformers: writes the model and what it computes into `folder`."""
  import torch
  import transformers
  from safetensors.torch import save_file

  from jaxft.hf.known_models import PUBLISHED

  config = transformers.AutoConfig.for_model(**with_layers(PUBLISHED[name], layers))
  for dropout in (
    "embd_pdrop",
    "attn_pdrop",
    "resid_pdrop",
    "embed_dropout",
    "attention_dropout",
    "resid_dropout",
  ):
    if hasattr(config, dropout):
      setattr(config, dropout, 0.0)
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim == 1:  # biases and norms must not be zeros and ones
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
  model.save_pretrained(folder / "model")

  numbers = {}
  for side, real in masks().items():
    positions = np.maximum(real.cumsum(1) - 1, 0)
    arguments = (
      dict(attention_mask=torch.from_numpy(real), position_ids=torch.from_numpy(positions))
      if side
      else {}
    )
    with torch.no_grad():
      numbers[f"logits{side}"] = model(torch.from_numpy(some_ids(0, T)), **arguments).logits.numpy()
  ids = torch.from_numpy(some_ids(0, T))
  with torch.no_grad():
    exact = model.double()(ids).logits.numpy()
    numbers["rounding"] = np.abs(numbers["logits"] - exact).max()
    del exact
  model.float()
  loss = model(ids, labels=ids).loss
  loss.backward()
  np.savez(folder / "numbers.npz", loss=loss.item(), **numbers)
  save_file({key: p.grad for key, p in model.named_parameters()}, folder / "gradients.safetensors")

  groups = [
    {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": DECAY},
    {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
  ]
  adamw = torch.optim.AdamW(groups, lr=RATE, eps=EPS)
  linear = transformers.get_linear_schedule_with_warmup(adamw, 0, STEPS)
  for step in range(STEPS):
    ids = torch.from_numpy(some_ids(step, STEP_T))
    adamw.zero_grad()
    model(ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adamw.step()
    linear.step()
  save_file(
    {key: p.detach() for key, p in model.named_parameters()}, folder / "trained.safetensors"
  )


def compare(folder: Path) -> None:
  """jaxft: reads the folder, computes the same, prints the differences as JSON."""
  import jax
  import jax.numpy as jnp
  from flax import nnx
  from safetensors import safe_open

  import jaxft.config
  import jaxft.model.decoder
  from jaxft.hf import export_tensors, load_weights, repo
  from jaxft.model.compute import ComputeConfig
  from jaxft.model.loss import cross_entropy_sum
  from jaxft.sharding import rules
  from jaxft.sharding.mesh import make_mesh
  from jaxft.training.build import build_train_program
  from jaxft.training.train_state import TrainState

  source = repo.resolve(str(folder / "model"))
  graph, shapes, _ = jaxft.model.decoder.abstract_model(
    source.cfg, ComputeConfig(vocab_multiple=rules.VOCAB_MULTIPLE)
  )
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  params = load_weights.load_params(source, shapes, jax.tree.map(lambda _: here, shapes))
  wanted = np.load(folder / "numbers.npz")
  found = {"parameters": jaxft.model.decoder.parameter_count(source.cfg)}

  @jax.jit
  def logits(params, ids, real, positions):
    decoder = nnx.merge(graph, params)
    return decoder.logits(decoder(ids, segments_BT=real, positions_BT=positions)[0])

  ids = some_ids(0, T).astype(np.int32)
  for side, real in masks().items():
    positions = np.maximum(real.cumsum(1) - 1, 0).astype(np.int32)
    difference = (
      np.asarray(logits(params, ids, real.astype(np.int32), positions)) - wanted[f"logits{side}"]
    )
    found[f"logits{side}"] = float(np.abs(difference[real == 1]).max())
  found["rounding"] = float(wanted["rounding"])
  found["largest logit"] = float(np.abs(wanted["logits"]).max())

  def loss(params):
    decoder, mask = nnx.merge(graph, params), jnp.ones((2, T - 1), bool)
    hidden, _ = decoder(ids[:, :-1])
    return cross_entropy_sum(hidden, decoder.head(), ids[:, 1:], mask, 128) / mask.sum()

  value, gradients = jax.jit(jax.value_and_grad(loss))(params)
  found["loss"] = abs(float(value) - float(wanted["loss"]))
  found["gradient"] = 0.0
  with safe_open(folder / "gradients.safetensors", "numpy") as theirs:
    for tensor in export_tensors.hf_tensors(gradients, source):
      gradient = theirs.get_tensor(tensor.name)
      worst = float(np.abs(tensor.to_numpy() - gradient).max() / np.abs(gradient).max())
      found["gradient"] = max(found["gradient"], worst)
  del gradients

  config = jaxft.config.default()
  config.optim.update(learning_rate=RATE, weight_decay=DECAY, eps=EPS, schedule="linear")
  config.train.batch_size = 2
  row = {
    "ids": np.zeros(STEP_T - 1, np.int32),
    "targets": np.zeros(STEP_T - 1, np.int32),
    "mask": np.ones(STEP_T - 1, bool),
  }
  run = build_train_program(config, source.cfg, make_mesh(config.mesh), STEPS, row)
  state = TrainState(step=jnp.int32(0), params=params, opt_state=run.tx.init(params))
  del params
  for step in range(STEPS):
    ids = some_ids(step, STEP_T).astype(np.int32)[None]
    mask = np.ones((1, 2, STEP_T - 1), bool)
    state, _ = run.train_step(state, {"ids": ids[..., :-1], "targets": ids[..., 1:], "mask": mask})
  found["weights"] = found["table"] = 0.0
  with safe_open(folder / "trained.safetensors", "numpy") as theirs:
    for tensor in export_tensors.hf_tensors(state.params, source):
      difference = np.abs(tensor.to_numpy() - theirs.get_tensor(tensor.name))
      if tensor.name.endswith("c_attn.bias"):
        difference = np.delete(difference, np.s_[source.cfg.D : 2 * source.cfg.D])
      where = "table" if tensor.name == "transformer.wte.weight" else "weights"
      found[where] = max(found[where], float(difference.max()))
  print(json.dumps(found))


def with_layers(config: dict, layers: int) -> dict:
  """The config with its first layers only."""
  config = dict(config)
  if config["model_type"] == "gpt_neo":
    pattern, times = config["attention_types"][0]
    return config | {"num_layers": layers, "attention_types": [[(pattern * times)[:layers], 1]]}
  return config | {"n_layer": layers}


def layers_that_fit(config: dict, memory: int) -> tuple[int, int]:
  """How many layers can be trained in `memory` bytes, and how many there are.

  Training takes four copies, and one more for both frameworks to load.
  """
  from jaxft.hf.model_config import from_hf_config
  from jaxft.model.decoder import parameter_count

  layers = from_hf_config(config).L
  for fewer in range(layers, 1, -1):
    if 20 * parameter_count(from_hf_config(with_layers(config, fewer))) < memory:
      return fewer, layers
  return 1, layers


def some_ids(seed: int, length: int) -> np.ndarray:
  return np.random.default_rng(seed).integers(50257, size=(2, length))


def masks() -> dict[str, np.ndarray]:
  """1 for a real token; none is padding, then the first ones of a row, then the last ones."""
  left, right = np.ones((2, T), np.int64), np.ones((2, T), np.int64)
  left[0, :PADDING], right[1, -PADDING:] = 0, 0
  return {"": np.ones((2, T), np.int64), " left": left, " right": right}


def measure(name: str, layers: int) -> dict:
  with tempfile.TemporaryDirectory() as folder:
    child = [sys.executable, __file__, "--folder", folder]
    subprocess.run(
      [*child, "--reference", name, str(layers)], check=True, env=children.environment()
    )
    compared = subprocess.run(child, check=True, stdout=subprocess.PIPE, env=children.environment())
  return json.loads(compared.stdout.splitlines()[-1])


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--only", nargs="*", metavar="NAME", help="these models (default: all); the file is not written"
  )
  parser.add_argument(
    "--memory", type=int, default=18, metavar="GIB", help="memory to use (default: 18)"
  )
  parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
  parser.add_argument("--reference", nargs=2, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.folder:
    if arguments.reference:
      return reference(arguments.reference[0], int(arguments.reference[1]), arguments.folder)
    return compare(arguments.folder)

  from jaxft.hf.known_models import PUBLISHED

  started, rows = datetime.datetime.now(), []
  for name in arguments.only or PUBLISHED:
    layers, of = layers_that_fit(PUBLISHED[name], arguments.memory * 2**30)
    found = measure(name, layers)
    rows.append(
      f"| {name} | {layers} of {of} | {found['parameters']:,} | {found['rounding']:.1e} | "
      f"{found['logits']:.1e} of {found['largest logit']:.1f} | "
      f"{found['logits left']:.1e} | {found['logits right']:.1e} | {found['loss']:.1e} | "
      f"{found['gradient']:.1e} | {found['weights']:.1e} | {found['table']:.1e} |"
    )
    print(rows[-1], flush=True)
    if not arguments.only:  # after each, so that a run that is cut short has its rows
      write(rows, started, arguments.memory)


def write(rows: list[str], started: datetime.datetime, memory: int) -> None:
  packages = ("jax", "flax", "optax", "transformers", "torch")
  head = HEADER.format(
    date=started.date(),
    versions=", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages),
    machine=f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
    minutes=round((datetime.datetime.now() - started).total_seconds() / 60),
    steps=STEPS,
  )
  foot = FOOTER.format(
    T=T, padding=PADDING, steps=STEPS, step_t=STEP_T, rate=RATE, decay=DECAY, eps=EPS, memory=memory
  )
  (ROOT / "docs" / "parity.md").write_text(head + "\n".join(rows) + "\n" + foot, encoding="utf-8")


if __name__ == "__main__":
  main()
