"""LoRA (Hu et al., arXiv:2106.09685): trains low-rank adapters of matrices.

An adapter adds scale x A B to a frozen matrix, where A and B are the paper's two thin matrices.

M tokens, G slots (of query, key, value) with separate adapters, R rank, L layers
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.model.compute import ComputeConfig, gather_weight
from jaxft.model.config import ModelConfig
from jaxft.model.dropout import dropout
from jaxft.utils.types import Params, PyTree

# Name in `ModelConfig.lora_targets` -> path of the module in a layer.
TARGET_MODULES = {
  "qkv": ("attention", "qkv"),
  "q": ("attention", "qkv"),
  "k": ("attention", "qkv"),
  "v": ("attention", "qkv"),
  "out": ("attention", "out"),
  "up": ("mlp", "up"),
  "down": ("mlp", "down"),
}


class Adapter(nnx.Module):
  """Computes `scale * dropout(x) A B`, shaped like `einsum(equation, x, kernel)`.

  If the checkpoint has separate query, key and value matrices, each target has its own A and B.
  """

  def __init__(
    self,
    name: str,
    equation: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    num_in_axes: int,
    cfg: ModelConfig,
    compute: ComputeConfig,
    rngs: nnx.Rngs,
  ):
    self.cfg = cfg
    self.compute = compute
    self.slots = qkv_slots(cfg, name)
    group = (len(self.slots),) if self.slots else ()
    group_axes = (None,) * len(group)
    in_axes = slice(num_in_axes)
    out_axes = slice(num_in_axes + len(group), None)  # without the kernel's axis of q, k, v
    x_letters, kernel = equation.partition("->")[0].split(",")
    inner = kernel[in_axes]
    outer = kernel[out_axes]
    slot = "G" * len(group)
    self.down = f"{x_letters},{slot}{inner}R->M{slot}R"
    self.up = f"M{slot}R,{slot}R{outer}->M{slot}{outer}"
    # As in PEFT, A is uniform within 1 / sqrt(fan-in) and B is zero, so that training starts from
    # the unchanged model.
    bound = math.prod(shape[in_axes]) ** -0.5
    a_shape = (*group, *shape[in_axes], cfg.lora_rank)
    a = jax.random.uniform(rngs.params(), a_shape, minval=-bound, maxval=bound)
    self.lora_a = nnx.Param(a, out_sharding=(*group_axes, *axes[in_axes], None))
    b = jnp.zeros((*group, cfg.lora_rank, *shape[out_axes]))
    self.lora_b = nnx.Param(b, out_sharding=(*group_axes, None, *axes[out_axes]))

  def __call__(self, x: jax.Array, keys_B: jax.Array | None) -> jax.Array:
    """Return the adapter's term (M, ...) of the product, for x (B, T, ...)."""
    x = dropout(x, self.cfg.lora_dropout, keys_B).reshape(-1, *x.shape[2:])
    down = jnp.einsum(self.down, x, gather_weight(self.lora_a, self.compute))
    delta = jnp.einsum(self.up, down, gather_weight(self.lora_b, self.compute))
    delta = delta * jnp.asarray(self.cfg.lora_scale, x.dtype)
    return _scatter_qkv(delta, self.slots) if self.slots else delta


def has_adapter(cfg: ModelConfig, module: str) -> bool:
  """Return whether this module of a layer has an adapter."""
  return any(TARGET_MODULES[target][1] == module for target in cfg.lora_targets)


def qkv_slots(cfg: ModelConfig, module: str) -> tuple[int, ...]:
  """Return which of q (0), k (1), v (2) have an adapter each; () if they share one."""
  if module != "qkv":
    return ()
  return tuple(i for i, name in enumerate("qkv") if name in cfg.lora_targets)


def merge(params: Params, cfg: ModelConfig) -> Params:
  """Return the weights of a model without adapters: merge them into the kernels.

  Shards and layers are merged one at a time in host memory, because the weights may not fit in the
  device's memory.
  """
  if not cfg.lora_rank:
    return params
  blocks = dict(params["blocks"])
  blocks |= {name: dict(blocks[name]) for name in ("attention", "mlp")}
  # Gathering is a collective, so all processes must do it in the same order.
  for layer, module in sorted({TARGET_MODULES[target] for target in cfg.lora_targets}):
    weights = dict(blocks[layer][module])
    adapter = weights.pop("adapter")
    kernel = weights["kernel"]
    a, b = (gather_to_host(adapter[name]) for name in ("lora_a", "lora_b"))
    shards = {str(shard.index): shard.data for shard in kernel.addressable_shards}
    slots = qkv_slots(cfg, module)

    def merge_shard(index, a=a, b=b, shards=shards, slots=slots):
      rows, *columns = index
      shard = np.asarray(shards[str(index)])
      deltas = (lora_delta(a[i], b[i], slots)[tuple(columns)] for i in range(len(a))[rows])
      return np.stack([x + cfg.lora_scale * d for x, d in zip(shard, deltas, strict=True)])

    merged = jax.make_array_from_callback(kernel.shape, kernel.sharding, merge_shard)
    blocks[layer][module] = weights | {"kernel": merged}
  return params | {"blocks": blocks}


def lora_delta(a: np.ndarray, b: np.ndarray, slots: tuple[int, ...]) -> np.ndarray:
  """Return A B of one layer, shaped like the kernel.

  Args:
    a: A of one layer, (G, inputs ..., R), or without G if `slots` is ().
    b: B of one layer, (G, R, outputs ...), or without G if `slots` is ().
    slots: from `qkv_slots`.
  """
  lead = int(bool(slots))  # 1 if the axis G exists
  delta = a.reshape(*a.shape[:lead], -1, a.shape[-1]) @ b.reshape(*b.shape[: lead + 1], -1)
  delta = delta.reshape(*a.shape[:-1], *b.shape[lead + 1 :])
  return np.asarray(_scatter_qkv(np.moveaxis(delta, 0, 1), slots)) if slots else delta


def select_adapters(tree: Params) -> Params:
  """Select the parameters of adapters from a tree of parameters."""
  selected = {
    name: subtree if name == "adapter" else select_adapters(subtree)
    for name, subtree in tree.items()
    if isinstance(subtree, dict)
  }
  return {name: subtree for name, subtree in selected.items() if subtree}


def without_adapters(tree: PyTree) -> PyTree:
  """Drop the adapters from a tree of parameters, or from a tree nested like it."""
  if not isinstance(tree, dict):
    return tree
  return {name: without_adapters(part) for name, part in tree.items() if name != "adapter"}


def gather_to_host(x: jax.Array) -> np.ndarray:
  """Copy a whole array to the host memory of every process; for small arrays."""
  if not x.is_fully_addressable:
    assert isinstance(x.sharding, NamedSharding)  # arrays of several processes are on the mesh
    replicated = NamedSharding(x.sharding.mesh, PartitionSpec())
    x = jax.jit(lambda x: x, out_shardings=replicated)(x)
  return np.asarray(x)


def _scatter_qkv(x: jax.typing.ArrayLike, slots: tuple[int, ...]) -> jax.Array:
  """Expand axis 1 from G slots to 3 (q, k, v), with zeros for missing slots."""
  by_slot = dict(zip(slots, jnp.unstack(x, axis=1), strict=True))
  zeros = jnp.zeros_like(by_slot[slots[0]])
  return jnp.stack([by_slot.get(i, zeros) for i in range(3)], 1)
