"""Weights, gradients and optimizer state in host memory; a layer is on the device while in use.

"all" walks the layers forward and backward by hand: autodiff through weights on the host would
hold the gradients of all layers on the device. Each layer is fetched once forward and once backward
for all accumulation steps together, so that what travels does not grow with the batch. "optimizer"
has a copy of the weights on the device, in the compute dtype, made anew each step.

A accumulation steps, B rows at once, T tokens a row, L layers, D model
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from jaxft.checkpoint.manager import CheckpointState
from jaxft.config import OptimSection
from jaxft.data.loader import Batch
from jaxft.model.config import ModelConfig
from jaxft.model.decoder import Decoder, apply_remat, default_positions
from jaxft.model.dropout import per_row_keys, split_keys
from jaxft.model.loss import cross_entropy_sum
from jaxft.sharding import per_device
from jaxft.training import optimizer
from jaxft.training.stochastic_rounding import stochastic_round
from jaxft.training.train_state import TrainState
from jaxft.training.train_step import GradFn, GradStatsFn, UpdateFn, ids_in_range
from jaxft.training.trainable import ParamPath, Trained, combine, make_layer_mask
from jaxft.utils.types import Params, PyTree

ApplyLayerFn: TypeAlias = Callable[[Params, jax.Array, jax.Array], jax.Array]  # (blocks, x, index)
TABLE_CHUNK_BYTES = 2**26  # bytes of a table that are updated at once


def validate_offload(platform: str, shapes: PyTree, mode: str) -> list[str]:
  """Return one line where the compiler is known to fail on such a state in host memory.

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
        f"config.memory.offload={mode}: on a TPU this model, optimizer or adapter cannot be "
        "offloaded. libtpu aborts unless the last two sizes of a shape are multiples of 8 and 128; "
        f"{jax.tree_util.keystr(path)} is {shape}. Full fine-tuning of GPT-J with adamw, lion or "
        "sgd works; for other models, use more chips (config.mesh.fsdp) without offload"
      ]
  return []


def is_offloaded(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
  """Whether a leaf goes to the host: vectors and scalars are too small to bother."""
  return leaf.ndim > 1


def with_host_memory(shapes: PyTree) -> PyTree:
  """The shapes, with shardings in host memory for what is offloaded."""

  def pin(leaf):
    if not is_offloaded(leaf):
      return leaf
    return leaf.update(sharding=leaf.sharding.with_memory_kind("pinned_host"))

  return jax.tree.map(pin, shapes)


def to_device(tree: PyTree) -> PyTree:
  """Move a tree to the device; what is on it already stays."""

  # In the host's layout, row after row: libtpu (0.0.42.1) aborts where the layout is to change.
  def row_major(x):
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

  def fetch(x: jax.Array) -> jax.Array:
    x = jax.device_put(x, jax.memory.Space.Device)
    return jax.lax.platform_dependent(x, tpu=row_major, default=lambda x: x)

  return jax.tree.map(fetch, tree)


def to_host(x: jax.Array) -> jax.Array:
  """Move an array to the host."""
  return jax.device_put(x, jax.memory.Space.Host)


def tree_to_host(tree: PyTree) -> PyTree:
  """Move whole leaves to the host, those that are offloaded."""
  return jax.tree.map(lambda leaf: to_host(leaf) if is_offloaded(leaf) else leaf, tree)


def host_mask(state: TrainState, mode: str) -> TrainState:
  """Return for each leaf of the state, or of its shapes, whether it is in host memory."""

  def mask(tree, on):
    return jax.tree.map(lambda leaf: on and is_offloaded(leaf), tree)

  return TrainState(
    step=False,
    params=mask(state.params, mode != "none"),
    opt_state=mask(state.opt_state, mode != "none"),
    frozen=mask(state.frozen, mode == "all"),
  )


def state_with_host_memory(state: TrainState, mode: str) -> TrainState:
  """The state's shapes, with shardings in host memory for what this `memory.offload` has there."""
  pin = lambda leaf, on_host: with_host_memory(leaf) if on_host else leaf
  return jax.tree.map(pin, state, host_mask(state, mode))


def mark_host_inputs(
  step: Callable[[PyTree, Batch], PyTree], mask: PyTree
) -> Callable[[PyTree, Batch], PyTree]:
  """Wrap `step` so that XLA knows which leaves of its first argument are on the host.

  The shardings of a GPU that does not exist have no memory kind, and the program would not know
  (jax 0.10 to 0.12).
  """
  if not any(jax.tree.leaves(mask)):
    return step

  def mark(x, on_host):
    return to_host(x) if on_host else x

  return lambda state, batch: step(jax.tree.map(mark, state, mask), batch)


def fetch_layer(stack: PyTree, index: jax.Array) -> PyTree:
  """Fetch one layer of stacked leaves."""
  layer = lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
  return to_device(jax.tree.map(layer, stack))


def make_streamed_grad_fn(
  graph: nnx.GraphDef[Decoder], *, loss_chunk: int, seed: int, remat: str, trained: Trained = ()
) -> GradFn:
  """Make `train_step.make_grad_fn`'s function for weights on the host, and the gradient too."""
  mask_frozen_layers = make_layer_mask(trained)

  def grad_fn(state: TrainState, batch: Batch) -> tuple[jax.Array, Params, jax.Array]:
    params = state.all_params
    model = nnx.merge(graph, params)
    ids = batch["ids"]
    tokens = jnp.sum(batch["mask"])
    scale = 1 / jnp.maximum(tokens, 1).astype(jnp.float32)
    embed_keys_AB, keys_LAB = _dropout_keys(model.cfg, seed, state.step, ids.shape[:2])
    positions = jnp.broadcast_to(default_positions(ids[0]), (len(ids), 1, ids.shape[2]))
    positions = batch.get("positions", positions)
    embedded, embed_vjp = _embed(graph, params, ids, positions, embed_keys_AB)
    layer_info = model.layer_info()

    # Parts of the model with weights that are on the device; all others stay on the host.
    def apply_layer(blocks, x, index):
      block = nnx.merge(graph, params | {"blocks": blocks}).blocks
      info = layer_info.at(index)

      def apply_one(xs):
        x_BTD, positions_BT, segments_BT, keys_B = xs
        return block(
          x_BTD, positions_BT=positions_BT, segments_BT=segments_BT, info=info, keys_B=keys_B
        )[0]

      keys_AB = None if keys_LAB is None else keys_LAB[index]
      xs = (x, positions, batch.get("segments"), keys_AB)
      return _map_micro_batches(apply_remat(apply_one, remat), xs)

    def loss_fn(head, x_BTD, targets_BT, mask_BT):
      model = nnx.merge(graph, params | head)
      h_BTD = model.norm(x_BTD)
      return scale * cross_entropy_sum(h_BTD, model.head(), targets_BT, mask_BT, loss_chunk)

    layers = jnp.arange(model.cfg.L)
    x, inputs = _forward_layers(apply_layer, params, embedded, layers)
    loss, d_head, dx = _head_grads(loss_fn, model.cfg, state, x, batch)
    dx, d_blocks = _backward_layers(apply_layer, mask_frozen_layers, state, dx, inputs, layers)
    d_embed = _embed_grads(model, state, ids, d_head, *embed_vjp(dx))
    grads = d_head | d_embed | d_blocks
    return loss, {name: grads[name] for name in state.params}, tokens

  return grad_fn


def _dropout_keys(
  cfg: ModelConfig, seed: int, step: jax.Array, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array] | tuple[None, None]:
  """Make the keys the model itself would: for its embedding (A, B), for its layers (L, A, B)."""
  key = jax.random.fold_in(jax.random.key(seed), step)
  keys_AB = per_row_keys(key, 0, math.prod(shape)).reshape(shape)
  if not any((cfg.embed_dropout, cfg.attention_dropout, cfg.residual_dropout, cfg.lora_dropout)):
    return None, None

  def split_rows(keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    embed_B, layers_B = split_keys(keys_B, 2)
    return embed_B, split_keys(layers_B, cfg.L)

  return jax.vmap(split_rows, out_axes=(0, 1))(keys_AB)


def _embed(
  graph: nnx.GraphDef[Decoder], params: Params, ids: jax.Array, positions, keys_AB
) -> tuple[jax.Array, Callable]:
  """Return the input of the first layer, (A, B, T, D), and its VJP.

  The VJP gives the gradient of the embedding's parameters but its table, and of the rows of that.
  """
  embed = to_device(params["embed"])
  other = {name: leaf for name, leaf in embed.items() if name != "tokens"}
  # Outside of the function that is differentiated: the gradient of the rows is added to the
  # table's at the end, and no second table exists.
  embed_tokens = nnx.merge(graph, params | {"embed": embed}).embed_tokens
  embeds = _map_micro_batches(embed_tokens, ids)

  def embed_inputs(other, embeds):
    model = nnx.merge(graph, params | {"embed": params["embed"] | other})
    return _map_micro_batches(lambda xs: model.embed_inputs(*xs), (embeds, positions, keys_AB))

  return jax.vjp(embed_inputs, other, embeds)


def _forward_layers(
  apply_layer: ApplyLayerFn, params: Params, x: jax.Array, layers: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Return the output of the last layer, and the inputs of all, (L, A, B, T, D).

  Nothing else is saved: the backward pass computes a layer again from its input, as with remat.
  """

  def forward(x, index):
    return apply_layer(fetch_layer(params["blocks"], index), x, index), x

  return jax.lax.scan(forward, x, layers)


def _head_grads(
  loss_fn: Callable, cfg: ModelConfig, state: TrainState, x: jax.Array, batch: Batch
) -> tuple[jax.Array, Params, jax.Array]:
  """Return the loss, and its gradient by the head's parameters and by the last hidden states."""
  # A tied head is the table of the embedding; a classifier has an output of its own.
  uses_table = cfg.tied and not cfg.classes
  names = ("norm", "output", "embed") if uses_table else ("norm", "output")

  def select_head(tree):
    return to_device({name: tree[name] for name in names if name in tree})

  head = select_head(state.params)
  frozen = select_head(state.frozen)

  def add_loss(total, xs):
    head_loss = lambda head, x_BTD: loss_fn(combine(head, frozen), x_BTD, *xs[1:])
    loss, (d_head, dx) = jax.value_and_grad(head_loss, (0, 1))(head, xs[0])
    return jax.tree.map(jnp.add, total, (loss, d_head)), dx

  zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), head))
  (loss, d_head), dx = jax.lax.scan(add_loss, zeros, (x, batch["targets"], batch["mask"]))
  return jnp.where(ids_in_range(batch, cfg), loss, jnp.nan), tree_to_host(d_head), dx


def _backward_layers(
  apply_layer: ApplyLayerFn,
  mask_frozen_layers: Callable[..., jax.Array],
  state: TrainState,
  dx: jax.Array,
  inputs: jax.Array,
  layers: jax.Array,
) -> tuple[jax.Array, Params]:
  """Return the gradient of the first layer's input, and that of all layers' parameters.

  From the last layer to the first, each is fetched again. Its gradient, of all micro-batches, goes
  to the host as it is made: the device has one layer's, never all.
  """

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

  return jax.lax.scan(backward, dx, (inputs, layers), reverse=True)


def _embed_grads(
  model: Decoder, state: TrainState, ids: jax.Array, d_head: Params, d_other: Params, d_embeds
) -> Params:
  """Return the gradient of the embedding: that of its rows is added to what a tied head has left.

  Args:
    d_other, d_embeds: of its parameters but the table, and of the rows, by the VJP of `_embed`.
  """
  if "tokens" in d_head.get("embed", {}):
    d_tokens = to_device(d_head["embed"]["tokens"])
  else:
    table_VD = state.all_params["embed"]["tokens"]
    d_tokens = jnp.zeros(table_VD.shape, table_VD.dtype)
  trained = state.params.get("embed", {})
  d_embed = {name: d for name, d in ({"tokens": d_tokens} | d_other).items() if name in trained}
  return tree_to_host(model.add_embedding_grads({"embed": d_embed}, ids, d_embeds))


def _map_micro_batches(f: Callable, xs: PyTree) -> jax.Array:
  """Map `f` over the accumulation steps, one after the other."""
  if jax.tree.leaves(xs)[0].shape[0] == 1:
    return f(jax.tree.map(lambda x: x[0], xs))[None]
  return jax.lax.map(f, xs)


def make_fetch_params(dtype: jnp.dtype, shardings: PyTree) -> Callable[[Params], Params]:
  """Make a function that copies weights on the host to the device, a layer at a time.

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

  return lambda params: jax.tree_util.tree_map_with_path(copy, params, shardings)


def make_streamed_stats(grad_shardings: PyTree) -> GradStatsFn:
  """Make `train_step.make_grad_stats`'s function for a gradient on the host, read in chunks.

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

  def grad_stats(grads: Params, state: CheckpointState) -> tuple[jax.Array, jax.Array]:
    squares, max_abs = jnp.moveaxis(map_shards(jax.tree.leaves(grads)), -1, 0)
    unchecked = jnp.zeros(len(jax.tree.leaves(state)), bool)
    norm = jnp.sqrt(squares.sum())
    return norm, jnp.concatenate([~jnp.isfinite(max_abs.max(axis=0)), unchecked])

  return grad_stats


def make_streamed_update_fn(
  config: OptimSection, shardings: PyTree, trained: Trained = ()
) -> UpdateFn:
  """Make `train_step.make_update_fn`'s function for a state on the host, updated in place.

  It updates a layer of each leaf, or some rows of a table, after the other.

  Args:
    shardings: for every parameter.
  """
  mask_frozen_layers = make_layer_mask(trained)

  def update_leaf(path, sharding, key, param, grad, opt_state, *, scale, learning_rate, is_finite):
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

  def update_fn(state, grads, keys, scale, learning_rate, is_finite):
    shared = {"scale": scale, "learning_rate": learning_rate, "is_finite": is_finite}
    update = functools.partial(update_leaf, **shared)
    trees = (shardings, keys, state.params, grads, state.opt_state)
    return optimizer.unzip(state.params, jax.tree_util.tree_map_with_path(update, *trees))

  return update_fn


class HostTraffic(NamedTuple):
  """Bytes that a step moves between host and device; they do not grow with the batch."""

  to_device: int
  to_host: int


def host_traffic(
  mode: str,
  params: Params,
  opt_state: PyTree,
  frozen: Params,
  tied: bool,
  nbytes: Callable[[PyTree], int],
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
  def of(cls, path: ParamPath, leaf: jax.Array, num_devices: int) -> "LeafChunks":
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
