"""Load, memory, disk, network and power of this host and its devices."""

import contextlib
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax
import psutil  # pyrefly: ignore[untyped-import]  (Orbax requires it; it has no types)

INTERVAL = 10  # seconds between readings


class SystemMetrics(threading.Thread):
  """Reads system metrics in a thread, because a driver may be slow.

  A context manager. `latest` is the newest reading. It covers this host only: gathering the
  readings of all hosts would need a collective, and training would wait for it.
  """

  def __init__(self, enabled: bool, workdir: Path):
    """Create the thread; `__enter__` starts it.

    Args:
      enabled: if false, no thread starts and `latest` stays empty.
      workdir: folder of the run, whose disk is measured.
    """
    super().__init__(name="jaxft-system", daemon=True)
    self.latest: dict[str, float] = {}
    self._enabled = enabled
    self._workdir = workdir
    self._stopped = threading.Event()

  def __enter__(self) -> "SystemMetrics":
    if self._enabled:
      self.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._stopped.set()

  def run(self) -> None:
    """Read all metrics every INTERVAL seconds; the thread's main loop."""
    readings = [*_host_readings(self._workdir), _device_memory, *_gpu_readings()]
    with contextlib.suppress(Exception):
      psutil.cpu_percent()  # starts the interval that the next call measures
    while not self._stopped.is_set():
      values: dict[str, float] = {}
      for read in readings:
        # A driver may fail, or a container may lack /proc. Report the other readings anyway.
        with contextlib.suppress(Exception):
          values |= read()
      self.latest = values
      self._stopped.wait(INTERVAL)


ReadFn = Callable[[], dict[str, float]]  # reads some metrics; may raise


def _host_readings(workdir: Path) -> list[ReadFn]:
  def memory() -> dict[str, float]:
    info = psutil.virtual_memory()
    used = info.total - info.available
    return {"system/memory_percent": info.percent, "system/memory_used_bytes": used}

  def disk() -> dict[str, float]:
    usage = psutil.disk_usage(str(workdir))
    return {"system/disk_percent": usage.percent, "system/disk_used_bytes": usage.used}

  disk_fields = {"read": "read_bytes", "written": "write_bytes"}
  network_fields = {"sent": "bytes_sent", "received": "bytes_recv"}
  return [
    lambda: {"system/cpu_percent": psutil.cpu_percent()},
    memory,
    lambda: {"system/process_memory_bytes": psutil.Process().memory_info().rss},
    disk,
    _counter_deltas("disk", disk_fields, psutil.disk_io_counters),
    _counter_deltas("network", network_fields, psutil.net_io_counters),
  ]


def _counter_deltas(prefix: str, fields: dict[str, str], counters: Callable[[], object]) -> ReadFn:
  """Return a function that reads the growth of host counters since its first call."""
  first: list[object] = []

  def read() -> dict[str, float]:
    now = counters()
    if now is None:  # the host has no such device
      return {}
    if not first:
      first.append(now)

    def delta(field: str) -> float:
      return getattr(now, field) - getattr(first[0], field)

    return {f"system/{prefix}_{name}_bytes": delta(field) for name, field in fields.items()}

  return read


def _device_memory() -> dict[str, float]:
  """Return the bytes that JAX uses on each device; CPUs do not report them."""
  values = {}
  for device in jax.local_devices():
    stats = device.memory_stats() or {}
    if "bytes_in_use" in stats:
      values[f"system/device{device.id}_bytes"] = stats["bytes_in_use"]
  return values


def _gpu_readings() -> list[ReadFn]:
  """Return readers of NVML (nvidia-ml-py); [] without the package or a driver."""
  try:
    import pynvml

    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
  except Exception:  # ImportError, or NVMLError without a driver
    return []
  gpus = (_readings_of_gpu(pynvml, handle, f"system/gpu{i}") for i, handle in enumerate(handles))
  return [reading for readings in gpus for reading in readings]


def _readings_of_gpu(nvml: ModuleType, handle: object, name: str) -> list[ReadFn]:
  """Return one function per reading, because each may fail separately.

  A part of a card (MIG, vGPU) reports no load; some cards report no power or no power limit.
  """

  def memory() -> dict[str, float]:
    info = nvml.nvmlDeviceGetMemoryInfo(handle)
    percent = 100 * info.used / info.total
    return {f"{name}_memory_bytes": info.used, f"{name}_memory_percent": percent}

  return [
    memory,
    lambda: {f"{name}_percent": nvml.nvmlDeviceGetUtilizationRates(handle).gpu},
    # NVML counts milliwatts.
    lambda: {f"{name}_power_watts": nvml.nvmlDeviceGetPowerUsage(handle) / 1000},
    lambda: {f"{name}_power_limit_watts": nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000},
  ]


def peak_memory_bytes(device: jax.Device) -> int:
  """Return the peak memory of the device if it reports one, else of this process."""
  if peak_memory_source(device) == "device":
    return device.memory_stats()["peak_bytes_in_use"]
  kib = 1 if sys.platform == "darwin" else 1024  # getrusage counts KiB on Linux and bytes on macOS
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib


def peak_memory_source(device: jax.Device) -> str:
  """Return what `peak_memory_bytes` measures: "device" or "process"."""
  return "device" if (device.memory_stats() or {}).get("peak_bytes_in_use") else "process"
