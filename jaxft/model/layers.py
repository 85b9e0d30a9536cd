"""The decoder's modules: embeddings, attention, MLP, norms and output head.

B batch, T query length, S key length, M = B T tokens, Q query, key and value, V vocabulary,
P positions, D model, F feed-forward, L layers, N heads, H head size
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.model import lora
from jaxft.model.attention import attention
from jaxft.model.compute import ComputeConfig, LayerInfo, gather_weight
from jaxft.model.config import ModelConfig
from jaxft.model.dropout import Keys, dropout, split_keys
from jaxft.model.kv_cache import KVCache
from jaxft.sharding.per_device import shard_map
from jaxft.sharding.rules import constrain

ACTIVATION_AXES = ("batch", None, "act_embed")


class Einsum(nnx.Module):
  """`einsum(x, kernel) + bias`, plus a LoRA adapter if the config has one."""

  def __init__(
    self,
    name: str,
    equation: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    num_in_axes: int,
    std: float,
    cfg: ModelConfig,
    compute: ComputeConfig,
    rngs: nnx.Rngs,
    bias: bool = True,
  ):
    self.equation = equation
    self.compute = compute
    self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape), out_sharding=axes)
    if bias:
      self.bias = nnx.Param(jnp.zeros(shape[num_in_axes:]), out_sharding=axes[num_in_axes:])
    if lora.has_adapter(cfg, name):
      shared = {"cfg": cfg, "compute": compute, "rngs": rngs}
      self.adapter = lora.Adapter(
        name=name, equation=equation, shape=shape, axes=axes, num_in_axes=num_in_axes, **shared
      )

  def __call__(self, x: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
    """Apply the product to x (B, T, ...); `keys_B` are for the adapter's dropout."""
    # Merge B and T into one axis M: XLA's CPU compiler transposes a whole gradient to sum it over
    # two axes.
    x_M = x.reshape(-1, *x.shape[2:])
    y = jnp.einsum(self.equation, x_M, gather_weight(self.kernel, self.compute))
    y = y + gather_weight(self.bias, self.compute) if hasattr(self, "bias") else y
    y = y + self.adapter(x, keys_B) if hasattr(self, "adapter") else y
    return y.reshape(*x.shape[:2], *y.shape[1:])


class LayerNorm(nnx.Module):
  """Layer normalization, computed in float32 for any input dtype."""

  def __init__(self, cfg: ModelConfig, compute: ComputeConfig):
    self.eps = cfg.norm_eps
    self.compute = compute
    self.scale = nnx.Param(jnp.ones(cfg.D), out_sharding=("embed",))
    self.bias = nnx.Param(jnp.zeros(cfg.D), out_sharding=("embed",))

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """Normalize x over D; the result has its dtype."""
    f32 = dataclasses.replace(self.compute, dtype=jnp.dtype("float32"))
    y_BTD = x_BTD.astype(jnp.float32)
    y_BTD = y_BTD - y_BTD.mean(-1, keepdims=True)
    y_BTD = y_BTD * jax.lax.rsqrt((y_BTD * y_BTD).mean(-1, keepdims=True) + self.eps)
    y_BTD = y_BTD * gather_weight(self.scale, f32) + gather_weight(self.bias, f32)
    return y_BTD.astype(x_BTD.dtype)


class Attention(nnx.Module):
  """Multi-head causal self-attention with its input and output products."""

  def __init__(self, cfg: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs):
    self.cfg = cfg
    self.compute = compute
    D, N, H = cfg.D, cfg.N, cfg.H
    shared = {"cfg": cfg, "compute": compute, "rngs": rngs}
    self.qkv = Einsum(
      name="qkv",
      equation="MD,DQNH->MQNH",
      shape=(D, 3, N, H),
      axes=("embed", None, "heads", None),
      num_in_axes=1,
      std=cfg.init_std,
      bias=cfg.qkv_bias,
      **shared,
    )
    self.out = Einsum(
      name="out",
      equation="MNH,NHD->MD",
      shape=(N, H, D),
      axes=("heads", None, "embed"),
      num_in_axes=2,
      # GPT-2's scale for the 2 L products that add to the residual stream.
      std=cfg.init_std / (2 * cfg.L) ** 0.5,
      bias=cfg.out_bias,
      **shared,
    )

  def __call__(
    self,
    x_BTD: jax.Array,
    cache: KVCache | None,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None,
    info: LayerInfo,
    keys_B: jax.Array | None,
    adapter_keys: Keys,
  ) -> tuple[jax.Array, KVCache | None]:
    """Return the output (B, T, D) and the cache with the layer's new keys and values.

    Args:
      x_BTD: the layer's normalized input.
      cache: as in `Decoder.__call__`.
      positions_BT: position ids, for rotary embeddings.
      segments_BT: segment ids, or None.
      info: the `LayerInfo` of this layer.
      keys_B: keys of the dropout of probabilities.
      adapter_keys: keys of the dropout of the two adapters, of qkv and out.
    """
    q_BTNH, k_BTNH, v_BTNH = jnp.unstack(self.qkv(x_BTD, adapter_keys[0]), axis=2)
    if info.depth is not None:
      q_BTNH = (q_BTNH.astype(jnp.float32) / info.depth).astype(q_BTNH.dtype)
    if self.cfg.rotary_dim:
      q_BTNH, k_BTNH = (apply_rope(x, positions_BT, self.cfg.rotary_dim) for x in (q_BTNH, k_BTNH))
    k_BSNH, v_BSNH, segments_BS, offset = k_BTNH, v_BTNH, segments_BT, 0
    if cache is not None:
      k_BSNH, v_BSNH, cache = cache.write_layer(info.index, k_BTNH, v_BTNH)
      segments_BS, offset = cache.segments_BS, cache.length
    keys_BN = None if keys_B is None else split_keys(keys_B, self.cfg.N).T
    operands = (q_BTNH, k_BSNH, v_BSNH, segments_BT, segments_BS, keys_BN)
    # Kernels need a static window, but one scan runs all layers. So each distinct window gets a
    # branch, and the layer selects one.
    branches = [functools.partial(self.attend, w, offset) for w in self.cfg.distinct_windows]
    if info.window_index is None:
      y_BTNH = branches[0](*operands)
    else:
      y_BTNH = jax.lax.switch(info.window_index, branches, *operands)
    return self.out(y_BTNH, adapter_keys[1]), cache

  def attend(self, window: int, offset: jax.Array | int, *operands: jax.Array | None) -> jax.Array:
    """Attend with this window (0: none), on each device's own rows and heads."""

    def attend_locally(q_BTNH, k_BSNH, v_BSNH, segments_BT, segments_BS, keys_BN):
      return attention(
        q_BTNH,
        k_BSNH,
        v_BSNH,
        scale=self.cfg.attention_scale,
        kernel=self.compute.attention,
        offset=offset,
        window=window or None,
        segments=None if segments_BT is None else (segments_BT, segments_BS),
        dropout_rate=self.cfg.attention_dropout,
        keys_BN=keys_BN,
      )

    # With a cache, attention is chunked or reference: plain operations, which the compiler shards.
    # It cannot shard the other kernels, so shard_map runs attention on each device's shard.
    if not isinstance(offset, int):
      return attend_locally(*operands)
    head_axes = ("batch", None, "heads", None)
    segment_axes = ("batch", None)
    in_axes = (head_axes, head_axes, head_axes, segment_axes, segment_axes, ("batch", "heads"))
    return shard_map(attend_locally, in_axes, head_axes, self.compute.mesh)(*operands)


class Mlp(nnx.Module):
  """The feed-forward network: up, GELU, down."""

  def __init__(self, cfg: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs):
    D, F = cfg.D, cfg.F
    std = cfg.init_std
    shared = {"num_in_axes": 1, "cfg": cfg, "compute": compute, "rngs": rngs}
    self.exact_gelu = cfg.exact_gelu
    self.up = Einsum(
      name="up", equation="MD,DF->MF", shape=(D, F), axes=("embed", "mlp"), std=std, **shared
    )
    std = std / (2 * cfg.L) ** 0.5
    self.down = Einsum(
      name="down", equation="MF,FD->MD", shape=(F, D), axes=("mlp", "embed"), std=std, **shared
    )

  def __call__(self, x_BTD: jax.Array, adapter_keys: Keys) -> jax.Array:
    """Return the output (B, T, D); `adapter_keys` are for adapters of up and down."""
    h_BTF = jax.nn.gelu(self.up(x_BTD, adapter_keys[0]), approximate=not self.exact_gelu)
    return self.down(h_BTF, adapter_keys[1])


class Block(nnx.Module):
  """One layer: attention and MLP with their norms and residual connections."""

  def __init__(self, cfg: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs):
    self.cfg = cfg
    self.compute = compute
    self.norm1 = LayerNorm(cfg, compute)
    if not cfg.parallel:
      self.norm2 = LayerNorm(cfg, compute)
    self.attention = Attention(cfg, compute, rngs)
    self.mlp = Mlp(cfg, compute, rngs)

  def __call__(
    self,
    x_BTD: jax.Array,
    cache: KVCache | None = None,
    *,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None,
    info: LayerInfo,
    keys_B: jax.Array | None,
  ) -> tuple[jax.Array, KVCache | None]:
    """Return the output (B, T, D) and the cache with the layer's new keys and values.

    The arguments are those of `Decoder.__call__`; `info` belongs to this layer.
    """
    # 7 keys per row: attention's probabilities, its output, the MLP's output, and four adapters.
    keys = split_keys(keys_B, 7)
    rate = self.cfg.residual_dropout
    h_BTD = self.norm1(x_BTD)
    y_BTD, cache = self.attention(h_BTD, cache, positions_BT, segments_BT, info, keys[0], keys[3:5])
    x_BTD = x_BTD + dropout(y_BTD, rate, keys[1])
    if not self.cfg.parallel:
      h_BTD = self.norm2(x_BTD)
    x_BTD = x_BTD + dropout(self.mlp(h_BTD, keys[5:]), rate, keys[2])
    return constrain(x_BTD, ACTIVATION_AXES, self.compute.mesh), cache


class Embed(nnx.Module):
  """Token embeddings and, without rotary positions, learned position embeddings."""

  def __init__(self, cfg: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs):
    self.tokens = init_embedding(cfg, compute, rngs)
    if not cfg.rotary_dim:
      positions_PD = cfg.init_std * jax.random.normal(rngs.params(), (cfg.P, cfg.D))
      self.positions = nnx.Param(positions_PD, out_sharding=(None, "embed"))


class OutputHead(nnx.Module):
  """The head's parameters: an untied table, a bias, or a classifier's scores."""

  def __init__(self, cfg: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs):
    if cfg.classes:
      score = cfg.init_std * jax.random.normal(rngs.params(), (cfg.classes, cfg.D))
      self.score = nnx.Param(score, out_sharding=(None, "embed"))
      return
    if not cfg.tied:
      self.kernel = init_embedding(cfg, compute, rngs)
    if cfg.head_bias:
      self.bias = nnx.Param(jnp.zeros(compute.padded_vocab(cfg)), out_sharding=("vocab",))


def init_embedding(cfg: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs) -> nnx.Param:
  """Draw a vocabulary table (padded V, D).

  Padding rows are 0 and stay 0: they get no gradient, and weight decay keeps 0 at 0.
  """
  table_VD = cfg.init_std * jax.random.normal(rngs.params(), (cfg.V, cfg.D))
  table_VD = jnp.pad(table_VD, [(0, compute.padded_vocab(cfg) - cfg.V), (0, 0)])
  return nnx.Param(table_VD, out_sharding=("vocab", "embed"))


def apply_rope(x_BTNH: jax.Array, positions_BT: jax.Array, rotary_dim: int) -> jax.Array:
  """Rotate each head by its position (RoPE; Su et al., arXiv:2104.09864).

  Only the first `rotary_dim` dimensions are rotated, as in GPT-J in pairs (0, 1), (2, 3), ...
  Angles, sines and the rotation are in float32, because bfloat16 rounds position 257 to 256.
  """
  inv_freq = 10000 ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
  angles = positions_BT.astype(jnp.float32)[:, :, None, None] * inv_freq
  sin, cos = jnp.sin(angles), jnp.cos(angles)
  x_rot = x_BTNH[..., :rotary_dim].astype(jnp.float32)
  pairs = x_rot.reshape(*x_rot.shape[:-1], rotary_dim // 2, 2)
  even, odd = pairs[..., 0], pairs[..., 1]
  pairs = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
  rotated = pairs.reshape(x_rot.shape).astype(x_BTNH.dtype)
  return jnp.concatenate([rotated, x_BTNH[..., rotary_dim:]], -1)
