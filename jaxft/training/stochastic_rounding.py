"""Stochastic rounding: bfloat16 weights that learn from very small updates.

Round-to-nearest would leave a weight unchanged unless an update is at least 1/512 of it
(arXiv:2010.06192).
"""

import jax
import jax.numpy as jnp

from jaxft.utils.types import Params

RNG_STREAM = 0x726F756E  # separates these random numbers from those of dropout


def stochastic_round(x: jax.Array, dtype: jnp.dtype, key: jax.Array) -> jax.Array:
  """Round float32 `x` to one of its bfloat16 neighbors, so that the mean is `x`.

  Values that bfloat16 represents exactly do not change. NaN and infinity stay NaN and infinity.

  Args:
    x: float32 array of any shape.
    dtype: bfloat16, or float32 to return `x` unchanged.
    key: key of the random bits.
  """
  if dtype == x.dtype:
    return x
  # A bfloat16 is the upper half of a float32. Adding 16 random bits to the lower half n carries
  # into the upper half with probability n / 65,536, which is exactly the fraction that is cut off.
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  bits += jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
  # A carry could turn the bits of a NaN or an infinity into another number.
  return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def stochastic_round_layers(x: jax.Array, dtype: jnp.dtype, key: jax.Array) -> jax.Array:
  """Round each layer of a stacked array with a separate key.

  A layer-by-layer update (`offload`) then rounds the same way.
  """
  if dtype == x.dtype:
    return x

  def round_layer(layer, i):
    return stochastic_round(layer, dtype, jax.random.fold_in(key, i))

  return jax.vmap(round_layer)(x, jnp.arange(x.shape[0]))


def rounding_keys(seed: int, step: jax.Array, params: Params) -> Params:
  """Return a key for each leaf of `params`, for this step of a run."""
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), RNG_STREAM), step)
  leaves, tree = jax.tree.flatten(params)
  return jax.tree.unflatten(tree, [jax.random.fold_in(key, i) for i in range(len(leaves))])
