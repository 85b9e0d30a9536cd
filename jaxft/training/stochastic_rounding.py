"""Stochastic rounding: bfloat16 weights that still learn from updates too small for one step.

Rounding to the nearest would leave a weight as it is until an update is 1/512 of it
(arXiv:2010.06192).
"""

import jax
import jax.numpy as jnp

from jaxft.utils.types import Params

RNG_STREAM = 0x726F756E  # of random numbers, apart from that of dropout


def stochastic_round(x: jax.Array, dtype: jnp.dtype, key: jax.Array) -> jax.Array:
  """Round `x`, float32, to one of its two neighbours in bfloat16, so that the mean is `x`.

  With dtype float32 nothing changes. What bfloat16 has exactly stays as it is, and what is not
  finite stays so.
  """
  if dtype == x.dtype:
    return x
  # A bfloat16 is the upper half of a float32. The sum carries into it in as many of 65,536 cases as
  # the lower half says.
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  bits += jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
  # A NaN's bits would carry into another number.
  return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def stochastic_round_layers(x: jax.Array, dtype: jnp.dtype, key: jax.Array) -> jax.Array:
  """Round each layer of stacked ones with a key of its own."""
  if dtype == x.dtype:
    return x

  def round_layer(layer, i):
    return stochastic_round(layer, dtype, jax.random.fold_in(key, i))

  return jax.vmap(round_layer)(x, jnp.arange(x.shape[0]))


def rounding_keys(seed: int, step: jax.Array, params: Params) -> Params:
  """Return a key for each leaf of the parameters in this step of a run."""
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), RNG_STREAM), step)
  leaves, tree = jax.tree.flatten(params)
  return jax.tree.unflatten(tree, [jax.random.fold_in(key, i) for i in range(len(leaves))])
