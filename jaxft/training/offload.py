"""Offload: weights, gradients and optimizer state stream from host memory.

`memory.offload` has two modes:

- "optimizer": float32 weights and optimizer state are on the host. Each step copies the weights to
  the device in the compute dtype, and runs the usual forward and backward pass on this copy.
- "all": the gradient is on the host too, and the device holds one layer at a time. The forward and
  backward pass are written by hand (`make_streamed_grad_fn`), because autodiff through weights on
  the host would hold the gradients of all layers on the device. Each layer is fetched once for the
  forward and once for the backward pass of all accumulation steps together. The traffic therefore
  does not grow with the batch.

The update reads a chunk of a leaf, updates it and writes it back (`make_streamed_update_fn`).

A accumulation steps, B rows of a micro-batch, T tokens per row, L layers, D model width
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
TABLE_CHUNK_BYTES = 2**26  # most bytes of a table that are updated at a time, in float32


def validate_offload(platform: str, shapes: PyTree, mode: str) -> list[str]:
  """Return an error line if libtpu would abort on this state on the host, else [].

  Args:
    platform: "cpu", "gpu" or "tpu".
    shapes: shapes of the state. If they have shardings, the shards of a device are checked.
    mode: `memory.offload`.
  """
  if mode == "none" or platform != "tpu":
    return []
  for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
    shape = leaf.sharding.shard_shape(leaf.shape) if getattr(leaf, "sharding", None) else leaf.shape
    # For other shapes, libtpu (0.0.42.1) uses one layout in host memory and copies in another.
    if is_offloaded(leaf) and (shape[-1] % 128 or len(shape) > 2 and shape[-2] % 8):
      return [
        f"config.memory.offload={mode}: on a TPU this model, optimizer or adapter cannot be "
        "offloaded. libtpu aborts unless the last two sizes of a shape are multiples of 8 and 128; "
        f"{jax.tree_util.keystr(path)} is {shape}. Full fine-tuning of GPT-J with adamw, lion or "
        "sgd works; for other models, use more chips (config.mesh.fsdp) without offload"
      ]
  return []


def is_offloaded(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
  """Return whether a leaf is offloaded: vectors and scalars are too small."""
  return leaf.ndim > 1


def with_host_memory(shapes: PyTree) -> PyTree:
  """Return the shapes, with shardings in host memory for offloaded leaves."""

  def pin(leaf):
    if not is_offloaded(leaf):
      return leaf
    return leaf.update(sharding=leaf.sharding.with_memory_kind("pinned_host"))

  return jax.tree.map(pin, shapes)


def to_device(tree: PyTree) -> PyTree:
  """Move a tree to the device; leaves that are there already stay."""

  # Keep the host's row-major layout: libtpu (0.0.42.1) aborts if a copy has to change the layout.
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
  """Move the leaves that are offloaded to the host."""
  return jax.tree.map(lambda leaf: to_host(leaf) if is_offloaded(leaf) else leaf, tree)


def host_mask(state: TrainState, mode: str) -> TrainState:
  """Return for each leaf of the state (or its shapes) whether it is on the host."""

  def mask(tree, on):
    return jax.tree.map(lambda leaf: on and is_offloaded(leaf), tree)

  return TrainState(
    step=False,
    params=mask(state.params, mode != "none"),
    opt_state=mask(state.opt_state, mode != "none"),
    frozen=mask(state.frozen, mode == "all"),
  )


def state_with_host_memory(state: TrainState, mode: str) -> TrainState:
  """Return the state's shapes, with host memory shardings as `mode` needs."""
  pin = lambda leaf, on_host: with_host_memory(leaf) if on_host else leaf
  return jax.tree.map(pin, state, host_mask(state, mode))


def mark_host_inputs(
  step: Callable[[PyTree, Batch], PyTree], mask: PyTree
) -> Callable[[PyTree, Batch], PyTree]:
  """Wrap `step` so that XLA knows which leaves of its state are on the host.

  When `jaxft.plan` compiles for a GPU that is not present, shardings have no memory kind, and the
  program alone would not show it (jax 0.10 to 0.12).

  Args:
    step: function of (tree, batch).
    mask: tree of bools: whether a leaf is on the host.
  """
  if not any(jax.tree.leaves(mask)):
    return step

  def mark(x, on_host):
    return to_host(x) if on_host else x

  return lambda state, batch: step(jax.tree.map(mark, state, mask), batch)


def fetch_layer(stack: PyTree, index: jax.Array) -> PyTree:
  """Copy one layer of stacked leaves to the device, without the layer axis."""
  layer = lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
  return to_device(jax.tree.map(layer, stack))


def make_streamed_grad_fn(
  graph: nnx.GraphDef[Decoder], *, loss_chunk: int, seed: int, remat: str, trained: Trained = ()
) -> GradFn:
  """Make a `train_step.GradFn` for weights and gradients on the host.

  It computes the loss and gradients of `train_step.make_grad_fn` in four stages: embedding, layers
  forward, output head with its gradient, layers backward. All A micro-batches pass a layer while it
  is on the device, which is why activations have the axes (A, B, T, D) here.

  Args:
    graph: the model's graph definition.
    loss_chunk: positions of a row whose logits are computed at a time; 0: all.
    seed: of the dropout.
    remat: `memory.remat`.
    trained: `ModelConfig.trained`.
  """
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

    # The functions below run parts of the model with weights that their caller has fetched. They
    # replace only these weights in `params`; all others stay on the host, unread.
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
  """Make the model's dropout keys: (A, B) for the embedding, (L, A, B) for layers."""
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

  The VJP returns two gradients: of the embedding's parameters except its table, and of the table's
  rows that were read.
  """
  embed = to_device(params["embed"])
  other = {name: leaf for name, leaf in embed.items() if name != "tokens"}
  # The lookup is outside the differentiated function. `_embed_grads` adds the gradient of the rows
  # to the table's gradient at the end, so that no second (V, D) table is needed.
  embed_tokens = nnx.merge(graph, params | {"embed": embed}).embed_tokens
  embeds = _map_micro_batches(embed_tokens, ids)

  def embed_inputs(other, embeds):
    model = nnx.merge(graph, params | {"embed": params["embed"] | other})
    return _map_micro_batches(lambda xs: model.embed_inputs(*xs), (embeds, positions, keys_AB))

  return jax.vjp(embed_inputs, other, embeds)


def _forward_layers(
  apply_layer: ApplyLayerFn, params: Params, x: jax.Array, layers: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Return the last layer's output, and the inputs of all, (L, A, B, T, D).

  Nothing else is saved: the backward pass computes each layer again from its input, as with remat.
  """

  def forward(x, index):
    return apply_layer(fetch_layer(params["blocks"], index), x, index), x

  return jax.lax.scan(forward, x, layers)


def _head_grads(
  loss_fn: Callable, cfg: ModelConfig, state: TrainState, x: jax.Array, batch: Batch
) -> tuple[jax.Array, Params, jax.Array]:
  """Return the loss, and its gradients for the head and the last hidden states.

  Micro-batches are processed one at a time, and their gradients of the head are added up.
  """
  # A tied head is the embedding table. A classifier has a separate output, even if `cfg.tied`.
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
  """Return the gradients of the first layer's input and of all layers.

  Each layer is fetched again, from the last to the first. Its gradient, summed over all
  micro-batches, is sent to the host immediately, so that the device holds one layer's gradient at
  most.
  """

  def backward(dx, xs):
    x, index = xs

    def fetch(tree):
      return fetch_layer({"blocks": tree.get("blocks", {})}, index)

    frozen, params = map(fetch, (state.frozen, state.params))
    # The VJP adds up the gradients of the micro-batches in the dtype of its parameters, so they are
    # cast to float32.
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
  """Return the gradient of the embedding, with the share of a tied head.

  Args:
    model: the model, for its embedding.
    state: the train state, for shapes and for the names of trained parameters.
    ids: (A, B, T) token ids.
    d_head: gradient of the head; with a tied head, it has the table's gradient.
    d_other: gradient of the parameters except the table, from the VJP of `_embed`.
    d_embeds: gradient of the rows that were read, from the VJP of `_embed`.
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
  """Map `f` over the accumulation steps, one at a time."""
  if jax.tree.leaves(xs)[0].shape[0] == 1:
    return f(jax.tree.map(lambda x: x[0], xs))[None]
  return jax.lax.map(f, xs)


def make_fetch_params(dtype: jnp.dtype, shardings: PyTree) -> Callable[[Params], Params]:
  """Make a function that copies weights to the device, a layer at a time.

  Matrices of layers are copied in the compute dtype, and their gradients have it too. Parameters
  that all layers share stay in float32, because their gradient is a sum of several.

  Args:
    dtype: the compute dtype.
    shardings: on the device, for every parameter.
  """

  def copy(path, leaf, sharding):
    if not optimizer.is_stacked(path):
      return to_device(leaf)
    # Cast each layer before they are stacked, so that the device never holds all in float32.
    to = optimizer.param_dtype(path, leaf, dtype)

    def fetch(index):
      return fetch_layer(leaf, index).astype(to)

    copied = jax.lax.map(fetch, jnp.arange(leaf.shape[0]))
    return jax.lax.with_sharding_constraint(copied, sharding)

  return lambda params: jax.tree_util.tree_map_with_path(copy, params, shardings)


def make_streamed_stats(grad_shardings: PyTree) -> GradStatsFn:
  """Make a `train_step.GradStatsFn` for gradients on the host.

  It reads the gradients in chunks and does not check the state, which would move 12 more bytes per
  parameter over the bus. A NaN in a weight reaches the loss, a NaN in a moment reaches a weight one
  step later, and neither is ever saved (`CheckpointManager.save`).

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
    # Replicas must not count twice in the norm. The maximum is NaN or infinity if any element is.
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
  """Make a `train_step.UpdateFn` for a state on the host.

  It updates each leaf in place, a chunk at a time: one layer, or some rows of a table.

  Args:
    config: the settings of the optimizer.
    shardings: for every parameter.
    trained: `ModelConfig.trained`.
  """
  mask_frozen_layers = make_layer_mask(trained)

  def update_leaf(path, sharding, key, param, grad, opt_state, *, scale, learning_rate, is_finite):
    tx = optimizer.make_leaf_optimizer(config, path)
    num_shards = param.shape[0] // sharding.shard_shape(param.shape)[0]
    chunks = LeafChunks.of(path, param, num_shards)

    # Moments have the leading axis of the parameter. Other leaves, such as step counts, are shared
    # by all chunks.
    def is_chunked(leaf):
      return leaf.shape[:1] == param.shape[:1]

    if any(leaf.ndim and not is_chunked(leaf) for leaf in jax.tree.leaves(opt_state)):
      chunks = chunks._replace(num_chunks=1)  # the optimizer needs the whole table (Adafactor)

    def read(leaf, i):
      return to_device(chunks.read(leaf, i) if is_chunked(leaf) else leaf)

    def write(leaf, new, i):
      new = to_host(new) if is_offloaded(leaf) else new
      return chunks.write(leaf, new, i) if is_chunked(leaf) else new

    def body(i, carry):
      param, new_state = carry
      p = read(param, i).astype(jnp.float32)

      # Shared leaves are read from the old state in every chunk, so that a count grows once per
      # step and not once per chunk.
      def read_old(new, old):
        return read(new if is_chunked(new) else old, i)

      s = jax.tree.map(read_old, new_state, opt_state)
      g = to_device(chunks.read(grad, i)).astype(jnp.float32)
      update, s = tx.update(g * scale, s, p)
      update = mask_frozen_layers(path, update, i) if chunks.by_layer else update
      p = stochastic_round(p - learning_rate * update, param.dtype, jax.random.fold_in(key, i))
      return write(param, p, i), jax.tree.map(lambda x, y: write(x, y, i), new_state, s)

    # A skipped step runs no iteration. XLA updates the carry of a loop in place, without a copy.
    num_turns = jnp.where(is_finite, chunks.num_chunks, 0)
    return jax.lax.fori_loop(0, num_turns, body, (param, opt_state))

  def update_fn(state, grads, keys, scale, learning_rate, is_finite):
    shared = {"scale": scale, "learning_rate": learning_rate, "is_finite": is_finite}
    update = functools.partial(update_leaf, **shared)
    trees = (shardings, keys, state.params, grads, state.opt_state)
    return optimizer.unzip(state.params, jax.tree_util.tree_map_with_path(update, *trees))

  return update_fn


class HostTraffic(NamedTuple):
  """Bytes per device that a step moves between host and device, for any batch size."""

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
  """Return the bytes that a step moves between host and device.

  Args:
    mode: `memory.offload`.
    params: shapes of the trained weights.
    opt_state: shapes of the optimizer state.
    frozen: shapes of the frozen weights.
    tied: whether the output head is the embedding table.
    nbytes: returns the bytes of a tree on one device.
  """
  weights = nbytes(params)
  moments = nbytes(opt_state)
  if mode == "none":
    return HostTraffic(0, 0)
  if mode == "optimizer":  # weights for the copy, then weights and moments for the update
    return HostTraffic(2 * weights + moments, weights + moments)
  layers = sum(nbytes(tree.get("blocks", {})) for tree in (params, frozen))
  tied_trained, tied_frozen = (
    nbytes(tree.get("embed", {})) if tied else 0 for tree in (params, frozen)
  )
  # To the device, for the gradient: layers twice (forward and backward), other weights once, a tied
  # table twice and its gradient once. Then the gradient for its norm, and gradient, weights and
  # moments for the update.
  fetched = weights + nbytes(frozen) + layers + 2 * tied_trained + tied_frozen
  fetched += weights + (2 * weights + moments)
  return HostTraffic(fetched, weights + tied_trained + weights + moments)


class LeafChunks(NamedTuple):
  """How a leaf is split along its first axis into chunks, updated one at a time."""

  by_layer: bool  # True: a chunk is a layer, without the layer axis; False: rows of each device
  num_chunks: int
  num_devices: int = 1  # devices that the rows are split over

  @classmethod
  def of(cls, path: ParamPath, leaf: jax.Array, num_devices: int) -> "LeafChunks":
    """Split a leaf by layer if it is stacked, else by rows."""
    if optimizer.is_stacked(path):
      return cls(True, leaf.shape[0])
    return cls.of_rows(leaf, num_devices)

  @classmethod
  def of_rows(cls, leaf: jax.Array, num_devices: int = 1) -> "LeafChunks":
    """Split rows into the fewest equal chunks of at most `TABLE_CHUNK_BYTES`."""
    rows = leaf.shape[0] // num_devices
    least = min(leaf.size * 4 / num_devices / TABLE_CHUNK_BYTES, rows)
    num_chunks = next(n for n in range(1, rows + 1) if rows % n == 0 and n >= least)
    return cls(False, num_chunks, num_devices)

  def read(self, x: jax.Array, i: jax.Array) -> jax.Array:
    """Return chunk i of x: a layer, (devices, rows of each, ...), or all of x."""
    if self.by_layer:
      return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
    if self.num_chunks == 1:
      return x
    rows = x.shape[0] // self.num_devices // self.num_chunks
    return jax.lax.dynamic_slice_in_dim(self._by_device(x), i * rows, rows, 1)

  def write(self, x: jax.Array, new: jax.Array, i: jax.Array) -> jax.Array:
    """Return x with chunk i replaced by `new`, which has the shape from `read`."""
    if self.by_layer:
      return jax.lax.dynamic_update_index_in_dim(x, new, i, 0)
    if self.num_chunks == 1:
      return new
    rows = self._by_device(x)
    return jax.lax.dynamic_update_slice_in_dim(rows, new, i * new.shape[1], 1).reshape(x.shape)

  def _by_device(self, x: jax.Array) -> jax.Array:
    """Reshape (rows, ...) to (devices, rows of each, ...).

    A slice over all rows would belong to some devices only, and would need a gather.
    """
    return x.reshape(self.num_devices, -1, *x.shape[1:])
