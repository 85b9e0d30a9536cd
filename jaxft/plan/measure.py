"""What the compiler says of a run's step: bytes a device, collectives, operations; for devices that are there or not."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxlib.mlir import ir
from ml_collections import ConfigDict

from jaxft.checkpoint.manager import tree_nbytes
from jaxft.hardware import flops, specs
from jaxft.model import attention
from jaxft.model.config import ModelConfig
from jaxft.plan import hlo
from jaxft.sharding import rules
from jaxft.sharding.mesh import make_mesh
from jaxft.training import offload
from jaxft.training.build import (
  TrainProgram,
  build_train_program,
  bytes_per_device,
  host_bytes,
  host_state_bytes,
  max_host_bytes,
)
from jaxft.utils import backend

# What libtpu says where memory is short, of all that a program takes or, before it gets so far, of its temporaries.
OUT_OF_MEMORY = re.compile(
  r"(?:Used |temporaries \()([\d.]+)([KMGT])(?: of |\) exceeds available HBM \()([\d.]+)([KMGT])"
)
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def measure_step(
  config: ConfigDict, cfg: ModelConfig, target: specs.Target, text: bool = False
) -> dict[str, Any]:
  """What one optimizer step of `config` takes on `target`.

  Where the compiler refuses because memory is short, "needs_bytes" and "has_bytes" are there in place of what only a compiled
  program tells. Raises RequestError, or what the compiler raises for any other reason.

  Args:
    text: give the compiled programs' texts too, as "text" and "eval_text".
  """
  mesh = make_mesh(config.mesh, specs.compile_devices(target))
  run = build_train_program(config, cfg, mesh, max(config.train.steps, 1), dummy_row(config, cfg))
  started = time.monotonic()
  traced = run.train_step.trace(run.state, run.batch)
  lowered, found = (
    mark_host_arguments(traced.lower(), run, run.host_mask),
    measure_traced(run, config, cfg, traced),
  )
  seconds = lambda: {"compile_seconds": round(time.monotonic() - started, 1)}
  # libtpu works on one core: it takes 75 s for GPT-J's train step on eight chips, and 15 s for the eval step.
  with ThreadPoolExecutor(1) as beside:
    lowered_eval = mark_host_arguments(
      run.eval_step.lower(run.state.all_params, run.eval_batch), run, run.host_mask.all_params
    )
    eval_compiled = beside.submit(lowered_eval.compile)
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      short = OUT_OF_MEMORY.search(str(error))
      if not short:
        raise
      needs, has = (int(float(short[i]) * UNITS[short[i + 1]]) for i in (1, 3))
      return found | {"needs_bytes": needs, "has_bytes": has} | seconds()
  if run.offload != "none":
    backend.check_slices(compiled, mesh.devices.flat[0].platform)
  evaluation = eval_compiled.result()
  found |= (
    measure_compiled(run, compiled)
    | {"eval_peak_bytes": eval_peak_bytes(run, evaluation)}
    | seconds()
  )
  return found | ({"text": compiled.as_text(), "eval_text": evaluation.as_text()} if text else {})


def eval_peak_bytes(run: TrainProgram, compiled: Any) -> int:
  """Most memory of a device while the compiled eval step runs, beside the optimizer state, which stays where it is."""
  weights = bytes_per_device(
    [
      leaf
      for leaf, there in _zip_with_mask(run.state.all_params, run.host_mask.all_params)
      if there
    ]
  )
  return (
    step_peak_bytes(compiled.memory_analysis(), run, weights) + argument_bytes(run)["optimizer"]
  )


def measure_traced(
  run: TrainProgram, config: ConfigDict, cfg: ModelConfig, traced: Any
) -> dict[str, Any]:
  """What is known before a compiler runs. Bytes are of one device, operations ("flops") of the whole step."""
  A, B, T = run.batch["ids"].shape
  mesh = run.batch_sharding.mesh
  rows = cfg.H, "segments" in run.batch, cfg.attention_dropout > 0
  kernel, why_not_faster = attention.resolve_kernel(
    run.compute.attention, mesh.devices.flat[0], run.compute.dtype, *rows
  )
  return {
    "device_kind": mesh.devices.flat[0].device_kind,
    "devices": mesh.size,
    "mesh": dict(mesh.shape),
    "accumulation_steps": A,
    "compute_dtype": run.compute.dtype.name,
    "attention": {"kernel": kernel, "why_not_faster": why_not_faster},
    "arguments": argument_bytes(run),
    "gradient_bytes": 0 if run.offload == "all" else bytes_per_device(run.grad_shapes),
    "host_bytes": host_bytes(run),
    "bytes_on_every_host": max_host_bytes(config, cfg),
    "checkpoint_bytes": tree_nbytes(run.state.checkpointable),
    "bus_bytes": sum(
      offload.host_traffic(
        run.offload,
        run.state.params,
        run.state.opt_state,
        run.state.frozen,
        cfg.tied and not cfg.classes,
        bytes_per_device,
      )
    ),
    "logits_bytes": logits_bytes(run, cfg),
    "tokens": A * B * T,
    "flops": flops.jaxpr_flops(traced.jaxpr),
    "model_flops": flops.model_flops(cfg, A * B, T),
  }


def measure_compiled(run: TrainProgram, compiled: Any) -> dict[str, Any]:
  """What the compiled train step tells, in bytes of one device."""
  memory, program_text = compiled.memory_analysis(), compiled.as_text()
  on_host = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
  return memory_breakdown(run, memory) | {
    "argument_bytes": memory.argument_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
    "host_bytes": on_host,
    "host_temporary_bytes": on_host
    - host_bytes(run),  # beside the state and, with "all", its gradient
    "collective_bytes": hlo.bytes_by_kind(hlo.collectives(program_text)),
    "moved_bytes": hlo.hbm_bytes(program_text),
  }


def mark_host_arguments(lowered: Any, run: TrainProgram, kept: Any) -> Any:
  """Marks in a lowered program which of its arguments, leaves as in `kept` and a batch, are in the host's memory.

  Without a device jax (0.10 to 0.12) leaves that out for CUDA, and the program would expect all of them on the device.
  """
  if run.offload == "none":
    return lowered
  kept = jax.tree.leaves(kept) + [False] * len(jax.tree.leaves(run.batch))
  module = lowered._lowering.stablehlo()
  with module.context, ir.Location.unknown(module.context):
    main = next(op for op in module.body.operations if "main" in str(op.name))
    attributes = [{it.name: it.attr for it in argument} for argument in main.arg_attrs]
    for argument, on_host in zip(attributes, kept, strict=True):
      if on_host:
        argument["mhlo.memory_kind"] = ir.StringAttr.get("pinned_host")
    main.arg_attrs = ir.ArrayAttr.get([ir.DictAttr.get(argument) for argument in attributes])
  return lowered


def dummy_row(config: ConfigDict, cfg: ModelConfig) -> dict[str, np.ndarray]:
  """A row shaped as `config.data` makes them; the data itself need not be there."""
  T = config.data.sequence_length
  row = {"ids": np.zeros(T, np.int32), "targets": np.zeros(T, np.int32), "mask": np.zeros(T, bool)}
  if config.data.layout == "pack" and not cfg.classes:
    row |= {"segments": row["ids"], "positions": row["ids"]}
  return row


def logits_bytes(run: TrainProgram, cfg: ModelConfig) -> int:
  """Of the float32 logits that a device has at once; they come and go within the temporaries."""
  _, B, T = run.batch_sharding.shard_shape(run.batch["ids"].shape)
  rows = (
    -(-cfg.V // rules.VOCAB_MULTIPLE)
    * rules.VOCAB_MULTIPLE
    // run.batch_sharding.mesh.shape["tensor"]
  )
  return 4 * B * (min(run.loss_chunk, T) or T) * (cfg.classes or rows)


def argument_bytes(run: TrainProgram) -> dict[str, int]:
  """Bytes a device of what goes into the step."""
  kept = run.host_mask
  parts = {
    "parameters": (run.state.all_params, kept.all_params),
    "optimizer": (run.state.opt_state, kept.opt_state),
  }
  bytes_here = lambda *trees: bytes_per_device(
    [leaf for leaf, there in _zip_with_mask(*trees) if not there]
  )
  return {what: bytes_here(*trees) for what, trees in parts.items()} | {
    "batch": bytes_per_device(run.batch)
  }


def memory_breakdown(run: TrainProgram, memory: Any) -> dict[str, Any]:
  """{"peak_bytes", "breakdown"} of a device, whose parts add up to the peak.

  The gradient is no argument: its bytes follow from its shardings, and the compiler has them among its temporaries; all of it
  exists before any weight changes, because its norm is known first. "activations" are the other temporaries.

  Args:
    memory: `compiled.memory_analysis()` of the train step.
  """
  on_host, parts = host_bytes(run), argument_bytes(run)
  peak = step_peak_bytes(memory, run, on_host)
  # Counters, and what tiles of a TPU fill up.
  other = (
    memory.argument_size_in_bytes
    - (host_state_bytes(run) if _is_cpu(run) else 0)
    - sum(parts.values())
  )
  rest = peak - sum(parts.values()) - other
  copy = min(bytes_per_device(run.compute_params), rest)
  gradients = 0 if run.offload == "all" else min(bytes_per_device(run.grad_shapes), rest - copy)
  parts |= {"parameters": parts["parameters"] + copy, "gradients": gradients}
  return {
    "peak_bytes": peak,
    "breakdown": parts | {"activations": rest - copy - gradients, "other": other},
  }


def _is_cpu(run: TrainProgram) -> bool:
  return run.batch_sharding.mesh.devices.flat[0].platform == "cpu"


def _zip_with_mask(tree: Any, kept: Any) -> zip:
  """Leaves, each with whether the host keeps it."""
  return zip(jax.tree.leaves(tree), jax.tree.leaves(kept), strict=True)


def step_peak_bytes(memory: Any, run: TrainProgram, on_host: int) -> int:
  """Most memory of a device at once; `on_host` bytes are kept in the host's memory, which on a CPU the compiler counts too.

  A GPU takes all temporaries as one block, next to the arguments; outputs live in donated arguments, but for some numbers. On a
  TPU the compiler's own figure counts, which is the same from libtpu 0.0.42 to 0.0.51; its sum of temporaries is not (6.4 GiB
  before 0.0.51, 5.2 from then on, for the same program). With `memory.offload` its own figure has the host's part in it.
  """
  if run.batch_sharding.mesh.devices.flat[0].platform == "tpu" and run.offload == "none":
    return memory.peak_memory_in_bytes
  taken = (
    memory.argument_size_in_bytes + memory.temp_size_in_bytes - (on_host if _is_cpu(run) else 0)
  )
  return taken + memory.output_size_in_bytes - memory.alias_size_in_bytes
