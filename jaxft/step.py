"""The train step and the eval step: pure functions, jitted by whoever knows the mesh.

A batch is {"ids", "targets", "mask"}, each (A, B, T): A accumulation steps of B rows of T columns. Where examples share rows it
has their "segments" and "positions" too.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxft import rounding
from jaxft.dropout import per_row_keys
from jaxft.loss import cross_entropy_sum
from jaxft.parts import combine, make_layer_mask


class CheckpointState(NamedTuple):
  """Everything that training changes, and everything a checkpoint holds."""

  step: jax.Array
  params: Any
  opt: Any


class TrainState(NamedTuple):
  """What training changes, and the weights that it leaves as they are."""

  step: jax.Array  # optimizer steps done, skipped ones included
  params: Any  # those that are trained
  opt_state: Any
  frozen: Any = {}  # those that are not

  @property
  def all_params(self) -> Any:
    """All parameters of the model."""
    return combine(self.params, self.frozen)

  @property
  def checkpointable(self) -> CheckpointState:
    """Without the frozen weights, which can be read again where they came from."""
    return CheckpointState(self.step, self.params, self.opt_state)


def make_grad_fn(graph: nnx.GraphDef, *, loss_chunk: int, seed: int, gradients: Any, trained: Any = ()) -> Callable:
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
      hidden_states(model, part, keys_B, rows), model.head(), part["targets"], part["mask"], loss_chunk
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
      scaled = lambda params, rows: scale * loss_sum(combine(params, state.frozen), rows, part, keys_B)
      loss, (grads, d_rows) = jax.value_and_grad(scaled, (0, 1))(state.params, model.embed_tokens(part["ids"]))
      return loss, place(model.add_embedding_grads(grads, part["ids"], d_rows))

    A = batch["ids"].shape[0]
    if A == 1:  # no second copy of the gradient for runs that do not accumulate
      return *of_part(0, jax.tree.map(lambda x: x[0], batch)), tokens
    # In float32, also where weights are a copy in bfloat16 (`offload.make_copy_grad_fn`).
    zeros = place(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), state.params))
    add = lambda total, xs: (jax.tree.map(lambda t, part: t + part.astype(t.dtype), total, of_part(*xs)), None)
    (loss, grads), _ = jax.lax.scan(add, (jnp.float32(0), zeros), (jnp.arange(A), batch))
    return loss, grads, tokens

  return gradient


def make_grad_stats(not_finite: Callable) -> Callable:
  """Returns `look(gradient, state) -> (norm, bad)`: for each leaf of the two in order whether it is not finite.

  Args:
    not_finite: `sharding.make_nonfinite_check` for (gradient, state).
  """
  norm = lambda grads: optax.tree_utils.tree_norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
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
      direction, opt = tx.update(jax.tree.map(lambda g: g.astype(jnp.float32) * scale, grads), opt, precise)

      def move(path, old, p, d, key):
        return rounding.stochastic_round_layers(p - rate * only_trained(path, d), old.dtype, key)

      return jnp.bool(False), jax.tree_util.tree_map_with_path(move, params, precise, direction, keys), opt

    return jax.lax.while_loop(lambda now: now[0], turn, (good, params, opt))[1:]

  return update


def make_train_step(
  gradient: Callable, look: Callable, update: Callable, schedule: optax.Schedule, *, clip_norm: float, seed: int
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

    keys = rounding.rounding_keys(seed, state.step, state.params)
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
  names = lambda tree: [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
  every = [f"the gradient of {name}" for name in names(state.params)] + [
    name[1:] for name in names(state.checkpointable)
  ]
  return [name for name, bad in zip(every, bad_leaves, strict=True) if bad]


def hidden_states(
  model: Any, part: dict, keys_B: jax.Array | None = None, rows_BTD: jax.Array | None = None
) -> jax.Array:
  """Hidden states (B, T, D) of a part of a batch."""
  how = {"segments_BT": part.get("segments"), "positions_BT": part.get("positions")}
  return model(part["ids"], **how, keys_B=keys_B, rows_BTD=rows_BTD)


class EvalResult(NamedTuple):
  """What a model makes of a text."""

  loss: float  # nats per unmasked target
  tokens: int  # of those targets
  confusion_CC: np.ndarray | None = (
    None  # of a model that classifies: how many of each class (row) it took for which (column)
  )

  @property
  def perplexity(self) -> float:
    return math.exp(min(self.loss, 700.0))

  @property
  def accuracy(self) -> float:
    return float(self.confusion_CC.trace() / max(self.confusion_CC.sum(), 1))

  @property
  def f1(self) -> float:
    """Of two classes the second one's; of more their mean ("macro"). A class that is never there, nor predicted, has 0."""
    right, all_of = self.confusion_CC.diagonal(), self.confusion_CC.sum(0) + self.confusion_CC.sum(1)
    each = 2 * right / np.maximum(all_of, 1)
    return float(each[1] if len(each) == 2 else each.mean())


def make_eval_step(graph: nnx.GraphDef, *, loss_chunk: int) -> Callable:
  """Returns `eval_step(params, batch) -> sums` as in `EvalResult`, so that batches of any size add up exactly."""

  def eval_step(params: Any, batch: dict) -> tuple[jax.Array, ...]:
    model = nnx.merge(graph, params)
    part = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch)
    h_BTD = hidden_states(model, part)
    loss = cross_entropy_sum(h_BTD, model.head(), part["targets"], part["mask"], loss_chunk)
    sums = loss, jnp.sum(part["mask"])
    if not model.cfg.classes:
      return sums
    classes = jnp.arange(model.cfg.classes)
    predicted_BTC = (model.logits(h_BTD).argmax(-1)[..., None] == classes).astype(jnp.int32)
    true_BTC = ((part["targets"][..., None] == classes) & part["mask"][..., None]).astype(jnp.int32)
    return *sums, jnp.einsum("BTC,BTK->CK", true_BTC, predicted_BTC)

  return eval_step


def evaluate(eval_step: Callable, params: Any, batches: Iterable[dict]) -> EvalResult:
  """The model on all batches. Sums stay on the device until the end, and no batch waits for the one before it, but on a CPU."""
  found = []
  for batch in batches:
    found.append(eval_step(params, batch))
    # Programs side by side, each of several devices that wait for each other, can take all of a CPU's threads: one in fifteen
    # evaluations hung where the weights are on the host (jax 0.10.2, eight devices on two cores).
    if next(iter(found[-1][0].devices())).platform == "cpu":
      found[-1][0].block_until_ready()
  losses, counts, *confusions = zip(*found, strict=True)
  tokens = sum(int(count) for count in counts)
  loss = sum(float(loss) for loss in losses) / max(tokens, 1)
  return EvalResult(loss, tokens, sum(np.asarray(one, np.int64) for one in confusions[0]) if confusions else None)
