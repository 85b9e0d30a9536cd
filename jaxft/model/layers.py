"""The layers of the decoder.

B batch, T query length, S key length, V vocabulary, P positions, D model, F feed-forward, L layers, N heads, H head size
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.model import lora
from jaxft.model.attention import attention
from jaxft.model.compute import ComputeConfig, gather_weight
from jaxft.model.config import ModelConfig
from jaxft.model.dropout import dropout, split_keys


class Einsum(nnx.Module):
  """`einsum(x, kernel) + bias`, M being all tokens of x (B, T, ...); and its adapter, where there is one.

  The kernel's shape, axis names and initial scale stand side by side.
  """

  def __init__(
    self,
    name: str,
    equation: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    inputs: int,
    std: float,
    cfg: ModelConfig,
    compute: ComputeConfig,
    rngs: nnx.Rngs,
    bias: bool = True,
  ):
    self.equation, self.compute = equation, compute
    self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape), out_sharding=axes)
    if bias:
      self.bias = nnx.Param(jnp.zeros(shape[inputs:]), out_sharding=axes[inputs:])
    if lora.has_adapter(cfg, name):
      self.adapter = lora.Adapter(
        name, equation, shape, axes, inputs=inputs, cfg=cfg, compute=compute, rngs=rngs
      )

  def __call__(self, x: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
    """keys_B: of the adapter's dropout."""
    # Rows and columns as one axis: XLA's CPU compiler transposes a whole gradient where it is to be summed over two.
    rows = x.shape[:2]
    y = jnp.einsum(
      self.equation, x.reshape(-1, *x.shape[2:]), gather_weight(self.kernel, self.compute)
    )
    y = y + gather_weight(self.bias, self.compute) if hasattr(self, "bias") else y
    y = y + self.adapter(x, keys_B) if hasattr(self, "adapter") else y
    return y.reshape(*rows, *y.shape[1:])


class LayerNorm(nnx.Module):
  """Layer normalisation, in float32 whatever the dtype of its input."""

  def __init__(self, cfg: ModelConfig, compute: ComputeConfig):
    self.eps, self.compute = cfg.norm_eps, compute
    self.scale = nnx.Param(jnp.ones(cfg.D), out_sharding=("embed",))
    self.bias = nnx.Param(jnp.zeros(cfg.D), out_sharding=("embed",))

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    f32 = dataclasses.replace(self.compute, dtype=jnp.float32)
    y_BTD = x_BTD.astype(jnp.float32)
    y_BTD = y_BTD - y_BTD.mean(-1, keepdims=True)
    y_BTD = y_BTD * jax.lax.rsqrt((y_BTD * y_BTD).mean(-1, keepdims=True) + self.eps)
    return (y_BTD * gather_weight(self.scale, f32) + gather_weight(self.bias, f32)).astype(
      x_BTD.dtype
    )


class Attention(nnx.Module):
  def __init__(self, cfg: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs):
    self.cfg, self.compute = cfg, compute
    D, N, H = cfg.D, cfg.N, cfg.H
    how = {"cfg": cfg, "compute": compute, "rngs": rngs}
    self.qkv = Einsum(
      "qkv",
      "MD,DQNH->MQNH",
      (D, 3, N, H),
      ("embed", None, "heads", None),
      inputs=1,
      std=cfg.init_std,
      bias=cfg.qkv_bias,
      **how,
    )
    self.out = Einsum(
      "out",
      "MNH,NHD->MD",
      (N, H, D),
      ("heads", None, "embed"),
      inputs=2,
      std=cfg.init_std / (2 * cfg.L) ** 0.5,
      bias=cfg.out_bias,
      **how,
    )

  def __call__(self, x_BTD, positions_BT, segments_BT, of_layer, cached, keys_B, adapter_keys):
    q_BTNH, k_BTNH, v_BTNH = jnp.unstack(self.qkv(x_BTD, adapter_keys[0]), axis=2)
    if of_layer.depth is not None:
      q_BTNH = (q_BTNH.astype(jnp.float32) / of_layer.depth).astype(q_BTNH.dtype)
    if self.cfg.rotary_dim:
      q_BTNH, k_BTNH = (apply_rope(x, positions_BT, self.cfg.rotary_dim) for x in (q_BTNH, k_BTNH))
    k_BSNH, v_BSNH, segments_BS, offset = cached(k_BTNH, v_BTNH)
    keys_BN = None if keys_B is None else split_keys(keys_B, self.cfg.N).T
    operands = (q_BTNH, k_BSNH, v_BSNH, segments_BT, segments_BS, keys_BN)
    ways = [functools.partial(self.attend, window, offset) for window in self.cfg.distinct_windows]
    attended_BTNH = (
      ways[0](*operands)
      if of_layer.window is None
      else jax.lax.switch(of_layer.window, ways, *operands)
    )
    return self.out(attended_BTNH, adapter_keys[1])

  def attend(self, window, offset, *operands):
    """`attention` in layers of this kind of window."""

    def local(q_BTNH, k_BSNH, v_BSNH, segments_BT, segments_BS, keys_BN):
      return attention(
        q_BTNH,
        k_BSNH,
        v_BSNH,
        scale=self.cfg.attention_scale,
        kernel=self.compute.attention,
        offset=offset,
        window=window or None,
        q_segments_BT=segments_BT,
        k_segments_BS=segments_BS,
        dropout_rate=self.cfg.attention_dropout,
        keys_BN=keys_BN,
      )

    if not isinstance(offset, int):  # with a cache: chunks, which the compiler splits as it likes
      return local(*operands)
    heads, columns = ("batch", None, "heads", None), ("batch", None)
    axes = (heads, heads, heads, columns, columns, ("batch", "heads"))
    return self.compute.shard_map(local, axes, heads)(*operands)


class Mlp(nnx.Module):
  def __init__(self, cfg: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs):
    F, D, how = cfg.F, cfg.D, {"cfg": cfg, "compute": compute, "rngs": rngs}
    self.exact_gelu = cfg.exact_gelu
    self.up = Einsum("up", "MD,DF->MF", (D, F), ("embed", "mlp"), inputs=1, std=cfg.init_std, **how)
    std = cfg.init_std / (2 * cfg.L) ** 0.5
    self.down = Einsum("down", "MF,FD->MD", (F, D), ("mlp", "embed"), inputs=1, std=std, **how)

  def __call__(self, x_BTD, adapter_keys):
    h_BTF = jax.nn.gelu(self.up(x_BTD, adapter_keys[0]), approximate=not self.exact_gelu)
    return self.down(h_BTF, adapter_keys[1])


class Block(nnx.Module):
  def __init__(self, cfg: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs):
    self.cfg = cfg
    self.norm1 = LayerNorm(cfg, compute)
    if not cfg.parallel:
      self.norm2 = LayerNorm(cfg, compute)
    self.attention, self.mlp = Attention(cfg, compute, rngs), Mlp(cfg, compute, rngs)

  def __call__(self, x_BTD, positions_BT, segments_BT, of_layer, cached, keys_B):
    keys = split_keys(keys_B, 7)
    rate, normed_BTD = self.cfg.residual_dropout, self.norm1(x_BTD)
    attended_BTD = self.attention(
      normed_BTD, positions_BT, segments_BT, of_layer, cached, keys[0], keys[3:5]
    )
    attended_BTD = dropout(attended_BTD, rate, keys[1])
    if self.cfg.parallel:
      return x_BTD + attended_BTD + dropout(self.mlp(normed_BTD, keys[5:]), rate, keys[2])
    x_BTD = x_BTD + attended_BTD
    return x_BTD + dropout(self.mlp(self.norm2(x_BTD), keys[5:]), rate, keys[2])


class Embed(nnx.Module):
  def __init__(self, cfg: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs):
    self.tokens = init_embedding(cfg, compute, rngs)
    if not cfg.rotary_dim:
      self.positions = nnx.Param(
        cfg.init_std * jax.random.normal(rngs.params(), (cfg.P, cfg.D)),
        out_sharding=(None, "embed"),
      )


class OutputHead(nnx.Module):
  """What the head has of its own: a table if it is not tied, a bias if there is one; or the scores of the classes."""

  def __init__(self, cfg: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs):
    if cfg.classes:
      scores = cfg.init_std * jax.random.normal(rngs.params(), (cfg.classes, cfg.D))
      self.score = nnx.Param(scores, out_sharding=(None, "embed"))
      return
    if not cfg.tied:
      self.kernel = init_embedding(cfg, compute, rngs)
    if cfg.head_bias:
      self.bias = nnx.Param(jnp.zeros(compute.padded_vocab(cfg)), out_sharding=("vocab",))


def init_embedding(cfg: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs) -> nnx.Param:
  """New rows of all tokens; those that pad the table are 0, and stay so: they have no gradient and nothing to decay."""
  rows_VD = cfg.init_std * jax.random.normal(rngs.params(), (cfg.V, cfg.D))
  padded_VD = jnp.pad(rows_VD, [(0, compute.padded_vocab(cfg) - cfg.V), (0, 0)])
  return nnx.Param(padded_VD, out_sharding=("vocab", "embed"))


def apply_rope(x_BTNH: jax.Array, positions_BT: jax.Array, rotary_dim: int) -> jax.Array:
  """Rotary positions (Su et al., arXiv:2104.09864) as GPT-J has them: pairs (0, 1), (2, 3), ... of the first dimensions.

  Angles, sines and the rotation are in float32: bfloat16 rounds position 257 to 256.
  """
  turns = 10000 ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
  angles = positions_BT.astype(jnp.float32)[:, :, None, None] * turns
  sin, cos = jnp.sin(angles), jnp.cos(angles)
  pairs = (
    x_BTNH[..., :rotary_dim].astype(jnp.float32).reshape(*x_BTNH.shape[:-1], rotary_dim // 2, 2)
  )
  even, odd = pairs[..., 0], pairs[..., 1]
  turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(
    *x_BTNH.shape[:-1], rotary_dim
  )
  return jnp.concatenate([turned.astype(x_BTNH.dtype), x_BTNH[..., rotary_dim:]], -1)
