"""Dropout with a key for each row of a batch: which rows are computed together, and where, changes nothing."""

import jax
import jax.numpy as jnp


def per_row_keys(key: jax.Array, first: jax.Array | int, rows: int) -> jax.Array:
  """Keys of rows `first`, `first + 1`, ... of a batch."""
  return jax.vmap(lambda row: jax.random.fold_in(key, row))(first + jnp.arange(rows))


def split_keys(keys_B: jax.Array | None, parts: int) -> jax.Array | tuple[None, ...]:
  """Keys (parts, B) for so many parts of a computation."""
  if keys_B is None:
    return (None,) * parts
  return jax.vmap(lambda key: jax.random.split(key, parts), out_axes=1)(keys_B)


def dropout(x: jax.Array, rate: float, keys_B: jax.Array | None) -> jax.Array:
  """Sets elements of x (B, ...) to 0 with this probability, and scales the rest so that the mean stays."""
  if not rate or keys_B is None:
    return x
  kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys_B)
  return jnp.where(kept, x / jnp.asarray(1 - rate, x.dtype), 0)


def attention_dropout_mask(
  keys_BN: jax.Array, rate: float, queries_T: jax.Array, S: int
) -> jax.Array:
  """Factors (B, N, T, S) for the probabilities of these queries to the first S keys: 0, or 1 / (1 - rate).

  Each query has bits of its own, and those of the first keys do not depend on S: so any part can be made alone.
  """
  of_query = lambda key, query: jax.random.bernoulli(jax.random.fold_in(key, query), 1 - rate, (S,))
  of_head = lambda key: jax.vmap(lambda query: of_query(key, query))(queries_T)
  return jax.vmap(jax.vmap(of_head))(keys_BN).astype(jnp.float32) / (1 - rate)
