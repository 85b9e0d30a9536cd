"""LoRA (Hu et al., arXiv:2106.09685): two thin matrices beside a product of each layer, which are trained in its place.

M tokens, G places of an output that have matrices of their own, R rank, L layers
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.model.compute import ComputeConfig, gather_weight
from jaxft.model.config import ModelConfig
from jaxft.model.dropout import dropout

# What may be named in `ModelConfig.lora_targets` -> the module of a layer that makes it.
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
  """`scale * dropout(x) A B`, shaped as `einsum(equation, x, kernel)`.

  Where query, key and value are products of their own in the checkpoint, each that is named has its own A and B.
  """

  def __init__(
    self,
    name: str,
    equation: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    inputs: int,
    cfg: ModelConfig,
    compute: ComputeConfig,
    rngs: nnx.Rngs,
  ):
    self.cfg, self.compute, self.places = cfg, compute, qkv_slots(cfg, name)
    places = self.places
    left, kernel = equation.partition("->")[0].split(",")
    group, skipped = ((len(places),), 1) if places else ((), 0)
    G, inner, outer = "G" * len(group), kernel[:inputs], kernel[inputs + skipped :]
    self.down, self.up = f"{left},{G}{inner}R->M{G}R", f"M{G}R,{G}R{outer}->M{G}{outer}"
    # As PEFT draws them: A evenly within 1 / sqrt(inputs), B zero, so that training begins with the model as it was.
    bound = math.prod(shape[:inputs]) ** -0.5
    first = (*group, *shape[:inputs], cfg.lora_rank)
    drawn = jax.random.uniform(rngs.params(), first, minval=-bound, maxval=bound)
    self.lora_a = nnx.Param(drawn, out_sharding=(*[None] * len(group), *axes[:inputs], None))
    rest, rest_axes = shape[inputs + skipped :], axes[inputs + skipped :]
    self.lora_b = nnx.Param(
      jnp.zeros((*group, cfg.lora_rank, *rest)),
      out_sharding=(*[None] * (len(group) + 1), *rest_axes),
    )

  def __call__(self, x: jax.Array, keys_B: jax.Array | None) -> jax.Array:
    """What is to be added to the product (M, ...) of x (B, T, ...)."""
    x = dropout(x, self.cfg.lora_dropout, keys_B).reshape(-1, *x.shape[2:])
    thin = jnp.einsum(self.down, x, gather_weight(self.lora_a, self.compute))
    more = jnp.einsum(self.up, thin, gather_weight(self.lora_b, self.compute)) * jnp.asarray(
      self.cfg.lora_scale, x.dtype
    )
    return _scatter_qkv(more, self.places, 1) if self.places else more


def has_adapter(cfg: ModelConfig, module: str) -> bool:
  """Whether this module of a layer has an adapter."""
  return any(TARGET_MODULES[target][1] == module for target in cfg.lora_targets)


def qkv_slots(cfg: ModelConfig, module: str) -> tuple[int, ...]:
  """Which of query, key and value have matrices of their own in this module; (): it has one pair for all."""
  return (
    tuple(i for i, name in enumerate("qkv") if name in cfg.lora_targets) if module == "qkv" else ()
  )


def merge(params: dict, cfg: ModelConfig) -> dict:
  """Weights as a model without adapters has them: kernel + scale A B in place of each kernel that has an adapter.

  Shard by shard and layer by layer in the host's memory: the weights may be larger than the device's.
  """
  if not cfg.lora_rank:
    return params
  blocks = {
    name: dict(part) if name in ("attention", "mlp") else part
    for name, part in params["blocks"].items()
  }
  for layer, module in sorted(
    {TARGET_MODULES[target] for target in cfg.lora_targets}
  ):  # processes gather in the same order
    part = dict(blocks[layer][module])
    adapter, kernel, places = part.pop("adapter"), part["kernel"], qkv_slots(cfg, module)
    a, b = (gather_to_host(adapter[name]) for name in ("lora_a", "lora_b"))
    local = {str(shard.index): shard.data for shard in kernel.addressable_shards}

    def merged(index, a=a, b=b, local=local, places=places):
      rows, columns = index[0], index[1:]
      change = (
        cfg.lora_scale * lora_delta(a[i], b[i], places)[columns] for i in range(len(a))[rows]
      )
      return np.stack(
        [kernel + more for kernel, more in zip(np.asarray(local[str(index)]), change, strict=True)]
      )

    blocks[layer][module] = part | {
      "kernel": jax.make_array_from_callback(kernel.shape, kernel.sharding, merged)
    }
  return params | {"blocks": blocks}


def lora_delta(a: np.ndarray, b: np.ndarray, places: tuple[int, ...]) -> np.ndarray:
  """A B of one layer, shaped as the kernel."""
  groups = int(bool(places))
  change = a.reshape(*a.shape[:groups], -1, a.shape[-1]) @ b.reshape(*b.shape[: groups + 1], -1)
  change = change.reshape(*a.shape[:-1], *b.shape[groups + 1 :])
  return np.asarray(_scatter_qkv(np.moveaxis(change, 0, 1), places, 1)) if places else change


def select_adapters(tree: dict) -> dict:
  """Of a tree of parameters those of adapters; nothing else of it."""
  inside = {
    name: part if name == "adapter" else select_adapters(part)
    for name, part in tree.items()
    if isinstance(part, dict)
  }
  return {name: part for name, part in inside.items() if part}


def gather_to_host(x: jax.Array) -> np.ndarray:
  """All of an array, which is small, on every process."""
  if x.is_fully_addressable:
    return np.asarray(x)
  return np.asarray(
    jax.jit(lambda x: x, out_shardings=NamedSharding(x.sharding.mesh, PartitionSpec()))(x)
  )


def _scatter_qkv(x: jax.Array, places: tuple[int, ...], axis: int) -> jax.Array:
  """What there is of query, key and value along an axis, with zeros for the others."""
  there = dict(zip(places, jnp.unstack(x, axis=axis), strict=True))
  return jnp.stack([there.get(i, jnp.zeros_like(there[places[0]])) for i in range(3)], axis)


def without_adapters(tree: Any) -> Any:
  """A tree of parameters, or of what belongs to them, without those of adapters."""
  if not isinstance(tree, dict):
    return tree
  return {name: without_adapters(part) for name, part in tree.items() if name != "adapter"}
