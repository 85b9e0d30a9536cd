"""Reads load, memory, disk, network and power of this host and of its devices."""

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
  """Read in a thread, because a driver may be slow; `latest` is the newest reading.

  A context manager. Of this host only: to gather the others' would be a collective that training
  waits for.
  """

  def __init__(self, enabled: bool, workdir: Path):
    """`workdir`: of the run; its disk is the one that is measured."""
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
    readings = [*_host_readings(self._workdir), _device_memory, *_gpu_readings()]
    with contextlib.suppress(Exception):
      psutil.cpu_percent()  # the first call begins the interval that the next one covers
    while not self._stopped.is_set():
      values: dict[str, float] = {}
      for read in readings:
        # A driver may fail, or a container have no /proc: the others are still reported.
        with contextlib.suppress(Exception):
          values |= read()
      self.latest = values
      self._stopped.wait(INTERVAL)


ReadFn = Callable[[], dict[str, float]]  # one that may fail alone


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
  """Return a function that reads counters of the host, less their values at the first call."""
  first: list[object] = []

  def read() -> dict[str, float]:
    now = counters()
    if now is None:  # a host without such a device
      return {}
    if not first:
      first.append(now)

    def delta(field: str) -> float:
      return getattr(now, field) - getattr(first[0], field)

    return {f"system/{prefix}_{name}_bytes": delta(field) for name, field in fields.items()}

  return read


def _device_memory() -> dict[str, float]:
  """Return the bytes that JAX has in use on each device; CPUs do not report them."""
  values = {}
  for device in jax.local_devices():
    stats = device.memory_stats() or {}
    if "bytes_in_use" in stats:
      values[f"system/device{device.id}_bytes"] = stats["bytes_in_use"]
  return values


def _gpu_readings() -> list[ReadFn]:
  """Return NVML's readings (package nvidia-ml-py); none without it or without a driver."""
  try:
    import pynvml

    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
  except Exception:  # ImportError; NVMLError where there is no driver
    return []
  gpus = (_readings_of_gpu(pynvml, handle, f"system/gpu{i}") for i, handle in enumerate(handles))
  return [reading for readings in gpus for reading in readings]


def _readings_of_gpu(nvml: ModuleType, handle: object, name: str) -> list[ReadFn]:
  """Return one function for each reading, as each may fail alone.

  A part of a card (MIG, vGPU) reports no load, and some cards report no power or no limit of it.
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
  """Return the peak memory so far: of the device if it reports one, else of this process."""
  if peak_memory_source(device) == "device":
    return device.memory_stats()["peak_bytes_in_use"]
  kib = 1 if sys.platform == "darwin" else 1024  # getrusage counts KiB on Linux and bytes on macOS
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib


def peak_memory_source(device: jax.Device) -> str:
  """Return what `peak_memory_bytes` is of: "device" or "process"."""
  return "device" if (device.memory_stats() or {}).get("peak_bytes_in_use") else "process"
