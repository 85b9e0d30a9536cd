"""The train step: gradients, their statistics, the update. Pure functions; build.py jits them.

A batch is {"ids", "targets", "mask"}, each (A, B, T): A accumulation steps of B rows of T columns.
Where examples share rows it has their "segments" and "positions" too.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike

from jaxft.checkpoint.manager import CheckpointState
from jaxft.data.loader import Batch
from jaxft.model.config import ModelConfig
from jaxft.model.decoder import Decoder
from jaxft.model.dropout import per_row_keys
from jaxft.model.loss import cross_entropy_sum
from jaxft.training.stochastic_rounding import rounding_keys, stochastic_round_layers
from jaxft.training.train_state import TrainState
from jaxft.training.trainable import Trained, combine, make_layer_mask
from jaxft.utils.types import Params, PyTree

# (state, batch) -> (loss, grads, tokens)
GradFn: TypeAlias = Callable[[TrainState, Batch], tuple[jax.Array, Params, jax.Array]]
# (grads, state) -> (global norm, for each leaf of both: is not finite)
GradStatsFn: TypeAlias = Callable[[Params, CheckpointState], tuple[jax.Array, jax.Array]]
# (state, grads, keys, scale, learning_rate, is_finite) -> (params, opt_state)
UpdateFn: TypeAlias = Callable[
  [TrainState, Params, Params, jax.Array, ArrayLike, jax.Array], tuple[Params, PyTree]
]
TrainStepFn: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, dict[str, ArrayLike]]]


def make_grad_fn(
  graph: nnx.GraphDef[Decoder],
  *,
  loss_chunk: int,
  seed: int,
  grad_shardings: PyTree,
  trained: Trained,
  fetch_params: Callable[[Params], Params],
) -> GradFn:
  """Return `grad_fn(state, batch) -> (loss, grads, tokens)`.

  The loss is a sum over the unmasked targets of the whole global batch divided by their count, so
  it does not depend on how rows are split into accumulation steps or over devices; nor does
  dropout, whose keys follow from (seed, step, row).

  Args:
    grad_shardings: a sharding for every leaf of the gradient.
    trained: `ModelConfig.trained`.
    fetch_params: makes the trained weights that the model computes with of those of the state.
  """
  mask_frozen_layers = make_layer_mask(trained)

  def shard_grads(grads):
    grads = jax.tree_util.tree_map_with_path(mask_frozen_layers, grads)
    return jax.tree.map(jax.lax.with_sharding_constraint, grads, grad_shardings)

  def grad_fn(state: TrainState, batch: Batch) -> tuple[jax.Array, Params, jax.Array]:
    params = fetch_params(state.params)
    tokens = jnp.sum(batch["mask"])
    scale = 1 / jnp.maximum(tokens, 1).astype(jnp.float32)
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def micro_batch_grads(index, micro_batch):
      B = micro_batch["ids"].shape[0]
      model = nnx.merge(graph, combine(params, state.frozen))
      keys_B = per_row_keys(key, index * B, B)

      # Scaled before the backward pass: its numbers then do not grow with the size of the batch.
      def loss_fn(params, embeds_BTD):
        model = nnx.merge(graph, combine(params, state.frozen))
        h_BTD, _ = model(
          micro_batch["ids"],
          segments_BT=micro_batch.get("segments"),
          positions_BT=micro_batch.get("positions"),
          keys_B=keys_B,
          embeds_BTD=embeds_BTD,
        )
        targets_BT, mask_BT = micro_batch["targets"], micro_batch["mask"]
        loss = cross_entropy_sum(h_BTD, model.head(), targets_BT, mask_BT, loss_chunk)
        return scale * jnp.where(ids_in_range(micro_batch, model.cfg), loss, jnp.nan)

      # The embeddings are an argument of their own: their gradient is then added to what the head
      # has left in that of a tied table, where autodiff would make a second table.
      embeds_BTD = model.embed_tokens(micro_batch["ids"])
      loss, (grads, d_embeds_BTD) = jax.value_and_grad(loss_fn, (0, 1))(params, embeds_BTD)
      grads = model.add_embedding_grads(grads, micro_batch["ids"], d_embeds_BTD)
      return loss, shard_grads(grads)

    A = batch["ids"].shape[0]
    if A == 1:  # no second copy of the gradient for runs that do not accumulate
      return *micro_batch_grads(0, jax.tree.map(lambda x: x[0], batch)), tokens

    def add(total, xs):
      micro_batch = micro_batch_grads(*xs)
      return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, micro_batch), None

    # In float32, also where weights are a copy in bfloat16 (`offload.make_fetch_params`).
    zeros = shard_grads(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
    (loss, grads), _ = jax.lax.scan(add, (jnp.float32(0), zeros), (jnp.arange(A), batch))
    return loss, grads, tokens

  return grad_fn


def make_grad_stats(nonfinite_leaves: Callable[[PyTree], jax.Array]) -> GradStatsFn:
  """Return `grad_stats(grads, state) -> (global norm, for each leaf of both: is not finite)`.

  Args:
    nonfinite_leaves: `per_device.make_nonfinite_check` for (grads, state).
  """

  def grad_stats(grads: Params, state: CheckpointState) -> tuple[jax.Array, jax.Array]:
    grads_f32 = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    return optax.tree_utils.tree_norm(grads_f32), nonfinite_leaves((grads, state))

  return grad_stats


def make_update_fn(tx: optax.GradientTransformation, trained: Trained = ()) -> UpdateFn:
  """Return `update_fn(state, grads, keys, scale, learning_rate, is_finite)`.

  It gives (params, opt_state), unchanged where `is_finite` is false. Gradients are multiplied by
  `scale`; `keys` has one for each parameter, to round it with.

  Args:
    trained: `ModelConfig.trained`.
  """
  mask_frozen_layers = make_layer_mask(trained)

  def update_fn(state, grads, keys, scale, learning_rate, is_finite):
    # A loop of one turn or none writes over the state where it lies. A choice between old and new
    # takes copies on a CPU, where the update is then three times as slow; a branch copies the state
    # on a GPU.
    def body(carry: tuple[jax.Array, Params, PyTree]) -> tuple[jax.Array, Params, PyTree]:
      _, params, opt_state = carry
      params_f32 = jax.tree.map(lambda p: p.astype(jnp.float32), params)
      scaled = jax.tree.map(lambda g: g.astype(jnp.float32) * scale, grads)
      updates, opt_state = tx.update(scaled, opt_state, params_f32)

      def apply(path, p, p_f32, update, key):
        p_f32 = p_f32 - learning_rate * mask_frozen_layers(path, update)
        return stochastic_round_layers(p_f32, p.dtype, key)

      params = jax.tree_util.tree_map_with_path(apply, params, params_f32, updates, keys)
      return jnp.bool(False), params, opt_state

    carry = (is_finite, state.params, state.opt_state)
    return jax.lax.while_loop(lambda carry: carry[0], body, carry)[1:]

  return update_fn


def make_train_step(
  grad_fn: GradFn,
  grad_stats: GradStatsFn,
  update_fn: UpdateFn,
  schedule: optax.Schedule,
  *,
  clip_norm: float,
  seed: int,
) -> TrainStepFn:
  """Return `train_step(state, batch) -> (state, metrics)`, of functions made here or in `offload`.

  When loss, gradient, or a leaf of the state is not finite, the step changes nothing but
  `state.step`: `metrics["bad"]` is true, and `metrics["bad_leaves"]` says which leaves of the
  gradient, and then of the weights and of the optimizer state, are not finite
  (`nonfinite_leaf_names`). A NaN among the weights shows here even where no row of the batch reads
  it. The check is of the old state: the new one would have to exist whole beside it (1.3 GiB more
  on each of eight H100 for GPT-J-6B).

  Args:
    clip_norm: largest global norm of the gradient; 0: no clipping.
    seed: of the run.
  """

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, ArrayLike]]:
    loss, grads, tokens = grad_fn(state, batch)
    norm, bad_leaves = grad_stats(grads, state.checkpointable)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(norm) & ~bad_leaves.any()
    # Clipping is one factor on the gradients, applied in the update: no clipped copy of them.
    scale = jnp.minimum(1, clip_norm / jnp.maximum(norm, 1e-30)) if clip_norm else jnp.float32(1)
    learning_rate = schedule(state.step)

    keys = rounding_keys(seed, state.step, state.params)
    params, opt_state = update_fn(state, grads, keys, scale, learning_rate, is_finite)
    metrics = {"loss": loss, "grad_norm": norm, "learning_rate": learning_rate, "tokens": tokens}
    metrics |= {"bad": ~is_finite, "bad_leaves": bad_leaves}
    step = state.step + 1
    return dataclasses.replace(state, step=step, params=params, opt_state=opt_state), metrics

  return train_step


def ids_in_range(batch: Batch, cfg: ModelConfig) -> jax.Array:
  """Whether all ids and targets are in the tables: XLA reads the nearest row for one outside."""

  def in_range(ids, size):
    return jnp.all((ids >= 0) & (ids < size))

  return in_range(batch["ids"], cfg.V) & in_range(batch["targets"], max(cfg.V, cfg.classes))


def nonfinite_leaf_names(bad_leaves: np.ndarray, state: TrainState) -> list[str]:
  """The names behind `metrics["bad_leaves"]`."""

  def paths(tree):
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]

  names = [f"the gradient of {name}" for name in paths(state.params)]
  names += [name[1:] for name in paths(state.checkpointable)]
  return [name for name, bad in zip(names, bad_leaves, strict=True) if bad]
