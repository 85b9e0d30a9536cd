"""Dropout with a key for each row of a batch: a row's mask does not depend on batch or device."""

from typing import TypeAlias, overload

import jax
import jax.numpy as jnp

Keys: TypeAlias = jax.Array | tuple[None, ...]  # what `split_keys` returns


def per_row_keys(key: jax.Array, first: jax.Array | int, rows: int) -> jax.Array:
  """Keys of rows `first`, `first + 1`, ... of a batch."""
  return jax.vmap(lambda row: jax.random.fold_in(key, row))(first + jnp.arange(rows))


@overload
def split_keys(keys_B: jax.Array, num: int) -> jax.Array: ...
@overload
def split_keys(keys_B: jax.Array | None, num: int) -> Keys: ...
def split_keys(keys_B: jax.Array | None, num: int) -> Keys:
  """Split each key into `num`: (num, B), or Nones where there are no keys."""
  if keys_B is None:
    return (None,) * num
  return jax.vmap(lambda key: jax.random.split(key, num), out_axes=1)(keys_B)


def dropout(x: jax.Array, rate: float, keys_B: jax.Array | None) -> jax.Array:
  """Set elements of x (B, ...) to 0 at this rate, and scale the rest so that the mean stays."""
  if not rate or keys_B is None:
    return x
  keep_mask = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys_B)
  return jnp.where(keep_mask, x / jnp.asarray(1 - rate, x.dtype), 0)


def attention_dropout_mask(
  keys_BN: jax.Array, rate: float, queries_T: jax.Array, S: int
) -> jax.Array:
  """Factors (B, N, T, S), 0 or 1 / (1 - rate), for these queries and the first S keys.

  Each query has bits of its own, and those of the first keys do not depend on S: so any chunk can
  be made alone.
  """

  def of_head(key):
    def of_query(query):
      query_key = jax.random.fold_in(key, query)
      return jax.random.bernoulli(query_key, 1 - rate, (S,))

    return jax.vmap(of_query)(queries_T)

  return jax.vmap(jax.vmap(of_head))(keys_BN).astype(jnp.float32) / (1 - rate)
