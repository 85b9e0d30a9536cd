"""How long a step takes, as a roofline: of three times the longest counts, each with the share of the peak it assumes."""

import math
from typing import Any, NamedTuple

from jaxft.hardware.specs import Target

UNMEASURED = "assumption: jaxft has not been measured on this hardware"


class Efficiency(NamedTuple):
  """The share of a data sheet's figure that a step is taken to reach."""

  compute: float = 0.5
  memory: float = 0.8
  network: float = 0.7
  bus: float = 0.8
  source: str = UNMEASURED


EFFICIENCY = Efficiency()
# What a device sends for a collective over n devices, in bytes of the larger of its input and output, by rings.
RING_FACTORS = {
  "all-gather": lambda n: (n - 1) / n,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1,
}


class Estimate(NamedTuple):
  compute_seconds: float
  memory_seconds: float
  network_seconds: float
  bus_seconds: float
  step_seconds: float
  tokens_per_second: float
  mfu: float

  @property
  def bound_by(self) -> str:
    return max(
      ("compute", "memory", "network", "bus"), key=lambda what: getattr(self, f"{what}_seconds")
    )

  def rows_to_hide_the_bus(self, rows: int) -> int:
    """Rows a batch from which on the bus is at most a fifth of a step: its bytes stay the same, the rest grows with rows."""
    a_row = (self.step_seconds - self.bus_seconds) / rows
    return math.ceil(4 * self.bus_seconds / a_row)


MFU_FORMULA = "model FLOPs / (step seconds x devices x dense 16-bit peak FLOP/s), model FLOPs without recomputation"
STEP_FORMULA = "the longest of compute, memory and network seconds, which are taken to overlap, and the bus seconds, which are not"


def estimate_step(
  target: Target,
  devices: int,
  *,
  dtype: str,
  flops: int,
  model_flops: int,
  moved_bytes: int,
  collective_bytes: dict[str, int],
  tokens: int,
  bus_bytes: int = 0,
  efficiency: Efficiency = EFFICIENCY,
) -> Estimate | None:
  """The estimate for one optimizer step; None for a device whose speed is not known (cpu).

  Args:
    devices: that share the step; not all of a target need be in the mesh.
    dtype: of matrix products.
    flops, model_flops: of the whole step, over all devices (`flops.py`).
    moved_bytes: between a device's memory and its cores (`hlo.hbm_bytes`).
    collective_bytes: of a device, by kind (`hlo.bytes_by_kind`).
    tokens: of a step.
    bus_bytes: between the host's memory and a device (`offload.host_traffic`).
  """
  facts = target.spec
  if facts is None:
    return None
  compute = flops / devices / (efficiency.compute * facts.peak_flops(dtype))
  memory = moved_bytes / (efficiency.memory * facts.bandwidth)
  sent = sum(RING_FACTORS[kind](devices) * nbytes for kind, nbytes in collective_bytes.items())
  network = sent / (efficiency.network * target.link)
  bus = bus_bytes / (efficiency.bus * facts.bus)
  seconds = max(compute, memory, network) + bus
  mfu = ideal_step_seconds(target, devices, model_flops) / seconds
  return Estimate(compute, memory, network, bus, seconds, tokens / seconds, mfu)


def ideal_step_seconds(target: Target, devices: int, model_flops: int) -> float | None:
  """A step's, if no device ever waited: over what it takes this is its MFU. None for a device whose speed is not known."""
  return (
    None if target.spec is None else model_flops / (devices * target.spec.peak_flops("bfloat16"))
  )


def estimate_cost(
  price: float | None, target: Target, estimate: Estimate | None
) -> dict[str, float]:
  """{"per_hour", "per_million_tokens"} of all devices of the target, by the user's price for one of them an hour."""
  if price is None:
    return {}
  hourly = price * target.count
  return {"per_hour": hourly} | (
    {"per_million_tokens": hourly / 3600 * 1e6 / estimate.tokens_per_second} if estimate else {}
  )


def to_dict(
  estimate: Estimate | None, target: Target, dtype: str, efficiency: Efficiency = EFFICIENCY
) -> dict[str, Any]:
  """The estimate with all that it rests on, for JSON."""
  if estimate is None:
    return {}
  facts = target.spec
  return estimate._asdict() | {
    "bound_by": estimate.bound_by,
    "peak": {
      "flops": facts.peak_flops(dtype),
      "memory_bytes_per_second": facts.bandwidth,
      "link_bytes_per_second": target.link,
      "bus_bytes_per_second": facts.bus,
    },
    "efficiency": efficiency._asdict(),
    "step_formula": STEP_FORMULA,
    "mfu_formula": MFU_FORMULA,
  }
