"""What of a model is trained: all of it, adapters, or named weights; the rest is frozen.

`trained`, throughout, is `ModelConfig.trained`: the path of each trained parameter, with its
layers; () means all.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.model.config import ModelConfig
from jaxft.utils.types import Params

Trained: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]
ParamPath: TypeAlias = tuple[jax.tree_util.DictKey, ...]  # as jax.tree_util has it


def partition(tree: Params, trained: Trained) -> tuple[Params, Params]:
  """Split a tree of parameters in two: the trained leaves, whole, and the frozen ones."""
  if not trained:
    return tree, {}
  names = {name for name, _ in trained}
  frozen = _select(tree, "", lambda name: name not in names)
  return _select(tree, "", lambda name: name in names), frozen


def combine(trained: Params, frozen: Params) -> Params:
  """Undo `partition`."""
  if not frozen:
    return trained
  both = {name: combine(trained[name], frozen[name]) for name in trained.keys() & frozen.keys()}
  merged = trained | frozen | both
  return {name: merged[name] for name in sorted(merged)}


def select_like(tree: Params, shapes: Params) -> Params:
  """Select what `shapes`, which may have fewer leaves, has of a tree."""
  return {
    name: select_like(tree[name], node) if isinstance(node, dict) else tree[name]
    for name, node in shapes.items()
  }


def make_layer_mask(trained: Trained) -> Callable[..., jax.Array]:
  """Return `mask_frozen_layers(path, x, layer=None)`: x with 0 in the leaf's frozen layers.

  With `layer`, x is that one layer alone.
  """
  trained_layers = {name: layers for name, layers in trained if layers}

  def mask_frozen_layers(
    path: ParamPath, x: jax.Array, layer: jax.Array | None = None
  ) -> jax.Array:
    layers = trained_layers.get(param_name(path))
    if layers is None:
      return x
    if layer is not None:
      return x * jnp.any(layer == jnp.array(layers)).astype(x.dtype)
    is_trained = np.isin(np.arange(x.shape[0]), layers).reshape(-1, *[1] * (x.ndim - 1))
    return x * jnp.asarray(is_trained, x.dtype)

  return mask_frozen_layers


def num_params(tree: Params, cfg: ModelConfig) -> int:
  """Count parameters, without the rows that pad the vocabulary."""

  def size(path: ParamPath, leaf: jax.Array) -> int:
    is_padded = param_name(path) in ("embed.tokens", "output.kernel", "output.bias")
    return (cfg.V if is_padded else leaf.shape[0]) * math.prod(leaf.shape[1:])

  return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(size, tree)))


def param_name(path: ParamPath) -> str:
  """The name of the parameter at this path, such as "blocks.mlp.up.kernel"."""
  return ".".join(key.key for key in path)


def _select(tree: Params, prefix: str, predicate: Callable[[str], bool]) -> Params:
  selected = {}
  for key, node in tree.items():
    if not isinstance(node, dict):
      if predicate(prefix + key):
        selected[key] = node
    elif subtree := _select(node, f"{prefix}{key}.", predicate):
      selected[key] = subtree
  return selected
