"""Learning-rate schedules, optimizers, and which weights decay."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

# The last part of a parameter's path says what it is; a new name must be placed here before it can be trained.
DECAYED = {"kernel", "tokens", "positions", "score"}
NOT_DECAYED = {"bias", "scale"}


def schedule(optim: ConfigDict, total_steps: int) -> optax.Schedule:
  """Learning rate of optimizer step 0, 1, 2, ...: a linear warm-up from 0, then constant, linear or cosine.

  The same course as transformers' `get_*_schedule_with_warmup`, with an end that may be above 0.
  """
  peak, warmup, end = optim.learning_rate, optim.warmup_steps, optim.end_learning_rate
  rest = max(total_steps - warmup, 1)
  after = {
    "constant": optax.constant_schedule(peak),
    "linear": optax.linear_schedule(peak, end, rest),
    "cosine": optax.cosine_decay_schedule(peak, rest, alpha=end / peak),
  }[optim.schedule]
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def optimizer(optim: ConfigDict) -> optax.GradientTransformation:
  """Turns clipped gradients into a direction; the step multiplies it by the learning rate and subtracts it.

  The learning rate is no part of it, because it follows the step of the run, also over steps that were skipped.
  """
  scale = {
    "adamw": optax.scale_by_adam(optim.b1, optim.b2, optim.eps, mu_dtype=jnp.dtype(optim.state_dtype)),
    "lion": optax.scale_by_lion(optim.b1, optim.b2, mu_dtype=jnp.dtype(optim.state_dtype)),
    # Adafactor (arXiv:1804.04235) without its own learning rate: factored second moment, then clipping by block.
    "adafactor": optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
    "sgd": optax.trace(optim.b1, accumulator_dtype=jnp.dtype(optim.state_dtype)),
  }[optim.name]
  return optax.chain(scale, optax.add_decayed_weights(optim.weight_decay, decay_mask))


def decay_mask(params: Any) -> Any:
  """True for matrices and embeddings, False for biases and norms; raises KeyError on a parameter of neither kind."""

  def decays(path, _):
    name = path[-1].key
    if name not in DECAYED | NOT_DECAYED:
      raise KeyError(f"{jax.tree_util.keystr(path)}: neither in DECAYED nor in NOT_DECAYED")
    return name in DECAYED

  return jax.tree_util.tree_map_with_path(decays, params)
