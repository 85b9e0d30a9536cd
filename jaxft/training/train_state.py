"""The train state: what a step changes, and the weights that it leaves as they are."""

import dataclasses

import jax

from jaxft.checkpoint.manager import CheckpointState
from jaxft.training.trainable import combine
from jaxft.utils.types import Params, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """Step, parameters and optimizer state, with the weights that are not trained.

  As a tree it may have shapes, shardings or a mask at its leaves, instead of arrays.
  """

  step: PyTree  # optimizer steps done, skipped ones included
  params: Params  # those that are trained
  opt_state: PyTree
  frozen: Params = dataclasses.field(default_factory=dict)  # those that are not

  @classmethod
  def from_checkpoint(cls, saved: CheckpointState, frozen: Params) -> "TrainState":
    """Undo `checkpointable`."""
    return cls(step=saved.step, params=saved.params, opt_state=saved.opt, frozen=frozen)

  @property
  def all_params(self) -> Params:
    """All parameters of the model."""
    return combine(self.params, self.frozen)

  @property
  def checkpointable(self) -> CheckpointState:
    """The state without the frozen weights, which the base model still has."""
    return CheckpointState(self.step, self.params, self.opt_state)


def shardings_of(shapes: PyTree) -> PyTree:
  """The sharding of each leaf."""
  return jax.tree.map(lambda leaf: leaf.sharding, shapes)
