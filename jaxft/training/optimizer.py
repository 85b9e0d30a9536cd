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

# The last key of a parameter's path says what it is; a new name must be added here before it can be
# trained.
DECAYED = {"kernel", "tokens", "positions", "score", "lora_a", "lora_b"}
NOT_DECAYED = {"bias", "scale"}


def warmup_steps(optim: OptimSection, total_steps: int) -> int:
  """Warm-up steps of a run: the setting, or a tenth of all steps where it is more than all.

  Without the setting, `warmup_ratio` of all steps, rounded up as transformers does; the tenth is
  rounded down, as the first step of a warm-up has a rate of 0.
  """
  if optim.warmup_steps > total_steps:
    return total_steps // 10
  return optim.warmup_steps or math.ceil(total_steps * optim.warmup_ratio)


def make_schedule(optim: OptimSection, total_steps: int) -> optax.Schedule:
  """Make the learning rate: a linear warm-up from 0, then constant, linear or cosine.

  The same course as transformers' `get_*_schedule_with_warmup`, with an end that may be above 0.
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
  """Make clipped gradients into updates, of which the step subtracts learning rate times update.

  Each leaf has a state of its own, and so has each layer in a leaf that stacks them: a layer can be
  updated alone, and what an optimizer measures over a whole matrix (Adafactor) it measures over
  that of one layer. The learning rate is no part of it, because it follows the step of the run,
  also over steps that were skipped.
  """

  def init(params: optax.Params) -> optax.OptState:
    # In float32, whatever the parameters are in: moments follow `optim.state_dtype` alone.
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
  """Make two trees like `like` of one that has a pair at each of its leaves."""
  first, second = (jax.tree.map(lambda _, pair, i=i: pair[i], like, pairs) for i in (0, 1))
  return first, second


def make_leaf_optimizer(optim: OptimSection, path: ParamPath) -> optax.GradientTransformation:
  """Make the optimizer of the leaf at this path, or of one layer of it."""
  dtype = jnp.dtype(optim.state_dtype)
  adam = optax.scale_by_adam(optim.b1, optim.b2, optim.eps, mu_dtype=dtype)
  scale = {
    "adamw": adam,
    "muon": _muon(optim) if is_stacked(path) and path[-1].key == "kernel" else adam,
    "lion": optax.scale_by_lion(optim.b1, optim.b2, mu_dtype=dtype),
    # Adafactor (arXiv:1804.04235) without its own learning rate: factored second moment, then
    # clipping by block.
    "adafactor": optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
    "sgd": optax.trace(optim.b1, accumulator_dtype=dtype),
  }[optim.name]
  if not has_weight_decay(path):
    return scale
  return optax.chain(scale, optax.add_decayed_weights(optim.weight_decay))


# For the kernel of a layer, by its number of axes: (D, F) or (F, D), (N, H, D), and (D, 3, N, H),
# whose queries, keys and values are three matrices.
MUON_AXES = {
  2: optax.contrib.MuonDimensionNumbers(0, 1),
  3: optax.contrib.MuonDimensionNumbers((0, 1), 2),
  4: optax.contrib.MuonDimensionNumbers(0, (2, 3)),
}


def _muon(optim: OptimSection) -> optax.GradientTransformation:
  """Muon (Jordan et al., 2024) for one matrix: its momentum, made orthogonal.

  Scaled as in arXiv:2502.16982, so that a learning rate for AdamW is one for it too.
  """
  dtype = jnp.dtype(optim.state_dtype)

  def muon_of(x: jax.Array) -> optax.GradientTransformation:
    axes = MUON_AXES[x.ndim]
    return optax.contrib.scale_by_muon(beta=optim.b1, mu_dtype=dtype, weight_dimension_numbers=axes)

  # optax has the coefficients of its iteration in the state too: constants, left out here.
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
  """The dtype of the parameter at this path, where matrices of layers are to be in `dtype`.

  What all layers share stays as it is, as its gradient is a sum of several; adapters stay too,
  which are small.
  """
  return dtype if is_stacked(path) and path[-1].key == "kernel" else leaf.dtype


def with_param_dtype(dtype: jax.typing.DTypeLike, shapes: Params, trained: Trained = ()) -> Params:
  """Shapes of parameters with the matrices of layers in `dtype`.

  Args:
    trained: `ModelConfig.trained`; matrices of which some layers are frozen stay as they are, so
      that those layers do not change.
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

  # Muon needs a layer's matrix whole. One layer after the other: all at once, a device would have
  # all layers of it.
  def scan_layers(updates, state, params=None):
    return jax.lax.map(lambda layer: tx.update(*layer), (updates, state, params))

  update = scan_layers if optim.name == "muon" else jax.vmap(tx.update)
  return optax.GradientTransformation(jax.vmap(tx.init), update)


def is_stacked(path: ParamPath) -> bool:
  """Whether the leaf at this path has a leading axis of layers."""
  return path[0].key == "blocks"


def has_weight_decay(path: ParamPath) -> bool:
  """The weight decay mask: matrices and embeddings, not biases and norms; KeyError for others."""
  name = path[-1].key
  if name not in DECAYED | NOT_DECAYED:
    raise KeyError(f"{jax.tree_util.keystr(path)}: neither in DECAYED nor in NOT_DECAYED")
  return name in DECAYED
