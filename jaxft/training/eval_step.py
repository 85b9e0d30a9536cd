"""The eval step, and the loss over an evaluation set."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.model.loss import cross_entropy_sum
from jaxft.training.train_step import hidden_states


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
    right, all_of = (
      self.confusion_CC.diagonal(),
      self.confusion_CC.sum(0) + self.confusion_CC.sum(1),
    )
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
  return EvalResult(
    loss, tokens, sum(np.asarray(one, np.int64) for one in confusions[0]) if confusions else None
  )
