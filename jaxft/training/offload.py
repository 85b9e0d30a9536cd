"""Weights, gradients and optimizer state in host memory; a layer is on the device while in use.

"all" walks the layers forward and backward by hand: autodiff through weights on the host would
hold the gradients of all layers on the device. Each layer is fetched once forward and once backward
for all accumulation steps together, so that what travels does not grow with the batch. "optimizer"
has a copy of the weights on the device, in the compute dtype, made anew each step.

A accumulation steps, B rows at once, T tokens a row, L layers, D model
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from jaxft.config import OptimSection
from jaxft.model.decoder import apply_remat, default_positions
from jaxft.model.dropout import per_row_keys, split_keys
from jaxft.model.loss import cross_entropy_sum
from jaxft.sharding import per_device
from jaxft.training import optimizer
from jaxft.training.stochastic_rounding import stochastic_round
from jaxft.training.train_state import TrainState
from jaxft.training.train_step import ids_in_range
from jaxft.training.trainable import combine, make_layer_mask

TABLE_CHUNK_BYTES = 2**26  # bytes of a table that are updated at once


def validate_offload(platform: str, shapes: Any, mode: str) -> list[str]:
  """Returns one line where the compiler is known to fail on such a state in host memory.

  Args:
    shapes: of the state; where they have shardings, a device's shards count.
    mode: `memory.offload`.
  """
  if mode == "none" or platform != "tpu":
    return []
  for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
    shape = leaf.sharding.shard_shape(leaf.shape) if getattr(leaf, "sharding", None) else leaf.shape
    # libtpu (0.0.42.1) has other shapes in another order in host memory than it copies them in.
    if is_offloaded(leaf) and (shape[-1] % 128 or len(shape) > 2 and shape[-2] % 8):
      return [
        f"config.memory.offload={mode}: on a TPU not for this model, optimizer or adapter: libtpu "
        "aborts on shapes whose last two sizes are no multiples of 8 and 128, as of "
        f"{jax.tree_util.keystr(path)}, {shape}; all of GPT-J with adamw, lion or sgd has none; "
        "more chips (config.mesh.fsdp) hold others without offload"
      ]
  return []


def is_offloaded(leaf: Any) -> bool:
  """Whether a leaf goes to the host: vectors and scalars are too small to bother."""
  return leaf.ndim > 1


def with_host_memory(shapes: Any) -> Any:
  """The shapes, with shardings in host memory for what is offloaded."""

  def pin(leaf):
    sharding = leaf.sharding
    if is_offloaded(leaf):
      sharding = sharding.with_memory_kind("pinned_host")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(pin, shapes)


def to_device(tree: Any) -> Any:
  """Moves a tree to the device; what is on it already stays."""

  # In the host's layout, row after row: libtpu (0.0.42.1) aborts where the layout is to change.
  def row_major(x):
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

  def fetch(x: jax.Array) -> jax.Array:
    x = jax.device_put(x, jax.memory.Space.Device)
    return jax.lax.platform_dependent(x, tpu=row_major, default=lambda x: x)

  return jax.tree.map(fetch, tree)


def to_host(x: jax.Array) -> jax.Array:
  """Moves an array to the host."""
  return jax.device_put(x, jax.memory.Space.Host)


def tree_to_host(tree: Any) -> Any:
  """Moves whole leaves to the host, those that are offloaded."""
  return jax.tree.map(lambda leaf: to_host(leaf) if is_offloaded(leaf) else leaf, tree)


def host_mask(state: TrainState, mode: str) -> TrainState:
  """Says for each leaf of the state, or of its shapes, whether it is in host memory."""

  def mask(tree, on):
    return jax.tree.map(lambda leaf: on and is_offloaded(leaf), tree)

  return TrainState(
    step=False,
    params=mask(state.params, mode != "none"),
    opt_state=mask(state.opt_state, mode != "none"),
    frozen=mask(state.frozen, mode == "all"),
  )


def mark_host_inputs(step: Callable, mask: Any) -> Callable:
  """Wraps `step` so that XLA knows which leaves of its first argument are on the host.

  The shardings of a GPU that does not exist have no memory kind, and the program would not know
  (jax 0.10 to 0.12).
  """

  def mark(x, on_host):
    return to_host(x) if on_host else x

  return lambda state, batch: step(jax.tree.map(mark, state, mask), batch)


def fetch_layer(stack: Any, index: jax.Array) -> Any:
  """Fetches one layer of stacked leaves."""
  layer = lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
  return to_device(jax.tree.map(layer, stack))


def make_streamed_grad_fn(
  graph: nnx.GraphDef, *, loss_chunk: int, seed: int, remat: str, trained: Any = ()
) -> Callable:
  """Makes `train_step.make_grad_fn`'s function for weights on the host, and the gradient too."""
  mask_frozen_layers = make_layer_mask(trained)

  def grad_fn(state: TrainState, batch: dict) -> tuple[jax.Array, Any, jax.Array]:
    params = state.all_params
    A, B, T = batch["ids"].shape
    tokens = jnp.sum(batch["mask"])
    scale = 1 / jnp.maximum(tokens, 1).astype(jnp.float32)
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    keys_AB = per_row_keys(key, 0, A * B).reshape(A, B)

    # The model with some of its parameters replaced by ones on the device; those it does not use in
    # a call stay on the host.
    def model_with(**replaced):
      return nnx.merge(graph, params | replaced)

    model = model_with()
    cfg = model.cfg
    has_dropout = any(
      (cfg.embed_dropout, cfg.attention_dropout, cfg.residual_dropout, cfg.lora_dropout)
    )
    embed_keys_AB, keys_LAB = _split_keys(keys_AB, cfg.L) if has_dropout else (None, None)
    positions = batch.get(
      "positions", jnp.broadcast_to(default_positions(batch["ids"][0]), (A, 1, T))
    )

    # ---- Forward: embedding, then layer after layer. Only the inputs of each layer are saved, of
    # all micro-batches: the backward pass computes the layer again from them, as with remat.
    embed = to_device(params["embed"])
    other_embed = {name: leaf for name, leaf in embed.items() if name != "tokens"}
    # Outside of the function that is differentiated: the gradient of the rows is added to the
    # table's at the end, and no second table exists.
    embeds = _map_micro_batches(model_with(embed=embed).embed_tokens, batch["ids"])

    def embed_inputs(other_embed, embeds):
      def embed_one(xs):
        return model_with(embed=params["embed"] | other_embed).embed_inputs(*xs)

      return _map_micro_batches(embed_one, (embeds, positions, embed_keys_AB))

    x, embed_vjp = jax.vjp(embed_inputs, other_embed, embeds)
    layer_info = model.layer_info()

    def apply_layer(blocks, x, index):
      block = model_with(blocks=blocks).blocks
      info = layer_info.at(index)

      def apply_one(xs):
        x_BTD, positions_BT, segments_BT, keys_B = xs
        update_cache = lambda k, v: (k, v, segments_BT, 0)
        return model.apply_layer(
          block, x_BTD, positions_BT, segments_BT, info, keys_B, update_cache
        )

      keys_AB = None if keys_LAB is None else keys_LAB[index]
      xs = (x, positions, batch.get("segments"), keys_AB)
      return _map_micro_batches(apply_remat(apply_one, remat), xs)

    def forward(x, index):
      return apply_layer(fetch_layer(params["blocks"], index), x, index), x

    layers = jnp.arange(cfg.L)
    x, inputs = jax.lax.scan(forward, x, layers)

    # ---- Loss: its gradient by the head's parameters and by the last hidden states.
    def loss_fn(head_params, x_BTD, targets_BT, mask_BT):
      model = model_with(**combine(head_params, frozen_head))
      h_BTD = model.norm(x_BTD)
      return scale * cross_entropy_sum(h_BTD, model.head(), targets_BT, mask_BT, loss_chunk)

    # A tied head is the table of the embedding; a classifier has an output of its own.
    uses_table = cfg.tied and not cfg.classes
    head_names = ("norm", "output", "embed") if uses_table else ("norm", "output")

    def select_head(tree):
      return to_device({name: tree[name] for name in head_names if name in tree})

    head_params = select_head(state.params)
    frozen_head = select_head(state.frozen)

    def add_loss(total, xs):
      loss, (d_head, dx) = jax.value_and_grad(loss_fn, (0, 1))(head_params, *xs)
      return jax.tree.map(jnp.add, total, (loss, d_head)), dx

    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), head_params))
    (loss, d_head), dx = jax.lax.scan(add_loss, zeros, (x, batch["targets"], batch["mask"]))
    loss = jnp.where(ids_in_range(batch, cfg), loss, jnp.nan)
    d_head = tree_to_host(d_head)

    # ---- Backward: layers from the last to the first, each fetched again. Its gradient, of all
    # micro-batches, goes to the host as it is made: the device has one layer's, never all.
    def backward(dx, xs):
      x, index = xs

      def fetch(tree):
        return fetch_layer({"blocks": tree.get("blocks", {})}, index)

      frozen, params = map(fetch, (state.frozen, state.params))
      # In float32, as the gradients of the accumulation steps are added up in the dtype of these.
      params_f32 = jax.tree.map(lambda p: p.astype(jnp.float32), params)
      _, vjp = jax.vjp(
        lambda params, x: apply_layer(combine(params, frozen)["blocks"], x, index), params_f32, x
      )
      d_params, dx = vjp(dx)

      def send(path, d, p):
        return to_host(mask_frozen_layers(path, d, index).astype(p.dtype))

      return dx, jax.tree_util.tree_map_with_path(send, d_params, params)

    dx, d_blocks = jax.lax.scan(backward, dx, (inputs, layers), reverse=True)

    # ---- The embedding: the gradient of its rows is added to what a tied head has left.
    d_other, d_embeds = embed_vjp(dx)
    if "tokens" in d_head.get("embed", {}):
      d_tokens = to_device(d_head["embed"]["tokens"])
    else:
      d_tokens = jnp.zeros_like(embed["tokens"])
    trained_embed = state.params.get("embed", {})
    d_embed = {"tokens": d_tokens} | d_other
    d_embed = {"embed": {name: d for name, d in d_embed.items() if name in trained_embed}}
    d_embed = tree_to_host(model.add_embedding_grads(d_embed, batch["ids"], d_embeds))
    grads = {**d_head, **d_embed, **d_blocks}
    return loss, {name: grads[name] for name in state.params}, tokens

  return grad_fn


def _map_micro_batches(f: Callable, xs: Any) -> jax.Array:
  """Maps `f` over the accumulation steps, one after the other."""
  if jax.tree.leaves(xs)[0].shape[0] == 1:
    return f(jax.tree.map(lambda x: x[0], xs))[None]
  return jax.lax.map(f, xs)


def _split_keys(keys_AB: jax.Array, L: int) -> tuple[jax.Array, jax.Array]:
  """Makes the keys the model itself would: for its embedding (A, B), for its layers (L, A, B)."""

  def split_rows(keys_B):
    embed_B, layers_B = split_keys(keys_B, 2)
    return embed_B, split_keys(layers_B, L)

  return jax.vmap(split_rows, out_axes=(0, 1))(keys_AB)


def make_copy_grad_fn(grad_fn: Callable, dtype: Any, shardings: Any) -> Callable:
  """Makes `grad_fn` copy weights on the host to the device first, a layer at a time.

  Matrices of layers are in the compute dtype, and so are their gradients; what all layers share
  stays in float32, as its gradient is a sum of several.

  Args:
    shardings: on the device, for every parameter.
  """

  def copy(path, leaf, sharding):
    if not optimizer.is_stacked(path):
      return to_device(leaf)
    # Cast before the layers are stacked: the device never has all of them in float32.
    to = optimizer.param_dtype(path, leaf, dtype)

    def fetch(index):
      return fetch_layer(leaf, index).astype(to)

    copied = jax.lax.map(fetch, jnp.arange(leaf.shape[0]))
    return jax.lax.with_sharding_constraint(copied, sharding)

  def copy_grad_fn(state: TrainState, batch: dict) -> tuple[jax.Array, Any, jax.Array]:
    params = jax.tree_util.tree_map_with_path(copy, state.params, shardings)
    return grad_fn(state._replace(params=params), batch)

  return copy_grad_fn


def make_streamed_stats(grad_shardings: Any) -> Callable:
  """Makes `train_step.make_grad_stats`'s function for a gradient on the host, read in chunks.

  It does not check the state: 12 more bytes a parameter over the bus. A NaN among the weights shows
  in the loss, among the moments in the weights after them, and a checkpoint of either is refused
  (`CheckpointManager.save`).

  Args:
    grad_shardings: a sharding for every leaf of the gradient.
  """

  def shard_stats(shard: per_device.LocalShard) -> jax.Array:
    chunks = LeafChunks.of_rows(shard.values)

    def add(i, carry):
      squares, max_abs = carry
      x = to_device(chunks.read(shard.values, i)).astype(jnp.float32)
      return squares + jnp.sum(x * x), jnp.maximum(max_abs, jnp.max(jnp.abs(x)))

    zeros = (jnp.float32(0), jnp.float32(0))
    squares, max_abs = jax.lax.fori_loop(0, chunks.num_chunks, add, zeros)
    # A replica adds nothing to the norm; NaN and infinity are the maximum wherever they are.
    return jnp.stack([jnp.where(shard.is_primary, squares, 0), max_abs])

  map_shards = per_device.map_shards(jax.tree.leaves(grad_shardings), shard_stats)

  def grad_stats(grads: Any, state: TrainState) -> tuple[jax.Array, jax.Array]:
    squares, max_abs = jnp.moveaxis(map_shards(jax.tree.leaves(grads)), -1, 0)
    unchecked = jnp.zeros(len(jax.tree.leaves(state)), bool)
    norm = jnp.sqrt(squares.sum())
    return norm, jnp.concatenate([~jnp.isfinite(max_abs.max(axis=0)), unchecked])

  return grad_stats


def make_streamed_update_fn(config: OptimSection, shardings: Any, trained: Any = ()) -> Callable:
  """Makes `train_step.make_update_fn`'s function for a state on the host, updated in place.

  It updates a layer of each leaf, or some rows of a table, after the other.

  Args:
    shardings: for every parameter.
  """
  mask_frozen_layers = make_layer_mask(trained)

  def update_leaf(path, sharding, key, param, grad, opt_state, is_finite, scale, learning_rate):
    tx = optimizer.make_leaf_optimizer(config, path)
    num_shards = param.shape[0] // sharding.shard_shape(param.shape)[0]
    chunks = LeafChunks.of(path, param, num_shards)

    # Others, such as step counts, are the same for all chunks.
    def is_chunked(leaf):
      return leaf.shape[:1] == param.shape[:1]

    if any(leaf.ndim and not is_chunked(leaf) for leaf in jax.tree.leaves(opt_state)):
      chunks = chunks._replace(num_chunks=1)  # an optimizer that measures over the whole table

    def read(leaf, i):
      return to_device(chunks.read(leaf, i) if is_chunked(leaf) else leaf)

    def write(leaf, new, i):
      new = to_host(new) if is_offloaded(leaf) else new
      return chunks.write(leaf, new, i) if is_chunked(leaf) else new

    def body(i, carry):
      param, new_state = carry
      p = read(param, i).astype(jnp.float32)

      # What all chunks share is read as it was before the step: a count is increased once.
      def read_old(new, old):
        return read(new if is_chunked(new) else old, i)

      s = jax.tree.map(read_old, new_state, opt_state)
      g = to_device(chunks.read(grad, i)).astype(jnp.float32)
      update, s = tx.update(g * scale, s, p)
      update = mask_frozen_layers(path, update, i) if chunks.by_layer else update
      p = stochastic_round(p - learning_rate * update, param.dtype, jax.random.fold_in(key, i))
      return write(param, p, i), jax.tree.map(lambda x, y: write(x, y, i), new_state, s)

    # No turn where the step is skipped; a loop writes over the state where it lies.
    num_turns = jnp.where(is_finite, chunks.num_chunks, 0)
    return jax.lax.fori_loop(0, num_turns, body, (param, opt_state))

  def update_fn(is_finite, grads, scale, learning_rate, keys, params, opt_state):
    update = lambda *leaves: update_leaf(*leaves, is_finite, scale, learning_rate)
    trees = (shardings, keys, params, grads, opt_state)
    return optimizer.unzip(params, jax.tree_util.tree_map_with_path(update, *trees))

  return update_fn


class HostTraffic(NamedTuple):
  """Bytes that a step moves between host and device; they do not grow with the batch."""

  to_device: int
  to_host: int


def host_traffic(
  mode: str, params: Any, opt_state: Any, frozen: Any, tied: bool, nbytes: Callable[[Any], int]
) -> HostTraffic:
  """What a step with this `memory.offload` moves.

  Args:
    params, opt_state, frozen: shapes of trained weights, optimizer state, and other weights.
    nbytes: of a tree, on one device.
  """
  weights = nbytes(params)
  moments = nbytes(opt_state)
  if mode == "none":
    return HostTraffic(0, 0)
  if mode == "optimizer":  # the copy, then the update
    return HostTraffic(2 * weights + moments, weights + moments)
  layers = sum(nbytes(tree.get("blocks", {})) for tree in (params, frozen))
  tied_trained, tied_frozen = (
    nbytes(tree.get("embed", {})) if tied else 0 for tree in (params, frozen)
  )
  # Layers forward and backward, all else once, what is tied twice, with its gradient; the gradient
  # for its norm; the update.
  fetched = weights + nbytes(frozen) + layers + 2 * tied_trained + tied_frozen
  fetched += weights + (2 * weights + moments)
  return HostTraffic(fetched, weights + tied_trained + weights + moments)


class LeafChunks(NamedTuple):
  """How a leaf is split along its first axis into chunks, on the device one after the other."""

  by_layer: bool  # a chunk is a layer, without that axis; otherwise some rows of each device's
  num_chunks: int
  num_devices: int = 1  # that share the rows

  @classmethod
  def of(cls, path: Any, leaf: jax.Array, num_devices: int) -> "LeafChunks":
    if optimizer.is_stacked(path):
      return cls(True, leaf.shape[0])
    return cls.of_rows(leaf, num_devices)

  @classmethod
  def of_rows(cls, leaf: jax.Array, num_devices: int = 1) -> "LeafChunks":
    """The fewest chunks of equal size of at most `TABLE_CHUNK_BYTES` in float32."""
    rows = leaf.shape[0] // num_devices
    least = min(leaf.size * 4 / num_devices / TABLE_CHUNK_BYTES, rows)
    num_chunks = next(n for n in range(1, rows + 1) if rows % n == 0 and n >= least)
    return cls(False, num_chunks, num_devices)

  def read(self, x: jax.Array, i: jax.Array) -> jax.Array:
    if self.by_layer:
      return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
    if self.num_chunks == 1:
      return x
    rows = x.shape[0] // self.num_devices // self.num_chunks
    return jax.lax.dynamic_slice_in_dim(self._by_device(x), i * rows, rows, 1)

  def write(self, x: jax.Array, new: jax.Array, i: jax.Array) -> jax.Array:
    if self.by_layer:
      return jax.lax.dynamic_update_index_in_dim(x, new, i, 0)
    if self.num_chunks == 1:
      return new
    rows = self._by_device(x)
    return jax.lax.dynamic_update_slice_in_dim(rows, new, i * new.shape[1], 1).reshape(x.shape)

  def _by_device(self, x: jax.Array) -> jax.Array:
    """(rows, ...) -> (devices, rows of each, ...), as a slice of all rows would need a gather."""
    return x.reshape(self.num_devices, -1, *x.shape[1:])
