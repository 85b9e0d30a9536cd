"""Weights, gradients and optimizer state in the host's memory: what a layer needs is on the device while the layer is used.

"all" walks the layers forward and backward by hand: autodiff through weights on the host would keep the gradients of all layers
on the device. Each layer is fetched once forward and once backward for all accumulation steps together, so that what travels
does not grow with the batch. "optimizer" keeps a copy of the weights on the device, in the compute dtype, made anew each step.

A accumulation steps, B rows at once, T tokens a row, L layers, D model
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from ml_collections import ConfigDict

from jaxft.model.decoder import apply_remat, default_positions
from jaxft.model.dropout import per_row_keys, split_keys
from jaxft.model.loss import cross_entropy_sum
from jaxft.sharding import per_device
from jaxft.training import optimizer, stochastic_rounding
from jaxft.training.train_state import TrainState
from jaxft.training.train_step import ids_in_range
from jaxft.training.trainable import combine, make_layer_mask

TABLE_CHUNK_BYTES = 2**26  # bytes of a table that are updated at once


def validate_offload(platform: str, shapes: Any, kept: str) -> list[str]:
  """One line where the compiler of such devices is known to fail on weights or optimizer state in the host's memory.

  Args:
    shapes: of what is kept there; those of a device's part, where they have shardings.
  """
  if kept == "none" or platform != "tpu":
    return []
  for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
    shape = leaf.sharding.shard_shape(leaf.shape) if getattr(leaf, "sharding", None) else leaf.shape
    # libtpu (0.0.42.1) keeps other shapes in another order in the host's memory than it copies them in.
    if is_offloaded(leaf) and (shape[-1] % 128 or len(shape) > 2 and shape[-2] % 8):
      return [
        f"config.memory.offload={kept}: on a TPU not for this model, optimizer or adapter: libtpu aborts on shapes whose last "
        f"two sizes are no multiples of 8 and 128, as of {jax.tree_util.keystr(path)}, {shape}; all of GPT-J with adamw, lion "
        "or sgd has none; more chips (config.mesh.fsdp) hold others without offload"
      ]
  return []


def is_offloaded(leaf: Any) -> bool:
  """Whether the host keeps a leaf of the state: vectors, such as step counts and the last norm, are too small to bother."""
  return leaf.ndim > 1


def with_host_memory(shapes: Any) -> Any:
  """The shapes with their shardings, which are in the host's memory for what is kept there."""

  def of_leaf(leaf):
    sharding = (
      leaf.sharding.with_memory_kind("pinned_host") if is_offloaded(leaf) else leaf.sharding
    )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(of_leaf, shapes)


def to_device(tree: Any) -> Any:
  """On the device; what is there already stays."""

  # In the host's layout, row after row: libtpu (0.0.42.1) aborts where it is to change it on the way.
  in_rows = lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim))))

  def of_leaf(x: jax.Array) -> jax.Array:
    x = jax.device_put(x, jax.memory.Space.Device)
    return jax.lax.platform_dependent(x, tpu=in_rows, default=lambda x: x)

  return jax.tree.map(of_leaf, tree)


def to_host(x: jax.Array) -> jax.Array:
  """To the host."""
  return jax.device_put(x, jax.memory.Space.Host)


def tree_to_host(tree: Any) -> Any:
  """Whole leaves, on the host where they are kept there."""
  return jax.tree.map(lambda leaf: to_host(leaf) if is_offloaded(leaf) else leaf, tree)


def host_mask(state: TrainState, offload: str) -> TrainState:
  """Of each leaf of the state, or of its shapes, whether the host keeps it."""
  of = lambda tree, there: jax.tree.map(lambda leaf: there and is_offloaded(leaf), tree)
  return TrainState(
    False,
    *(of(tree, offload != "none") for tree in (state.params, state.opt_state)),
    of(state.frozen, offload == "all"),
  )


def mark_host_inputs(step: Callable, kept: Any) -> Callable:
  """`step`, told which leaves of its first argument are on the host.

  For a GPU that is not there shardings have no kind of memory, and the program would not know (jax 0.10 to 0.12).
  """
  place = lambda x, there: to_host(x) if there else x
  return lambda state, batch: step(jax.tree.map(place, state, kept), batch)


def fetch_layer(stack: Any, index: jax.Array) -> Any:
  """One layer of stacked leaves, fetched."""
  return to_device(
    jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stack)
  )


def make_streamed_grad_fn(
  graph: nnx.GraphDef, *, loss_chunk: int, seed: int, remat: str, trained: Any = ()
) -> Callable:
  """`step.make_grad_fn` with weights on the host, and the gradient there too."""
  only_trained = make_layer_mask(trained)

  def gradient(state: TrainState, batch: dict) -> tuple[jax.Array, Any, jax.Array]:
    params, (A, B, T) = state.all_params, batch["ids"].shape
    tokens = jnp.sum(batch["mask"])
    scale = 1 / jnp.maximum(tokens, 1).astype(jnp.float32)
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    keys_AB = per_row_keys(key, 0, A * B).reshape(A, B)
    with_ = lambda **parts: nnx.merge(graph, params | parts)
    model = with_()
    dropped = any(
      (
        model.cfg.embed_dropout,
        model.cfg.attention_dropout,
        model.cfg.residual_dropout,
        model.cfg.lora_dropout,
      )
    )
    embed_keys_AB, keys_LAB = _split_keys(keys_AB, model.cfg.L) if dropped else (None, None)
    positions = batch.get(
      "positions", jnp.broadcast_to(default_positions(batch["ids"][0]), (A, 1, T))
    )

    # ---- Forward: embedding, then layer after layer; the input of each is kept -------------------------------------
    embed = to_device(params["embed"])
    rest = {name: leaf for name, leaf in embed.items() if name != "tokens"}
    rows = _map_micro_batches(with_(embed=embed).embed_tokens, batch["ids"])

    def enter(rest, rows):
      part = lambda xs: with_(embed=params["embed"] | rest).embed_inputs(*xs)
      return _map_micro_batches(part, (rows, positions, embed_keys_AB))

    x, enter_vjp = jax.vjp(enter, rest, rows)
    of_layers = model.layer_info()

    def layer(block, x, index):
      module, of_layer = with_(blocks=block).blocks, of_layers.at(index)

      def of_part(xs):
        x_BTD, positions_BT, segments_BT, keys_B = xs
        cached = lambda k, v: (k, v, segments_BT, 0)
        return model.apply_layer(module, x_BTD, positions_BT, segments_BT, of_layer, keys_B, cached)

      keys_AB = None if keys_LAB is None else keys_LAB[index]
      return _map_micro_batches(
        apply_remat(of_part, remat), (x, positions, batch.get("segments"), keys_AB)
      )

    def forward(x, index):
      return layer(fetch_layer(params["blocks"], index), x, index), x

    layers = jnp.arange(model.cfg.L)
    x, inputs = jax.lax.scan(forward, x, layers)

    # ---- Loss ------------------------------------------------------------------------------------------------------
    def leave(top, x_BTD, targets_BT, mask_BT):
      model = with_(**top)
      return scale * cross_entropy_sum(
        model.norm(x_BTD), model.head(), targets_BT, mask_BT, loss_chunk
      )

    at_top = (
      ("norm", "output", "embed")
      if model.cfg.tied and not model.cfg.classes
      else ("norm", "output")
    )
    of_top = lambda tree: to_device({name: tree[name] for name in at_top if name in tree})
    top, top_frozen, of_parts = (
      of_top(state.params),
      of_top(state.frozen),
      (x, batch["targets"], batch["mask"]),
    )

    def leave_part(total, xs):
      of_trained = lambda top, *xs: leave(combine(top, top_frozen), *xs)
      loss, (d_top, dx) = jax.value_and_grad(of_trained, (0, 1))(top, *xs)
      return jax.tree.map(jnp.add, total, (loss, d_top)), dx

    (loss, d_top), dx = jax.lax.scan(
      leave_part, jax.tree.map(jnp.zeros_like, (jnp.float32(0), top)), of_parts
    )
    loss, d_top = jnp.where(ids_in_range(batch, model.cfg), loss, jnp.nan), tree_to_host(d_top)

    # ---- Backward: each layer's gradient goes to the host as it is made ----------------------------------------------
    def backward(dx, xs):
      x, index = xs
      of_layer = lambda tree: fetch_layer({"blocks": tree.get("blocks", {})}, index)
      frozen, block = of_layer(state.frozen), of_layer(state.params)
      precise = jax.tree.map(
        lambda p: p.astype(jnp.float32), block
      )  # accumulation steps are added up in it
      _, vjp = jax.vjp(
        lambda block, x: layer(combine(block, frozen)["blocks"], x, index), precise, x
      )
      d_block, dx = vjp(dx)
      sent = lambda path, d, p: to_host(only_trained(path, d, index).astype(p.dtype))
      return dx, jax.tree_util.tree_map_with_path(sent, d_block, block)

    dx, d_blocks = jax.lax.scan(backward, dx, (inputs, layers), reverse=True)
    d_rest, d_rows = enter_vjp(dx)
    d_tokens = (
      to_device(d_top["embed"]["tokens"])
      if "tokens" in d_top.get("embed", {})
      else jnp.zeros_like(embed["tokens"])
    )
    d_embed = {
      name: d
      for name, d in ({"tokens": d_tokens} | d_rest).items()
      if name in state.params.get("embed", {})
    }
    d_embed = tree_to_host(model.add_embedding_grads({"embed": d_embed}, batch["ids"], d_rows))
    found = {**d_top, **d_embed, **d_blocks}
    return loss, {name: found[name] for name in state.params}, tokens

  return gradient


def _map_micro_batches(part: Callable, xs: Any) -> jax.Array:
  """`part` of each accumulation step, one after the other."""
  if jax.tree.leaves(xs)[0].shape[0] == 1:
    return part(jax.tree.map(lambda x: x[0], xs))[None]
  return jax.lax.map(part, xs)


def _split_keys(keys_AB: jax.Array, L: int) -> tuple[jax.Array, jax.Array]:
  """Keys for what goes into the first layer, (A, B), and for the layers, (L, A, B): those that the model itself would draw."""
  of_rows = lambda keys_B: (lambda embed, layers: (embed, split_keys(layers, L)))(
    *split_keys(keys_B, 2)
  )
  return jax.vmap(of_rows, out_axes=(0, 1))(keys_AB)


def make_copy_grad_fn(gradient: Callable, dtype: Any, places: Any) -> Callable:
  """`gradient`, of weights on the device that are made of those on the host, a layer at a time.

  Matrices of layers are in the compute dtype, and so are their gradients; what all layers share stays in float32, as its
  gradient is a sum of several.

  Args:
    places: a sharding on the device for every parameter.
  """

  def copied(path, leaf, place):
    if not optimizer.is_stacked(path):
      return to_device(leaf)
    one = lambda index: fetch_layer(leaf, index).astype(optimizer.param_dtype(path, leaf, dtype))
    return jax.lax.with_sharding_constraint(jax.lax.map(one, jnp.arange(leaf.shape[0])), place)

  def of_copy(state: TrainState, batch: dict) -> tuple[jax.Array, Any, jax.Array]:
    copy = jax.tree_util.tree_map_with_path(copied, state.params, places)
    return gradient(state._replace(params=copy), batch)

  return of_copy


def make_streamed_stats(gradients: Any) -> Callable:
  """`step.make_grad_stats` in pieces: the norm of the gradient, and which of its leaves are not finite.

  The state is not looked at: 12 more bytes a parameter over the bus. Weights that are no numbers show in the loss, moments in
  the weights after them, and a checkpoint of either is refused (`Checkpoints.save`).

  Args:
    gradients: a sharding for every leaf of the gradient.
  """

  def of_part(part: per_device.LocalShard) -> jax.Array:
    leaf, cut = part.values, LeafChunks.in_rows(part.values)

    def add(i, found):
      x = to_device(cut.read(leaf, i)).astype(jnp.float32)
      return found[0] + jnp.sum(x * x), jnp.maximum(found[1], jnp.max(jnp.abs(x)))

    squares, largest = jax.lax.fori_loop(0, cut.num_chunks, add, (jnp.float32(0), jnp.float32(0)))
    return jnp.stack([jnp.where(part.is_primary, squares, 0), largest])

  everyone = per_device.map_shards(jax.tree.leaves(gradients), of_part)

  def look(grads: Any, state: TrainState) -> tuple[jax.Array, jax.Array]:
    squares, largest = jnp.moveaxis(everyone(jax.tree.leaves(grads)), -1, 0)
    rest = jnp.zeros(len(jax.tree.leaves(state)), bool)
    return jnp.sqrt(squares.sum()), jnp.concatenate([~jnp.isfinite(largest.max(axis=0)), rest])

  return look


def make_streamed_update_fn(config: ConfigDict, places: Any, trained: Any = ()) -> Callable:
  """`step.make_update_fn` in place on the host: of each leaf a layer, or some rows of a table, after the other.

  Args:
    places: a sharding for every parameter.
  """
  only_trained = make_layer_mask(trained)

  def of_leaf(path, place, key, param, grad, states, good, scale, rate):
    tx, cut = (
      optimizer.make_leaf_optimizer(config, path),
      LeafChunks.of(path, param, param.shape[0] // place.shard_shape(param.shape)[0]),
    )
    if any(leaf.ndim and leaf.shape[:1] != param.shape[:1] for leaf in jax.tree.leaves(states)):
      cut = cut._replace(num_chunks=1)  # an optimizer that measures over the whole table
    in_parts = lambda leaf: (
      leaf.shape[:1] == param.shape[:1]
    )  # others, such as step counts, are the same for all parts
    read = lambda leaf, i: to_device(cut.read(leaf, i) if in_parts(leaf) else leaf)

    def write(leaf, new, i):
      new = to_host(new) if is_offloaded(leaf) else new
      return cut.write(leaf, new, i) if in_parts(leaf) else new

    def turn(i, now):
      p = read(now[0], i).astype(jnp.float32)
      s = jax.tree.map(lambda leaf, old: read(leaf if in_parts(leaf) else old, i), now[1], states)
      direction, new = tx.update(to_device(cut.read(grad, i)).astype(jnp.float32) * scale, s, p)
      direction = only_trained(path, direction, i) if cut.layers else direction
      p = stochastic_rounding.stochastic_round(
        p - rate * direction, param.dtype, jax.random.fold_in(key, i)
      )
      return write(now[0], p, i), jax.tree.map(lambda x, y: write(x, y, i), now[1], new)

    return jax.lax.fori_loop(0, jnp.where(good, cut.num_chunks, 0), turn, (param, states))

  def update(
    good: jax.Array, grads: Any, scale: jax.Array, rate: jax.Array, keys: Any, params: Any, opt: Any
  ) -> tuple[Any, Any]:
    one = lambda *leaves: of_leaf(*leaves, good, scale, rate)
    pairs = jax.tree_util.tree_map_with_path(one, places, keys, params, grads, opt)
    return tuple(
      jax.tree.map(lambda _, pair, part=part: pair[part], params, pairs) for part in (0, 1)
    )

  return update


class HostTraffic(NamedTuple):
  """Bytes that a step moves between the host's memory and a device, which do not grow with the batch."""

  to_device: int
  to_host: int


def host_traffic(
  kept: str, params: Any, opt: Any, frozen: Any, tied: bool, nbytes: Callable[[Any], int]
) -> HostTraffic:
  """What a step of `memory.offload` = `kept` moves.

  Args:
    params, opt, frozen: shapes of the weights that are trained, of optimizer state, and of the other weights.
    nbytes: of a tree, on one device.
  """
  weights, moments = nbytes(params), nbytes(opt)
  if kept == "none":
    return HostTraffic(0, 0)
  if kept == "optimizer":  # the copy, then the update
    return HostTraffic(2 * weights + moments, weights + moments)
  of = lambda part, tree: nbytes(tree.get(part, {}))
  layers = of("blocks", params) + of("blocks", frozen)
  shared, still = (of("embed", tree) if tied else 0 for tree in (params, frozen))
  # Layers forward and backward, all else once, what is tied twice, with its gradient; the gradient for its norm; the update.
  fetched = (
    weights + nbytes(frozen) + layers + 2 * shared + still + weights + (2 * weights + moments)
  )
  return HostTraffic(fetched, weights + shared + weights + moments)


class LeafChunks(NamedTuple):
  """How a leaf is cut along its first axis into parts that are on the device one after the other."""

  layers: bool  # a part is a layer, without the axis of layers; otherwise it is some rows of each device's
  num_chunks: int
  devices: int = 1  # that share the rows

  @classmethod
  def of(cls, path: Any, leaf: jax.Array, devices: int) -> "LeafChunks":
    return cls(True, leaf.shape[0]) if optimizer.is_stacked(path) else cls.in_rows(leaf, devices)

  @classmethod
  def in_rows(cls, leaf: jax.Array, devices: int = 1) -> "LeafChunks":
    rows, least = leaf.shape[0] // devices, leaf.size * 4 / devices / TABLE_CHUNK_BYTES
    return cls(
      False, next(n for n in range(1, rows + 1) if rows % n == 0 and n >= min(least, rows)), devices
    )

  def read(self, x: jax.Array, i: jax.Array) -> jax.Array:
    if self.layers:
      return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
    if self.num_chunks == 1:
      return x
    rows = x.shape[0] // self.devices // self.num_chunks
    return jax.lax.dynamic_slice_in_dim(self._by_device(x), i * rows, rows, 1)

  def write(self, x: jax.Array, new: jax.Array, i: jax.Array) -> jax.Array:
    if self.layers:
      return jax.lax.dynamic_update_index_in_dim(x, new, i, 0)
    if self.num_chunks == 1:
      return new
    return jax.lax.dynamic_update_slice_in_dim(
      self._by_device(x), new, i * new.shape[1], 1
    ).reshape(x.shape)

  def _by_device(self, x: jax.Array) -> jax.Array:
    """(rows, ...) -> (devices, rows of each, ...): a slice of all rows would have to be gathered first."""
    return x.reshape(self.devices, -1, *x.shape[1:])
