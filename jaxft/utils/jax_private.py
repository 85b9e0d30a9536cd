"""All uses of JAX's private API (jax 0.10 to 0.12)."""

from typing import Any, TypeAlias

import jax
from jax._src import clusters, distributed, xla_bridge
from jaxlib.mlir import ir

MemoryStats: TypeAlias = Any  # result of `compiled.memory_analysis()`; its module has no stubs


def backends_are_initialized() -> bool:
  """Return whether JAX has started: it has read its environment and found devices."""
  return xla_bridge.backends_are_initialized()


def distributed_state() -> distributed.State:
  """Return the state of `jax.distributed`.

  Its fields include `client` (the key-value store), `process_id` and `num_processes`.
  `jax.process_count()` would start JAX, possibly before its environment is complete.
  """
  return distributed.global_state


def detect_cluster(
  coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> tuple[str | None, int | None, int | None]:
  """Fill in the arguments that are None from SLURM, Open MPI, Kubernetes or a TPU.

  `jax.distributed.initialize` does the same. Raises any error of the detection.
  """
  detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
  return detect(coordinator, num_processes, process_id, None, None, timeout)[:3]


def pretend_cudnn(version: tuple[int, int], device: tuple[int, int]) -> None:
  """Let JAX trace cuDNN's attention without a GPU.

  JAX would ask the library and the first device. XLA keeps the call in the compiled program, but
  its memory figures lack cuDNN's workspace.

  Args:
    version: cuDNN version, (major, minor).
    device: compute capability of the GPU, (major, minor).
  """
  from jax._src.cudnn import fused_attention_stablehlo as calls

  def parse(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))

  calls.check_cudnn_version = lambda: 10000 * version[0] + 100 * version[1]
  calls.check_compute_capability = lambda capability: device >= parse(capability)
  calls.is_cuda_compute_capability_equal = lambda capability: device == parse(capability)


def stablehlo_module(lowered: jax.stages.Lowered) -> ir.Module:
  """Return the MLIR module of a lowered program, for edits before compiling."""
  return lowered._lowering.stablehlo()
