"""Attention without a (B, N, T, S) array, on any device: some queries after others, forward and backward.

The mathematics of FlashAttention (Dao et al., arXiv:2205.14135) in XLA's own operations: kept for the backward pass are the
output and the logarithm of each query's sum, and probabilities are made again from them. A chunk sees all of its keys at once.

B batch, T query length, S key length, C queries of a chunk, N heads, H head size
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxft.model.dropout import attention_dropout_mask

MIN_CHUNK = 128  # at least, at once
CHECKPOINT_NAME = "attention"  # the name, for `jax.checkpoint`, of what the backward pass reads beside queries, keys and values
MAX_UNROLLED = 8  # chunks that are written out, each with only the keys that it can see


class Chunk(NamedTuple):
  """Queries [start, start + C) and the keys [first, last) that they may see."""

  start: Any
  C: int
  first: int
  last: int

  def queries(self, x: jax.Array, axis: int = 2) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, self.start, self.C, axis)

  def keys(self, x: jax.Array, axis: int = 2) -> jax.Array:
    return jax.lax.slice_in_dim(x, self.first, self.last, axis=axis)


class NonDiffArgs(NamedTuple):
  """What has no gradient."""

  offset: Any
  q_segments_BT: jax.Array | None
  k_segments_BS: jax.Array | None
  keys_BN: jax.Array | None


class ChunkedAttention(NamedTuple):
  """`attention` in chunks of queries, with what is the same for all of them."""

  scale: float
  window: int | None
  dropout_rate: float

  def __call__(
    self, q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, rest: NonDiffArgs
  ) -> jax.Array:
    """(B, T, N, H), as `attention.attention` has it."""
    T, S = q_BTNH.shape[1], k_BSNH.shape[1]
    C = min(T, -(-T // MAX_UNROLLED // MIN_CHUNK) * MIN_CHUNK)
    # Dropout's bits are hundreds of operations: written out eight times, a compiler for TPUs takes minutes for them.
    looped = rest.keys_BN is not None
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q_BTNH, k_BSNH, v_BSNH))
    if looped:  # all chunks alike
      q = jnp.pad(q, [(0, 0), (0, 0), (0, -T % C), (0, 0)])
      if rest.q_segments_BT is not None:
        rest = rest._replace(q_segments_BT=jnp.pad(rest.q_segments_BT, [(0, 0), (0, -T % C)]))

    @jax.custom_vjp
    def attend(q, k, v, rest):
      return forward(q, k, v, rest)[0]

    def forward(q, k, v, rest):
      if looped:
        one = lambda start: self.forward(Chunk(start, C, 0, S), q, k, v, rest)
        out, log_sum = map(merge_chunks, jax.lax.map(one, jnp.arange(0, q.shape[2], C)))
      else:
        # One after the other: XLA would look for fusions across chunks, which for GPT-J on an RTX 4090 takes it 23 s instead of
        # 3, and has the scores of several in memory (2.4 GiB instead of 0.7 for 8 x 2048 tokens; jax 0.10.2).
        in_turn = jax.lax.optimization_barrier
        pairs = [
          in_turn(self.forward(chunk, q, k, v, rest)) for chunk in self.chunks(T, S, C, rest.offset)
        ]
        out, log_sum = (jnp.concatenate(pieces, 2) for pieces in zip(*pairs))
      out, log_sum = (checkpoint_name(x, CHECKPOINT_NAME) for x in (out, log_sum))
      return out, (q, k, v, rest, out, log_sum)

    def backward(kept, d_out):
      q, k, v, rest, out, log_sum = kept
      total = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
      if looped:

        def turn(total, start):
          dq, *more = self.backward(Chunk(start, C, 0, S), q, k, v, rest, out, log_sum, d_out)
          return jax.tree.map(jnp.add, total, tuple(more)), dq

        total, dq = jax.lax.scan(turn, total, jnp.arange(0, q.shape[2], C))
        dq = merge_chunks(dq)
      else:
        dqs = []
        for chunk in self.chunks(T, S, C, rest.offset):
          dq, *more = self.backward(chunk, q, k, v, rest, out, log_sum, d_out)
          dqs.append(dq)
          total = tuple(
            x.at[:, :, chunk.first : chunk.last].add(part) for x, part in zip(total, more)
          )
        dq = jnp.concatenate(dqs, 2)
      return dq, total[0].astype(k.dtype), total[1].astype(v.dtype), None

    attend.defvjp(forward, backward)
    return jnp.moveaxis(attend(q, k, v, rest), 1, 2)[:, :T]

  def chunks(self, T: int, S: int, C: int, offset: Any) -> list[Chunk]:
    """With the keys that can be left out without a look: all, where queries begin in a column that is not known yet."""
    if not isinstance(offset, int):
      return [Chunk(start, min(C, T - start), 0, S) for start in range(0, T, C)]
    found = []
    for start in range(0, T, C):
      last = min(start + C, T)
      first = 0 if self.window is None else max(0, offset + start + 1 - self.window)
      found.append(Chunk(start, last - start, first, min(offset + last, S)))
    return found

  def logits(self, chunk: Chunk, q, k, rest: NonDiffArgs) -> jax.Array:
    """(B, N, C, keys) in float32, the lowest number where a query does not see a key."""
    rows, columns = (
      rest.offset + chunk.start + jnp.arange(chunk.C),
      jnp.arange(chunk.first, chunk.last),
    )
    # Tied to the queries: else the mask is the same in all layers, and is made once for all chunks, heads and rows and kept.
    rows, _ = jax.lax.optimization_barrier((rows, q[0, 0, 0, 0]))
    distance = rows[:, None] - columns
    visible = distance >= 0
    if self.window is not None:
      visible = visible & (distance < self.window)
    if rest.q_segments_BT is not None:
      mine, theirs = chunk.queries(rest.q_segments_BT, 1), chunk.keys(rest.k_segments_BS, 1)
      visible = visible & (mine[:, None, :, None] == theirs[:, None, None, :])
    x = jnp.einsum(
      "BNTH,BNSH->BNTS", chunk.queries(q), chunk.keys(k), preferred_element_type=jnp.float32
    )
    return jnp.where(visible, self.scale * x, jnp.finfo(jnp.float32).min)

  def dropout(self, chunk: Chunk, rest: NonDiffArgs) -> jax.Array:
    rows = chunk.start + jnp.arange(chunk.C)
    return attention_dropout_mask(rest.keys_BN, self.dropout_rate, rows, chunk.last)[
      ..., chunk.first :
    ]

  def forward(self, chunk: Chunk, q, k, v, rest: NonDiffArgs) -> tuple[jax.Array, jax.Array]:
    """Output (B, N, C, H) of a chunk, and the logarithm of each query's sum (B, N, C)."""
    x = self.logits(chunk, q, k, rest)
    largest = x.max(-1, keepdims=True)
    p = jnp.exp(x - largest)
    total = p.sum(-1, keepdims=True)
    if rest.keys_BN is not None:
      p = p * self.dropout(chunk, rest)
    out = (
      jnp.einsum(
        "BNTS,BNSH->BNTH", p.astype(v.dtype), chunk.keys(v), preferred_element_type=jnp.float32
      )
      / total
    )
    return out.astype(v.dtype), (largest + jnp.log(total))[..., 0]

  def backward(
    self, chunk: Chunk, q, k, v, rest: NonDiffArgs, out, log_sum, d_out
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of a chunk's queries, and its parts of those of the keys and values that it sees."""
    d_out, seen = chunk.queries(d_out), chunk.keys(v)
    p = jnp.exp(self.logits(chunk, q, k, rest) - chunk.queries(log_sum)[..., None])
    dp = jnp.einsum("BNTH,BNSH->BNTS", d_out, seen, preferred_element_type=jnp.float32)
    used = p
    if rest.keys_BN is not None:
      kept = self.dropout(chunk, rest)
      used, dp = p * kept, dp * kept
    inner = jnp.sum(
      d_out.astype(jnp.float32) * chunk.queries(out).astype(jnp.float32), -1, keepdims=True
    )
    dx = (self.scale * p * (dp - inner)).astype(q.dtype)
    dq = jnp.einsum("BNTS,BNSH->BNTH", dx, chunk.keys(k))
    dk = jnp.einsum("BNTS,BNTH->BNSH", dx, chunk.queries(q), preferred_element_type=jnp.float32)
    dv = jnp.einsum(
      "BNTS,BNTH->BNSH", used.astype(d_out.dtype), d_out, preferred_element_type=jnp.float32
    )
    return dq, dk, dv


def merge_chunks(parts: jax.Array) -> jax.Array:
  """(chunks, B, N, C, ...) -> (B, N, chunks x C, ...)."""
  x = jnp.moveaxis(parts, 0, 2)
  return x.reshape(*x.shape[:2], -1, *x.shape[4:])
