"""What shapes a decoder: facts of its architecture, and how it is computed.

B batch, T length, V vocabulary, P positions, D model, F feed-forward, L layers, N heads, H head size
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

# Called on every activation, or on every weight where it is used, with the logical name of each axis.
ConstrainFn = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Facts about an architecture, read from a checkpoint's config.json (`hf/facts.py`), never typed by a user."""

  V: int
  P: int
  D: int
  F: int
  L: int
  N: int
  H: int
  norm_eps: float
  embed_dropout: float
  attention_dropout: float
  residual_dropout: float
  init_std: float
  # What tells the families apart. GPT-2: none of it; GPT-Neo: no query/key/value biases, no scale, windows; GPT-J: rotary
  # positions, parallel blocks, no attention biases, a head of its own.
  attention_scale: float
  divided_by_depth: bool = (
    False  # attention_scale is divided by 1, 2, 3, ... in the layers, as stanford-crfm's GPT-2s have it
  )
  windows: tuple[int, ...] = ()  # per layer, 0 for a layer that sees everything; (): all do
  rotary_dim: int = 0  # leading dimensions of each head that are rotated; 0: a table of learned positions instead
  parallel: bool = False  # attention and feed-forward both read the same norm and are added at once
  qkv_bias: bool = True
  out_bias: bool = True
  tied: bool = True  # the output table is the token embedding
  head_bias: bool = False
  exact_gelu: bool = False  # by the error function, as Cerebras-GPT has it; else by its approximation with tanh
  classes: int = 0  # above 0: a classification head in place of the language head
  # What a run makes of the model (`hf/chosen.py`): adapters beside the products named, and which weights it trains.
  lora_rank: int = 0
  lora_scale: float = 0.0
  lora_dropout: float = 0.0
  lora_targets: tuple[str, ...] = ()  # qkv where they share an adapter, else q, k, v; out, up, down
  trained: tuple[
    tuple[str, tuple[int, ...]], ...
  ] = ()  # (path, its layers), ... as `parts.py` reads it; (): everything

  @property
  def distinct_windows(self) -> tuple[int, ...]:
    """The different windows among the layers; 0: none."""
    return tuple(sorted(set(self.windows))) or (0,)

  def with_dropout(self, rate: float) -> "ModelConfig":
    return dataclasses.replace(self, embed_dropout=rate, attention_dropout=rate, residual_dropout=rate)


class LayerInfo(NamedTuple):
  """What tells one layer from the others beside its weights; None where nothing does. Arrays (L,) of all layers, () of one."""

  window: jax.Array | None  # its place in `distinct_windows`
  depth: jax.Array | None  # 1, 2, 3, ...: what its attention_scale is divided by

  def at(self, index: Any) -> "LayerInfo":
    return jax.tree.map(lambda x_L: x_L[index], self)


# Fields that follow from settings of a run.
RUN_FIELDS = ("lora_rank", "lora_scale", "lora_dropout", "lora_targets", "trained")


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
  shard_row_grads: Callable[[jax.Array], jax.Array] = lambda rows: rows  # and as they go to where its gradient is
  attention: str = "reference"  # of `attention.KERNELS`
  # (function, logical axes of its array arguments, of its result) -> the function, in which each device sees its own part
  shard_map: Callable[[Callable, Any, Any], Callable] = lambda f, axes_in, axes_out: f
  vocab_multiple: int = 1  # tables are padded to a multiple of so many rows: any mesh can then split them

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
