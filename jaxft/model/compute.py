"""ComputeConfig: the dtypes, kernels and devices that a decoder computes with.

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
  """How layers differ beside their weights: (L,) for all of them, () for one; None: not at all."""

  index: jax.Array | int  # 0, 1, 2, ...: in a cache
  window_index: jax.Array | None  # in `distinct_windows`
  depth: jax.Array | None  # 1, 2, 3, ...: what its attention_scale is divided by

  def at(self, index: jax.Array | int) -> "LayerInfo":
    window_index, depth = jax.tree.map(lambda x_L: x_L[index], (self.window_index, self.depth))
    return LayerInfo(index, window_index, depth)


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
  """How a model is run: it changes nothing in what is computed (but for rounding)."""

  dtype: jnp.dtype = jnp.dtype("float32")
  remat: str = "none"
  mesh: Mesh | None = None  # of the arrays, sharded by sharding/rules.py; None: one device
  zero_stage: int = 3
  attention: str = "reference"  # of `attention.KERNELS`
  vocab_multiple: int = 1  # vocabulary tables are padded to it, so that any mesh can split them
  to_device: Callable[[jax.Array], jax.Array] = lambda x: x  # a weight from where it is stored

  def padded_vocab(self, cfg: ModelConfig) -> int:
    """Rows of the tables of a vocabulary of `cfg.V`."""
    return -(-cfg.V // self.vocab_multiple) * self.vocab_multiple


def gather_weight(param: nnx.Param, compute: ComputeConfig) -> jax.Array:
  """Cast a parameter, then gather it: in bfloat16 half the bytes travel.

  The backward pass casts and gathers again: saved from the forward pass, the gathered weights of
  all layers would be the whole model.
  """
  axes = param.out_sharding
  if param.ndim == len(axes) - 1:
    axes = axes[1:]  # inside the scan the layer axis is gone, its name is not
  return cast_and_gather(compute.to_device(param[...]), axes, compute)


def cast_and_gather(x: jax.Array, axes: Axes, compute: ComputeConfig) -> jax.Array:
  """`gather_weight` of an array that is on the device, by its logical axes."""
  return gather(x.astype(compute.dtype), axes, compute.mesh, compute.zero_stage)


def resolve_dtype(name: str, device: jax.Device) -> jnp.dtype:
  """The dtype of activations; "auto" is bfloat16, or float32 where that is missing or gains little.

  It gains little on a CPU (docs/speed.md). NVIDIA GPUs have it from compute capability 8.0 on: a
  T4 (7.5) and a V100 (7.0) do not.
  """
  if name != "auto":
    return jnp.dtype(name)
  is_old_gpu = device.platform == "gpu" and float(getattr(device, "compute_capability", 8)) < 8
  return jnp.dtype("float32" if device.platform == "cpu" or is_old_gpu else "bfloat16")
