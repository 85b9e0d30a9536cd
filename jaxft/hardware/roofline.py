"""Roofline model: the time of a step from an assumed share of each hardware peak."""

import math
from typing import NamedTuple

from jaxft.hardware.specs import Target
from jaxft.utils.types import Json

UNMEASURED = "assumed, jaxft has not been measured on this hardware"


class Efficiency(NamedTuple):
  """The share of each data sheet figure that a step is assumed to reach."""

  compute: float = 0.5
  memory: float = 0.8
  network: float = 0.7
  bus: float = 0.8
  source: str = UNMEASURED


EFFICIENCY = Efficiency()
# Bytes that a device sends in a ring collective over n devices, divided by the larger of its input
# and output.
RING_FACTORS = {
  "all-gather": lambda n: (n - 1) / n,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1,
}


class Estimate(NamedTuple):
  """The estimated seconds of a step and its parts, the speed, and MFU (0 to 1)."""

  compute_seconds: float
  memory_seconds: float
  network_seconds: float
  bus_seconds: float
  step_seconds: float
  tokens_per_second: float
  mfu: float

  @property
  def bound_by(self) -> str:
    """The longest part: "compute", "memory", "network" or "bus"."""
    terms = ("compute", "memory", "network", "bus")
    return max(terms, key=lambda term: getattr(self, f"{term}_seconds"))

  def rows_to_hide_the_bus(self, rows: int) -> int:
    """Return the smallest batch for which the bus takes at most a fifth of a step.

    Bus traffic does not depend on the batch; the rest of the step grows with its rows.

    Args:
      rows: sequences of the batch of this estimate.
    """
    row_seconds = (self.step_seconds - self.bus_seconds) / rows
    return math.ceil(4 * self.bus_seconds / row_seconds)


MFU_FORMULA = (
  "model FLOPs / (step seconds x devices x dense 16-bit peak FLOP/s), "
  "model FLOPs without recomputation"
)
STEP_FORMULA = (
  "max(compute, memory, network) + bus seconds: the first three are assumed to overlap, "
  "the bus is not"
)


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
  """Estimate one optimizer step.

  Args:
    target: the hardware.
    devices: number of devices in the mesh; a target may have more.
    dtype: dtype of matrix products.
    flops: FLOPs of the whole step over all devices, including recomputation (`flops.py`).
    model_flops: the same without recomputation.
    moved_bytes: bytes between a device's memory and its cores (`hlo.hbm_bytes`).
    collective_bytes: bytes of a device's collectives, by kind (`hlo.bytes_by_kind`).
    tokens: tokens of a step.
    bus_bytes: bytes between host memory and a device (`offload.host_traffic`).
    efficiency: assumed share of each peak.

  Returns:
    None for a device of unknown speed (cpu).
  """
  spec = target.spec
  ideal = ideal_step_seconds(target, devices, model_flops)
  if spec is None or ideal is None:
    return None
  compute = flops / devices / (efficiency.compute * spec.peak_flops(dtype))
  memory = moved_bytes / (efficiency.memory * spec.bandwidth)
  sent = sum(RING_FACTORS[kind](devices) * nbytes for kind, nbytes in collective_bytes.items())
  network = sent / (efficiency.network * target.link)
  bus = bus_bytes / (efficiency.bus * spec.bus)
  seconds = max(compute, memory, network) + bus
  return Estimate(
    compute_seconds=compute,
    memory_seconds=memory,
    network_seconds=network,
    bus_seconds=bus,
    step_seconds=seconds,
    tokens_per_second=tokens / seconds,
    mfu=ideal / seconds,
  )


def ideal_step_seconds(target: Target, devices: int, model_flops: int) -> float | None:
  """Return the time of a step at peak FLOP/s; None for a device of unknown speed.

  MFU = this / measured step time.
  """
  if target.spec is None:
    return None
  return model_flops / (devices * target.spec.peak_flops("bfloat16"))


def estimate_cost(
  price: float | None, target: Target, estimate: Estimate | None
) -> dict[str, float]:
  """Return the cost per hour and per million tokens, given a device's hourly price."""
  if price is None:
    return {}
  hourly = price * target.count
  cost = {"per_hour": hourly}
  if estimate:
    cost["per_million_tokens"] = hourly / 3600 * 1e6 / estimate.tokens_per_second
  return cost


def to_dict(
  estimate: Estimate | None, target: Target, dtype: str, efficiency: Efficiency = EFFICIENCY
) -> Json:
  """Return the estimate with all its assumptions, for JSON."""
  spec = target.spec
  if estimate is None or spec is None:
    return {}
  return estimate._asdict() | {
    "bound_by": estimate.bound_by,
    "peak": {
      "flops": spec.peak_flops(dtype),
      "memory_bytes_per_second": spec.bandwidth,
      "link_bytes_per_second": target.link,
      "bus_bytes_per_second": spec.bus,
    },
    "efficiency": efficiency._asdict(),
    "step_formula": STEP_FORMULA,
    "mfu_formula": MFU_FORMULA,
  }
