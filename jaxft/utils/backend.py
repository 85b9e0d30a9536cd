"""How JAX is set up before it looks for devices, what this machine has, and whether JAX found it."""

import contextlib
import functools
import glob
import importlib.util
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax

from jaxft.errors import RequestError, first_line
from jaxft.utils.files import cache_dir

GIB = 2**30
# Without it libtpu 0.0.42's compiler overflows a stack on GPT-2 with dropout, from four rows at once on: a segmentation fault.
LIBTPU_STACK_FLAG = "--fibers_default_thread_stack_size=1048576"

# Linux shows an NVIDIA GPU by its device nodes or, before anything has used it, by its driver alone.
NVIDIA_PATHS = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/usr/lib/wsl/lib/libcuda.so.1")
ACCELERATOR_PATHS = (
  *NVIDIA_PATHS,
  "/dev/kfd",
  "/dev/accel*",
  "/dev/vfio/*",
  "/dev/dxg",
)  # AMD's, Google's TPUs, any on Windows
CGROUP_FILE, CGROUP_ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
PCI_DEVICES = "/sys/bus/pci/devices/*"
REQUIRE_CHOICES = ("gpu", "tpu")
CUDA_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")

# XLA's pool of pinned host memory: in whole GiB, read when JAX starts. It grows by doubling, up to this, and what it has pinned
# no other process gets: the whole machine can stop (GPT-J's 90 GiB pinned 126 of 128).
PINNED_LIMIT_ENV = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
PINNED_FRACTION = 0.8
DEFAULT_PINNED_BYTES = 64 * GIB  # XLA's own limit
# The pool has gaps: by `pool_fits` it takes 1.03 to 1.45 times what a run keeps there, for GPT-2 124M to GPT-J-6B with adamw,
# lion, adafactor and sgd (2026-11-28; not measured on a GPU).
PINNED_HEADROOM = 1.5
POOL_MIN_REGION, POOL_ALIGNMENT = 2 * 2**20, 256  # bytes
HOST_MEMORY_ENV = "JAXFT_HOST_MEMORY_GIB"  # for machines that show another size than they have

# Before jax 0.11.1 XLA annotates slices of arrays with the loop's counter in place of their index (openxla/xla #46231, mended
# in #46308): on a GPU `memory.offload=all` would add the gradient of the last layer to the first.
SLICE_FIX_VERSION = (0, 11, 1)
SLICE_PASS = "dynamic-slice-annotator"
SLICE_ANNOTATION = '"dynamic_slice_config"'
DISABLE_PASSES = "--xla_disable_hlo_passes="

# Flags of JAX that change types, shapes or random numbers of a program, or forbid what it does. jaxft's are made for these.
JAX_FLAGS = {
  "jax_enable_x64": False,
  "jax_numpy_dtype_promotion": "standard",
  "jax_numpy_rank_promotion": "allow",
  "jax_default_prng_impl": "threefry2x32",
  "jax_threefry_partitionable": True,  # the same numbers on any mesh
  "jax_transfer_guard": None,
  "jax_default_device": None,
  "jax_no_tracing": False,
  "jax_no_execution": False,
}

_own_env_vars: set[str] = set()  # variables of the environment that this process has set


def configure_jax() -> None:
  """Set what JAX reads before it first looks for devices, where neither a flag nor the environment says otherwise.

  Compiled programs are cached in the user's folder. XLA may take 95 % of a GPU (its own default leaves a quarter), and pin 80 %
  of the host's memory for what `memory.offload` keeps there (its default is 64 GB; see `limit_pinned_memory`). Where there is
  no accelerator, JAX is told so: the compilers of jaxft[plan], which look like some, would complain at length.
  """
  for flag, wanted in JAX_FLAGS.items():
    value = getattr(jax.config, flag, wanted)
    if value != wanted and not isinstance(
      value, jax.Device
    ):  # a device is chosen by a program, not by the environment
      jax.config.update(flag, wanted)
      _warn(f"{flag.upper()}={value}: jaxft's programs are made for {wanted}, which is set now")
  accelerated = sys.platform != "linux" or _any_exists(ACCELERATOR_PATHS) or has_nvidia_gpu()
  if not jax.config.jax_platforms and not accelerated:
    jax.config.update("jax_platforms", "cpu")
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(cache_dir("xla")))
  if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # its former name
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")
  if not os.environ.get(PINNED_LIMIT_ENV):
    os.environ[PINNED_LIMIT_ENV] = _ceil_gib(PINNED_FRACTION * host_memory_bytes())
    _own_env_vars.add(PINNED_LIMIT_ENV)
  if has_slice_bug() and accelerated:
    os.environ["XLA_FLAGS"] = disable_slice_pass(os.environ.get("XLA_FLAGS", ""))
  tpu = os.environ.get("LIBTPU_INIT_ARGS", "")  # jax adds to it too
  if "stack_size" not in tpu:
    os.environ["LIBTPU_INIT_ARGS"] = f"{tpu} {LIBTPU_STACK_FLAG}".strip()


# ---- Slices of arrays in loops, on GPUs ------------------------------------------------------------------------------


def has_slice_bug() -> bool:
  """Whether this jax's XLA annotates slices on a GPU with the wrong offset."""
  return jax.__version_info__ < SLICE_FIX_VERSION


def disable_slice_pass(flags: str) -> str:
  """XLA_FLAGS that keep XLA from annotating slices; they become kernels, which compute the index themselves."""
  if flags.strip() and not flags.strip().startswith("-"):
    raise RequestError(
      f"XLA_FLAGS={flags!r}: with jax {jax.__version__} give the flags themselves, not a file of them"
    )
  ours = DISABLE_PASSES + SLICE_PASS  # XLA adds up what several such flags turn off
  return flags if ours in flags.split() else f"{flags} {ours}".strip()


def check_slices(compiled: jax.stages.Compiled, platform: str) -> None:
  """Raises RequestError where a program for a GPU has annotated slices that may be wrong: JAX started without our XLA_FLAGS."""
  if has_slice_bug() and platform == "gpu" and SLICE_ANNOTATION in compiled.as_text():
    raise RequestError(
      f"config.memory.offload: jax {jax.__version__} writes gradients to the wrong layers on a GPU (openxla/xla #46231), and "
      f"started before jaxft could prevent it; set XLA_FLAGS={DISABLE_PASSES}{SLICE_PASS} before Python starts, or install jax 0.11.1 "
      "or newer"
    )


# ---- Versions --------------------------------------------------------------------------------------------------------


def has_cpu_mesh_bug() -> bool:
  """Whether XLA's CPU compiler ends the process on programs for several devices: that of jax 0.11.2, not of 0.11.1 or 0.12."""
  return jax.__version_info__ == (0, 11, 2)


def known_bugs() -> list[str]:
  """One line for each fault that this jax is known to have."""
  lines = []
  if has_slice_bug():
    lines.append(
      f"jax {jax.__version__}: XLA reads and writes wrong slices on GPUs (openxla/xla #46231); jaxft turns that pass off"
    )
  if has_cpu_mesh_bug():
    lines.append(
      f"jax {jax.__version__}: XLA's CPU compiler crashes on several devices, which are refused; one device, GPUs and TPUs work"
    )
  return lines


# ---- Memory ----------------------------------------------------------------------------------------------------------


def device_memory_bytes(device: jax.Device) -> int:
  """Bytes of a device that is there: of a CPU all that the machine has, however many share it."""
  return (device.memory_stats() or {}).get("bytes_limit") or host_memory_bytes()


def host_memory_bytes() -> int:
  """Bytes of memory that this process may use: $JAXFT_HOST_MEMORY_GIB, or what the machine and the control group allow.

  Raises RequestError when the variable is no number.
  """
  if wanted := os.environ.get(HOST_MEMORY_ENV):
    try:
      return _positive(float(wanted) * GIB)
    except (ValueError, OverflowError) as error:
      raise RequestError(
        f"{HOST_MEMORY_ENV}={wanted!r}: must be a number of GiB, such as 128"
      ) from error
  return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_cgroup_limits()])


def max_pinned_bytes(host_bytes: int | None) -> int | None:
  """Bytes that XLA may pin for a run that keeps `host_bytes` there, if the host has as many; None where that is not known."""
  return None if host_bytes is None else int(PINNED_HEADROOM * host_bytes)


def limit_pinned_memory(host_bytes: int | None) -> None:
  """Let XLA pin no more than `max_pinned_bytes`, where that is less than `configure_jax` allows.

  It is of no effect where the environment has a limit of the user's, or JAX has started already.
  """
  from jax._src import xla_bridge  # JAX has no public way to ask

  needed = max_pinned_bytes(host_bytes)
  if (
    needed is not None
    and PINNED_LIMIT_ENV in _own_env_vars
    and not xla_bridge.backends_are_initialized()
  ):
    os.environ[PINNED_LIMIT_ENV] = _ceil_gib(min(PINNED_FRACTION * host_memory_bytes(), needed))


def pool_fits(blocks: Iterable[int], limit: int) -> bool:
  """Whether XLA's pool of pinned memory can hold these blocks, in bytes, taken one after the other.

  A model of its allocator (tsl's BFCAllocator): it asks for regions of twice the size of the last, up to what is left of the
  limit, and a block lies in one region, in the smallest gap that is large enough.
  """
  gaps, left, region = [], limit, POOL_MIN_REGION
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
  """Bytes of the host's memory that XLA may pin for GPUs."""
  try:
    return int(os.environ[PINNED_LIMIT_ENV]) * GIB
  except (KeyError, ValueError):  # XLA reads it likewise
    return DEFAULT_PINNED_BYTES


def _ceil_gib(nbytes: float) -> str:
  return str(max(1, -int(-nbytes // GIB)))


def _positive(number: float) -> int:
  if not 1 <= number < 2**60:
    raise ValueError(number)
  return int(number)


def _cgroup_limits() -> list[int]:
  """Memory limits of the control groups that this process is in, as a container or SLURM sets them."""
  try:
    groups = CGROUP_FILE.read_text().splitlines()
  except OSError:
    return []
  files = []
  for line in groups:  # id:controllers:/path, the controllers empty in version 2
    name = line.split(":", 2)[2].lstrip("/")
    for folder in (name, *map(str, Path(name).parents)):
      files += [
        CGROUP_ROOT / folder / "memory.max",
        CGROUP_ROOT / "memory" / folder / "memory.limit_in_bytes",
      ]
  limits = []
  for file in files:
    try:
      limits.append(int(file.read_text()))
    except (OSError, ValueError):  # not there, or "max"
      pass
  return [limit for limit in limits if limit > 0]


# ---- Was it the device that was wanted? --------------------------------------------------------------------------------


def validate_require(wanted: str | None) -> None:
  """Raises RequestError where this is nothing that can be required."""
  if wanted not in (None, *REQUIRE_CHOICES):
    raise RequestError(f"--require={wanted!r}: must be one of {', '.join(REQUIRE_CHOICES)}")


def require_device(wanted: str | None) -> None:
  """Start JAX; warn where it computes on the CPU of a machine that has an NVIDIA GPU.

  Args:
    wanted: one of REQUIRED; None: whatever there is.

  Raises RequestError when JAX does not start, or computes on anything else than `wanted`.
  """
  validate_require(wanted)
  found, reason = init_backend()
  if wanted and found != wanted:
    raise RequestError(
      f"--require {wanted}: JAX computes on the {found}{': ' if reason else ''}{reason}"
    )
  if reason:
    _warn(cpu_warning(reason))


def cpu_warning(reason: str) -> str:
  """What to say where JAX computes on the CPU for this reason."""
  return f"{'this machine has an NVIDIA GPU, but ' if has_nvidia_gpu() else ''}JAX computes on the CPU: {reason}"


def init_backend() -> tuple[str, str]:
  """Start JAX, in silence: what it computes on, and why that is the CPU where there is an accelerator, or JAX looked for one.

  Raises RequestError when JAX finds nothing to compute on.
  """
  with _capture_jax_log() as said:
    try:
      found = jax.default_backend()
    except (
      RuntimeError,
      AssertionError,
    ) as error:  # the second where a plugin of $JAX_PLATFORMS does not load
      reason = said[-1] if said else first_line(error)
      wanted = (
        f" (JAX_PLATFORMS={os.environ['JAX_PLATFORMS']})" if os.environ.get("JAX_PLATFORMS") else ""
      )
      raise RequestError(
        f"JAX finds no device{wanted}: {reason}; python -m jaxft.doctor shows what is installed"
      ) from error
  if found != "cpu":
    return found, ""
  if has_nvidia_gpu():
    return found, cpu_override() or _no_gpu_reason(said)
  return found, said[-1] if said else ""


def cpu_override() -> str:
  """Which variable chooses the CPU in place of an NVIDIA GPU; "" where none does."""
  if (jax.config.jax_platforms or "").startswith("cpu"):
    return f"JAX_PLATFORMS={jax.config.jax_platforms} is set"
  hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
  if hidden is not None and hidden.strip() in ("", "-1", "NoDevFiles"):
    return f"CUDA_VISIBLE_DEVICES={hidden!r} hides it"
  return ""


def _no_gpu_reason(said: list[str]) -> str:
  if not any(map(_has_module, CUDA_PLUGINS)):
    return 'JAX has no CUDA plugin; pip install "jaxft[cuda]"'
  if not _any_exists(NVIDIA_PATHS):
    return "its driver is not loaded, or this container does not see it; nvidia-smi should list it"
  return f"CUDA does not start ({said[-1] if said else 'JAX does not say why'}); nvidia-smi should list the GPU"


@contextlib.contextmanager
def _capture_jax_log() -> Iterator[list[str]]:
  """Collects, a line each, what JAX would log while it starts: pages of traceback where a plugin does not load."""
  said, logger = [], logging.getLogger("jax._src.xla_bridge")

  class Collect(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
      said.append(first_line(record.exc_info[1]) if record.exc_info else record.getMessage())

  handler, propagated = Collect(logging.WARNING), logger.propagate
  logger.addHandler(handler)
  logger.propagate = False
  try:
    yield said
  finally:
    logger.removeHandler(handler)
    logger.propagate = propagated


def has_nvidia_gpu() -> bool:
  """Whether Linux shows one, with a driver or without."""
  return _any_exists(NVIDIA_PATHS) or any(map(_is_nvidia_display, glob.glob(PCI_DEVICES)))


def _is_nvidia_display(device: str) -> bool:
  try:
    vendor, kind = ((Path(device) / name).read_text().strip() for name in ("vendor", "class"))
  except OSError:
    return False
  return vendor == "0x10de" and kind.startswith("0x03")


@functools.cache  # once in a process
def _warn(line: str) -> None:
  print(f"warning: {line}", file=sys.stderr, flush=True)


def _any_exists(patterns: tuple[str, ...]) -> bool:
  return any(map(glob.glob, patterns))


def _has_module(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    return False
