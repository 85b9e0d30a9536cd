"""The train state: everything that a step changes, and the frozen weights."""

import dataclasses

import jax

from jaxft.checkpoint.manager import CheckpointState
from jaxft.training.trainable import combine
from jaxft.utils.types import Params, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """Step, trained parameters, optimizer state and frozen parameters.

  Its leaves may also be shapes, shardings or a mask, instead of arrays.
  """

  step: PyTree  # optimizer steps done, skipped ones included
  params: Params  # trained
  opt_state: PyTree
  frozen: Params = dataclasses.field(default_factory=dict)  # not trained

  @classmethod
  def from_checkpoint(cls, saved: CheckpointState, frozen: Params) -> "TrainState":
    """Build the state from a checkpoint and the frozen weights."""
    return cls(step=saved.step, params=saved.params, opt_state=saved.opt, frozen=frozen)

  @property
  def all_params(self) -> Params:
    """All parameters of the model, trained and frozen."""
    return combine(self.params, self.frozen)

  @property
  def checkpointable(self) -> CheckpointState:
    """The state without the frozen weights, which the base model has."""
    return CheckpointState(self.step, self.params, self.opt_state)


def shardings_of(shapes: PyTree) -> PyTree:
  """Return the sharding of each leaf."""
  return jax.tree.map(lambda leaf: leaf.sharding, shapes)
