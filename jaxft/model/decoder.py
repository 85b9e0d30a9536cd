"""The decoder: embeddings, a scan over layers, the last norm and the output head.

B batch, T query length, S key length, V vocabulary, D model, L layers, N heads, H head size
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.model import attention
from jaxft.model.compute import ComputeConfig, LayerInfo, cast_and_gather, gather_weight
from jaxft.model.config import ModelConfig
from jaxft.model.dropout import dropout, split_keys
from jaxft.model.kv_cache import KVCache
from jaxft.model.layers import ACTIVATION_AXES, Block, Embed, LayerNorm, OutputHead
from jaxft.model.loss import Head, compute_logits
from jaxft.sharding.rules import constrain, shard_rows
from jaxft.utils.types import Params

# Operations that remat "none" recomputes. They are cheap, and their results for the weights (cast
# and gathered) would take as much memory as the layer.
CHEAP_PRIMITIVES = {"convert_element_type", "sharding_constraint"}


class Decoder(nnx.Module):
  """Maps token ids to hidden states; `logits` maps hidden states to logits."""

  def __init__(self, cfg: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs):
    self.cfg = cfg
    self.compute = compute
    self.embed = Embed(cfg, compute, rngs)
    # One Block whose parameters have a leading layer axis. `lax.scan` iterates over that axis, so
    # that a single layer is compiled for any depth.
    metadata = {nnx.PARTITION_NAME: "layers"}
    init_block = nnx.vmap(lambda rngs: Block(cfg, compute, rngs), transform_metadata=metadata)
    self.blocks = init_block(rngs.split(cfg.L))
    self.norm = LayerNorm(cfg, compute)
    if cfg.classes or not cfg.tied or cfg.head_bias:
      self.output = OutputHead(cfg, compute, rngs)

  def __call__(
    self,
    ids_BT: jax.Array,
    cache: KVCache | None = None,
    *,
    segments_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    keys_B: jax.Array | None = None,
    embeds_BTD: jax.Array | None = None,
    layers: list[Params] | None = None,
  ) -> tuple[jax.Array, KVCache | None]:
    """Compute the hidden states of token ids, and update the cache if one is given.

    Args:
      ids_BT: token ids.
      cache: keys and values of earlier tokens. The new tokens are T more columns after them. The
        caller makes sure that they fit: `cache.length + T <= S`.
      segments_BT: segment ids; tokens see only their own segment. None for one segment per row.
      positions_BT: position ids; None for those of the columns, 0, 1, 2, ...
      keys_B: dropout keys, one for each row; None for no dropout.
      embeds_BTD: `embed_tokens(ids_BT)`, from a caller that needs its gradient; None to compute it.
      layers: weights of each layer, to unroll the scan; needs an `unstack`ed cache. None to scan
        over `blocks`.

    Returns:
      The hidden states (B, T, D) after the last norm, in the compute dtype, and the updated cache.
    """
    embeds_BTD = self.embed_tokens(ids_BT) if embeds_BTD is None else embeds_BTD
    embed_keys_B, layers_keys_B = split_keys(keys_B, 2)
    if positions_BT is None:
      positions_BT = default_positions(embeds_BTD)
      positions_BT = positions_BT if cache is None else positions_BT + cache.length
    if cache is not None:
      segments_BT = jnp.ones_like(ids_BT) if segments_BT is None else segments_BT
      cache = cache.write_segments(segments_BT)

    def layer(carry, xs):
      block, info, keys_B = xs
      carry = block(
        *carry, positions_BT=positions_BT, segments_BT=segments_BT, info=info, keys_B=keys_B
      )
      return carry, None

    carry = (self.embed_inputs(embeds_BTD, positions_BT, embed_keys_B), cache)
    info_L = self.layer_info()
    keys_LB = split_keys(layers_keys_B, self.cfg.L)
    if layers is None:
      xs = (self.blocks, info_L, None if layers_keys_B is None else keys_LB)
      carry, _ = jax.lax.scan(apply_remat(layer, self.compute.remat), carry, xs)
    else:
      graphdef = nnx.graphdef(self.blocks)
      for index, weights in enumerate(layers):
        carry, _ = layer(carry, (nnx.merge(graphdef, weights), info_L.at(index), keys_LB[index]))
    x_BTD, cache = carry
    if cache is not None:
      cache = dataclasses.replace(cache, length=cache.length + ids_BT.shape[1])
    return self.norm(x_BTD), cache

  def head(self) -> Head:
    """Return the output table and its bias in float32.

    Padding rows of the table get a bias of minus infinity, so that their probability is 0.
    """
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
    gather = functools.partial(cast_and_gather, axes=table.out_sharding, compute=self.compute)
    return Head(table_VD, bias_V, gather)

  def logits(self, h: jax.Array) -> jax.Array:
    """Map hidden states (..., D) to logits (..., V), or (..., classes), in float32.

    The classes are those of the last real token of a text.
    """
    return compute_logits(h, self.head())[..., : self.cfg.classes or self.cfg.V]

  def embed_tokens(self, ids_BT: jax.Array) -> jax.Array:
    """Look up token embeddings (B, T, D) in the sharded table, without gathering it."""
    compute = self.compute
    embeds_BTD = compute.to_device(self.embed.tokens[...])[ids_BT].astype(compute.dtype)
    embeds_BTD = shard_rows(embeds_BTD, "parameters", compute.mesh, compute.zero_stage)
    return constrain(embeds_BTD, ACTIVATION_AXES, compute.mesh)

  def add_embedding_grads(self, grads: Params, ids: jax.Array, d_embeds: jax.Array) -> Params:
    """Add the gradient of `embed_tokens(ids)` to the gradient of the parameters.

    It is added to the head's gradient of the same table, because a second table would double the
    memory. The sum is in float32: in bfloat16, the sum of a frequent token would lose small terms.
    A frozen table gets no gradient.

    Args:
      grads: gradient of the parameters.
      ids: token ids (..., B, T).
      d_embeds: gradient of their embeddings (..., B, T, D).
    """
    if "tokens" not in grads.get("embed", {}):
      return grads
    d_embeds = shard_rows(d_embeds, "gradients", self.compute.mesh, self.compute.zero_stage)
    table_VD = grads["embed"]["tokens"]
    table_VD = table_VD.at[ids].add(d_embeds.astype(table_VD.dtype))
    return grads | {"embed": grads["embed"] | {"tokens": table_VD}}

  def embed_inputs(
    self, embeds_BTD: jax.Array, positions_BT: jax.Array, keys_B: jax.Array | None
  ) -> jax.Array:
    """Return the input of the first layer, (B, T, D)."""
    if not self.cfg.rotary_dim:
      embeds_BTD = embeds_BTD + gather_weight(self.embed.positions, self.compute)[positions_BT]
    embeds_BTD = dropout(embeds_BTD, self.cfg.embed_dropout, keys_B)
    return constrain(embeds_BTD, ACTIVATION_AXES, self.compute.mesh)

  def layer_info(self) -> LayerInfo:
    """Return the `LayerInfo` of all layers, to scan over."""
    windows = self.cfg.distinct_windows
    index_L = depth_L = None
    if len(windows) > 1:
      index_L = jnp.array([windows.index(window) for window in self.cfg.windows])
    if self.cfg.divided_by_depth:
      depth_L = jnp.arange(1, self.cfg.L + 1, dtype=jnp.float32)
    return LayerInfo(jnp.arange(self.cfg.L), index_L, depth_L)


def default_positions(x: jax.Array) -> jax.Array:
  """Return position ids 0, 1, 2, ... for x (B, T, ...), as (1, T)."""
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
  # prevent_cse stops the compiler from merging the recomputation with the forward pass. Inside a
  # scan it cannot merge them, and prevent_cse would only cost time.
  return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def parameter_count(cfg: ModelConfig) -> int:
  """Return the number of parameters, without rows that pad the vocabulary."""
  _, shapes, _ = abstract_model(cfg, ComputeConfig())
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def init_model(cfg: ModelConfig, compute: ComputeConfig, seed: int = 0) -> Decoder:
  """Create a decoder with new weights.

  Call it under `jax.jit` with out_shardings to create the weights sharded.
  """
  # sharding/rules.py derives the shardings from the axis names. Flax must not look for a mesh here.
  with nnx.use_eager_sharding(False):
    return Decoder(cfg, compute, nnx.Rngs(seed))


def abstract_model(
  cfg: ModelConfig, compute: ComputeConfig
) -> tuple[nnx.GraphDef[Decoder], Params, Params]:
  """Describe a decoder without allocating its weights.

  Returns:
    The graphdef, the shapes of the parameters, and their logical axes in the same nested dict.
    `nnx.merge(graphdef, params)` makes a decoder from parameters of these shapes.
  """
  graphdef, state = nnx.split(nnx.eval_shape(lambda: init_model(cfg, compute)))
  axes = {}
  for path, param in nnx.to_flat_state(state):
    node = axes
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = param.out_sharding
  return graphdef, nnx.to_pure_dict(state), axes
