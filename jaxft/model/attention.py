"""Causal scaled dot-product attention by one of four kernels.

Windows and segments are optional. The kernels:

- cudnn: cuDNN's flash attention, on NVIDIA GPUs.
- splash: JAX's Pallas kernel, on TPUs.
- chunked: chunks of queries in plain XLA operations, on any device.
- reference: the formula, which tests compare with. Only it stores all probabilities (B, N, T, S).

This module decides which kernels a device supports. `training.build` (`select_kernel`) applies
`config.model.attention`.

B batch, T query length, S key length, N heads, H head size
"""

from collections.abc import Callable

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxft.model.attention_chunked import CHECKPOINT_NAME, ChunkedAttention, NonDiffArgs
from jaxft.model.dropout import attention_dropout_mask

FASTEST = {"gpu": "cudnn", "tpu": "splash"}  # on other platforms chunked
KERNELS = ("cudnn", "splash", "chunked", "reference")
LANES = 128  # of a TPU's vector unit; splash requires lengths that are multiples of it
SPLASH_BLOCK = 512  # queries and keys per block, as in MaxText; not measured here


def fastest_kernel(device: jax.Device, dtype: DTypeLike, H: int) -> str:
  """Return the fastest kernel that a device supports for this dtype and head size."""
  shape = (dtype, H, False, False)
  return next(kernel for kernel in KERNELS if not unsupported_reason(kernel, device, *shape))


def unsupported_reason(
  kernel: str, device: jax.Device, dtype: DTypeLike, H: int, segments: bool, dropout: bool
) -> str:
  """Return why a device cannot use a kernel, or "" if it can.

  Args:
    kernel: one of `KERNELS`.
    device: where the model runs.
    dtype: of queries, keys and values.
    H: head size.
    segments: whether rows have several segments, as packed examples do.
    dropout: whether probabilities get dropout.
  """
  if kernel == "splash" and device.platform != "tpu":
    return f"it requires a TPU, and this device is a {device.platform}"
  if kernel == "cudnn":  # the limits of cuDNN 9.x as called by jax 0.10 to 0.12
    if device.platform != "gpu":
      return f"it requires an NVIDIA GPU, and this device is a {device.platform}"
    capability = float(getattr(device, "compute_capability", 0))
    if capability < 8:
      return f"it requires compute capability 8.0, and this GPU has {capability}"
    if jnp.dtype(dtype).itemsize != 2:
      return f"it computes in bfloat16, and the model in {jnp.dtype(dtype)}"
    max_H = 256 if capability >= 9 else 128
    if H % 8 or H > max_H:
      return f"it requires a head size of 8, 16 ... {max_H} on this GPU, and the model's is {H}"
    if segments:
      return "it does not support packed examples"
  if kernel in ("cudnn", "splash") and dropout:
    return "its dropout is not reproducible across meshes"
  return ""


def resolve_kernel(
  kernel: str, device: jax.Device, dtype: DTypeLike, H: int, segments: bool, dropout: bool
) -> tuple[str, str]:
  """Return the kernel to train with, and why it is not the fastest ("" if it is).

  An unsupported `kernel` falls back to chunked. For the arguments see `unsupported_reason`.
  """
  fastest = FASTEST.get(device.platform, "chunked")
  shape = (dtype, H, segments, dropout)
  if unsupported_reason(kernel, device, *shape):
    kernel = "chunked"
  if kernel == fastest:
    return kernel, ""
  reason = unsupported_reason(fastest, device, *shape) or "it was not requested"
  return kernel, f"not {fastest}: {reason}"


def attention_saveable(primitive: jax.extend.core.Primitive, *_: object, **params: object) -> bool:
  """Save kernels' outputs: a `jax.checkpoint` policy. So no kernel runs twice."""
  is_cudnn = primitive.name.startswith("dot_product_attention_fwd")
  return is_cudnn or params.get("name") == CHECKPOINT_NAME


def attention(
  q_BTNH: jax.Array,
  k_BSNH: jax.Array,
  v_BSNH: jax.Array,
  *,
  scale: float,
  kernel: str = "reference",
  offset: jax.Array | int = 0,
  window: int | None = None,
  segments: tuple[jax.Array, jax.Array] | None = None,
  dropout_rate: float = 0.0,
  keys_BN: jax.Array | None = None,
) -> jax.Array:
  """Attend from each query to the keys at or before it in its own segment.

  Causality is by column, not by position id: query t is in column `offset + t`, key s in column s.
  So segments alone handle padding, packing and the unused end of a KV cache: a query sees only keys
  of its segment. The softmax is computed in float32 for any input dtype.

  Args:
    q_BTNH: queries.
    k_BSNH: keys.
    v_BSNH: values.
    scale: factor of the logits before the softmax.
    kernel: one of `KERNELS`. Calls that cuDNN and splash do not support fall back to chunked: with
      a cache, with dropout (its bits must be the same on every device), and on cuDNN with segments.
    offset: column of the first query: the number of columns that a cache already holds.
    window: a query sees only the last `window` columns, its own included; None for all.
    segments: segment ids of the queries (B, T) and of the keys (B, S); None for one per row.
    dropout_rate: of the probabilities; ignored without `keys_BN`.
    keys_BN: dropout keys, one for each row and head.

  Returns:
    The weighted sums of the values, (B, T, N, H).
  """
  T, S = q_BTNH.shape[1], k_BSNH.shape[1]
  if window is not None and window >= S:
    window = None
  if not dropout_rate:
    keys_BN = None
  has_offset = not isinstance(offset, int) or offset != 0
  fits_kernels = T == S and not has_offset and keys_BN is None
  if kernel == "cudnn" and fits_kernels and segments is None:
    return jax.nn.dot_product_attention(
      q_BTNH,
      k_BSNH,
      v_BSNH,
      scale=scale,
      is_causal=True,
      local_window_size=None if window is None else (window - 1, 0),
      implementation="cudnn",
    )
  if kernel == "splash" and fits_kernels:
    return _splash(q_BTNH, k_BSNH, v_BSNH, scale, window, segments)
  nondiff = NonDiffArgs(offset, segments, keys_BN)
  if kernel == "reference" or T == 1:  # decoding: the (B, N, 1, S) array is small
    return _reference(q_BTNH, k_BSNH, v_BSNH, nondiff, scale, window, dropout_rate)
  return ChunkedAttention(scale, window, dropout_rate)(q_BTNH, k_BSNH, v_BSNH, nondiff)


def _reference(q_BTNH, k_BSNH, v_BSNH, nondiff, scale, window, dropout_rate):
  """Compute attention by the formula."""
  T, S = q_BTNH.shape[1], k_BSNH.shape[1]
  equation = "BTNH,BSNH->BNTS"
  logits_BNTS = scale * jnp.einsum(equation, q_BTNH, k_BSNH, preferred_element_type=jnp.float32)
  distance_TS = nondiff.offset + jnp.arange(T)[:, None] - jnp.arange(S)[None, :]
  visible = distance_TS >= 0
  if window is not None:
    visible = visible & (distance_TS < window)
  if nondiff.segments is not None:
    q_segments_BT, k_segments_BS = nondiff.segments
    visible = visible & (q_segments_BT[:, None, :, None] == k_segments_BS[:, None, None, :])
  # The lowest finite number, not -inf. With -inf, a query without a visible key (padding, which the
  # loss masks) would get NaN, which would reach the gradients of all weights.
  p_BNTS = jax.nn.softmax(jnp.where(visible, logits_BNTS, jnp.finfo(jnp.float32).min))
  if nondiff.keys_BN is not None:
    p_BNTS = p_BNTS * attention_dropout_mask(nondiff.keys_BN, dropout_rate, jnp.arange(T), S)
  return jnp.einsum("BNTS,BSNH->BTNH", p_BNTS.astype(v_BSNH.dtype), v_BSNH)


def _splash(q_BTNH, k_BTNH, v_BTNH, scale, window, segments):
  """Call JAX's Pallas kernel, which skips blocks without a visible key.

  Its interface differs from that of `attention`. It takes one row (N, T, H), requires T to be a
  multiple of `LANES`, and does not scale the logits.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

  T, N = q_BTNH.shape[1:3]

  def pad(x):  # attention is causal, so no real query sees the padding at the end
    widths = [(0, 0), (0, -T % LANES)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths)

  q_BTNH = q_BTNH * jnp.asarray(scale, q_BTNH.dtype)
  q, k, v = (jnp.moveaxis(pad(x), 2, 1) for x in (q_BTNH, k_BTNH, v_BTNH))
  attend = _splash_kernel(T + -T % LANES, N, window)
  if segments is None:
    out_BNTH = jax.vmap(attend)(q, k, v)
  else:

    def attend_in_segments(q, k, v, segments):
      return attend(q, k, v, segment_ids=SegmentIds(segments, segments))

    out_BNTH = jax.vmap(attend_in_segments)(q, k, v, pad(segments[0]))
  return jnp.moveaxis(out_BNTH, 1, 2)[:, :T]


def _splash_kernel(T: int, N: int, window: int | None) -> Callable:
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  mask = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
  block = next(size for size in (SPLASH_BLOCK, 384, 256, LANES) if T % size == 0)
  sizes = splash.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  return splash.make_splash_mha(
    masks.MultiHeadMask([mask] * N),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=sizes,
    residual_checkpoint_name=CHECKPOINT_NAME,
  )
