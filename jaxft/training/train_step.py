"""The train step: gradients, their statistics, and the update. Pure functions, jitted by training/build.py.

A batch is {"ids", "targets", "mask"}, each (A, B, T): A accumulation steps of B rows of T columns. Where examples share rows it
has their "segments" and "positions" too.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxft.model.dropout import per_row_keys
from jaxft.model.loss import cross_entropy_sum
from jaxft.training import stochastic_rounding
from jaxft.training.train_state import TrainState
from jaxft.training.trainable import combine, make_layer_mask


def make_grad_fn(
  graph: nnx.GraphDef, *, loss_chunk: int, seed: int, gradients: Any, trained: Any = ()
) -> Callable:
  """Returns `gradient(state, batch) -> (loss, gradient, tokens)`.

  The loss is a sum over the unmasked targets of the whole global batch divided by their count, so it does not depend on how
  rows are cut into accumulation steps or spread over devices; nor does dropout, whose keys follow from (seed, step, row).

  Args:
    gradients: a sharding for every leaf of the gradient.
    trained: `ModelConfig.trained`.
  """
  only_trained = make_layer_mask(trained)

  def loss_sum(params, rows, part, keys_B):
    model = nnx.merge(graph, params)
    loss = cross_entropy_sum(
      hidden_states(model, part, keys_B, rows),
      model.head(),
      part["targets"],
      part["mask"],
      loss_chunk,
    )
    return jnp.where(ids_in_range(part, model.cfg), loss, jnp.nan)

  def place(grads):
    grads = jax.tree_util.tree_map_with_path(only_trained, grads)
    return jax.tree.map(jax.lax.with_sharding_constraint, grads, gradients)

  def gradient(state: TrainState, batch: dict) -> tuple[jax.Array, Any, jax.Array]:
    tokens = jnp.sum(batch["mask"])
    scale = 1 / jnp.maximum(tokens, 1).astype(jnp.float32)
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def of_part(index, part):
      # Scaled before the backward pass: its numbers then do not grow with the size of the batch.
      B, model = part["ids"].shape[0], nnx.merge(graph, state.all_params)
      keys_B = per_row_keys(key, index * B, B)
      scaled = lambda params, rows: (
        scale * loss_sum(combine(params, state.frozen), rows, part, keys_B)
      )
      loss, (grads, d_rows) = jax.value_and_grad(scaled, (0, 1))(
        state.params, model.embed_tokens(part["ids"])
      )
      return loss, place(model.add_embedding_grads(grads, part["ids"], d_rows))

    A = batch["ids"].shape[0]
    if A == 1:  # no second copy of the gradient for runs that do not accumulate
      return *of_part(0, jax.tree.map(lambda x: x[0], batch)), tokens
    # In float32, also where weights are a copy in bfloat16 (`offload.make_copy_grad_fn`).
    zeros = place(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), state.params))
    add = lambda total, xs: (
      jax.tree.map(lambda t, part: t + part.astype(t.dtype), total, of_part(*xs)),
      None,
    )
    (loss, grads), _ = jax.lax.scan(add, (jnp.float32(0), zeros), (jnp.arange(A), batch))
    return loss, grads, tokens

  return gradient


def make_grad_stats(not_finite: Callable) -> Callable:
  """Returns `look(gradient, state) -> (norm, bad)`: for each leaf of the two in order whether it is not finite.

  Args:
    not_finite: `sharding.make_nonfinite_check` for (gradient, state).
  """
  norm = lambda grads: optax.tree_utils.tree_norm(
    jax.tree.map(lambda g: g.astype(jnp.float32), grads)
  )
  return lambda grads, state: (norm(grads), not_finite((grads, state)))


def make_update_fn(tx: optax.GradientTransformation, trained: Any = ()) -> Callable:
  """Returns `update(good, gradient, scale, rate, keys, params, opt) -> (params, opt)`, as before where `good` is false.

  `scale` is what the gradient is multiplied with, `rate` the learning rate, and `keys` what each parameter is rounded by.

  Args:
    trained: `ModelConfig.trained`.
  """
  only_trained = make_layer_mask(trained)

  def update(
    good: jax.Array, grads: Any, scale: jax.Array, rate: jax.Array, keys: Any, params: Any, opt: Any
  ) -> tuple[Any, Any]:
    # A loop of one turn or none writes over the state where it lies. A choice between old and new takes copies on a CPU, where
    # the update is then three times as slow; a branch copies the state on a GPU.
    def turn(now: tuple[jax.Array, Any, Any]) -> tuple[jax.Array, Any, Any]:
      _, params, opt = now
      precise = jax.tree.map(lambda p: p.astype(jnp.float32), params)
      direction, opt = tx.update(
        jax.tree.map(lambda g: g.astype(jnp.float32) * scale, grads), opt, precise
      )

      def move(path, old, p, d, key):
        return stochastic_rounding.stochastic_round_layers(
          p - rate * only_trained(path, d), old.dtype, key
        )

      return (
        jnp.bool(False),
        jax.tree_util.tree_map_with_path(move, params, precise, direction, keys),
        opt,
      )

    return jax.lax.while_loop(lambda now: now[0], turn, (good, params, opt))[1:]

  return update


def make_train_step(
  gradient: Callable,
  look: Callable,
  update: Callable,
  schedule: optax.Schedule,
  *,
  clip_norm: float,
  seed: int,
) -> Callable:
  """Returns `train_step(state, batch) -> (state, metrics)`, of the three functions that are made here or in `offload`.

  When loss, gradient, or a leaf of the state is not finite, the step changes nothing but `state.step`: `metrics["bad"]` is
  true, and `metrics["bad_leaves"]` tells which leaves of the gradient, and then of the weights and of the optimizer state, are
  not finite (`nonfinite_leaf_names`). A weight that is no number shows here even where no row of the batch reads it. It is the old
  state that is looked at: the new one would have to exist whole beside it (1.3 GiB more on each of eight H100 for GPT-J-6B).

  Args:
    clip_norm: largest global norm of the gradient; 0: no clipping.
    seed: of the run.
  """

  def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
    loss, grads, tokens = gradient(state, batch)
    norm, bad_leaves = look(grads, state.checkpointable)
    good = jnp.isfinite(loss) & jnp.isfinite(norm) & ~bad_leaves.any()
    scale = jnp.minimum(1, clip_norm / jnp.maximum(norm, 1e-30)) if clip_norm else jnp.float32(1)
    rate = schedule(state.step)

    keys = stochastic_rounding.rounding_keys(seed, state.step, state.params)
    params, opt = update(good, grads, scale, rate, keys, state.params, state.opt_state)
    metrics = {"loss": loss, "grad_norm": norm, "learning_rate": rate, "tokens": tokens}
    metrics |= {"bad": ~good, "bad_leaves": bad_leaves}
    return state._replace(step=state.step + 1, params=params, opt_state=opt), metrics

  return train_step


def ids_in_range(part: dict, cfg: Any) -> jax.Array:
  """Whether ids and targets are ones that the tables have: XLA takes the nearest row for one that is not, in silence."""
  inside = lambda ids, rows: jnp.all((ids >= 0) & (ids < rows))
  return inside(part["ids"], cfg.V) & inside(part["targets"], max(cfg.V, cfg.classes))


def nonfinite_leaf_names(bad_leaves: Any, state: TrainState) -> list[str]:
  """The names behind `metrics["bad_leaves"]`."""
  names = lambda tree: [
    jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
  ]
  every = [f"the gradient of {name}" for name in names(state.params)] + [
    name[1:] for name in names(state.checkpointable)
  ]
  return [name for name, bad in zip(every, bad_leaves, strict=True) if bad]


def hidden_states(
  model: Any, part: dict, keys_B: jax.Array | None = None, rows_BTD: jax.Array | None = None
) -> jax.Array:
  """Hidden states (B, T, D) of a part of a batch."""
  how = {"segments_BT": part.get("segments"), "positions_BT": part.get("positions")}
  return model(part["ids"], **how, keys_B=keys_B, embeds_BTD=rows_BTD)
