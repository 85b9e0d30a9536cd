"""Exact FLOPs of a step from its jaxpr: the same for any hardware and mesh.

B batch, T length, V vocabulary, D model, F feed-forward, L layers, N heads, H head size
"""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jax.extend.core import ClosedJaxpr, Jaxpr

# (matrix products, axis of the queries' length) of each attention kernel. Each product counts all
# queries and half of the keys, because no kernel computes masked blocks.
ATTENTION_KERNELS = {
  "dot_product_attention_fwd": (2, 1),  # cuDNN, (B, T, N, H)
  "dot_product_attention_bwd": (5, 1),
  "splash_mha_fwd": (2, -2),  # (B, N, T, H), or (N, T, H) for one row
  "splash_mha_dkv": (4, -2),
  "splash_mha_dq": (3, -2),
}


def jaxpr_flops(jaxpr: "ClosedJaxpr | Jaxpr") -> int:
  """Return the FLOPs of all matrix products, including recomputation.

  The body of a loop counts once for each iteration; XLA's `cost_analysis` counts it only once (jax
  0.10.2). Other operations are memory-bound and not counted. Dead code is not counted, because the
  compiler removes it.
  """
  return _count_live(jaxpr, [True] * len(jaxpr.outvars))[0]


def model_flops(cfg: Any, batch_size: int, T: int) -> int:
  """Return the model FLOPs of a step: (6 weights + 12 L N H T) x tokens.

  This is PaLM's formula (appendix B of arXiv:2204.02311), without recomputation. A weight of a
  matrix product takes 2 FLOPs per token forward and 4 backward, or 2 backward if it is frozen.
  Attention counts all T columns, as is usual, although half of them are masked.

  Args:
    cfg: a `jaxft.model.config.ModelConfig`.
    batch_size: sequences of an optimizer step.
    T: tokens of a sequence.
  """
  heads = cfg.N * cfg.H
  head = "output.score" if cfg.classes else "embed.tokens" if cfg.tied else "output.kernel"
  layer = {  # (inputs, outputs) of each product
    "attention.qkv": (cfg.D, 3 * heads),
    "attention.out": (heads, cfg.D),
    "mlp.up": (cfg.D, cfg.F),
    "mlp.down": (cfg.F, cfg.D),
  }
  sizes = {f"blocks.{name}.kernel": cfg.L * math.prod(shape) for name, shape in layer.items()}
  sizes |= {head: (cfg.classes or cfg.V) * cfg.D}
  trained = {name for name, _ in cfg.trained}

  def factor(name: str) -> int:
    return 6 if name in trained or not trained else 4

  # An adapter has rank x (inputs + outputs) weights; query, key and value count as one matrix.
  adapters = sum(
    6 * cfg.L * cfg.lora_rank * sum(shape)
    for name, shape in layer.items()
    if f"blocks.{name}.adapter.lora_a" in trained
  )
  products = sum(factor(name) * size for name, size in sizes.items()) + adapters
  return (products + 12 * cfg.L * heads * T) * batch_size * T


def _count_live(jaxpr: "ClosedJaxpr | Jaxpr", needed: list[bool]) -> tuple[int, list[bool]]:
  """Return the FLOPs of the needed outputs, and which inputs they need.

  Walks the equations backward, so that an equation counts only if a later one uses its result.
  """
  live = {id(var) for var, need in zip(jaxpr.outvars, needed, strict=True) if need}
  total = 0
  for eqn in reversed(jaxpr.eqns):
    needed = [id(var) in live for var in eqn.outvars]
    if any(needed) or eqn.effects:
      count, used = _count_equation(eqn, needed)
      total += count
      live |= {id(var) for var, use in zip(eqn.invars, used, strict=True) if use}
  return total, [id(var) in live for var in jaxpr.invars]


def _count_equation(eqn: Any, needed: list[bool]) -> tuple[int, list[bool]]:
  name = eqn.primitive.name
  params = eqn.params
  everything = [True] * len(eqn.invars)
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * depth * math.prod(eqn.outvars[0].aval.shape), everything
  label = params["name"] if name == "pallas_call" else name
  for kernel, (products, axis) in ATTENTION_KERNELS.items():
    if label.startswith(kernel):
      avals = (var.aval for var in eqn.invars)
      floats = (aval for aval in avals if aval.ndim > 2 and aval.dtype.kind not in "biu")
      shape = next(floats).shape  # the queries come first
      return products * math.prod(shape) * shape[axis], everything
  if name == "scan":
    # JAX 0.10 and 0.12 name the groups of variables differently, so we count axes: a variable that
    # is scanned over has one axis more outside than inside.
    body = params["jaxpr"]
    carries = sum(a.aval.ndim == b.aval.ndim for a, b in zip(eqn.outvars, body.outvars))
    consts = sum(a.aval.ndim == b.aval.ndim for a, b in zip(eqn.invars, body.invars)) - carries
    # An iteration must produce the carry that the next one needs. Repeat until the needed part of
    # the carry no longer grows.
    while True:
      count, used = _count_live(body, needed)
      carry_used = used[consts : consts + carries]
      carry = [need or use for need, use in zip(needed[:carries], carry_used, strict=True)]
      if carry == needed[:carries]:
        return params["length"] * count, used
      needed = carry + needed[carries:]
  if name == "cond":  # count the most expensive branch
    branches = [_count_live(branch, needed) for branch in params["branches"]]
    return max(count for count, _ in branches), everything
  inner = [value for value in params.values() if hasattr(value, "eqns")]
  if name == "shard_map":  # its jaxpr is the work of one device
    count, used = _count_live(params["jaxpr"], needed)
    return params["mesh"].size * count, used
  if len(inner) == 1:
    if (len(inner[0].invars), len(inner[0].outvars)) == (len(everything), len(needed)):
      return _count_live(inner[0], needed)
  return sum(map(jaxpr_flops, inner)), everything
