"""Floating-point operations of a step, counted in what JAX traced: the same for any hardware and mesh, and exact.

B batch, T length, V vocabulary, D model, F feed-forward, L layers, N heads, H head size
"""

import math
from typing import Any

# Matrix products of a kernel for attention, and the axis of its queries' length; each product is of all queries and half of the
# keys: neither kernel computes blocks that no query sees.
ATTENTION_KERNELS = {
  "dot_product_attention_fwd": (2, 1),  # cuDNN, (B, T, N, H)
  "dot_product_attention_bwd": (5, 1),
  "splash_mha_fwd": (2, -2),  # (B, N, T, H), or (N, T, H) of one row
  "splash_mha_dkv": (4, -2),
  "splash_mha_dq": (3, -2),
}


def jaxpr_flops(jaxpr: Any) -> int:
  """Of all matrix products, two for each multiplication and addition; loops by their trip count, recomputation included.

  XLA's own `cost_analysis` counts the body of a loop once (jax 0.10.2). What is not a matrix product is bound by memory.
  Only what something needs is counted, as the compiler drops the rest.
  """
  return _count_live(jaxpr, [True] * len(_inner_jaxpr(jaxpr).outvars))[0]


def model_flops(cfg: Any, batch_size: int, T: int) -> int:
  """What a step needs at least, by PaLM's formula (arXiv:2204.02311, appendix B): (6 P + 12 L N H T) x tokens.

  P are the parameters of matrix products: 2 P a token forward and twice that backward, less 2 for each that is frozen;
  attention to all T columns, as it is usually counted, though half of them are masked. Recomputation is not in it.

  Args:
    cfg: a `jaxft.model.decoder.ModelConfig`.
    batch_size: rows of an optimizer step.
  """
  heads, head = (
    cfg.N * cfg.H,
    "output.score" if cfg.classes else "embed.tokens" if cfg.tied else "output.kernel",
  )
  inside = {  # of a layer: inputs and outputs of each product
    "attention.qkv": (cfg.D, 3 * heads),
    "attention.out": (heads, cfg.D),
    "mlp.up": (cfg.D, cfg.F),
    "mlp.down": (cfg.F, cfg.D),
  }
  sizes = {f"blocks.{name}.kernel": cfg.L * math.prod(shape) for name, shape in inside.items()}
  sizes |= {head: (cfg.classes or cfg.V) * cfg.D}
  trained = {name for name, _ in cfg.trained}
  times = lambda name: 6 if name in trained or not trained else 4
  # Of adapters, rank x (inputs + outputs), where query, key and value are counted as one.
  adapters = sum(
    6 * cfg.L * cfg.lora_rank * sum(shape)
    for name, shape in inside.items()
    if f"blocks.{name}.adapter.lora_a" in trained
  )
  products = sum(times(name) * size for name, size in sizes.items()) + adapters
  return (products + 12 * cfg.L * heads * T) * batch_size * T


def _count_live(jaxpr: Any, needed: list[bool]) -> tuple[int, list[bool]]:
  """Operations that it takes to make the needed outputs, and which inputs it takes."""
  jaxpr = _inner_jaxpr(jaxpr)
  live = {id(var) for var, need in zip(jaxpr.outvars, needed, strict=True) if need}
  total = 0
  for eqn in reversed(jaxpr.eqns):
    wanted = [id(var) in live for var in eqn.outvars]
    if any(wanted) or eqn.effects:
      count, used = _count_equation(eqn, wanted)
      total += count
      live |= {id(var) for var, use in zip(eqn.invars, used, strict=True) if use}
  return total, [id(var) in live for var in jaxpr.invars]


def _count_equation(eqn: Any, wanted: list[bool]) -> tuple[int, list[bool]]:
  name, params, everything = eqn.primitive.name, eqn.params, [True] * len(eqn.invars)
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * depth * math.prod(eqn.outvars[0].aval.shape), everything
  label = params["name"] if name == "pallas_call" else name
  for kernel, (products, axis) in ATTENTION_KERNELS.items():
    if label.startswith(kernel):
      floats = (
        var.aval for var in eqn.invars if var.aval.ndim > 2 and var.aval.dtype.kind not in "biu"
      )
      shape = next(floats).shape  # of the queries
      return products * math.prod(shape) * shape[axis], everything
  if name == "scan":
    # By their axes, as jax 0.10 and 0.12 name the parts differently: what is walked along has one more outside than inside.
    body, whole = (
      _inner_jaxpr(params["jaxpr"]),
      lambda out, inside: sum(a.aval.ndim == b.aval.ndim for a, b in zip(out, inside)),
    )
    carries = whole(eqn.outvars, body.outvars)
    consts = whole(eqn.invars, body.invars) - carries
    while True:  # what one turn needs of the carry, the turn before it must make
      count, used = _count_live(params["jaxpr"], wanted)
      more = [
        want or use
        for want, use in zip(wanted[:carries], used[consts : consts + carries], strict=True)
      ]
      if more == wanted[:carries]:
        return params["length"] * count, used
      wanted = more + wanted[carries:]
  if name == "cond":  # the index comes before what the branches take
    branches = [_count_live(branch, wanted) for branch in params["branches"]]
    return max(count for count, _ in branches), everything
  inner = [value for value in params.values() if hasattr(value, "eqns")]
  if name == "shard_map":  # what each device does
    count, used = _count_live(params["jaxpr"], wanted)
    return params["mesh"].size * count, used
  if (
    len(inner) == 1
    and len(_inner_jaxpr(inner[0]).invars) == len(everything)
    and len(_inner_jaxpr(inner[0]).outvars) == len(wanted)
  ):
    return _count_live(inner[0], wanted)
  return sum(
    _count_live(jaxpr, [True] * len(_inner_jaxpr(jaxpr).outvars))[0] for jaxpr in inner
  ), everything


def _inner_jaxpr(jaxpr: Any) -> Any:
  """Without the constants that a closed one carries."""
  return getattr(jaxpr, "jaxpr", jaxpr)
