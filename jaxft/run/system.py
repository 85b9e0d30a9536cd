"""Load and memory of the host that this process runs on and of the devices that it drives."""

import contextlib
import threading
from types import ModuleType
from typing import Any

import jax
import psutil  # Orbax requires it

EVERY = 10  # seconds between readings


class SystemMetrics(threading.Thread):
  """Reads in a thread of its own, because a driver may take its time; `latest` is the newest reading. A context manager.

  Of this host only: to gather the others' would be a collective that training waits for.
  """

  def __init__(self, on: bool):
    super().__init__(name="jaxft-system", daemon=True)
    self.latest: dict[str, float] = {}
    self._on, self._ended = on, threading.Event()

  def __enter__(self) -> "SystemMetrics":
    if self._on:
      self.start()
    return self

  def __exit__(self, *_) -> None:
    self._ended.set()

  def run(self) -> None:
    process, gpus = psutil.Process(), _Gpus()
    psutil.cpu_percent()  # the first call begins the interval that the next one tells of
    while not self._ended.is_set():
      found = {}
      for read in (lambda: _of_host(process), _of_devices, gpus.read):
        with contextlib.suppress(Exception):  # of a driver, or of a container without /proc: the others are told
          found |= read()
      self.latest = found
      self._ended.wait(EVERY)


def _of_host(process: psutil.Process) -> dict[str, float]:
  memory = psutil.virtual_memory()
  return {
    "system/cpu_percent": psutil.cpu_percent(),
    "system/memory_percent": memory.percent,
    "system/memory_used_bytes": memory.total - memory.available,
    "system/process_memory_bytes": process.memory_info().rss,
  }


def _of_devices() -> dict[str, float]:
  """What JAX has in use; a CPU keeps no count."""
  stats = {device.id: device.memory_stats() or {} for device in jax.local_devices()}
  return {f"system/device{i}_bytes": it["bytes_in_use"] for i, it in stats.items() if "bytes_in_use" in it}


class _Gpus:
  """NVIDIA's own readings, through the package nvidia-ml-py; none without it or without a driver."""

  def __init__(self):
    self._nvml: ModuleType | None = None
    self._handles: list[Any] = []
    try:
      import pynvml

      pynvml.nvmlInit()
      self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
      self._nvml = pynvml
    except Exception:  # ImportError; NVMLError where there is no driver
      return

  def read(self) -> dict[str, float]:
    found = {}
    for i, handle in enumerate(self._handles):
      with contextlib.suppress(self._nvml.NVMLError):  # a part of a card (MIG, vGPU) tells no load
        found[f"system/gpu{i}_memory_bytes"] = self._nvml.nvmlDeviceGetMemoryInfo(handle).used
        found[f"system/gpu{i}_percent"] = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu
    return found
