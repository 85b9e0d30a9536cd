"""Predict the device and host memory of a run, before it allocates any."""

import math

import jax

from jaxft.config import Config
from jaxft.errors import RequestError
from jaxft.model.compute import ComputeConfig
from jaxft.model.config import ModelConfig
from jaxft.model.decoder import abstract_model
from jaxft.sharding import rules
from jaxft.training import offload, optimizer
from jaxft.training.build import TrainProgram
from jaxft.utils import backend
from jaxft.utils.types import PyTree


def bytes_per_device(tree: PyTree) -> int:
  """Return the bytes of these shapes on one device, or in its share of host memory."""

  def nbytes(leaf):
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

  return sum(map(nbytes, jax.tree.leaves(tree)))


def check_fits(program: TrainProgram, config: Config) -> None:
  """Check that device and host can hold the state and a batch.

  Activations and other temporaries are not counted: only compilation shows them.

  Raises:
    RequestError: the device or the host has too little memory.
  """
  devices = program.batch_sharding.mesh.local_devices
  device = devices[0]
  on_host = host_bytes(program) * len(devices)
  fewer = (
    "to save memory, set config.model.param_dtype=bfloat16, config.optim.name=adafactor or "
    "config.optim.state_dtype=bfloat16 (docs/memory.md)"
  )
  needs = f"config.memory.offload={program.offload} needs {on_host:,} bytes of host memory"
  if on_host > (limit := backend.host_memory_bytes()):
    raise RequestError(f"{needs}, and the host has {limit:,}; {fewer}")
  if device.platform == "gpu" and on_host > (limit := backend.pinned_limit()):
    raise RequestError(
      f"{needs}, and XLA may pin {limit:,} in this process; set {backend.PINNED_LIMIT_ENV} (GiB) "
      "before it starts or, if the machine has more memory than it reports, "
      f"{backend.HOST_MEMORY_ENV}; {fewer}"
    )
  limit = backend.device_memory_bytes(device)
  state = bytes_per_device(program.state) if program.offload == "none" else 0
  batch = bytes_per_device(program.batch)
  if state + batch > limit:
    raise RequestError(
      f"config.train.batch_size={config.train.batch_size}, "
      f"config.data.sequence_length={config.data.sequence_length}, "
      f"config.model.path={config.model.path!r}: each device needs {state:,} bytes for weights "
      f"and optimizer state and {batch:,} for a batch; a {device.device_kind} here has {limit:,}"
    )


def pinned_memory_warning(program: TrainProgram) -> str:
  """Return a warning if the state may not fit XLA's pinned memory pool, else ""."""
  devices = program.batch_sharding.mesh.local_devices
  on_host = host_bytes(program)
  limit = backend.pinned_limit()
  blocks = [bytes_per_device(leaf) for leaf in _host_leaves(program)]
  blocks.append(on_host - sum(blocks))  # the gradient, counted as one block
  if devices[0].platform != "gpu" or backend.pool_fits(blocks * len(devices), limit):
    return ""
  return (
    f"warning: offload needs {on_host * len(devices):,} bytes of host memory; with the gaps "
    f"between blocks that may exceed the {limit:,} that XLA may pin. If the run ends out of host "
    f"memory, set {backend.PINNED_LIMIT_ENV} (GiB) before it starts (docs/memory.md)"
  )


def host_bytes(program: TrainProgram) -> int:
  """Return the host memory per device, in bytes: state and, with "all", gradients."""
  grads = jax.tree.leaves(program.grad_shapes) if program.offload == "all" else []
  return host_state_bytes(program) + bytes_per_device(list(filter(offload.is_offloaded, grads)))


def max_host_bytes(config: Config, cfg: ModelConfig) -> int | None:
  """Return an upper bound of the bytes in a host's memory, before JAX has devices.

  XLA reads its limit of pinned memory once, at initialization, so the bound must be known earlier.

  Returns:
    0 without offload; None if the bound depends on the devices.
  """
  if config.memory.offload == "none":
    return 0
  if config.mesh.data == -1 or config.mesh.zero_stage < max(rules.MIN_ZERO_STAGE.values()):
    return None  # each device has a copy, and their number is not known yet
  if cfg.trained:
    return None  # the export merges all weights, frozen ones too, in host memory in float32
  shapes = abstract_model(cfg, ComputeConfig(vocab_multiple=rules.VOCAB_MULTIPLE))[1]
  moments = jax.eval_shape(optimizer.make_optimizer(config.optim).init, shapes)
  weights = optimizer.with_param_dtype(config.model.param_dtype, shapes, cfg.trained)
  grads = weights if config.memory.offload == "all" else ()
  leaves = filter(offload.is_offloaded, jax.tree.leaves((weights, moments, grads)))
  return config.mesh.data * sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def host_state_bytes(program: TrainProgram) -> int:
  """Return `host_bytes` without the gradient."""
  return bytes_per_device(_host_leaves(program))


def _host_leaves(program: TrainProgram) -> list[jax.ShapeDtypeStruct]:
  """Return the shapes of the leaves of the state that are in host memory."""
  leaves, mask = map(jax.tree.leaves, (program.state, program.host_mask))
  return [leaf for leaf, on_host in zip(leaves, mask, strict=True) if on_host]
