"""Dropout with one key per row of a batch.

So a row's mask does not depend on its batch or device.
"""

from typing import TypeAlias, overload

import jax
import jax.numpy as jnp

Keys: TypeAlias = jax.Array | tuple[None, ...]  # the result of `split_keys`


def per_row_keys(key: jax.Array, first: jax.Array | int, rows: int) -> jax.Array:
  """Return the keys of rows `first`, `first + 1`, ... of a batch, (rows,)."""
  return jax.vmap(lambda row: jax.random.fold_in(key, row))(first + jnp.arange(rows))


@overload
def split_keys(keys_B: jax.Array, num: int) -> jax.Array: ...
@overload
def split_keys(keys_B: jax.Array | None, num: int) -> Keys: ...
def split_keys(keys_B: jax.Array | None, num: int) -> Keys:
  """Split each key into `num` keys, (num, B); without keys return `num` Nones."""
  if keys_B is None:
    return (None,) * num
  return jax.vmap(lambda key: jax.random.split(key, num), out_axes=1)(keys_B)


def dropout(x: jax.Array, rate: float, keys_B: jax.Array | None) -> jax.Array:
  """Set elements of x (B, ...) to 0 at this rate; divide the others by 1 - rate."""
  if not rate or keys_B is None:
    return x
  keep_mask = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys_B)
  return jnp.where(keep_mask, x / jnp.asarray(1 - rate, x.dtype), 0)


def attention_dropout_mask(
  keys_BN: jax.Array, rate: float, queries_T: jax.Array, S: int
) -> jax.Array:
  """Return dropout factors (B, N, T, S), each 0 or 1 / (1 - rate).

  Each query has its own random bits, and the bits of the first keys do not depend on S. So every
  chunk of the mask can be computed alone, and all kernels and meshes get the same mask.

  Args:
    keys_BN: dropout keys, one for each row and head.
    rate: probability of a 0.
    queries_T: indices of the queries in the row.
    S: number of keys.
  """

  def of_head(key):
    def of_query(query):
      query_key = jax.random.fold_in(key, query)
      return jax.random.bernoulli(query_key, 1 - rate, (S,))

    return jax.vmap(of_query)(queries_T)

  return jax.vmap(jax.vmap(of_head))(keys_BN).astype(jnp.float32) / (1 - rate)
