"""Attention kernels match the reference: outputs and gradients, by length, window and segments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

from jaxft.model.attention import attention, fastest_kernel, resolve_kernel
from jaxft.model.dropout import attention_dropout_mask

B, N, H = 2, 3, 8


def inputs(T, S, dtype=jnp.float32, N=N, H=H):
  """q, k, v and a cotangent."""
  keys = jax.random.split(jax.random.key(T * 1009 + S), 4)
  shapes = [(B, T, N, H), (B, S, N, H), (B, S, N, H), (B, T, N, H)]
  return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]


@functools.partial(jax.jit, static_argnames=("kernel", "scale", "window", "dropout_rate"))
def output_and_grads(q, k, v, cotangent, *, kernel="reference", **how):
  """Output and the three gradients."""
  out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, kernel=kernel, **how), q, k, v)
  return out, *vjp(cotangent)


def assert_close(found, expected, tolerance):
  for name, a, b in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert np.abs(a - b).max() <= tolerance * max(1, np.abs(b).max()), name


def random_segments(T):
  """Three examples in a row, and padding."""
  cuts = np.sort(np.random.default_rng(T).integers(0, T + 1, (B, 3)), 1)
  return jnp.array((np.arange(T)[None, :, None] >= cuts[:, None]).sum(-1) + 1, jnp.int32)


@pytest.mark.parametrize(
  "T, window",
  [
    (7, 3),
    (131, None),
    (300, 200),
    *(
      pytest.param(*it, marks=pytest.mark.slow)
      for it in ((1, None), (7, None), (128, None), (131, 1), (300, None), (1031, 5))
    ),
  ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_chunked_matches_reference(T, window, packed):
  how = {"scale": 0.3, "window": window}
  if packed:
    how["segments"] = (random_segments(T),) * 2
  data = inputs(T, T)
  assert_close(
    output_and_grads(*data, kernel="chunked", **how),
    output_and_grads(*data, kernel="reference", **how),
    2e-6,
  )


@pytest.mark.parametrize(
  "T, rate, window",
  [
    pytest.param(1, 0.1, None, marks=pytest.mark.slow),
    pytest.param(131, 0.5, None, marks=pytest.mark.slow),
    (300, 0.1, 5),
  ],
)
@pytest.mark.slow_for("True")
@pytest.mark.parametrize("packed", [False, True])
def test_chunked_dropout_matches_reference(T, rate, window, packed):
  """The bits of dropout are those of the formula."""
  keys_BN = jax.vmap(lambda row: jax.random.split(jax.random.fold_in(jax.random.key(3), row), N))(
    jnp.arange(B)
  )
  how = {"scale": 0.3, "window": window, "dropout_rate": rate, "keys_BN": keys_BN}
  if packed:
    how["segments"] = (random_segments(T),) * 2
  data = inputs(T, T)
  expected = output_and_grads(*data, kernel="reference", **how)
  assert_close(output_and_grads(*data, kernel="chunked", **how), expected, 2e-6)
  if T > 1:
    without = output_and_grads(*data, scale=0.3, window=window)
    assert np.abs(np.asarray(expected[0]) - np.asarray(without[0])).max() > 0.01


@pytest.mark.parametrize(
  "T, S, offset",
  [
    (1, 300, 299),
    pytest.param(5, 17, 3, marks=pytest.mark.slow),
    (131, 300, 169),
  ],
)
@pytest.mark.parametrize("known", [True, False])
def test_chunked_with_cache_matches_reference(T, S, offset, known):
  """With an offset that is known when it is compiled, and with one that is not."""
  data, segments = inputs(T, S), jnp.ones((B, S), jnp.int32).at[:, :2].set(0)
  how = {"scale": 0.3, "segments": (jnp.ones((B, T), jnp.int32), segments)}
  of = lambda kernel: lambda offset: attention(*data[:3], kernel=kernel, offset=offset, **how)
  chunked = of("chunked")(offset) if known else jax.jit(of("chunked"))(offset)
  np.testing.assert_allclose(chunked, of("reference")(offset), atol=2e-6)


@pytest.mark.parametrize("T", [131, pytest.param(300, marks=pytest.mark.slow)])
def test_chunked_bfloat16_is_as_accurate(T):
  """To the formula in float32, of the same inputs."""
  data, how = inputs(T, T, jnp.bfloat16), {"scale": 0.3}
  exact = output_and_grads(*(x.astype(jnp.float32) for x in data), **how)
  rms = lambda x: float(jnp.sqrt(jnp.mean(x**2)))
  errors = lambda found: [rms(a.astype(jnp.float32) - b) for a, b in zip(found, exact)]
  chunked = errors(output_and_grads(*data, kernel="chunked", **how))
  reference = errors(output_and_grads(*data, **how))
  for ours, formula in zip(chunked, reference, strict=True):
    assert 0 < ours <= 1.3 * formula


@pytest.mark.parametrize(
  "T, window, packed",
  [
    pytest.param(128, None, False, marks=pytest.mark.slow),
    (300, 128, False),
    pytest.param(300, None, True, marks=pytest.mark.slow),
    pytest.param(512, 200, True, marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize("H", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_splash_matches_reference(T, window, packed, H, monkeypatch):
  """The kernel itself, interpreted."""
  monkeypatch.setattr(
    splash, "make_splash_mha", functools.partial(splash.make_splash_mha, interpret=True)
  )
  how = {"scale": H**-0.5, "window": window}
  if packed:
    how["segments"] = (random_segments(T),) * 2
  data = inputs(T, T, N=2, H=H)
  assert_close(
    output_and_grads(*data, kernel="splash", **how),
    output_and_grads(*data, kernel="reference", **how),
    1e-5,
  )


class Device:
  def __init__(self, platform, compute_capability=None):
    self.platform = platform
    if compute_capability:
      self.compute_capability = compute_capability


def test_resolve_kernel_says_why_not_fastest():
  def resolve(kernel, device, *shape):
    return resolve_kernel(kernel, Device(*device), jnp.bfloat16, *shape)

  assert resolve("cudnn", ("gpu", "9.0"), 64, False, False) == ("cudnn", "")
  dropout = "its dropout is not reproducible across meshes"
  assert resolve("cudnn", ("gpu", "9.0"), 64, False, True) == ("chunked", f"not cudnn: {dropout}")
  assert resolve("cudnn", ("gpu", "9.0"), 64, True, False) == (
    "chunked",
    "not cudnn: it does not support packed examples",
  )
  kernel, why = resolve("chunked", ("gpu", "8.9"), 256, False, False)  # GPT-J
  assert (
    kernel == "chunked"
    and why
    == "not cudnn: it requires a head size of 8, 16 ... 128 on this GPU, and the model's is 256"
  )
  assert resolve("chunked", ("gpu", "9.0"), 64, False, False) == (
    "chunked",
    "not cudnn: it was not requested",
  )
  assert resolve("splash", ("tpu",), 64, True, False) == ("splash", "")
  assert resolve("splash", ("tpu",), 64, True, True) == ("chunked", f"not splash: {dropout}")
  assert resolve("chunked", ("cpu",), 64, True, True) == ("chunked", "")


def test_fastest_kernel_of_each_device():
  pick = lambda device, dtype, H: fastest_kernel(Device(*device), dtype, H)
  assert pick(("cpu",), jnp.float32, 64) == "chunked"
  assert pick(("tpu",), jnp.bfloat16, 64) == "splash"
  assert pick(("gpu", "9.0"), jnp.bfloat16, 256) == "cudnn"
  assert pick(("gpu", "8.9"), jnp.bfloat16, 128) == "cudnn"
  assert pick(("gpu", "8.9"), jnp.bfloat16, 256) == "chunked"  # GPT-J
  assert pick(("gpu", "9.0"), jnp.float32, 64) == "chunked"
  assert pick(("gpu", "7.5"), jnp.bfloat16, 64) == "chunked"
  assert pick(("gpu", "9.0"), jnp.bfloat16, 20) == "chunked"


def test_attention_dropout_keeps_the_mean():
  keys_BN = jax.random.split(jax.random.key(0), (4, 5))
  factors = np.asarray(attention_dropout_mask(keys_BN, 0.3, jnp.arange(64), 64))
  assert abs(factors.mean() - 1) < 0.02 and abs((factors == 0).mean() - 0.3) < 0.02
