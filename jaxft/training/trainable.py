"""Trained and frozen weights: all weights, adapters or named weights are trained.

`trained` is always `ModelConfig.trained`: the path of each trained parameter, with its trained
layers (() means all layers). An empty `trained` means that all parameters are trained.
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
ParamPath: TypeAlias = tuple[jax.tree_util.DictKey, ...]  # a path of jax.tree_util


def partition(tree: Params, trained: Trained) -> tuple[Params, Params]:
  """Split a tree of parameters into the trained leaves and the frozen ones.

  A leaf with only some trained layers counts as trained (`make_layer_mask`).
  """
  if not trained:
    return tree, {}
  names = {name for name, _ in trained}
  frozen = _select(tree, "", lambda name: name not in names)
  return _select(tree, "", lambda name: name in names), frozen


def combine(trained: Params, frozen: Params) -> Params:
  """Merge the two trees of `partition` again."""
  if not frozen:
    return trained
  both = {name: combine(trained[name], frozen[name]) for name in trained.keys() & frozen.keys()}
  merged = trained | frozen | both
  return {name: merged[name] for name in sorted(merged)}


def select_like(tree: Params, shapes: Params) -> Params:
  """Select the leaves of `tree` that `shapes` has too."""
  return {
    name: select_like(tree[name], node) if isinstance(node, dict) else tree[name]
    for name, node in shapes.items()
  }


def make_layer_mask(trained: Trained) -> Callable[..., jax.Array]:
  """Make `mask_frozen_layers(path, x, layer=None)`: x with 0 in frozen layers.

  With `layer`, x is that single layer, without the layer axis.
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
  """Count the parameters of a tree, without the rows that pad the vocabulary."""

  def size(path: ParamPath, leaf: jax.Array) -> int:
    is_padded = param_name(path) in ("embed.tokens", "output.kernel", "output.bias")
    return (cfg.V if is_padded else leaf.shape[0]) * math.prod(leaf.shape[1:])

  return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(size, tree)))


def param_name(path: ParamPath) -> str:
  """Return the name of the parameter at this path, such as "blocks.mlp.up.kernel"."""
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
