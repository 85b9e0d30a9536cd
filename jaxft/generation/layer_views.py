"""Views of each layer's weights, without a copy, in the memory of the stacked weights.

XLA's CPU compiler copies the weights of a layer out of the stack before it multiplies with them
(jax 0.10 to 0.12). With a batch the products hide the copy; when one token is read at a time,
memory bandwidth is what takes time, and the copy takes twice as much again.
"""

import operator

import jax
import numpy as np

from jaxft.utils.types import Params


def unstack_layers(blocks: Params, L: int) -> list[Params] | None:
  """Make zero-copy views of each layer, or None if weights are not float32 on a single CPU device.

  The views hold references to the stacked arrays, which cannot be donated while one exists.
  """
  leaves = jax.tree.leaves(blocks)
  if not all(map(_is_viewable, leaves)):
    return None
  (device,) = leaves[0].devices()
  stacks = jax.tree.map(np.from_dlpack, blocks)
  layers = [jax.tree.map(operator.itemgetter(layer), stacks) for layer in range(L)]
  return jax.device_put(layers, device, may_alias=True)


def _is_viewable(leaf: jax.Array) -> bool:
  devices = list(leaf.devices())
  return len(devices) == 1 and devices[0].platform == "cpu" and leaf.dtype == np.float32
