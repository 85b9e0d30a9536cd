"""The train state: what a step changes, and the weights that it leaves as they are."""

from typing import Any, NamedTuple

import jax

from jaxft.checkpoint.manager import CheckpointState
from jaxft.training.trainable import combine


class TrainState(NamedTuple):
  """Step, parameters and optimizer state, with the weights that are not trained."""

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
    """The state without the frozen weights, which the base model still has."""
    return CheckpointState(self.step, self.params, self.opt_state)


def shardings_of(shapes: Any) -> Any:
  """The sharding of each leaf."""
  return jax.tree.map(lambda leaf: leaf.sharding, shapes)
