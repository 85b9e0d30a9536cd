"""ComputeConfig: the dtypes, kernels and sharding hooks that a decoder computes with.

B batch, T length, V vocabulary, P positions, D model, F feed-forward, L layers, N heads, H head size
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.model.config import ModelConfig

# Called on every activation, or on every weight where it is used, with the logical name of each axis.
ConstrainFn = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]


class LayerInfo(NamedTuple):
  """What tells one layer from the others beside its weights; None where nothing does. Arrays (L,) of all layers, () of one."""

  window: jax.Array | None  # its place in `distinct_windows`
  depth: jax.Array | None  # 1, 2, 3, ...: what its attention_scale is divided by

  def at(self, index: Any) -> "LayerInfo":
    return jax.tree.map(lambda x_L: x_L[index], self)


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
  """How a model is run: what a user may choose without changing what is computed (but for rounding)."""

  dtype: Any = jnp.float32
  remat: str = "none"
  constrain: ConstrainFn = lambda x, axes: x  # activations
  gather: ConstrainFn = lambda x, axes: x  # weights
  shard_rows: Callable[[jax.Array], jax.Array] = lambda rows: (
    rows
  )  # rows of a table, as they come from where it is stored
  shard_row_grads: Callable[[jax.Array], jax.Array] = lambda rows: (
    rows
  )  # and as they go to where its gradient is
  attention: str = "reference"  # of `attention.KERNELS`
  # (function, logical axes of its array arguments, of its result) -> the function, in which each device sees its own part
  shard_map: Callable[[Callable, Any, Any], Callable] = lambda f, axes_in, axes_out: f
  vocab_multiple: int = (
    1  # tables are padded to a multiple of so many rows: any mesh can then split them
  )

  to_device: Callable[[jax.Array], jax.Array] = lambda x: x  # a weight from where it is kept

  def padded_vocab(self, cfg: ModelConfig) -> int:
    """Rows of the tables of a vocabulary of `cfg.V`."""
    return -(-cfg.V // self.vocab_multiple) * self.vocab_multiple


def gather_weight(param: nnx.Param, compute: ComputeConfig) -> jax.Array:
  """A parameter as the maths uses it: cast first and then gathered, so that half the bytes travel in bfloat16.

  The backward pass casts and gathers again: kept from the forward pass, the layers' weights would be the whole model.
  """
  axes = param.out_sharding
  if param.ndim == len(axes) - 1:
    axes = axes[1:]  # inside the scan the layer axis is gone, its name is not
  return compute.gather(compute.to_device(param[...]).astype(compute.dtype), axes)


def resolve_dtype(name: str, device: jax.Device) -> Any:
  """The dtype of activations: "auto" is bfloat16, but float32 where that gains little (a CPU: docs/speed.md) or is missing.

  NVIDIA GPUs have it from compute capability 8.0 on: a T4 (7.5) and a V100 (7.0) do not.
  """
  if name != "auto":
    return jnp.dtype(name)
  old = device.platform == "gpu" and float(getattr(device, "compute_capability", 8)) < 8
  return jnp.dtype("float32" if device.platform == "cpu" or old else "bfloat16")
