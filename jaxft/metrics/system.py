"""Load and memory of the host that this process runs on and of the devices that it drives, its disk, network and power."""

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import psutil  # Orbax requires it

INTERVAL = 10  # seconds between readings


class SystemMetrics(threading.Thread):
  """Reads in a thread of its own, because a driver may take its time; `latest` is the newest reading. A context manager.

  Of this host only: to gather the others' would be a collective that training waits for.
  """

  def __init__(self, on: bool, workdir: Path):
    """`workdir`: of the run; its disk is the one that is measured."""
    super().__init__(name="jaxft-system", daemon=True)
    self.latest: dict[str, float] = {}
    self._on, self._workdir, self._ended = on, workdir, threading.Event()

  def __enter__(self) -> "SystemMetrics":
    if self._on:
      self.start()
    return self

  def __exit__(self, *_) -> None:
    self._ended.set()

  def run(self) -> None:
    readings = [*_host_readings(self._workdir), _device_memory, *_gpu_readings()]
    with contextlib.suppress(Exception):
      psutil.cpu_percent()  # the first call begins the interval that the next one covers
    while not self._ended.is_set():
      found = {}
      for read in readings:
        with contextlib.suppress(
          Exception
        ):  # of a driver, or of a container without /proc: the others are told
          found |= read()
      self.latest = found
      self._ended.wait(INTERVAL)


ReadFn = Callable[[], dict[str, float]]  # one that may fail alone


def _host_readings(workdir: Path) -> list[ReadFn]:
  def memory() -> dict[str, float]:
    it = psutil.virtual_memory()
    return {
      "system/memory_percent": it.percent,
      "system/memory_used_bytes": it.total - it.available,
    }

  def disk() -> dict[str, float]:
    it = psutil.disk_usage(str(workdir))
    return {"system/disk_percent": it.percent, "system/disk_used_bytes": it.used}

  return [
    lambda: {"system/cpu_percent": psutil.cpu_percent()},
    memory,
    lambda: {"system/process_memory_bytes": psutil.Process().memory_info().rss},
    disk,
    _counter_deltas(
      "disk", {"read": "read_bytes", "written": "write_bytes"}, psutil.disk_io_counters
    ),
    _counter_deltas(
      "network", {"sent": "bytes_sent", "received": "bytes_recv"}, psutil.net_io_counters
    ),
  ]


def _counter_deltas(what: str, fields: dict[str, str], counters: Callable[[], Any]) -> ReadFn:
  """What the host's counters, which began with the host, have counted since the first reading."""
  first = []

  def read() -> dict[str, float]:
    now = counters()
    if now is None:  # of a host without such a device
      return {}
    if not first:
      first.append(now)
    return {
      f"system/{what}_{name}_bytes": getattr(now, field) - getattr(first[0], field)
      for name, field in fields.items()
    }

  return read


def _device_memory() -> dict[str, float]:
  """What JAX has in use; a CPU keeps no count."""
  stats = {device.id: device.memory_stats() or {} for device in jax.local_devices()}
  return {
    f"system/device{i}_bytes": it["bytes_in_use"] for i, it in stats.items() if "bytes_in_use" in it
  }


def _gpu_readings() -> list[ReadFn]:
  """NVIDIA's own readings, through the package nvidia-ml-py; none without it or without a driver."""
  try:
    import pynvml

    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
  except Exception:  # ImportError; NVMLError where there is no driver
    return []
  return [
    reading
    for i, handle in enumerate(handles)
    for reading in _readings_of_gpu(pynvml, handle, f"system/gpu{i}")
  ]


def _readings_of_gpu(nvml: ModuleType, handle: Any, name: str) -> list[ReadFn]:
  """Each alone: a part of a card (MIG, vGPU) reports no load, and some cards report no power or no limit of it."""

  def memory() -> dict[str, float]:
    it = nvml.nvmlDeviceGetMemoryInfo(handle)
    return {f"{name}_memory_bytes": it.used, f"{name}_memory_percent": 100 * it.used / it.total}

  return [
    memory,
    lambda: {f"{name}_percent": nvml.nvmlDeviceGetUtilizationRates(handle).gpu},
    lambda: {
      f"{name}_power_watts": nvml.nvmlDeviceGetPowerUsage(handle) / 1000
    },  # NVML counts milliwatts
    lambda: {f"{name}_power_limit_watts": nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000},
  ]
