"""The eval step, and the loss over an evaluation set."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.data.loader import Batch
from jaxft.model.decoder import Decoder
from jaxft.model.loss import cross_entropy_sum
from jaxft.utils.types import Params

# (params, batch) -> summed loss, token count and, for a classifier, the confusion matrix
EvalStepFn: TypeAlias = Callable[[Params, Batch], tuple[jax.Array, ...]]


class EvalResult(NamedTuple):
  """The loss of a model on a text, and the predictions of a classifier."""

  loss: float  # nats per unmasked target
  tokens: int  # number of unmasked targets
  confusion_CC: np.ndarray | None = None  # classifier: counts, true x predicted

  @property
  def perplexity(self) -> float:
    """exp(loss), with the loss capped at 700 to avoid an overflow."""
    return math.exp(min(self.loss, 700.0))

  @property
  def accuracy(self) -> float:
    """Share of examples whose class a classifier predicts correctly."""
    assert self.confusion_CC is not None
    return float(self.confusion_CC.trace() / max(self.confusion_CC.sum(), 1))

  @property
  def f1(self) -> float:
    """F1 of the second class; of more than two classes the macro mean.

    A class without true or predicted examples counts as 0.
    """
    assert self.confusion_CC is not None
    true_and_predicted = self.confusion_CC.sum(0) + self.confusion_CC.sum(1)
    f1_C = 2 * self.confusion_CC.diagonal() / np.maximum(true_and_predicted, 1)
    return float(f1_C[1] if len(f1_C) == 2 else f1_C.mean())


def make_eval_step(graph: nnx.GraphDef[Decoder], *, loss_chunk: int) -> EvalStepFn:
  """Make `eval_step(params, batch) -> sums`; sums of batches can be added up."""

  def eval_step(params: Params, batch: Batch) -> tuple[jax.Array, ...]:
    model = nnx.merge(graph, params)
    batch = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch)
    targets_BT = batch["targets"]
    mask_BT = batch["mask"]
    h_BTD, _ = model(
      batch["ids"], segments_BT=batch.get("segments"), positions_BT=batch.get("positions")
    )
    loss = cross_entropy_sum(h_BTD, model.head(), targets_BT, mask_BT, loss_chunk)
    sums = loss, jnp.sum(mask_BT)
    if not model.cfg.classes:
      return sums
    classes = jnp.arange(model.cfg.classes)
    predicted_BTC = (model.logits(h_BTD).argmax(-1)[..., None] == classes).astype(jnp.int32)
    true_BTC = ((targets_BT[..., None] == classes) & mask_BT[..., None]).astype(jnp.int32)
    # C: true class, c: predicted class.
    return *sums, jnp.einsum("BTC,BTc->Cc", true_BTC, predicted_BTC)

  return eval_step


def evaluate(eval_step: EvalStepFn, params: Params, batches: Iterable[Batch]) -> EvalResult:
  """Evaluate the model on all batches.

  Sums stay on the device until the end. Except on a CPU, no batch waits for the previous one.
  """
  sums = []
  for batch in batches:
    sums.append(eval_step(params, batch))
    # On a CPU, several programs that run at the same time can deadlock: each waits in a collective,
    # and together they hold all threads. With offloaded weights one in fifteen evaluations hung
    # (jax 0.10.2, eight devices on two cores).
    if next(iter(sums[-1][0].devices())).platform == "cpu":
      sums[-1][0].block_until_ready()
  losses, counts, *confusions = zip(*sums, strict=True)
  tokens = sum(int(count) for count in counts)
  loss = sum(float(loss) for loss in losses) / max(tokens, 1)
  confusion = np.sum([np.asarray(x, np.int64) for x in confusions[0]], 0) if confusions else None
  return EvalResult(loss, tokens, confusion)
