"""The decoder: embeddings, a scan over layers, the last norm and the output head.

B batch, T query length, S key length, V vocabulary, P positions, D model, F feed-forward, L layers, N heads, H head size
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

# Cheap to do again, and what they make of a weight is as large as the layer.
CHEAP_PRIMITIVES = {"convert_element_type", "sharding_constraint"}
ACTIVATION_AXES = ("batch", None, "act_embed")  # their logical axes


class Decoder(nnx.Module):
  """Token ids in, hidden states out; `head` turns hidden states into logits."""

  def __init__(self, cfg: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs):
    self.cfg, self.compute = cfg, compute
    self.embed = Embed(cfg, compute, rngs)
    # One Block whose parameters have a leading layer axis; `lax.scan` below walks along it.
    stack = nnx.vmap(
      lambda r: Block(cfg, compute, r), transform_metadata={nnx.PARTITION_NAME: "layers"}
    )
    self.blocks = stack(rngs.split(cfg.L))
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
    """Hidden states (B, T, D) after the last norm, in the compute dtype.

    Args:
      ids_BT: token ids.
      segments_BT: tokens see only tokens of their own segment; None: one segment a row.
      positions_BT: position ids; None: 0, 1, 2, ...
      keys_B: dropout keys, one for each row; None: no dropout.
      embeds_BTD: what `embed_tokens` gives for the ids, where their gradient is wanted (`add_embedding_grads`); None: it is called.
    """

    def cached(layer, cache, k, v):
      return (k, v, segments_BT, 0), cache

    embeds_BTD = self.embed_tokens(ids_BT) if embeds_BTD is None else embeds_BTD
    return self._run(embeds_BTD, segments_BT, positions_BT, keys_B, None, cached)[0]

  def forward_cached(
    self,
    cache: KVCache,
    ids_BT: jax.Array,
    segments_BT: jax.Array,
    positions_BT: jax.Array,
    layers: list[dict] | None = None,
  ) -> tuple[jax.Array, KVCache]:
    """Reads T more columns after those in the cache: hidden states (B, T, D) and the longer cache.

    The caller sees to it that the cache has room: `cache.used + T <= S`.

    Args:
      layers: weights of each layer, for a cache that is `apart`; None: they are stacked in `blocks`.
    """
    segments_BS = jax.lax.dynamic_update_slice(cache.segments_BS, segments_BT, (0, cache.used))

    def cached(layer, kv, k_BTNH, v_BTNH):
      (k, k_BSNH), (v, v_BSNH) = (
        cache.write(kv[0], layer, k_BTNH),
        cache.write(kv[1], layer, v_BTNH),
      )
      return (k_BSNH, v_BSNH, segments_BS, cache.used), (k, v)

    embeds_BTD, kv = self.embed_tokens(ids_BT), (cache.k, cache.v)
    h_BTD, (k, v) = self._run(embeds_BTD, segments_BT, positions_BT, None, kv, cached, layers)
    return h_BTD, KVCache(k, v, segments_BS, cache.used + ids_BT.shape[1])

  def head(self) -> Head:
    """The output table and its bias, in float32: minus infinity for rows that are padding."""
    if self.cfg.classes:
      return Head(gather_weight(self.output.score, self.compute))
    table = self.embed.tokens if self.cfg.tied else self.output.kernel
    table_VD = self.compute.to_device(table[...])
    bias_V = (
      self.compute.to_device(self.output.bias[...]).astype(jnp.float32)
      if self.cfg.head_bias
      else None
    )
    rows = table_VD.shape[0]
    if rows > self.cfg.V:
      bias_V = jnp.where(jnp.arange(rows) < self.cfg.V, 0.0 if bias_V is None else bias_V, -jnp.inf)
    used = lambda table_VD: self.compute.gather(
      table_VD.astype(self.compute.dtype), table.out_sharding
    )
    return Head(table_VD, bias_V, used)

  def logits(self, h: jax.Array) -> jax.Array:
    """(..., D) -> (..., V) in float32; (..., classes) of a model that classifies, where the last real token's count."""
    return compute_logits(h, self.head())[..., : self.cfg.classes or self.cfg.V]

  def embed_tokens(self, ids_BT: jax.Array) -> jax.Array:
    """Rows of the token table, (B, T, D). They are read where the table is stored: it is never whole on a device for them."""
    embeds_BTD = self.compute.to_device(self.embed.tokens[...])[ids_BT].astype(self.compute.dtype)
    return self.compute.constrain(self.compute.shard_rows(embeds_BTD), ACTIVATION_AXES)

  def add_embedding_grads(self, gradient: dict, ids: jax.Array, d_rows: jax.Array) -> dict:
    """The gradient of the parameters with that of the rows that were looked up.

    They are added to what the head has left there, in float32: a second table would take as much memory again, and bfloat16
    loses what is added to the sum of a frequent token. A frozen table has none.
    """
    if "tokens" not in gradient.get("embed", {}):
      return gradient
    table_VD = gradient["embed"]["tokens"]
    table_VD = table_VD.at[ids].add(self.compute.shard_row_grads(d_rows).astype(table_VD.dtype))
    return gradient | {"embed": gradient["embed"] | {"tokens": table_VD}}

  def embed_inputs(
    self, embeds_BTD: jax.Array, positions_BT: jax.Array, keys_B: jax.Array | None
  ) -> jax.Array:
    """What goes into the first layer, (B, T, D)."""
    if not self.cfg.rotary_dim:
      embeds_BTD = embeds_BTD + gather_weight(self.embed.positions, self.compute)[positions_BT]
    return self.compute.constrain(
      dropout(embeds_BTD, self.cfg.embed_dropout, keys_B), ACTIVATION_AXES
    )

  def apply_layer(
    self, block: Block, x_BTD, positions_BT, segments_BT, of_layer, keys_B, cached
  ) -> jax.Array:
    """One layer: what goes into it to what comes out."""
    x_BTD = block(x_BTD, positions_BT, segments_BT, of_layer, cached, keys_B)
    return self.compute.constrain(x_BTD, ACTIVATION_AXES)

  def layer_info(self) -> LayerInfo:
    """What tells the layers apart."""
    kinds = self.cfg.distinct_windows
    windows_L = (
      jnp.array([kinds.index(window) for window in self.cfg.windows]) if len(kinds) > 1 else None
    )
    depths_L = (
      jnp.arange(1, self.cfg.L + 1, dtype=jnp.float32) if self.cfg.divided_by_depth else None
    )
    return LayerInfo(windows_L, depths_L)

  def _run(self, embeds_BTD, segments_BT, positions_BT, keys_B, kv, cached, layers=None):
    embed_keys_B, layers_keys_B = split_keys(keys_B, 2)
    if positions_BT is None:
      positions_BT = default_positions(embeds_BTD)

    def layer(carry, xs):
      x_BTD, kv = carry
      block, index, of_layer, keys_B = xs

      def cached_here(k_BTNH, v_BTNH):
        nonlocal kv
        seen, kv = cached(index, kv, k_BTNH, v_BTNH)
        return seen

      return (
        self.apply_layer(block, x_BTD, positions_BT, segments_BT, of_layer, keys_B, cached_here),
        kv,
      ), None

    x_BTD, of_layers = self.embed_inputs(embeds_BTD, positions_BT, embed_keys_B), self.layer_info()
    if layers is not None:
      graph, carry = nnx.graphdef(self.blocks), (x_BTD, kv)
      for index, weights in enumerate(layers):
        carry, _ = layer(carry, (nnx.merge(graph, weights), index, of_layers.at(index), None))
      return self.norm(carry[0]), carry[1]
    keys_LB = None if layers_keys_B is None else split_keys(layers_keys_B, self.cfg.L)
    layer = apply_remat(layer, self.compute.remat)
    (x_BTD, kv), _ = jax.lax.scan(
      layer, (x_BTD, kv), (self.blocks, jnp.arange(self.cfg.L), of_layers, keys_LB)
    )
    return self.norm(x_BTD), kv


def default_positions(x: jax.Array) -> jax.Array:
  """0, 1, 2, ... for every row of x (B, T, ...), (1, T)."""
  return jnp.arange(x.shape[1])[None]


def apply_remat(layer: Callable, remat: str) -> Callable:
  policies = jax.checkpoint_policies
  policy = {
    "none": lambda primitive, *_, **__: primitive.name not in CHEAP_PRIMITIVES,
    "dots": policies.save_from_both_policies(
      policies.dots_with_no_batch_dims_saveable, attention.attention_saveable
    ),
    "full": policies.nothing_saveable,
  }[remat]
  # prevent_cse guards against a compiler that undoes the recomputation; inside a scan it cannot, and guarding costs.
  return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def parameter_count(cfg: ModelConfig) -> int:
  """Parameters of the model, without rows that pad its tables."""
  return sum(
    math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_model(cfg, ComputeConfig())[1])
  )


def init_model(cfg: ModelConfig, compute: ComputeConfig, seed: int = 0) -> Decoder:
  """A decoder with new weights. Under `jax.jit` with out_shardings the weights are born sharded."""
  # Placement is decided in sharding.py, from the axis names; flax must not look for a mesh here.
  with nnx.use_eager_sharding(False):
    return Decoder(cfg, compute, nnx.Rngs(seed))


def abstract_model(cfg: ModelConfig, compute: ComputeConfig) -> tuple[nnx.GraphDef, dict, dict]:
  """A decoder without memory: its graph, its parameters as shapes, and the logical axis names of each parameter.

  The two dicts are nested alike. `nnx.merge(graph, parameters)` gives the decoder back, with real parameters too.
  """
  graph, state = nnx.split(nnx.eval_shape(lambda: init_model(cfg, compute)))
  axes = {}
  for path, param in nnx.to_flat_state(state):
    node = axes
    for part in path[:-1]:
      node = node.setdefault(part, {})
    node[path[-1]] = param.out_sharding
  return graph, nnx.to_pure_dict(state), axes
