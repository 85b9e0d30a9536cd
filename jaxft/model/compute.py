"""ComputeConfig: the dtype, kernel and mesh that a decoder computes with.

L layers
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxft.model.config import ModelConfig
from jaxft.sharding.rules import Axes, gather


class LayerInfo(NamedTuple):
  """Differences between layers besides their weights.

  Fields are (L,) for all layers, () for one. None means that all layers are alike.
  """

  index: jax.Array | int  # 0, 1, 2, ...: the layer's index in a cache
  window_index: jax.Array | None  # index in `ModelConfig.distinct_windows`
  depth: jax.Array | None  # 1, 2, 3, ...: the divisor of attention_scale

  def at(self, index: jax.Array | int) -> "LayerInfo":
    """Return the info of one layer."""
    window_index, depth = jax.tree.map(lambda x_L: x_L[index], (self.window_index, self.depth))
    return LayerInfo(index, window_index, depth)


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
  """How a model is run. Results do not depend on it, except for rounding."""

  dtype: jnp.dtype = jnp.dtype("float32")
  remat: str = "none"
  mesh: Mesh | None = None  # arrays are sharded over it by sharding/rules.py; None: one device
  zero_stage: int = 3
  attention: str = "reference"  # one of `attention.KERNELS`
  vocab_multiple: int = 1  # vocabulary tables are padded to it, so that any mesh can split them
  to_device: Callable[[jax.Array], jax.Array] = lambda x: (
    x
  )  # copies an offloaded weight to the device

  def padded_vocab(self, cfg: ModelConfig) -> int:
    """Return the number of rows of the vocabulary tables, padding included."""
    return -(-cfg.V // self.vocab_multiple) * self.vocab_multiple


def gather_weight(param: nnx.Param, compute: ComputeConfig) -> jax.Array:
  """Cast a parameter to the compute dtype, then gather its shards.

  Casting first halves the bytes to gather in bfloat16. The backward pass casts and gathers again,
  because the gathered weights of all layers would need the memory of the whole model.
  """
  axes = param.out_sharding
  if param.ndim == len(axes) - 1:
    axes = axes[1:]  # inside the scan the parameter has no layer axis, but its metadata still does
  return cast_and_gather(compute.to_device(param[...]), axes, compute)


def cast_and_gather(x: jax.Array, axes: Axes, compute: ComputeConfig) -> jax.Array:
  """Cast and gather an array that is on the device, given its logical axes."""
  return gather(x.astype(compute.dtype), axes, compute.mesh, compute.zero_stage)


def resolve_dtype(name: str, device: jax.Device) -> jnp.dtype:
  """Return the dtype of activations.

  "auto" is bfloat16, except on CPUs, where it gains little (docs/speed.md), and on GPUs without it.
  NVIDIA GPUs have it from compute capability 8.0; a T4 (7.5) and a V100 (7.0) do not.
  """
  if name != "auto":
    return jnp.dtype(name)
  is_old_gpu = device.platform == "gpu" and float(getattr(device, "compute_capability", 8)) < 8
  return jnp.dtype("float32" if device.platform == "cpu" or is_old_gpu else "bfloat16")
