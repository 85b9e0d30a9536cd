"""jaxft against transformers in torch, on the device that is here.

  python benchmarks/agree.py [--model gpt2] [--rows 8]

The same random weights, batches and AdamW on both sides: losses, the first gradient, and the way of
the weights in all steps. jaxft computes as it does by default (bfloat16 and cuDNN's attention on a
GPU, float32 on a CPU), torch in float32 without TF32, which is the reference, and under bfloat16
autocast, which is the yardstick. With `--offloads all none` weights that are streamed are held
against resident ones too. Says DIFFERS, and ends with code 1, where jaxft is further from the
reference than ALLOWED. The peak that was planned is beside the measured one. The table goes into
docs/benchmarks.md.

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
# Streamed and resident weights differ by rounding alone; two swapped leaves would be wrong
# by their whole size.
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
    "--trace", action="store_true", help="print the longest kernels of one more step of the first"
  )
  parser.add_argument("--side", choices=("torch", "jaxft"), help=argparse.SUPPRESS)
  parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
  return parser.parse_args()


def main() -> None:
  args = parsed()
  if args.side:
    del sys.argv[-4:]  # a section's heading is of the command as it was given
    return with_torch(args) if args.side == "torch" else with_jaxft(args)
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


def some_ids(args: argparse.Namespace, step: int) -> np.ndarray:
  """[rows, length + 1] of a Zipf-like draw: random, and yet to be learned."""
  draw = np.random.default_rng(step).zipf(1.3, size=(args.rows, args.length + 1))
  return np.minimum(draw - 1, 50256)


def norm(tensors: Tensors) -> float:
  return math.sqrt(sum(float(np.square(it, dtype=np.float64).sum()) for it in tensors.values()))


def distance(found: Tensors, reference: Tensors) -> float:
  """Relative, over all tensors as one vector."""
  return norm({name: found[name].reshape(it.shape) - it for name, it in reference.items()}) / norm(
    reference
  )


# ---- torch ---------------------------------------------------------------------------------------


def torch_model(args: argparse.Namespace, device: str):
  """Random weights, no dropout; biases and norms are not all zeros and ones."""
  import torch
  import transformers
  from models import PUBLISHED

  facts = dict(PUBLISHED[args.model])
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


def with_torch(args: argparse.Namespace) -> None:
  """Writes the model first, then what it learns, {"float32", "bfloat16"} each, into the folder."""
  import torch
  from safetensors.numpy import save_file

  device = children.torch_device()
  model = torch_model(args, device)
  model.save_pretrained(args.folder / "model")
  (args.folder / "model written").touch()
  start, found = {name: p.detach().clone() for name, p in model.named_parameters()}, {}
  for dtype in ("float32", "bfloat16"):
    with torch.no_grad():
      for name, parameter in model.named_parameters():
        parameter.copy_(start[name])
    found[dtype], gradient = torch_steps(args, model, device, dtype)
    update = {name: p.detach() - start[name] for name, p in model.named_parameters()}
    for what, tensors in (("gradient", gradient), ("update", update)):
      save_file(
        {name: it.cpu().numpy() for name, it in tensors.items()},
        args.folder / f"{what} {dtype}.safetensors",
      )
  found |= {
    "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    "torch": torch.__version__,
  }
  whole = args.folder / "torch.json.part"
  whole.write_text(json.dumps(found))
  whole.rename(args.folder / "torch.json")


def torch_steps(
  args: argparse.Namespace, model, device: str, dtype: str
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
  linear = transformers.get_linear_schedule_with_warmup(adamw, 0, args.steps)
  losses, gradient = [], {}
  for step in range(args.steps):
    ids = torch.from_numpy(some_ids(args, step)).to(device)
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


# ---- jaxft ---------------------------------------------------------------------------------------


def with_jaxft(args: argparse.Namespace) -> None:
  from jaxft.hf import repo

  device = children.jax_device()
  wait_for(args.folder / "model written")
  source, runs = repo.resolve(str(args.folder / "model")), []
  for offload in args.offloads:
    figures, gradient, update = jaxft_run(args, source, device, offload)
    runs.append((figures, gradient, update))
    page.note("agree run", device=device.device_kind, model=args.model, **figures)
    print(describe_run(figures), flush=True)
  report(
    args, runs, json.loads(wait_for(args.folder / "torch.json").read_text()), device.device_kind
  )


def jaxft_run(
  args: argparse.Namespace, source, device, offload: str
) -> tuple[dict[str, Any], Tensors, Tensors]:
  """Figures of the steps, the first gradient, and the way of the weights."""
  import jax

  from jaxft.plan import measure
  from jaxft.sharding.mesh import make_mesh
  from jaxft.training.build import build_train_program
  from jaxft.training.init import init_train_state, load_or_init_params

  config, T = config_of(args, offload), args.length
  row = {"ids": np.zeros(T, np.int32), "targets": np.zeros(T, np.int32), "mask": np.ones(T, bool)}
  run = build_train_program(config, source.cfg, make_mesh(config.mesh, [device]), args.steps, row)
  began = time.monotonic()
  step = run.train_step.trace(run.state, run.batch).lower().compile()
  compiled = time.monotonic() - began
  planned = measure.memory_breakdown(run, step.memory_analysis())
  begin = lambda: init_train_state(run, *load_or_init_params(run, source.cfg, source, config))
  batch = lambda i: jax.device_put(batch_of(some_ids(args, i)), run.batch_sharding)
  state = begin()
  before = as_torch(state.params, source)
  state, numbers, seconds = taken(step, state, [batch(i) for i in range(args.steps)])
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
  if args.trace and offload == args.offloads[0]:
    state = traced(args.folder / "trace", step, state, batch(0))
  del state
  _, gradients, _ = run.grad_fn(begin(), batch(0))  # after the steps, whose peak is wanted alone
  return found, as_torch(gradients, source), update


def config_of(args: argparse.Namespace, offload: str):
  import jaxft.config

  config = jaxft.config.default()
  config.model.path = str(args.folder / "model")
  config.memory.offload = offload
  config.memory.remat = args.remat
  config.optim.update(
    learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, eps=EPS, schedule="linear"
  )
  config.train.batch_size = args.rows
  config.train.steps = args.steps
  config.data.sequence_length = args.length
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
  """One more step; prints its longest kernels. A trace that cannot be made costs a line."""
  import gaps
  import jax

  try:
    with jax.profiler.trace(str(folder)):
      state, numbers = step(state, batch)
      jax.block_until_ready(numbers)
    print(gaps.describe_kernels(folder, 1), flush=True)
  except OSError as error:
    print(f"no trace: {error}", flush=True)
  return state


def as_torch(tree: Any, source) -> Tensors:
  """Parameters or gradients as transformers names and shapes them."""
  from jaxft.hf import export_tensors

  return {
    it.name: np.array(it.to_numpy(), np.float32) for it in export_tensors.hf_tensors(tree, source)
  }


# ---- Report --------------------------------------------------------------------------------------


def report(args: argparse.Namespace, runs: list, torch: dict[str, Any], device: str) -> None:
  """Notes and prints the comparison; ends with code 1 where something differs."""
  from safetensors.numpy import load_file

  (figures, gradient, update), *others = runs
  read = lambda what, dtype: load_file(args.folder / f"{what} {dtype}.safetensors")
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
    "agree", device=device, model=args.model, verdict=verdict, compared=compared, between=between
  )
  text = table(args, [run for run, _, _ in runs], compared, between, verdict, device)
  page.put(
    f"agreement with torch, {name_of(args)} on {page.where(device)}",
    "benchmarks/agree.py",
    text,
    device,
  )
  print(f"{text}\n{verdict}; {'; '.join(describe_run(run) for run, _, _ in runs)}")
  sys.exit(1 if differs else 0)


def between_runs(
  gradient: Tensors, update: Tensors, like: Tensors, like_update: Tensors
) -> dict[str, float]:
  """How far a run of another `memory.offload` is from the first; the worst leaf that counts."""
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


def name_of(args: argparse.Namespace) -> str:
  return f"{args.model}, offload {' and '.join(args.offloads)}"


def describe_run(run: dict[str, Any]) -> str:
  gib = lambda nbytes: f"{nbytes / 2**30:.2f} GiB" if nbytes else "unknown"
  return (
    f"offload={run['offload']}: {run['compute_dtype']}, {run['attention']}, loss "
    f"{run['loss'][0]:.4f} to {run['loss'][-1]:.4f}, {1000 * run['step_seconds']:.0f} ms a step, "
    f"peak {gib(run['peak_bytes'])}, planned {gib(run['planned_peak_bytes'])}, compiled in "
    f"{run['compile_seconds']} s"
  )


def table(
  args: argparse.Namespace, runs: list, compared: dict, between: dict, verdict: str, device: str
) -> str:
  names = {
    "loss": "loss, the largest difference of any step",
    "gradient": "first gradient, relative",
    "update": "way of the weights in all steps, relative",
  }
  lines = [
    f"{page.machine(device, 'jax', 'torch', 'transformers')}. {name_of(args)}: {args.steps} "
    f"steps of {args.rows} x {args.length} tokens, `memory.remat={args.remat}`, AdamW, no "
    f"dropout, against torch in float32: **{verdict}**.",
    "",
    f"| | jaxft, {runs[0]['compute_dtype']}, {runs[0]['attention']} | torch, bfloat16 autocast |",
    "|---|---|---|",
    *(
      f"| {names[what]} | {ours:.1e} | {theirs:.1e} |" for what, (ours, theirs) in compared.items()
    ),
    "",
    *(f"- {describe_run(run)}" for run in runs),
  ]
  for offload, apart in between.items():
    figures = ", ".join(f"{what} {far:.1e}" for what, far in apart.items())
    lines.append(f"- offload={offload} against {runs[0]['offload']}, relative: {figures}")
  return "\n".join(lines)


if __name__ == "__main__":
  main()
