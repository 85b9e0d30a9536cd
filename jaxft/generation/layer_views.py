"""Make zero-copy views of each layer's weights in the stacked arrays.

XLA's CPU compiler copies the weights of a layer out of the stack before it multiplies with them
(jax 0.10 to 0.12). For a batch, the matrix products hide the copy. When one token is decoded at a
time, memory bandwidth is the bottleneck, and the copy adds twice the traffic of the product itself.
"""

import operator

import jax
import numpy as np

from jaxft.utils.types import Params


def unstack_layers(blocks: Params, L: int) -> list[Params] | None:
  """Return zero-copy views of each layer's weights.

  The views hold references to the stacked arrays, so these cannot be donated while a view exists.

  Args:
    blocks: weights of all layers, stacked along the first axis.
    L: layers.

  Returns:
    The weights of each layer; None if they are not float32 on a single CPU device.
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
