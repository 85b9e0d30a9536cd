"""The decoder: embeddings, a scan over layers, the last norm and the output head.

B batch, T query length, S key length, V vocabulary, D model, L layers, N heads, H head size
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.model import attention
from jaxft.model.compute import ComputeConfig, LayerInfo, gather_weight
from jaxft.model.config import ModelConfig
from jaxft.model.dropout import dropout, split_keys
from jaxft.model.kv_cache import KVCache
from jaxft.model.layers import Block, Embed, LayerNorm, OutputHead
from jaxft.model.loss import Head, compute_logits

# Cheap to compute again, and what they make of a weight is as large as the layer.
CHEAP_PRIMITIVES = {"convert_element_type", "sharding_constraint"}
ACTIVATION_AXES = ("batch", None, "act_embed")


class Decoder(nnx.Module):
  """Token ids in, hidden states out; `head` turns hidden states into logits."""

  def __init__(self, cfg: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs):
    self.cfg = cfg
    self.compute = compute
    self.embed = Embed(cfg, compute, rngs)
    # One Block whose parameters have a leading layer axis; `lax.scan` below walks along it.
    metadata = {nnx.PARTITION_NAME: "layers"}
    init_block = nnx.vmap(lambda rngs: Block(cfg, compute, rngs), transform_metadata=metadata)
    self.blocks = init_block(rngs.split(cfg.L))
    self.norm = LayerNorm(cfg, compute)
    if cfg.classes or not cfg.tied or cfg.head_bias:
      self.output = OutputHead(cfg, compute, rngs)

  def __call__(
    self,
    ids_BT: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    keys_B: jax.Array | None = None,
    embeds_BTD: jax.Array | None = None,
  ) -> jax.Array:
    """Return the hidden states (B, T, D) after the last norm, in the compute dtype.

    Args:
      ids_BT: token ids.
      segments_BT: tokens see only tokens of their own segment; None: one segment a row.
      positions_BT: position ids; None: 0, 1, 2, ...
      keys_B: dropout keys, one for each row; None: no dropout.
      embeds_BTD: `embed_tokens(ids_BT)`, by a caller that wants its gradient; None: it is computed.
    """

    def update_cache(layer, cache, k, v):
      return (k, v, segments_BT, 0), cache

    embeds_BTD = self.embed_tokens(ids_BT) if embeds_BTD is None else embeds_BTD
    return self._forward(embeds_BTD, segments_BT, positions_BT, keys_B, None, update_cache)[0]

  def forward_cached(
    self,
    cache: KVCache,
    ids_BT: jax.Array,
    segments_BT: jax.Array,
    positions_BT: jax.Array,
    layers: list[dict] | None = None,
  ) -> tuple[jax.Array, KVCache]:
    """Read T more columns after those in the cache: hidden states (B, T, D) and the longer cache.

    The caller makes sure that the cache has room: `cache.length + T <= S`.

    Args:
      layers: weights of each layer, for a cache that is `unstack`ed; None: they are in `blocks`.
    """
    segments_BS = jax.lax.dynamic_update_slice(cache.segments_BS, segments_BT, (0, cache.length))

    def update_cache(layer, kv, k_BTNH, v_BTNH):
      k, k_BSNH = cache.update(kv[0], layer, k_BTNH)
      v, v_BSNH = cache.update(kv[1], layer, v_BTNH)
      return (k_BSNH, v_BSNH, segments_BS, cache.length), (k, v)

    embeds_BTD = self.embed_tokens(ids_BT)
    kv = (cache.k, cache.v)
    h_BTD, (k, v) = self._forward(
      embeds_BTD, segments_BT, positions_BT, None, kv, update_cache, layers
    )
    length = cache.length + ids_BT.shape[1]
    return h_BTD, KVCache(k=k, v=v, segments_BS=segments_BS, length=length)

  def head(self) -> Head:
    """The output table and its bias in float32; the bias of padding rows is minus infinity."""
    if self.cfg.classes:
      return Head(gather_weight(self.output.score, self.compute))
    table = self.embed.tokens if self.cfg.tied else self.output.kernel
    table_VD = self.compute.to_device(table[...])
    bias_V = None
    if self.cfg.head_bias:
      bias_V = self.compute.to_device(self.output.bias[...]).astype(jnp.float32)
    padded_V = table_VD.shape[0]
    if padded_V > self.cfg.V:
      is_token = jnp.arange(padded_V) < self.cfg.V
      bias_V = jnp.where(is_token, 0.0 if bias_V is None else bias_V, -jnp.inf)

    def gather(table_VD):
      return self.compute.gather(table_VD.astype(self.compute.dtype), table.out_sharding)

    return Head(table_VD, bias_V, gather)

  def logits(self, h: jax.Array) -> jax.Array:
    """(..., D) -> (..., V) in float32, or (..., classes), read at the last real token."""
    return compute_logits(h, self.head())[..., : self.cfg.classes or self.cfg.V]

  def embed_tokens(self, ids_BT: jax.Array) -> jax.Array:
    """Look up rows of the token table, (B, T, D), where it is stored, without gathering it."""
    table_VD = self.compute.to_device(self.embed.tokens[...])
    embeds_BTD = self.compute.shard_rows(table_VD[ids_BT].astype(self.compute.dtype))
    return self.compute.constrain(embeds_BTD, ACTIVATION_AXES)

  def add_embedding_grads(self, grads: dict, ids: jax.Array, d_embeds: jax.Array) -> dict:
    """Add the gradient of `embed_tokens(ids)` to the gradient of the parameters.

    It is added in float32 to what the head has left in the table's gradient: a second table would
    take as much memory again, and bfloat16 loses what is added to the sum of a frequent token. A
    frozen table has none.
    """
    if "tokens" not in grads.get("embed", {}):
      return grads
    table_VD = grads["embed"]["tokens"]
    table_VD = table_VD.at[ids].add(self.compute.shard_row_grads(d_embeds).astype(table_VD.dtype))
    return grads | {"embed": grads["embed"] | {"tokens": table_VD}}

  def embed_inputs(
    self, embeds_BTD: jax.Array, positions_BT: jax.Array, keys_B: jax.Array | None
  ) -> jax.Array:
    """Return the input of the first layer, (B, T, D)."""
    if not self.cfg.rotary_dim:
      embeds_BTD = embeds_BTD + gather_weight(self.embed.positions, self.compute)[positions_BT]
    embeds_BTD = dropout(embeds_BTD, self.cfg.embed_dropout, keys_B)
    return self.compute.constrain(embeds_BTD, ACTIVATION_AXES)

  def apply_layer(
    self, block: Block, x_BTD, positions_BT, segments_BT, info, keys_B, update_cache
  ) -> jax.Array:
    x_BTD = block(x_BTD, positions_BT, segments_BT, info, update_cache, keys_B)
    return self.compute.constrain(x_BTD, ACTIVATION_AXES)

  def layer_info(self) -> LayerInfo:
    windows = self.cfg.distinct_windows
    index_L = depth_L = None
    if len(windows) > 1:
      index_L = jnp.array([windows.index(window) for window in self.cfg.windows])
    if self.cfg.divided_by_depth:
      depth_L = jnp.arange(1, self.cfg.L + 1, dtype=jnp.float32)
    return LayerInfo(index_L, depth_L)

  def _forward(self, embeds_BTD, segments_BT, positions_BT, keys_B, kv, update_cache, layers=None):
    embed_keys_B, layers_keys_B = split_keys(keys_B, 2)
    if positions_BT is None:
      positions_BT = default_positions(embeds_BTD)

    def layer(carry, xs):
      x_BTD, kv = carry
      block, index, info, keys_B = xs

      def update_layer(k_BTNH, v_BTNH):
        nonlocal kv
        visible, kv = update_cache(index, kv, k_BTNH, v_BTNH)
        return visible

      x_BTD = self.apply_layer(block, x_BTD, positions_BT, segments_BT, info, keys_B, update_layer)
      return (x_BTD, kv), None

    x_BTD = self.embed_inputs(embeds_BTD, positions_BT, embed_keys_B)
    info_L = self.layer_info()
    if layers is not None:
      graphdef = nnx.graphdef(self.blocks)
      carry = (x_BTD, kv)
      for index, weights in enumerate(layers):
        carry, _ = layer(carry, (nnx.merge(graphdef, weights), index, info_L.at(index), None))
      return self.norm(carry[0]), carry[1]
    keys_LB = None if layers_keys_B is None else split_keys(layers_keys_B, self.cfg.L)
    xs = (self.blocks, jnp.arange(self.cfg.L), info_L, keys_LB)
    (x_BTD, kv), _ = jax.lax.scan(apply_remat(layer, self.compute.remat), (x_BTD, kv), xs)
    return self.norm(x_BTD), kv


def default_positions(x: jax.Array) -> jax.Array:
  """0, 1, 2, ... for every row of x (B, T, ...), (1, T)."""
  return jnp.arange(x.shape[1])[None]


def apply_remat(layer: Callable, remat: str) -> Callable:
  """Wrap a layer in `jax.checkpoint` with the policy of `config.memory.remat`."""
  policies = jax.checkpoint_policies
  policy = {
    "none": lambda primitive, *_, **__: primitive.name not in CHEAP_PRIMITIVES,
    "dots": policies.save_from_both_policies(
      policies.dots_with_no_batch_dims_saveable, attention.attention_saveable
    ),
    "full": policies.nothing_saveable,
  }[remat]
  # prevent_cse guards against a compiler that undoes the recomputation; inside a scan it cannot,
  # and guarding costs.
  return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def parameter_count(cfg: ModelConfig) -> int:
  """Parameters of the model, without rows that pad its tables."""
  _, shapes, _ = abstract_model(cfg, ComputeConfig())
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def init_model(cfg: ModelConfig, compute: ComputeConfig, seed: int = 0) -> Decoder:
  """Create a decoder with new weights; under `jax.jit` with out_shardings they are made sharded."""
  # sharding/rules.py makes the shardings from the axis names; flax must not look for a mesh here.
  with nnx.use_eager_sharding(False):
    return Decoder(cfg, compute, nnx.Rngs(seed))


def abstract_model(cfg: ModelConfig, compute: ComputeConfig) -> tuple[nnx.GraphDef, dict, dict]:
  """Describe a decoder without memory: graphdef, shapes of parameters, and their logical axes.

  The two dicts are nested alike. `nnx.merge(graphdef, params)` makes a decoder of such parameters.
  """
  graphdef, state = nnx.split(nnx.eval_shape(lambda: init_model(cfg, compute)))
  axes = {}
  for path, param in nnx.to_flat_state(state):
    node = axes
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = param.out_sharding
  return graphdef, nnx.to_pure_dict(state), axes
