"""ComputeConfig: the dtypes, kernels and sharding hooks that a decoder computes with.

L layers
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.model.config import ModelConfig

# Called on every activation, or on every weight where it is used, with its logical axis names.
ConstrainFn = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]


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

  dtype: Any = jnp.float32
  remat: str = "none"
  constrain: ConstrainFn = lambda x, axes: x  # activations
  gather: ConstrainFn = lambda x, axes: x  # weights
  # Rows of a vocabulary table as they leave it, and their gradient as it goes back to it.
  shard_rows: Callable[[jax.Array], jax.Array] = lambda rows: rows
  shard_row_grads: Callable[[jax.Array], jax.Array] = lambda rows: rows
  attention: str = "reference"  # of `attention.KERNELS`
  # (function, logical axes of its array arguments, of its result) -> the function on local shards
  shard_map: Callable[[Callable, Any, Any], Callable] = lambda f, axes_in, axes_out: f
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
  return compute.gather(compute.to_device(param[...]).astype(compute.dtype), axes)


def resolve_dtype(name: str, device: jax.Device) -> Any:
  """The dtype of activations; "auto" is bfloat16, or float32 where that is missing or gains little.

  It gains little on a CPU (docs/speed.md). NVIDIA GPUs have it from compute capability 8.0 on: a
  T4 (7.5) and a V100 (7.0) do not.
  """
  if name != "auto":
    return jnp.dtype(name)
  is_old_gpu = device.platform == "gpu" and float(getattr(device, "compute_capability", 8)) < 8
  return jnp.dtype("float32" if device.platform == "cpu" or is_old_gpu else "bfloat16")
