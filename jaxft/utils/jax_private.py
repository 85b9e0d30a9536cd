"""Private JAX: everything that jaxft needs and that has no public name (jax 0.10 to 0.12)."""

from typing import Any, TypeAlias

import jax
from jax._src import clusters, distributed, xla_bridge
from jaxlib.mlir import ir

MemoryStats: TypeAlias = Any  # of `compiled.memory_analysis()`; its module has no stubs


def backends_are_initialized() -> bool:
  """Return whether JAX has looked for devices already, and read its environment."""
  return xla_bridge.backends_are_initialized()


def distributed_state() -> distributed.State:
  """The processes of `jax.distributed`: client (the key-value store), process_id, num_processes.

  `jax.process_count()` would start JAX, whose environment may not be complete yet.
  """
  return distributed.global_state


def detect_cluster(
  coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> tuple[str | None, int | None, int | None]:
  """What `jax.distributed.initialize` learns from SLURM, Open MPI, Kubernetes or a TPU."""
  detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
  return detect(coordinator, num_processes, process_id, None, None, timeout)[:3]


def pretend_cudnn(version: tuple[int, int], device: tuple[int, int]) -> None:
  """Let JAX trace cuDNN's attention without a GPU.

  JAX asks the library and the first device. XLA leaves the call in the compiled program as it is;
  it does not know the workspace that cuDNN would take. `device` is the GPU's compute capability.
  """
  from jax._src.cudnn import fused_attention_stablehlo as calls

  def parse(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))

  calls.check_cudnn_version = lambda: 10000 * version[0] + 100 * version[1]
  calls.check_compute_capability = lambda capability: device >= parse(capability)
  calls.is_cuda_compute_capability_equal = lambda capability: device == parse(capability)


def stablehlo_module(lowered: jax.stages.Lowered) -> ir.Module:
  """The MLIR module of a lowered program, to be changed before it is compiled."""
  return lowered._lowering.stablehlo()
