"""Measurements of a compiled step: bytes per device, collectives and FLOPs."""

import re
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.stages import Compiled, Lowered, Traced
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func

from jaxft.checkpoint.manager import tree_nbytes
from jaxft.config import Config
from jaxft.hardware import flops, specs
from jaxft.model import attention
from jaxft.model.config import ModelConfig
from jaxft.plan import hlo
from jaxft.sharding import rules
from jaxft.sharding.mesh import make_mesh
from jaxft.training import build, offload
from jaxft.training.build import TrainProgram
from jaxft.training.memory import bytes_per_device, host_bytes, host_state_bytes, max_host_bytes
from jaxft.utils import backend, jax_private
from jaxft.utils.jax_private import MemoryStats
from jaxft.utils.types import Json, PyTree

# libtpu's error message when memory is short. It reports the whole program or, if the compiler
# fails earlier, only the temporaries.
OUT_OF_MEMORY = re.compile(
  r"(?:Used |temporaries \()([\d.]+)([KMGT])(?: of |\) exceeds available HBM \()([\d.]+)([KMGT])"
)
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def measure_step(
  config: Config, cfg: ModelConfig, target: specs.Target, text: bool = False
) -> Json:
  """Compile the steps of `config` and return their memory, FLOPs and traffic.

  If the program does not fit in the device's memory, the result has "needs_bytes" and "has_bytes",
  but no values of the compiled program.

  Args:
    config: the config of the run.
    cfg: its model.
    target: the devices to compile for, which need not exist.
    text: also return the text of the compiled programs, as "text" and "eval_text".

  Raises:
    RequestError: config and target do not match.
    jax.errors.JaxRuntimeError: the compiler fails for another reason than memory.
  """
  mesh = make_mesh(config.mesh, specs.compile_devices(target))
  total_steps = max(config.train.steps, 1)
  program = build.build_train_program(config, cfg, mesh, total_steps, dummy_row(config, cfg))
  state = program.state
  host_mask = program.host_mask
  started = time.monotonic()
  traced = program.train_step.trace(state, program.batch)
  lowered = mark_host_arguments(traced.lower(), program, host_mask)
  result = measure_traced(program, config, cfg, traced)

  def seconds() -> dict[str, float]:
    return {"compile_seconds": round(time.monotonic() - started, 1)}

  # Compile both steps in parallel, because libtpu uses one core. It takes 75 s for GPT-J's train
  # step on eight chips, and 15 s for the eval step.
  with ThreadPoolExecutor(1) as pool:
    lowered_eval = program.eval_step.lower(state.all_params, program.eval_batch)
    lowered_eval = mark_host_arguments(lowered_eval, program, host_mask.all_params)
    eval_future = pool.submit(lowered_eval.compile)
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      match = OUT_OF_MEMORY.search(str(error))
      if not match:
        raise
      needs, has = (int(float(match[i]) * UNITS[match[i + 1]]) for i in (1, 3))
      return result | {"needs_bytes": needs, "has_bytes": has} | seconds()
  if program.offload != "none":
    backend.check_slices(compiled, mesh.devices.flat[0].platform)
  eval_compiled = eval_future.result()
  result |= measure_compiled(program, compiled)
  result |= {"eval_peak_bytes": eval_peak_bytes(program, eval_compiled)} | seconds()
  texts = {"text": compiled.as_text(), "eval_text": eval_compiled.as_text()} if text else {}
  return result | texts


def eval_peak_bytes(program: TrainProgram, compiled: Compiled) -> int:
  """Return a device's peak memory in the eval step, with the optimizer state."""
  mask = program.host_mask.all_params
  on_host = _bytes_where(program.state.all_params, mask, on_host=True)
  peak = step_peak_bytes(compiled.memory_analysis(), program, on_host)
  return peak + argument_bytes(program)["optimizer"]


def measure_traced(program: TrainProgram, config: Config, cfg: ModelConfig, traced: Traced) -> Json:
  """Return values that need no compiler: bytes per device, FLOPs of the step."""
  A, B, T = program.batch["ids"].shape
  mesh = program.batch_sharding.mesh
  compute = program.compute
  state = program.state
  kernel, why_not_faster = attention.resolve_kernel(
    compute.attention,
    mesh.devices.flat[0],
    compute.dtype,
    *(cfg.H, "segments" in program.batch, cfg.attention_dropout > 0),
  )
  tied = cfg.tied and not cfg.classes
  return {
    "device_kind": mesh.devices.flat[0].device_kind,
    "devices": mesh.size,
    "mesh": dict(mesh.shape),
    "accumulation_steps": A,
    "compute_dtype": compute.dtype.name,
    "attention": {"kernel": kernel, "why_not_faster": why_not_faster},
    "arguments": argument_bytes(program),
    "gradient_bytes": 0 if program.offload == "all" else bytes_per_device(program.grad_shapes),
    "host_bytes": host_bytes(program),
    "bytes_on_every_host": max_host_bytes(config, cfg),
    "checkpoint_bytes": tree_nbytes(state.checkpointable),
    "bus_bytes": sum(
      offload.host_traffic(
        program.offload, state.params, state.opt_state, state.frozen, tied, bytes_per_device
      )
    ),
    "logits_bytes": logits_bytes(program, cfg),
    "tokens": A * B * T,
    "flops": flops.jaxpr_flops(traced.jaxpr),
    "model_flops": flops.model_flops(cfg, A * B, T),
  }


def measure_compiled(program: TrainProgram, compiled: Compiled) -> Json:
  """Return the measurements of a compiled train step, in bytes of one device."""
  memory: MemoryStats = compiled.memory_analysis()
  text = compiled.as_text() or ""
  on_host = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
  return memory_breakdown(program, memory) | {
    "argument_bytes": memory.argument_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
    "host_bytes": on_host,
    # In addition to the state and, with offload "all", its gradient.
    "host_temporary_bytes": on_host - host_bytes(program),
    "collective_bytes": hlo.bytes_by_kind(hlo.collectives(text)),
    "moved_bytes": hlo.hbm_bytes(text),
  }


def mark_host_arguments(lowered: Lowered, program: TrainProgram, host_mask: PyTree) -> Lowered:
  """Mark the arguments of a lowered program that are in host memory.

  For CUDA without a device, JAX (0.10 to 0.12) omits these marks, and the program would expect all
  arguments on the device.

  Args:
    lowered: the program; changed in place, and returned.
    program: decides whether anything is offloaded.
    host_mask: tree of bools, true for an argument on the host; the batch, which comes last, is
      excluded.
  """
  if program.offload == "none":
    return lowered
  mask = jax.tree.leaves(host_mask) + [False] * len(jax.tree.leaves(program.batch))
  module = jax_private.stablehlo_module(lowered)
  with module.context, ir.Location.unknown(module.context):
    functions = (op for op in module.body.operations if isinstance(op, func.FuncOp))
    main = next(op for op in functions if "main" in str(op.name))
    arguments = map(ir.DictAttr, main.arg_attrs)
    attributes = [{it.name: it.attr for it in argument} for argument in arguments]
    for argument, on_host in zip(attributes, mask, strict=True):
      if on_host:
        argument["mhlo.memory_kind"] = ir.StringAttr.get("pinned_host")
    main.arg_attrs = ir.ArrayAttr.get([ir.DictAttr.get(argument) for argument in attributes])
  return lowered


def dummy_row(config: Config, cfg: ModelConfig) -> dict[str, np.ndarray]:
  """Return a sequence with the shapes of `config.data`; the data need not exist."""
  T = config.data.sequence_length
  row = {"ids": np.zeros(T, np.int32), "targets": np.zeros(T, np.int32), "mask": np.zeros(T, bool)}
  if config.data.layout == "pack" and not cfg.classes:
    row |= {"segments": row["ids"], "positions": row["ids"]}
  return row


def logits_bytes(program: TrainProgram, cfg: ModelConfig) -> int:
  """Return the bytes of a device's float32 logits, a part of the temporaries."""
  _, B, T = program.batch_sharding.shard_shape(program.batch["ids"].shape)
  padded_vocab = -(-cfg.V // rules.VOCAB_MULTIPLE) * rules.VOCAB_MULTIPLE
  vocab = padded_vocab // program.batch_sharding.mesh.shape["tensor"]
  return 4 * B * (min(program.loss_chunk, T) or T) * (cfg.classes or vocab)


def argument_bytes(program: TrainProgram) -> dict[str, int]:
  """Return the bytes on a device of the step's arguments, by category."""
  state = program.state
  mask = program.host_mask
  return {
    "parameters": _bytes_where(state.all_params, mask.all_params, on_host=False),
    "optimizer": _bytes_where(state.opt_state, mask.opt_state, on_host=False),
    "batch": bytes_per_device(program.batch),
  }


def memory_breakdown(program: TrainProgram, memory: MemoryStats) -> Json:
  """Return the "peak_bytes" of a device, and a "breakdown" that adds up to them.

  The gradient is not an argument. The compiler counts it among its temporaries, and its bytes
  follow from its shardings. All of it exists before any weight changes, because clipping needs its
  norm first. "activations" are the other temporaries.

  Args:
    program: the program of the run.
    memory: `compiled.memory_analysis()` of the train step.
  """
  breakdown = argument_bytes(program)
  on_device = sum(breakdown.values())
  peak = step_peak_bytes(memory, program, host_bytes(program))
  counted_on_host = host_state_bytes(program) if _is_cpu(program) else 0
  # Counters, and padding of a TPU's tiles.
  other = memory.argument_size_in_bytes - counted_on_host - on_device
  temporaries = peak - on_device - other
  copy = min(bytes_per_device(program.compute_params), temporaries)
  grads = 0
  if program.offload != "all":
    grads = min(bytes_per_device(program.grad_shapes), temporaries - copy)
  breakdown |= {"parameters": breakdown["parameters"] + copy, "gradients": grads}
  breakdown |= {"activations": temporaries - copy - grads, "other": other}
  return {"peak_bytes": peak, "breakdown": breakdown}


def _is_cpu(program: TrainProgram) -> bool:
  return program.batch_sharding.mesh.devices.flat[0].platform == "cpu"


def _bytes_where(tree: PyTree, host_mask: PyTree, on_host: bool) -> int:
  """Return the bytes per device of the leaves on the host, or of the other leaves."""
  leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(host_mask), strict=True)
  return bytes_per_device([leaf for leaf, masked in leaves if masked == on_host])


def step_peak_bytes(memory: MemoryStats, program: TrainProgram, on_host: int) -> int:
  """Return the peak memory of a device.

  On a GPU this is the sum of arguments and temporaries, which are one block. Outputs reuse donated
  arguments, except for a few numbers.

  On a TPU it is the compiler's own figure, which is the same from libtpu 0.0.42 to 0.0.51. The sum
  of temporaries is not (6.4 GiB before 0.0.51, 5.2 GiB since, for the same program). With
  `memory.offload` the compiler's figure includes host memory, so we use the sum.

  Args:
    memory: `compiled.memory_analysis()`.
    program: the program of the run.
    on_host: bytes in host memory, which the CPU's compiler includes.
  """
  if program.batch_sharding.mesh.devices.flat[0].platform == "tpu" and program.offload == "none":
    return memory.peak_memory_in_bytes
  peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
  return peak - (on_host if _is_cpu(program) else 0)
