"""Weights in bfloat16 that still learn: rounded up or down by chance, so that what is too small for one step adds up over many.

Rounding to the nearest would leave a weight as it is until an update is 1/512 of it (arXiv:2010.06192).
"""

from typing import Any

import jax
import jax.numpy as jnp


def by_chance(x: jax.Array, dtype: Any, key: jax.Array) -> jax.Array:
  """`x`, float32, in `dtype`: float32 as it is, or one of the two neighbours in bfloat16, of which the mean is `x`.

  What bfloat16 can say exactly stays as it is.
  """
  if dtype == x.dtype:
    return x
  # A bfloat16 is the upper half of a float32. The sum carries into it in as many of 65,536 cases as the lower half says.
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def keys_of_leaves(key: jax.Array, tree: Any) -> Any:
  """A key for each leaf, by its place in the tree."""
  leaves, shape = jax.tree.flatten(tree)
  return jax.tree.unflatten(shape, [jax.random.fold_in(key, i) for i in range(len(leaves))])
