"""Learning-rate schedules, optimizers, and which weights decay."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from jaxft.config import OptimSection
from jaxft.training.trainable import ParamPath, Trained, param_name
from jaxft.utils.types import Params, PyTree

# The last key of a parameter's path decides whether it decays. A new name must be added here before
# it can be trained.
DECAYED = {"kernel", "tokens", "positions", "score", "lora_a", "lora_b"}
NOT_DECAYED = {"bias", "scale"}


def warmup_steps(optim: OptimSection, total_steps: int) -> int:
  """Return the number of warm-up steps of a run.

  This is `optim.warmup_steps`, or a tenth of all steps if the setting is more than all steps. If it
  is 0, the result is `optim.warmup_ratio` of all steps, rounded up as in transformers. The tenth is
  rounded down, because the first step of a warm-up has a learning rate of 0.
  """
  if optim.warmup_steps > total_steps:
    return total_steps // 10
  return optim.warmup_steps or math.ceil(total_steps * optim.warmup_ratio)


def make_schedule(optim: OptimSection, total_steps: int) -> optax.Schedule:
  """Make the schedule: linear warm-up from 0, then constant, linear or cosine.

  It equals transformers' `get_*_schedule_with_warmup`, except that the end may be above 0.
  """
  peak, end = optim.learning_rate, optim.end_learning_rate
  warmup = warmup_steps(optim, total_steps)
  rest = max(total_steps - warmup, 1)
  after = {
    "constant": optax.constant_schedule(peak),
    "linear": optax.linear_schedule(peak, end, rest),
    "cosine": optax.cosine_decay_schedule(peak, rest, alpha=end / peak),
  }[optim.schedule]
  if not warmup:
    return after
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(optim: OptimSection) -> optax.GradientTransformation:
  """Make the optimizer: clipped gradients to updates, without learning rate.

  The train step subtracts learning rate x update. The learning rate is not part of the optimizer
  because it follows the step of the run, which also counts skipped steps.

  Each leaf has a separate state, and so has each layer of a stacked leaf. A layer can therefore be
  updated alone (`offload`), and statistics over a whole matrix (Adafactor) are per layer.
  """

  def init(params: optax.Params) -> optax.OptState:
    # Cast to float32, so that the dtype of moments depends on `optim.state_dtype` only.
    def init_leaf(path, p):
      return _map_over_layers(optim, path).init(p.astype(jnp.float32))

    return jax.tree_util.tree_map_with_path(init_leaf, params)

  def update(
    updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
  ) -> tuple[optax.Updates, optax.OptState]:
    def update_leaf(path, param, grad, leaf_state):
      return _map_over_layers(optim, path).update(grad, leaf_state, param)

    return unzip(params, jax.tree_util.tree_map_with_path(update_leaf, params, updates, state))

  return optax.GradientTransformation(init, update)


def unzip(like: PyTree, pairs: PyTree) -> tuple[PyTree, PyTree]:
  """Split a tree with a pair at each leaf of `like` into two trees like `like`."""
  first, second = (jax.tree.map(lambda _, pair, i=i: pair[i], like, pairs) for i in (0, 1))
  return first, second


def make_leaf_optimizer(optim: OptimSection, path: ParamPath) -> optax.GradientTransformation:
  """Make the optimizer of the leaf at this path, or of one of its layers."""
  dtype = jnp.dtype(optim.state_dtype)
  adam = optax.scale_by_adam(optim.b1, optim.b2, optim.eps, mu_dtype=dtype)
  scale = {
    "adamw": adam,
    "muon": _muon(optim) if is_stacked(path) and path[-1].key == "kernel" else adam,
    "lion": optax.scale_by_lion(optim.b1, optim.b2, mu_dtype=dtype),
    # Adafactor (arXiv:1804.04235) without its relative learning rate: factored second moment, then
    # clipping by block.
    "adafactor": optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
    "sgd": optax.trace(optim.b1, accumulator_dtype=dtype),
  }[optim.name]
  if not has_weight_decay(path):
    return scale
  return optax.chain(scale, optax.add_decayed_weights(optim.weight_decay))


# Which axes of a layer's kernel are rows and columns, by its number of axes: (D, F) or (F, D);
# (N, H, D); and (D, 3, N, H), in which queries, keys and values are three matrices.
MUON_AXES = {
  2: optax.contrib.MuonDimensionNumbers(0, 1),
  3: optax.contrib.MuonDimensionNumbers((0, 1), 2),
  4: optax.contrib.MuonDimensionNumbers(0, (2, 3)),
}


def _muon(optim: OptimSection) -> optax.GradientTransformation:
  """Make Muon (Jordan et al., 2024) for one matrix: orthogonalized momentum.

  It is scaled as in arXiv:2502.16982, so that a learning rate for AdamW also suits Muon.
  """
  dtype = jnp.dtype(optim.state_dtype)

  def muon_of(x: jax.Array) -> optax.GradientTransformation:
    axes = MUON_AXES[x.ndim]
    return optax.contrib.scale_by_muon(beta=optim.b1, mu_dtype=dtype, weight_dimension_numbers=axes)

  # optax's state also has the coefficients of its Newton-Schulz iteration. They are constants, so
  # they are left out here, and are not in checkpoints.
  def init(params: PyTree) -> PyTree:
    state = muon_of(params).init(params)
    assert isinstance(state, optax.contrib.MuonState)
    return state.count, state.mu

  def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
    muon = muon_of(updates)
    start = muon.init(updates)
    assert isinstance(start, optax.contrib.MuonState)
    count, mu = state
    orthogonal, new = muon.update(updates, start._replace(count=count, mu=mu))
    assert isinstance(new, optax.contrib.MuonState)
    axes = MUON_AXES[updates.ndim]
    rows, columns = (math.prod(np.take(updates.shape, np.atleast_1d(axis))) for axis in axes)
    return 0.2 * max(rows, columns) ** 0.5 * orthogonal, (new.count, new.mu)

  return optax.GradientTransformation(init, update)


def param_dtype(
  path: ParamPath, leaf: jax.Array | jax.ShapeDtypeStruct, dtype: jnp.dtype
) -> jnp.dtype:
  """Return the dtype of the parameter at `path` if layer matrices use `dtype`.

  Parameters that all layers share keep their dtype, because their gradient is a sum of several.
  Adapters keep theirs too, because they are small.
  """
  return dtype if is_stacked(path) and path[-1].key == "kernel" else leaf.dtype


def with_param_dtype(dtype: jax.typing.DTypeLike, shapes: Params, trained: Trained = ()) -> Params:
  """Return the shapes of parameters, with matrices of layers in `dtype`.

  Args:
    dtype: of the matrices of layers.
    shapes: shapes of the parameters.
    trained: `ModelConfig.trained`. Matrices with some frozen layers keep their dtype, because a
      cast would change the frozen layers.
  """
  partly_frozen = {name for name, layers in trained if layers}

  def cast(path, leaf):
    if param_name(path) in partly_frozen:
      return leaf
    return leaf.update(dtype=param_dtype(path, leaf, jnp.dtype(dtype)))

  return jax.tree_util.tree_map_with_path(cast, shapes)


def _map_over_layers(optim: OptimSection, path: ParamPath) -> optax.GradientTransformation:
  tx = make_leaf_optimizer(optim, path)
  if not is_stacked(path):
    return tx

  # Muon needs the whole, unsharded matrix of a layer. Layers are updated one at a time: with vmap a
  # device would gather all of them at the same time.
  def scan_layers(updates, state, params=None):
    return jax.lax.map(lambda layer: tx.update(*layer), (updates, state, params))

  update = scan_layers if optim.name == "muon" else jax.vmap(tx.update)
  return optax.GradientTransformation(jax.vmap(tx.init), update)


def is_stacked(path: ParamPath) -> bool:
  """Return whether the leaf at this path has a leading axis of layers."""
  return path[0].key == "blocks"


def has_weight_decay(path: ParamPath) -> bool:
  """Return whether the leaf at this path decays: matrices and embeddings do.

  Biases and norms do not.

  Raises:
    KeyError: the name of the parameter is not known.
  """
  name = path[-1].key
  if name not in DECAYED | NOT_DECAYED:
    raise KeyError(f"{jax.tree_util.keystr(path)}: neither in DECAYED nor in NOT_DECAYED")
  return name in DECAYED
