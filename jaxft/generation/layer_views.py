"""Each layer's weights as arrays of their own, in the memory of the stacked ones.

XLA's CPU compiler copies the weights of a layer out of the stack before it multiplies with them (jax 0.10 to 0.12). For a batch
that hides behind the products; where one token is read at a time, memory is what takes time, and the copy twice as much again.
"""

import operator
from typing import Any

import jax
import numpy as np


def unstack_layers(blocks: Any, L: int) -> list[Any] | None:
  """Of each of L layers the weights, nothing copied; None where that is not to be had: other devices, several, bfloat16.

  The views hold on to the stacked arrays, which cannot be donated while there is one.
  """
  leaves = jax.tree.leaves(blocks)
  if not all(_is_viewable(leaf) for leaf in leaves):
    return None
  (device,) = leaves[0].devices()
  stacks = jax.tree.map(np.from_dlpack, blocks)
  layers = [jax.tree.map(operator.itemgetter(layer), stacks) for layer in range(L)]
  return jax.device_put(layers, device, may_alias=True)


def _is_viewable(leaf: jax.Array) -> bool:
  on = leaf.devices()
  return len(on) == 1 and next(iter(on)).platform == "cpu" and leaf.dtype == np.float32
