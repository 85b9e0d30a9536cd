"""jaxft against transformers in torch, on the device that is here: python benchmarks/agree.py [--model gpt2] [--rows 8]

The same random weights, batches and AdamW on both sides: losses, the first gradient, and the way of the weights in all steps.
jaxft computes as it does by default (bfloat16 and cuDNN's attention on a GPU, float32 on a CPU), torch in float32 without TF32,
which is the reference, and under bfloat16 autocast, which is the yardstick. With `--offloads all none` weights that are
streamed are held against resident ones too. Says DIFFERS, and ends with code 1, where jaxft is further from the reference than
ALLOWED. The peak that was planned is beside the measured one. The table goes into docs/benchmarks.md.

Needs torch and transformers beside jaxft.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import children
import numpy as np
import page

LEARNING_RATE, WEIGHT_DECAY, EPS = 1e-4, 0.1, 1e-8
# Times the distance of bfloat16 torch to float32 torch, and what comes on top.
ALLOWED = {"loss": (2, 1e-3), "gradient": (4, 1e-3), "update": (4, 1e-2)}
# Streamed and resident weights differ by rounding alone; a leaf in another's place would be wrong by its whole size.
ALLOWED_LEAF = 0.5
Tensors = dict[str, np.ndarray]


def parsed() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--model", default="gpt2", help="one of the published sizes (jaxft.hf.known_models)"
  )
  parser.add_argument("--rows", type=int, default=8, help="of a batch")
  parser.add_argument("--length", type=int, default=1024, help="tokens a row")
  parser.add_argument("--steps", type=int, default=30)
  parser.add_argument("--remat", default="none", choices=("none", "dots", "full"))
  parser.add_argument(
    "--offloads", nargs="+", choices=("none", "optimizer", "all"), default=["none"]
  )
  parser.add_argument(
    "--trace", action="store_true", help="tell the longest kernels of one more step of the first"
  )
  parser.add_argument("--side", choices=("torch", "jaxft"), help=argparse.SUPPRESS)
  parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
  return parser.parse_args()


def main() -> None:
  asked = parsed()
  if asked.side:
    del sys.argv[-4:]  # a section's heading is of the command as it was given
    return with_torch(asked) if asked.side == "torch" else with_jaxft(asked)
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, *sys.argv, "--folder", folder, "--side"]
    start = lambda side: subprocess.Popen([*command, side], env=children.environment())
    theirs, ours = start("torch"), start("jaxft")
    try:
      while ours.poll() is None and theirs.poll() in (None, 0):
        time.sleep(0.1)
      failed = ours.poll() is None
    finally:
      for child in (theirs, ours):
        child.kill()
        child.wait()
  sys.exit("the torch side failed" if failed else ours.returncode)


def wait_for(file: Path) -> Path:
  while not file.exists():
    time.sleep(0.1)
  return file


def some_ids(asked: argparse.Namespace, step: int) -> np.ndarray:
  """[rows, length + 1] of a Zipf-like draw: random, and yet to be learned."""
  draw = np.random.default_rng(step).zipf(1.3, size=(asked.rows, asked.length + 1))
  return np.minimum(draw - 1, 50256)


def norm(tensors: Tensors) -> float:
  return math.sqrt(sum(float(np.square(it, dtype=np.float64).sum()) for it in tensors.values()))


def distance(found: Tensors, reference: Tensors) -> float:
  """Relative, over all tensors as one vector."""
  return norm({name: found[name].reshape(it.shape) - it for name, it in reference.items()}) / norm(
    reference
  )


# ---- torch -----------------------------------------------------------------------------------------------------------------


def torch_model(asked: argparse.Namespace, device: str):
  """Random weights, no dropout; biases and norms are not all zeros and ones."""
  import torch
  import transformers
  from models import PUBLISHED

  facts = dict(PUBLISHED[asked.model])
  config = transformers.AutoConfig.for_model(facts.pop("model_type"), **facts)
  for name in (
    "embd_pdrop",
    "attn_pdrop",
    "resid_pdrop",
    "embed_dropout",
    "attention_dropout",
    "resid_dropout",
  ):
    if hasattr(config, name):
      setattr(config, name, 0.0)
  config.use_cache = False
  torch.manual_seed(0)
  attention = "sdpa" if config.model_type == "gpt2" else "eager"
  with torch.device(device):
    model = transformers.AutoModelForCausalLM.from_config(
      config, attn_implementation=attention
    ).train()
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim == 1:
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
  return model


def with_torch(asked: argparse.Namespace) -> None:
  """Writes the model first, then what it learns, {"float32", "bfloat16"} each, into the folder."""
  import torch
  from safetensors.numpy import save_file

  device = children.torch_device()
  model = torch_model(asked, device)
  model.save_pretrained(asked.folder / "model")
  (asked.folder / "model written").touch()
  start, found = {name: p.detach().clone() for name, p in model.named_parameters()}, {}
  for dtype in ("float32", "bfloat16"):
    with torch.no_grad():
      for name, parameter in model.named_parameters():
        parameter.copy_(start[name])
    found[dtype], gradient = torch_steps(asked, model, device, dtype)
    update = {name: p.detach() - start[name] for name, p in model.named_parameters()}
    for what, tensors in (("gradient", gradient), ("update", update)):
      save_file(
        {name: it.cpu().numpy() for name, it in tensors.items()},
        asked.folder / f"{what} {dtype}.safetensors",
      )
  found |= {
    "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    "torch": torch.__version__,
  }
  whole = asked.folder / "torch.json.part"
  whole.write_text(json.dumps(found))
  whole.rename(asked.folder / "torch.json")


def torch_steps(
  asked: argparse.Namespace, model, device: str, dtype: str
) -> tuple[list[float], dict]:
  """The losses and the first gradient."""
  import torch
  import transformers

  weights = list(model.parameters())
  groups = [
    {"params": [p for p in weights if p.ndim == 2], "weight_decay": WEIGHT_DECAY},
    {"params": [p for p in weights if p.ndim == 1], "weight_decay": 0.0},
  ]
  adamw = torch.optim.AdamW(groups, lr=LEARNING_RATE, eps=EPS)
  linear = transformers.get_linear_schedule_with_warmup(adamw, 0, asked.steps)
  losses, gradient = [], {}
  for step in range(asked.steps):
    ids = torch.from_numpy(some_ids(asked, step)).to(device)
    adamw.zero_grad()
    with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
      logits = model(ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    gradient = gradient or {name: p.grad.detach().clone() for name, p in model.named_parameters()}
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    adamw.step()
    linear.step()
    losses.append(loss.item())
  return losses, gradient


# ---- jaxft -----------------------------------------------------------------------------------------------------------------


def with_jaxft(asked: argparse.Namespace) -> None:
  from jaxft.hf import repo

  device = children.jax_device()
  wait_for(asked.folder / "model written")
  source, runs = repo.resolve(str(asked.folder / "model")), []
  for offload in asked.offloads:
    figures, gradient, update = jaxft_run(asked, source, device, offload)
    runs.append((figures, gradient, update))
    page.note("agree run", device=device.device_kind, model=asked.model, **figures)
    print(told(figures), flush=True)
  report(
    asked, runs, json.loads(wait_for(asked.folder / "torch.json").read_text()), device.device_kind
  )


def jaxft_run(
  asked: argparse.Namespace, source, device, offload: str
) -> tuple[dict[str, Any], Tensors, Tensors]:
  """Figures of the steps, the first gradient, and the way of the weights."""
  import jax

  from jaxft.plan import measure
  from jaxft.sharding.mesh import make_mesh
  from jaxft.training.build import build_train_program
  from jaxft.training.init import init_train_state, load_or_init_params

  config, T = config_of(asked, offload), asked.length
  row = {"ids": np.zeros(T, np.int32), "targets": np.zeros(T, np.int32), "mask": np.ones(T, bool)}
  run = build_train_program(config, source.cfg, make_mesh(config.mesh, [device]), asked.steps, row)
  began = time.monotonic()
  step = run.train_step.trace(run.state, run.batch).lower().compile()
  compiled = time.monotonic() - began
  planned = measure.memory_breakdown(run, step.memory_analysis())
  begin = lambda: init_train_state(run, *load_or_init_params(run, source.cfg, source, config))
  batch = lambda i: jax.device_put(batch_of(some_ids(asked, i)), run.batch_sharding)
  state = begin()
  before = as_torch(state.params, source)
  state, numbers, seconds = taken(step, state, [batch(i) for i in range(asked.steps)])
  found = {
    "offload": offload,
    "compute_dtype": run.compute.dtype.name,
    "attention": run.compute.attention,
    "loss": [float(it["loss"]) for it in numbers],
    "grad_norm": [float(it["grad_norm"]) for it in numbers],
    "step_seconds": statistics.median(seconds),
    "compile_seconds": round(compiled, 1),
    "planned_peak_bytes": planned["peak_bytes"],
    "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),  # of this process so far
  }
  update = {name: after - before[name] for name, after in as_torch(state.params, source).items()}
  if asked.trace and offload == asked.offloads[0]:
    state = traced(asked.folder / "trace", step, state, batch(0))
  del state
  _, gradients, _ = run.grad_fn(begin(), batch(0))  # after the steps, whose peak is wanted alone
  return found, as_torch(gradients, source), update


def config_of(asked: argparse.Namespace, offload: str):
  import jaxft.config

  config = jaxft.config.default()
  config.model.path = str(asked.folder / "model")
  config.memory.offload = offload
  config.memory.remat = asked.remat
  config.optim.update(
    learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, eps=EPS, schedule="linear"
  )
  config.train.batch_size = asked.rows
  config.train.steps = asked.steps
  config.data.sequence_length = asked.length
  return config


def batch_of(ids: np.ndarray) -> dict[str, np.ndarray]:
  ids = ids[None].astype(np.int32)
  return {"ids": ids[..., :-1], "targets": ids[..., 1:], "mask": np.ones(ids[..., 1:].shape, bool)}


def taken(step, state, batches: list) -> tuple[Any, list[dict], list[float]]:
  """The state after the batches, and metrics and seconds of each."""
  import jax

  numbers, seconds = [], []
  for batch in batches:
    began = time.monotonic()
    state, now = step(state, batch)
    numbers.append(jax.device_get(now))
    seconds.append(time.monotonic() - began)
  return state, numbers, seconds


def traced(folder: Path, step, state, batch):
  """One more step; its longest kernels are told. A trace that cannot be made costs a line."""
  import gaps
  import jax

  try:
    with jax.profiler.trace(str(folder)):
      state, numbers = step(state, batch)
      jax.block_until_ready(numbers)
    print(gaps.kernels_told(folder, 1), flush=True)
  except OSError as error:
    print(f"no trace: {error}", flush=True)
  return state


def as_torch(tree: Any, source) -> Tensors:
  """Parameters or gradients as transformers names and shapes them."""
  from jaxft.hf import export_tensors

  return {
    it.name: np.array(it.to_numpy(), np.float32) for it in export_tensors.hf_tensors(tree, source)
  }


# ---- What is told of both --------------------------------------------------------------------------------------------------


def report(asked: argparse.Namespace, runs: list, torch: dict[str, Any], device: str) -> None:
  """Notes and prints the comparison; ends with code 1 where something differs."""
  from safetensors.numpy import load_file

  (figures, gradient, update), *others = runs
  read = lambda what, dtype: load_file(asked.folder / f"{what} {dtype}.safetensors")
  away = lambda losses: float(np.abs(np.subtract(losses, torch["float32"])).max())
  compared = {"loss": (away(figures["loss"]), away(torch["bfloat16"]))}
  for what, tensors in (("gradient", gradient), ("update", update)):
    reference = read(what, "float32")
    compared[what] = distance(tensors, reference), distance(read(what, "bfloat16"), reference)
  allowed = {what: factor * compared[what][1] + more for what, (factor, more) in ALLOWED.items()}
  differs = [what for what, (ours, _) in compared.items() if not ours <= allowed[what]]
  between = {
    run["offload"]: between_runs(first, way, gradient, update) for run, first, way in others
  }
  for offload, apart in between.items():
    differs += [
      f"{what} of offload={offload}"
      for what, far in apart.items()
      if not far <= limit(what, compared)
    ]
  if torch["device"] != device:
    differs.append(f"the device: torch computed on {torch['device']}")
  verdict = f"DIFFERS: {', '.join(differs)}" if differs else "agrees"
  page.note(
    "agree", device=device, model=asked.model, verdict=verdict, compared=compared, between=between
  )
  text = table(asked, [run for run, _, _ in runs], compared, between, verdict, device)
  page.put(
    f"agreement with torch, {name_of(asked)} on {page.where(device)}",
    "benchmarks/agree.py",
    text,
    device,
  )
  print(f"{text}\n{verdict}; {'; '.join(told(run) for run, _, _ in runs)}")
  sys.exit(1 if differs else 0)


def between_runs(
  gradient: Tensors, update: Tensors, like: Tensors, like_update: Tensors
) -> dict[str, float]:
  """How far a run of another `memory.offload` is from the first one; the worst leaf among those that weigh something."""
  all_of = norm(like)
  leaves = [name for name, it in like.items() if norm({name: it}) > 1e-3 * all_of]
  worst = max(distance({name: gradient[name]}, {name: like[name]}) for name in leaves)
  return {
    "gradient": distance(gradient, like),
    "update": distance(update, like_update),
    "worst leaf": worst,
  }


def limit(what: str, compared: dict[str, tuple[float, float]]) -> float:
  """Of what streamed and resident weights may differ by: as far as bfloat16 is from float32."""
  return ALLOWED_LEAF if what == "worst leaf" else compared[what][1] + ALLOWED[what][1]


def name_of(asked: argparse.Namespace) -> str:
  return f"{asked.model}, offload {' and '.join(asked.offloads)}"


def told(run: dict[str, Any]) -> str:
  gib = lambda nbytes: f"{nbytes / 2**30:.2f} GiB" if nbytes else "not told"
  return (
    f"offload={run['offload']}: {run['compute_dtype']}, {run['attention']}, loss {run['loss'][0]:.4f} to "
    f"{run['loss'][-1]:.4f}, {1000 * run['step_seconds']:.0f} ms a step, peak {gib(run['peak_bytes'])}, planned "
    f"{gib(run['planned_peak_bytes'])}, compiled in {run['compile_seconds']} s"
  )


def table(
  asked: argparse.Namespace, runs: list, compared: dict, between: dict, verdict: str, device: str
) -> str:
  names = {
    "loss": "loss, the largest difference of any step",
    "gradient": "first gradient, relative",
    "update": "way of the weights in all steps, relative",
  }
  lines = [
    f"{page.machine(device, 'jax', 'torch', 'transformers')}. {name_of(asked)}: {asked.steps} steps of {asked.rows} x "
    f"{asked.length} tokens, `memory.remat={asked.remat}`, AdamW, no dropout, against torch in float32: **{verdict}**.",
    "",
    f"| | jaxft, {runs[0]['compute_dtype']}, {runs[0]['attention']} | torch, bfloat16 autocast |",
    "|---|---|---|",
    *(
      f"| {names[what]} | {ours:.1e} | {theirs:.1e} |" for what, (ours, theirs) in compared.items()
    ),
    "",
    *(f"- {told(run)}" for run in runs),
  ]
  for offload, apart in between.items():
    figures = ", ".join(f"{what} {far:.1e}" for what, far in apart.items())
    lines.append(f"- offload={offload} against {runs[0]['offload']}, relative: {figures}")
  return "\n".join(lines)


if __name__ == "__main__":
  main()
