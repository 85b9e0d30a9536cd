"""JAX's configuration before it starts, and this machine's devices and memory."""

import contextlib
import functools
import glob
import importlib.util
import logging
import os
import sys
from collections.abc import Generator, Iterable
from pathlib import Path

import jax

from jaxft.errors import RequestError, first_line
from jaxft.utils import environment, jax_private
from jaxft.utils.files import cache_dir
from jaxft.utils.logger import warn

GIB = 2**30
# Without this flag the compiler of libtpu 0.0.42 overflows a stack on GPT-2 with dropout and four
# or more sequences, with a segmentation fault.
LIBTPU_STACK_FLAG = "--fibers_default_thread_stack_size=1048576"

# Paths of an NVIDIA GPU on Linux. Before its first use it has no device nodes, only a driver.
NVIDIA_PATHS = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/usr/lib/wsl/lib/libcuda.so.1")
# In addition: AMD GPUs, Google TPUs (two paths), and any GPU under WSL.
ACCELERATOR_PATHS = (*NVIDIA_PATHS, "/dev/kfd", "/dev/accel*", "/dev/vfio/*", "/dev/dxg")
CGROUP_FILE = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")
PCI_DEVICES = "/sys/bus/pci/devices/*"
REQUIRE_CHOICES = ("gpu", "tpu")
CUDA_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")

# The limit of XLA's pool of pinned host memory, in whole GiB, read when JAX starts. The pool grows
# by doubling, and no other process can use pinned memory. Without a limit the whole machine can
# stop (GPT-J's 90 GiB pinned 126 of 128).
PINNED_LIMIT_ENV = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
PINNED_FRACTION = 0.8
DEFAULT_PINNED_BYTES = 64 * GIB  # XLA's own limit
# The pool has gaps. According to `pool_fits` it needs 1.03 to 1.45 times the bytes of a run, for
# GPT-2 124M to GPT-J-6B with adamw, lion, adafactor and sgd (2026-11-28; not measured on a GPU).
PINNED_HEADROOM = 1.5
POOL_MIN_REGION = 2 * 2**20  # bytes
POOL_ALIGNMENT = 256  # bytes
HOST_MEMORY_ENV = "JAXFT_HOST_MEMORY_GIB"  # for machines that report a wrong size

# Before jax 0.11.1 XLA annotates slices of arrays with the loop counter instead of their index
# (openxla/xla #46231, fixed in #46308). On a GPU `memory.offload=all` would add the gradient of the
# last layer to the first.
SLICE_FIX_VERSION = (0, 11, 1)
SLICE_PASS = "dynamic-slice-annotator"
SLICE_ANNOTATION = '"dynamic_slice_config"'
DISABLE_PASSES = "--xla_disable_hlo_passes="

# JAX flags that change a program's types, shapes or random numbers, or forbid its operations, with
# the values that jaxft requires.
JAX_FLAGS = {
  "jax_enable_x64": False,
  "jax_numpy_dtype_promotion": "standard",
  "jax_numpy_rank_promotion": "allow",
  "jax_default_prng_impl": "threefry2x32",
  "jax_threefry_partitionable": True,  # the same random numbers on any mesh
  "jax_transfer_guard": None,
  "jax_default_device": None,
  "jax_no_tracing": False,
  "jax_no_execution": False,
}

_own_env_vars: set[str] = set()  # environment variables that this process has set


def configure_jax() -> None:
  """Configure JAX before it initializes its backends.

  Flags and environment variables that are already set win, except those in JAX_FLAGS. Compiled
  programs are cached in the user's cache folder. XLA may take 95 % of a GPU (its own default leaves
  a quarter). It may pin 80 % of the host's memory for `memory.offload` (its own default is 64 GB;
  see `limit_pinned_memory`).
  """
  environment.quiet_transformers()
  for flag, required in JAX_FLAGS.items():
    value = getattr(jax.config, flag, required)
    # A jax.Device as default device is set by a program, not by the environment: keep it.
    if value != required and not isinstance(value, jax.Device):
      jax.config.update(flag, required)
      _warn(f"{flag.upper()}={value} is not supported; jaxft runs with {required}")
  has_accelerator = sys.platform != "linux" or _any_exists(ACCELERATOR_PATHS) or has_nvidia_gpu()
  if not jax.config.values["jax_platforms"] and not has_accelerator:
    # JAX would take the compilers of jaxft[plan] for accelerators, and log long warnings.
    jax.config.update("jax_platforms", "cpu")
  if not jax.config.values["jax_compilation_cache_dir"]:
    jax.config.update("jax_compilation_cache_dir", str(cache_dir("xla")))
  if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the old name of this variable
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")
  if not os.environ.get(PINNED_LIMIT_ENV):
    os.environ[PINNED_LIMIT_ENV] = _ceil_gib(PINNED_FRACTION * host_memory_bytes())
    _own_env_vars.add(PINNED_LIMIT_ENV)
  if has_slice_bug() and has_accelerator:
    os.environ["XLA_FLAGS"] = disable_slice_pass(os.environ.get("XLA_FLAGS", ""))
  tpu_flags = os.environ.get("LIBTPU_INIT_ARGS", "")  # JAX also adds flags
  if "stack_size" not in tpu_flags:
    os.environ["LIBTPU_INIT_ARGS"] = f"{tpu_flags} {LIBTPU_STACK_FLAG}".strip()


# ---- Slices of arrays in loops, on GPUs ----------------------------------------------------------


def has_slice_bug() -> bool:
  """Return whether XLA of this jax annotates slices with a wrong offset on a GPU."""
  return jax.__version_info__ < SLICE_FIX_VERSION


def disable_slice_pass(flags: str) -> str:
  """Return XLA_FLAGS with the faulty pass disabled; kernels compute the indices.

  Raises:
    RequestError: `flags` is the name of a file.
  """
  if flags.strip() and not flags.strip().startswith("-"):
    raise RequestError(
      f"XLA_FLAGS={flags!r}: with jax {jax.__version__}, give the flags themselves, not a file "
      "that contains them"
    )
  ours = DISABLE_PASSES + SLICE_PASS  # XLA combines several flags of this name
  return flags if ours in flags.split() else f"{flags} {ours}".strip()


def check_slices(compiled: jax.stages.Compiled, platform: str) -> None:
  """Raise RequestError if a GPU program has wrong slices.

  This happens if JAX started before `configure_jax` set XLA_FLAGS.
  """
  if has_slice_bug() and platform == "gpu" and SLICE_ANNOTATION in (compiled.as_text() or ""):
    raise RequestError(
      f"config.memory.offload: jax {jax.__version__} writes gradients to the wrong layers on a GPU "
      "(openxla/xla #46231), and started before jaxft could prevent it; set "
      f"XLA_FLAGS={DISABLE_PASSES}{SLICE_PASS} before Python starts, or install jax 0.11.1 or newer"
    )


# ---- Versions ------------------------------------------------------------------------------------


def has_cpu_mesh_bug() -> bool:
  """Return whether XLA's CPU compiler crashes on programs for several devices.

  jax 0.11.2 does; 0.11.1 and 0.12 do not.
  """
  return jax.__version_info__ == (0, 11, 2)


def known_bugs() -> list[str]:
  """Return one line for each known bug of this jax."""
  lines = []
  if has_slice_bug():
    lines.append(
      f"jax {jax.__version__}: XLA reads and writes wrong slices on GPUs (openxla/xla #46231); "
      "jaxft disables the faulty compiler pass"
    )
  if has_cpu_mesh_bug():
    lines.append(
      f"jax {jax.__version__}: XLA's CPU compiler crashes on several devices, so jaxft refuses "
      "them; one CPU device, GPUs and TPUs work"
    )
  return lines


# ---- Memory --------------------------------------------------------------------------------------


def device_memory_bytes(device: jax.Device) -> int:
  """Return the bytes of a device's memory; all CPU devices share the host's memory."""
  return (device.memory_stats() or {}).get("bytes_limit") or host_memory_bytes()


def host_memory_bytes() -> int:
  """Return the bytes of memory that this process may use.

  This is $JAXFT_HOST_MEMORY_GIB, or the least of the machine's memory and the limits of the control
  groups.

  Raises:
    RequestError: the variable is not a number.
  """
  if gib := os.environ.get(HOST_MEMORY_ENV):
    try:
      return _positive(float(gib) * GIB)
    except (ValueError, OverflowError) as error:
      message = f"{HOST_MEMORY_ENV}={gib!r}: must be a number of GiB, such as 128"
      raise RequestError(message) from error
  return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_cgroup_limits()])


def max_pinned_bytes(host_bytes: int | None) -> int | None:
  """Return the bytes that XLA may pin for `host_bytes` of a run; None if unknown."""
  return None if host_bytes is None else int(PINNED_HEADROOM * host_bytes)


def limit_pinned_memory(host_bytes: int | None) -> None:
  """Lower XLA's limit of pinned memory to `max_pinned_bytes`, if that is less.

  This has no effect if the user set a limit, or if JAX has started.
  """
  limit = max_pinned_bytes(host_bytes)
  if limit is None or PINNED_LIMIT_ENV not in _own_env_vars:
    return
  if not jax_private.backends_are_initialized():
    os.environ[PINNED_LIMIT_ENV] = _ceil_gib(min(PINNED_FRACTION * host_memory_bytes(), limit))


def pool_fits(blocks: Iterable[int], limit: int) -> bool:
  """Return whether XLA's pool of pinned memory can hold blocks in this order.

  This models XLA's allocator (tsl's BFCAllocator). Each new region is twice as large as the last,
  up to the rest of the limit. A block is stored in one region, in the smallest gap that is large
  enough.

  Args:
    blocks: sizes in bytes.
    limit: bytes of the whole pool.
  """
  gaps: list[int] = []
  left = limit
  region = POOL_MIN_REGION
  for block in blocks:
    block = -(-block // POOL_ALIGNMENT) * POOL_ALIGNMENT
    if fitting := [gap for gap in gaps if gap >= block]:
      gaps.remove(min(fitting))
      gaps.append(min(fitting) - block)
      continue
    if block > left:
      return False
    grown = region
    while block > grown:
      grown *= 2
    taken = min(grown, left)
    left -= taken
    gaps.append(taken - block)
    region = grown if grown > region else 2 * region
  return True


def pinned_limit() -> int:
  """Return the bytes of host memory that XLA may pin for GPUs."""
  try:
    return int(os.environ[PINNED_LIMIT_ENV]) * GIB
  except (KeyError, ValueError):  # XLA falls back to its default in the same cases
    return DEFAULT_PINNED_BYTES


def _ceil_gib(nbytes: float) -> str:
  return str(max(1, -int(-nbytes // GIB)))


def _positive(number: float) -> int:
  if not 1 <= number < 2**60:
    raise ValueError(number)
  return int(number)


def _cgroup_limits() -> list[int]:
  """Return the memory limits of this process's control groups (containers, SLURM)."""
  try:
    groups = CGROUP_FILE.read_text().splitlines()
  except OSError:
    return []
  files = []
  for line in groups:  # id:controllers:/path; version 2 has no controllers here
    group = Path(line.split(":", 2)[2].lstrip("/"))
    for folder in (group, *group.parents):
      files.append(CGROUP_ROOT / folder / "memory.max")
      files.append(CGROUP_ROOT / "memory" / folder / "memory.limit_in_bytes")
  limits = []
  for file in files:
    try:
      limits.append(int(file.read_text()))
    except (OSError, ValueError):  # no such file, or "max"
      pass
  return [limit for limit in limits if limit > 0]


# ---- The required device -------------------------------------------------------------------------


def validate_require(platform: str | None) -> None:
  """Raise RequestError if --require cannot have this value."""
  if platform not in (None, *REQUIRE_CHOICES):
    raise RequestError(f"--require={platform!r}: must be one of {', '.join(REQUIRE_CHOICES)}")


def require_device(platform: str | None) -> None:
  """Start JAX; warn if it uses the CPU of a machine that has an NVIDIA GPU.

  Args:
    platform: one of REQUIRE_CHOICES; None for any.

  Raises:
    RequestError: JAX does not start, or uses another platform.
  """
  validate_require(platform)
  actual, reason = init_backend()
  if platform and actual != platform:
    because = f": {reason}" if reason else ""
    raise RequestError(f"--require {platform}: JAX computes on the {actual}{because}")
  if reason:
    _warn(cpu_warning(reason))


def cpu_warning(reason: str) -> str:
  """Return the warning that JAX uses the CPU, with the reason."""
  has_gpu = "this machine has an NVIDIA GPU, but " if has_nvidia_gpu() else ""
  return f"{has_gpu}JAX computes on the CPU: {reason}"


def init_backend() -> tuple[str, str]:
  """Start JAX without its log.

  Returns:
    The platform ("cpu", "gpu", "tpu"), and the reason if it is unexpectedly the CPU, else "".

  Raises:
    RequestError: JAX finds no device.
  """
  with _capture_jax_log() as log:
    try:
      platform = jax.default_backend()
    # AssertionError: a plugin in $JAX_PLATFORMS does not load.
    except (RuntimeError, AssertionError) as error:
      reason = log[-1] if log else first_line(error)
      platforms = os.environ.get("JAX_PLATFORMS")
      setting = f" (JAX_PLATFORMS={platforms})" if platforms else ""
      raise RequestError(
        f"JAX finds no device{setting}: {reason}; python -m jaxft.doctor checks the installation"
      ) from error
  if platform != "cpu":
    return platform, ""
  if has_nvidia_gpu():
    return platform, cpu_override() or _no_gpu_reason(log)
  return platform, log[-1] if log else ""


def cpu_override() -> str:
  """Return the variable that selects the CPU instead of an NVIDIA GPU, or ""."""
  if (platforms := jax.config.values["jax_platforms"] or "").startswith("cpu"):
    return f"JAX_PLATFORMS={platforms} is set"
  visible = os.environ.get("CUDA_VISIBLE_DEVICES")
  if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
    return f"CUDA_VISIBLE_DEVICES={visible!r} hides the GPU"
  return ""


def _no_gpu_reason(log: list[str]) -> str:
  if not any(map(_has_module, CUDA_PLUGINS)):
    return 'JAX has no CUDA plugin; pip install "jaxft[cuda]"'
  if not _any_exists(NVIDIA_PATHS):
    return "its driver is not loaded, or not visible in this container; check with nvidia-smi"
  reason = log[-1] if log else "JAX reports no reason"
  return f"CUDA does not start ({reason}); check the GPU with nvidia-smi"


@contextlib.contextmanager
def _capture_jax_log() -> Generator[list[str]]:
  """Collect one line for each warning that JAX logs while it starts.

  A plugin that does not load would print pages of traceback.
  """
  lines: list[str] = []
  logger = logging.getLogger("jax._src.xla_bridge")

  class Collect(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
      error = record.exc_info and record.exc_info[1]
      lines.append(first_line(error) if error else record.getMessage())

  handler = Collect(logging.WARNING)
  propagated = logger.propagate
  logger.addHandler(handler)
  logger.propagate = False
  try:
    yield lines
  finally:
    logger.removeHandler(handler)
    logger.propagate = propagated


def has_nvidia_gpu() -> bool:
  """Return whether Linux lists an NVIDIA GPU, with or without a driver."""
  return _any_exists(NVIDIA_PATHS) or any(map(_is_nvidia_display, glob.glob(PCI_DEVICES)))


def _is_nvidia_display(device: str) -> bool:
  try:
    vendor, kind = ((Path(device) / name).read_text().strip() for name in ("vendor", "class"))
  except OSError:
    return False
  return vendor == "0x10de" and kind.startswith("0x03")


@functools.cache  # print each warning once per process
def _warn(line: str) -> None:
  warn(line)


def _any_exists(patterns: tuple[str, ...]) -> bool:
  return any(map(glob.glob, patterns))


def _has_module(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    return False
