"""What of a model is trained: all of it, adapters, or weights that were named; the rest is frozen.

`trained`, throughout, is `ModelConfig.trained`: the path of each parameter that is, with its layers; () means all.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Trained = tuple[tuple[str, tuple[int, ...]], ...]


def partition(tree: dict, trained: Trained) -> tuple[dict, dict]:
  """A tree of parameters as two: what is trained, whole leaves, and what is frozen."""
  if not trained:
    return tree, {}
  names = {name for name, _ in trained}
  return _only(tree, "", lambda name: name in names), _only(
    tree, "", lambda name: name not in names
  )


def combine(trained: dict, frozen: dict) -> dict:
  """The inverse of `partition`."""
  if not frozen:
    return trained
  both = {name: combine(trained[name], frozen[name]) for name in trained.keys() & frozen.keys()}
  merged = trained | frozen | both
  return {name: merged[name] for name in sorted(merged)}


def select_like(tree: dict, shapes: dict) -> dict:
  """Of a tree what `shapes`, which may have less in it, has."""
  return {
    name: select_like(tree[name], part) if isinstance(part, dict) else tree[name]
    for name, part in shapes.items()
  }


def make_layer_mask(trained: Trained) -> Callable[..., jax.Array]:
  """(path of a leaf, array shaped like it) -> the array, 0 in layers that are frozen; with `layer`, of that one layer alone."""
  layers = {name: chosen for name, chosen in trained if chosen}

  def of_leaf(path: Any, x: jax.Array, layer: jax.Array | None = None) -> jax.Array:
    chosen = layers.get(param_name(path))
    if chosen is None:
      return x
    if layer is not None:
      return x * jnp.any(layer == jnp.array(chosen)).astype(x.dtype)
    is_chosen = np.isin(np.arange(x.shape[0]), chosen).reshape(-1, *[1] * (x.ndim - 1))
    return x * jnp.asarray(is_chosen, x.dtype)

  return of_leaf


def num_params(tree: dict, cfg: Any) -> int:
  """Parameters in a tree of them, without rows that pad the vocabulary of `cfg` (a `ModelConfig`)."""

  def size(path: Any, leaf: Any) -> int:
    rows = (
      cfg.V
      if param_name(path) in ("embed.tokens", "output.kernel", "output.bias")
      else leaf.shape[0]
    )
    return rows * math.prod(leaf.shape[1:])

  return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(size, tree)))


def param_name(path: Any) -> str:
  """The name of a leaf at this path of a tree of parameters."""
  return ".".join(key.key for key in path)


def _only(tree: dict, above: str, wanted: Callable[[str], bool]) -> dict:
  found = {}
  for key, part in tree.items():
    if not isinstance(part, dict):
      if wanted(above + key):
        found[key] = part
    elif inside := _only(part, f"{above}{key}.", wanted):
      found[key] = inside
  return found
