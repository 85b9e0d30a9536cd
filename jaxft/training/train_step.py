"""The train step: gradients, their statistics, the update.

These are pure functions, which build.py compiles.

A batch is {"ids", "targets", "mask"}, each (A, B, T): A accumulation steps, B rows per step, T
tokens per row. Packed batches, in which several examples share a row, also have "segments" and
"positions".
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
# (grads, state) -> (global norm, one "is not finite" flag for each leaf of both)
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
  """Make `grad_fn(state, batch) -> (loss, grads, tokens)`.

  The loss is summed over the unmasked targets of the whole global batch and divided by their count.
  It therefore does not depend on how rows are split into accumulation steps or over devices.
  Neither does dropout, whose keys are derived from (seed, step, row).

  Args:
    graph: the model's graph definition.
    loss_chunk: positions of a row whose logits are computed at a time; 0: all.
    seed: of the dropout.
    grad_shardings: a sharding for every leaf of the gradient.
    trained: `ModelConfig.trained`.
    fetch_params: maps the trained weights of the state to the weights that the model computes with.
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

      # Dividing by the token count before the backward pass, not after it, keeps the size of the
      # gradients independent of the batch size.
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

      # The embeddings are a separate argument. Their gradient is then added to the tied table's
      # gradient from the output head. Autodiff would build a second (V, D) table and add the two.
      embeds_BTD = model.embed_tokens(micro_batch["ids"])
      loss, (grads, d_embeds_BTD) = jax.value_and_grad(loss_fn, (0, 1))(params, embeds_BTD)
      grads = model.add_embedding_grads(grads, micro_batch["ids"], d_embeds_BTD)
      return loss, shard_grads(grads)

    A = batch["ids"].shape[0]
    if A == 1:  # without accumulation, avoid a second copy of the gradient
      return *micro_batch_grads(0, jax.tree.map(lambda x: x[0], batch)), tokens

    def add(total, xs):
      micro_batch = micro_batch_grads(*xs)
      return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, micro_batch), None

    # Float32 even if the weights are a bfloat16 copy (`offload.make_fetch_params`).
    zeros = shard_grads(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
    (loss, grads), _ = jax.lax.scan(add, (jnp.float32(0), zeros), (jnp.arange(A), batch))
    return loss, grads, tokens

  return grad_fn


def make_grad_stats(nonfinite_leaves: Callable[[PyTree], jax.Array]) -> GradStatsFn:
  """Make `grad_stats(grads, state) -> (global norm, flags)`.

  `flags` has one bool for each leaf of grads, then of state: true if the leaf is not finite.

  Args:
    nonfinite_leaves: `per_device.make_nonfinite_check` for (grads, state).
  """

  def grad_stats(grads: Params, state: CheckpointState) -> tuple[jax.Array, jax.Array]:
    grads_f32 = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    return optax.tree_utils.tree_norm(grads_f32), nonfinite_leaves((grads, state))

  return grad_stats


def make_update_fn(tx: optax.GradientTransformation, trained: Trained = ()) -> UpdateFn:
  """Make `update_fn(state, grads, keys, scale, learning_rate, is_finite)`.

  It returns (params, opt_state), unchanged if `is_finite` is false. Gradients are multiplied by
  `scale`. `keys` has a key for each parameter, for stochastic rounding.

  Args:
    tx: the optimizer, without the learning rate.
    trained: `ModelConfig.trained`.
  """
  mask_frozen_layers = make_layer_mask(trained)

  def update_fn(state, grads, keys, scale, learning_rate, is_finite):
    # A while loop that runs once or not at all lets XLA update the state in place. The alternatives
    # copy it: jnp.where copies on a CPU, which makes the update three times as slow, and lax.cond
    # copies on a GPU.
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
  """Make `train_step(state, batch) -> (state, metrics)`.

  Its parts are made here or in `offload`.

  If the loss, the gradient or a leaf of the state is not finite, the step is skipped: it changes
  only `state.step`. Then `metrics["bad"]` is true, and `metrics["bad_leaves"]` flags the non-finite
  leaves of the gradient, the weights and the optimizer state, in this order
  (`nonfinite_leaf_names`). This finds a NaN in the weights even if no row of the batch reads it.

  The old state is checked. Checking the new one would need both in memory at the same time, 1.3 GiB
  more on each of eight H100 for GPT-J-6B.

  Args:
    grad_fn: computes loss and gradients.
    grad_stats: computes the global norm and the non-finite flags.
    update_fn: applies the update.
    schedule: learning rate by step.
    clip_norm: largest global norm of the gradient; 0: no clipping.
    seed: of the run.
  """

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, ArrayLike]]:
    loss, grads, tokens = grad_fn(state, batch)
    norm, bad_leaves = grad_stats(grads, state.checkpointable)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(norm) & ~bad_leaves.any()
    # Clipping is a factor that the update applies, which saves a clipped copy of the gradients.
    scale = jnp.minimum(1, clip_norm / jnp.maximum(norm, 1e-30)) if clip_norm else jnp.float32(1)
    learning_rate = schedule(state.step)

    # Keys depend on (seed, step) alone, so that a resumed run rounds the same way.
    keys = rounding_keys(seed, state.step, state.params)
    params, opt_state = update_fn(state, grads, keys, scale, learning_rate, is_finite)
    metrics = {"loss": loss, "grad_norm": norm, "learning_rate": learning_rate, "tokens": tokens}
    metrics |= {"bad": ~is_finite, "bad_leaves": bad_leaves}
    step = state.step + 1
    return dataclasses.replace(state, step=step, params=params, opt_state=opt_state), metrics

  return train_step


def ids_in_range(batch: Batch, cfg: ModelConfig) -> jax.Array:
  """Return whether all ids and targets are in the tables; XLA clamps others."""

  def in_range(ids, size):
    return jnp.all((ids >= 0) & (ids < size))

  return in_range(batch["ids"], cfg.V) & in_range(batch["targets"], max(cfg.V, cfg.classes))


def nonfinite_leaf_names(bad_leaves: np.ndarray, state: TrainState) -> list[str]:
  """Return the names of the leaves that `metrics["bad_leaves"]` flags."""

  def paths(tree):
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]

  names = [f"the gradient of {name}" for name in paths(state.params)]
  names += [name[1:] for name in paths(state.checkpointable)]
  return [name for name, bad in zip(names, bad_leaves, strict=True) if bad]
