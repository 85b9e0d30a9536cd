"""Attention in chunks of queries on any device, without a (B, N, T, S) array.

The mathematics is that of FlashAttention (Dao et al., arXiv:2205.14135), in plain XLA operations.
The forward pass stores the output and each query's log-sum-exp. From these the backward pass
recomputes the probabilities, p = exp(logits - log-sum-exp). Unlike FlashAttention, only queries are
chunked: the scores (B, N, U, S) of a chunk with all of its keys are in memory at a time. So no
softmax has to be combined from parts.

B batch, T query length, S key length, U queries of a chunk, N heads, H head size
"""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxft.model.dropout import attention_dropout_mask

MIN_CHUNK = 128  # queries
# Chunks are unrolled, not looped over, because then each reads only the keys that it can see. With
# 8 chunks that saves 44 % of the work of causal attention. More chunks would compile for longer.
MAX_UNROLLED = 8
CHECKPOINT_NAME = "attention"  # names the output and log-sum-exp for remat policies


class Chunk(NamedTuple):
  """Queries [start, start + U) and the keys [key_start, key_end) that they can see."""

  start: jax.Array | int
  U: int
  key_start: int
  key_end: int

  def queries(self, x: jax.Array, axis: int = 2) -> jax.Array:
    """Slice the chunk's queries out of x."""
    return jax.lax.dynamic_slice_in_dim(x, self.start, self.U, axis)

  def keys(self, x: jax.Array, axis: int = 2) -> jax.Array:
    """Slice the chunk's keys out of x."""
    return jax.lax.slice_in_dim(x, self.key_start, self.key_end, axis=axis)


class NonDiffArgs(NamedTuple):
  """Arguments without a gradient."""

  offset: jax.Array | int
  segments: tuple[jax.Array, jax.Array] | None  # of queries (B, T) and keys (B, S)
  keys_BN: jax.Array | None  # of dropout


# q, k, v, arguments without a gradient, the output, and each query's log-sum-exp (B, N, T).
Residuals: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, NonDiffArgs, jax.Array, jax.Array]


class ChunkedAttention(NamedTuple):
  """Attention in chunks of queries; the fields are the same for all chunks.

  Inside, q, k, v and the output are (B, N, T or S, H), so that products need no transpose.
  """

  scale: float
  window: int | None
  dropout_rate: float

  def __call__(
    self, q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, nondiff: NonDiffArgs
  ) -> jax.Array:
    """Return the same as `attention.attention`, (B, T, N, H)."""
    T, S = q_BTNH.shape[1], k_BSNH.shape[1]
    U = min(T, -(-T // MAX_UNROLLED // MIN_CHUNK) * MIN_CHUNK)
    # Dropout's random bits take hundreds of operations. Unrolled eight times, they take a TPU
    # compiler minutes. So with dropout the chunks are a loop. All chunks of a loop need one shape:
    # T is padded, and every chunk reads all keys.
    use_scan = nondiff.keys_BN is not None
    chunk_at = lambda start: Chunk(start=start, U=U, key_start=0, key_end=S)
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q_BTNH, k_BSNH, v_BSNH))
    if use_scan:
      q = jnp.pad(q, [(0, 0), (0, 0), (0, -T % U), (0, 0)])
      if nondiff.segments is not None:
        q_segments_BT, k_segments_BS = nondiff.segments
        q_segments_BT = jnp.pad(q_segments_BT, [(0, 0), (0, -T % U)])
        nondiff = nondiff._replace(segments=(q_segments_BT, k_segments_BS))

    @jax.custom_vjp
    def attend(q, k, v, nondiff):
      return forward(q, k, v, nondiff)[0]

    def forward(q, k, v, nondiff):
      if use_scan:

        def body(start):
          return self.forward(chunk_at(start), q, k, v, nondiff)

        out, lse = map(merge_chunks, jax.lax.map(body, jnp.arange(0, q.shape[2], U)))
      else:
        # The barrier stops XLA from fusing across chunks. Without it, compiling GPT-J for an RTX
        # 4090 takes 23 s instead of 3, and the scores of several chunks are in memory (2.4 GiB
        # instead of 0.7 for 8 x 2048 tokens; jax 0.10.2).
        barrier = jax.lax.optimization_barrier
        chunks = self.chunks(T, S, U, nondiff.offset)
        pairs = [barrier(self.forward(chunk, q, k, v, nondiff)) for chunk in chunks]
        out, lse = (jnp.concatenate(pieces, 2) for pieces in zip(*pairs))
      out, lse = (checkpoint_name(x, CHECKPOINT_NAME) for x in (out, lse))
      return out, (q, k, v, nondiff, out, lse)

    def backward(residuals, d_out):
      q, k, v, nondiff, *_ = residuals
      # Every chunk adds to the gradients of keys and values, so they are summed in float32.
      d_kv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
      if use_scan:

        def body(d_kv, start):
          dq, *d_chunk = self.backward(chunk_at(start), residuals, d_out)
          return jax.tree.map(jnp.add, d_kv, tuple(d_chunk)), dq

        d_kv, dq = jax.lax.scan(body, d_kv, jnp.arange(0, q.shape[2], U))
        dq = merge_chunks(dq)
      else:
        dqs = []
        for chunk in self.chunks(T, S, U, nondiff.offset):
          dq, *d_chunk = self.backward(chunk, residuals, d_out)
          dqs.append(dq)
          keys = slice(chunk.key_start, chunk.key_end)
          d_kv = tuple(x.at[:, :, keys].add(d) for x, d in zip(d_kv, d_chunk))
        dq = jnp.concatenate(dqs, 2)
      return dq, d_kv[0].astype(k.dtype), d_kv[1].astype(v.dtype), None

    attend.defvjp(forward, backward)
    return jnp.moveaxis(attend(q, k, v, nondiff), 1, 2)[:, :T]

  def chunks(self, T: int, S: int, U: int, offset: jax.Array | int) -> list[Chunk]:
    """Split the queries into chunks, each with the keys that it can see.

    With a traced `offset` (a cache) the visible keys are unknown at compile time. Each chunk then
    reads all keys, and only the mask hides the invisible ones.
    """
    chunks = []
    for start in range(0, T, U):
      end = min(start + U, T)
      key_start, key_end = 0, S
      if isinstance(offset, int):
        key_end = min(offset + end, S)
        if self.window is not None:
          key_start = max(0, offset + start + 1 - self.window)
      chunks.append(Chunk(start=start, U=end - start, key_start=key_start, key_end=key_end))
    return chunks

  def logits(self, chunk: Chunk, q: jax.Array, k: jax.Array, nondiff: NonDiffArgs) -> jax.Array:
    """Return the masked logits (B, N, U, keys) in float32."""
    rows = nondiff.offset + chunk.start + jnp.arange(chunk.U)
    columns = jnp.arange(chunk.key_start, chunk.key_end)
    # The barrier makes the mask depend on the queries. The mask is the same in all layers, so XLA
    # would otherwise compute it once for all chunks, heads and rows, and keep it in memory.
    rows, _ = jax.lax.optimization_barrier((rows, q[0, 0, 0, 0]))
    distance = rows[:, None] - columns
    visible = distance >= 0
    if self.window is not None:
      visible = visible & (distance < self.window)
    if nondiff.segments is not None:
      q_segments = chunk.queries(nondiff.segments[0], 1)
      k_segments = chunk.keys(nondiff.segments[1], 1)
      visible = visible & (q_segments[:, None, :, None] == k_segments[:, None, None, :])
    x = _einsum("BNUH,BNSH->BNUS", chunk.queries(q), chunk.keys(k))
    return jnp.where(visible, self.scale * x, jnp.finfo(jnp.float32).min)

  def dropout(self, chunk: Chunk, keys_BN: jax.Array) -> jax.Array:
    """Return the dropout factors (B, N, U, keys); both passes compute the same ones."""
    rows = chunk.start + jnp.arange(chunk.U)
    mask = attention_dropout_mask(keys_BN, self.dropout_rate, rows, chunk.key_end)
    return mask[..., chunk.key_start :]

  def forward(
    self, chunk: Chunk, q: jax.Array, k: jax.Array, v: jax.Array, nondiff: NonDiffArgs
  ) -> tuple[jax.Array, jax.Array]:
    """Return a chunk's output (B, N, U, H) and log-sum-exp of each query (B, N, U)."""
    x = self.logits(chunk, q, k, nondiff)
    row_max = x.max(-1, keepdims=True)
    p = jnp.exp(x - row_max)
    row_sum = p.sum(-1, keepdims=True)
    if nondiff.keys_BN is not None:
      p = p * self.dropout(chunk, nondiff.keys_BN)
    # Divide after the product: U x H numbers instead of U x S. Dropout applies to p alone, because
    # the softmax is normalized before dropout.
    out = _einsum("BNUS,BNSH->BNUH", p.astype(v.dtype), chunk.keys(v)) / row_sum
    return out.astype(v.dtype), (row_max + jnp.log(row_sum))[..., 0]

  def backward(
    self, chunk: Chunk, residuals: Residuals, d_out: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of a chunk's queries, keys and values.

    Those of keys and values are partial sums: other chunks see the same keys.
    """
    q, k, v, nondiff, out, lse = residuals
    d_out = chunk.queries(d_out)
    v = chunk.keys(v)
    p = jnp.exp(self.logits(chunk, q, k, nondiff) - chunk.queries(lse)[..., None])
    dp = _einsum("BNUH,BNSH->BNUS", d_out, v)
    p_dropped = p
    if nondiff.keys_BN is not None:
      mask = self.dropout(chunk, nondiff.keys_BN)
      p_dropped = p * mask
      dp = dp * mask
    # FlashAttention's D, of the softmax's gradient p (dp - D). D is the sum of p dp over S, which
    # equals the sum of d_out out over H. That needs no second pass over the keys.
    d_out_f32 = d_out.astype(jnp.float32)
    delta = jnp.sum(d_out_f32 * chunk.queries(out).astype(jnp.float32), -1, keepdims=True)
    d_logits = (self.scale * p * (dp - delta)).astype(q.dtype)
    dq = jnp.einsum("BNUS,BNSH->BNUH", d_logits, chunk.keys(k))
    dk = _einsum("BNUS,BNUH->BNSH", d_logits, chunk.queries(q))
    dv = _einsum("BNUS,BNUH->BNSH", p_dropped.astype(d_out.dtype), d_out)
    return dq, dk, dv


def merge_chunks(x: jax.Array) -> jax.Array:
  """Merge chunks: (chunks, B, N, U, ...) -> (B, N, chunks x U, ...)."""
  x = jnp.moveaxis(x, 0, 2)
  return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
