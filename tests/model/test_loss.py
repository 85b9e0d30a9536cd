"""The loss: equal to optax's cross-entropy with any chunk, whatever is under the mask."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.model import loss

B, T, D, V = 3, 29, 11, 37


def cross_entropy_sum(h, table, bias, *rest):
  return loss.cross_entropy_sum(h, loss.Head(table, bias), *rest)


def inputs(seed=0):
  rng = np.random.default_rng(seed)
  return (
    rng.standard_normal((B, T, D), np.float32),
    rng.standard_normal((V, D), np.float32),
    rng.standard_normal(V, np.float32),
    rng.integers(V, size=(B, T)).astype(np.int32),
    rng.random((B, T)) < 0.7,
  )


def test_chunk_gradients_sum_in_float32():
  """A table that is cast to bfloat16 where it is used: more chunks are not more rounding."""
  h, table, bias, targets, mask = inputs()
  cast = lambda table: table.astype(jnp.bfloat16)

  def gradient(chunk):
    def of(table):
      return loss.cross_entropy_sum(
        h.astype(jnp.bfloat16), loss.Head(table, bias, cast), targets, mask, chunk
      )

    return jax.grad(of)(table)

  exact = jax.grad(lambda table: cross_entropy_sum(h, table, bias, targets, mask))(table)
  error = {
    chunk: float(jnp.linalg.norm(gradient(chunk) - exact) / jnp.linalg.norm(exact))
    for chunk in (0, 7, 1)
  }
  assert error[7] < 1.2 * error[0] and error[1] < 1.2 * error[0], error


@pytest.mark.parametrize("tokens", [4080, 8127])
def test_chunked_hidden_gradient_scale_is_exact(tokens):
  """1 / tokens rounded to bfloat16 would scale the gradients of all layers by up to 0.4 %."""
  h, table, bias, targets, mask = inputs()

  def gradient(chunk):
    of = lambda h: (
      loss.cross_entropy_sum(h, loss.Head(table.astype(jnp.bfloat16), bias), targets, mask, chunk)
      / tokens
    )
    return np.asarray(jax.grad(of)(h.astype(jnp.bfloat16)), np.float32)

  whole, parts = gradient(0), gradient(8)
  assert abs(np.sum(whole * parts) / np.sum(whole * whole) - 1) < 3e-4


@pytest.mark.parametrize("chunk", [0, 8])
def test_gradients_have_dtypes_of_their_inputs(chunk):
  h, table, bias, targets, mask = inputs()
  given = tuple(jnp.asarray(x, jnp.bfloat16) for x in (h, table, bias))
  of = lambda h, table, bias: (
    loss.cross_entropy_sum(h, loss.Head(table, bias), targets, mask, chunk) / 7
  )
  assert {x.dtype for x in jax.grad(of, (0, 1, 2))(*given)} == {jnp.dtype(jnp.bfloat16)}


def test_cross_entropy_matches_optax():
  h, table, bias, targets, mask = inputs()
  wanted = optax.softmax_cross_entropy_with_integer_labels(
    jnp.einsum("BTD,VD->BTV", h, table) + bias, targets
  )
  np.testing.assert_allclose(
    cross_entropy_sum(h, table, bias, targets, mask), (wanted * mask).sum(), rtol=1e-6
  )


@pytest.mark.parametrize("chunk", [1, 7, 8, 29, 64])
def test_chunk_size_does_not_change_loss_or_grads(chunk):
  h, table, bias, targets, mask = inputs()
  whole, parts = (jax.value_and_grad(cross_entropy_sum, (0, 1, 2)) for _ in range(2))
  for a, b in zip(
    jax.tree.leaves(whole(h, table, bias, targets, mask)),
    jax.tree.leaves(parts(h, table, bias, targets, mask, chunk)),
  ):
    np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-5)


def test_chunked_loss_has_no_full_logits():
  shapes = str(jax.make_jaxpr(jax.grad(lambda h, *rest: cross_entropy_sum(h, *rest, 8)))(*inputs()))
  assert f"f32[{B},8,{V}]" in shapes and f"f32[{B},{T},{V}]" not in shapes


def test_masked_targets_do_not_affect_loss():
  h, table, bias, targets, mask = inputs()
  other = np.where(mask, targets, (targets + 1) % V)
  for chunk in (0, 7):
    np.testing.assert_array_equal(
      cross_entropy_sum(h, table, bias, targets, mask, chunk),
      cross_entropy_sum(h, table, bias, other, mask, chunk),
    )
  d_h = jax.grad(cross_entropy_sum)(h, table, bias, targets, mask)
  assert (d_h[~mask] == 0).all() and (np.abs(d_h[mask]).sum(-1) > 0).all()


@given(
  st.integers(1, 64),
  st.integers(1, 2048),
  st.sampled_from([293, 6300, 50304]),
  st.sampled_from([2**27, 2**29]),
)
def test_choose_chunk_fits_with_little_padding(B, T, V, most_bytes):
  chunk, most = loss.choose_chunk(-1, B, T, V, most_bytes), max(1, most_bytes // (4 * B * V))
  if not chunk:
    assert most >= T
    return
  assert most / 2 <= chunk <= most < T
  assert most < 64 or chunk % 64 == 0
  if most >= 128 and T % 256 == 0:
    assert -T % chunk <= T / 20


def test_max_logits_bytes_by_platform():
  """Accelerators get more logits, as the table costs them most; remat=full gets few."""
  limit = loss.max_logits_bytes
  assert limit("gpu", "dots") == limit("tpu", "none") == 4 * limit("cpu", "dots")
  assert limit("gpu", "full") == limit("cpu", "full")
