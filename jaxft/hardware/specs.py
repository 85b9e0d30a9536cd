"""Hardware specifications, from the vendors' public data sheets (`SOURCES`).

GPUs: memory, bandwidth, multiprocessors and the dense bfloat16 or float16 tensor rate with float32
accumulation are from NVIDIA's data sheets and architecture white papers. Threads and shared memory
are from the table of compute capabilities in the CUDA C++ programming guide.

TPUs: HBM, bandwidth, bfloat16 rate and links are from Google Cloud's page on each version. Those
pages list the sum of both directions of a link. Usable memory is the limit in libtpu's compiler.
"""

import difflib
import json
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import jax

from jaxft.errors import RequestError, first_line
from jaxft.utils import jax_private

GIB, TERA, GIGA = 2**30, 10**12, 10**9
# `Gpu.memory` is the total that nvidia-smi shows; on an A10G or an L4 it excludes the memory for
# error correction. A process gets less: the driver, the CUDA context and NCCL take a part, and
# XLA's pool is the rest (`backend.configure_jax`).
GPU_USABLE_SHARE = 0.93
CUDNN_VERSION = (9, 28)  # installed by jax[cuda13] today


class Gpu(NamedTuple):
  """The specification of a GPU."""

  label: str
  capability: tuple[int, int]
  multiprocessors: int
  clock_ghz: float
  memory: int  # bytes
  bandwidth: int  # bytes/s
  l2: int  # bytes
  shared: int  # bytes per multiprocessor
  threads: int  # per multiprocessor
  flops: int  # FLOP/s of dense tensor cores, 16-bit inputs, float32 accumulation
  link: int  # bytes/s to each neighbor in a node, one way
  node: int = 8  # devices of a machine, as sold or rented
  bfloat16: bool = True

  def peak_flops(self, dtype: str) -> int:
    """Return the FLOP/s of matrix products in this dtype.

    float32 uses TF32 at half the 16-bit rate (XLA's default), or the CUDA cores of a GPU without
    TF32.
    """
    if dtype != "float32":
      return self.flops
    cores = self.multiprocessors * self.fpus
    return self.flops // 2 if self.bfloat16 else int(2 * cores * self.clock_ghz * GIGA)

  @property
  def bus(self) -> int:
    """Bytes/s between host and device memory, each way: 16 PCI Express lanes."""
    return PCIE3 if self.capability < (8, 0) else PCIE4 if self.capability < (9, 0) else PCIE5

  @property
  def fpus(self) -> int:
    """Number of float32 units of a multiprocessor."""
    return 64 if self.capability in ((7, 5), (8, 0)) else 128


class Tpu(NamedTuple):
  """The specification of a TPU device: a chip, or half a chip of a TPU7x."""

  label: str
  usable: int  # bytes
  bandwidth: int
  flops: int
  link: int  # bytes/s of all its links, one way
  devices: int = 1  # per chip
  bfloat16: bool = True

  def peak_flops(self, dtype: str) -> int:
    """Return the FLOP/s of matrix products: the same for every dtype.

    XLA rounds float32 operands to bfloat16 (its default precision on TPUs).
    """
    return self.flops

  @property
  def bus(self) -> int:
    """Bytes/s between host and chip: PCI Express 3; Google publishes no number."""
    return PCIE3


# One 400 Gbit/s network card per GPU, as in NVIDIA's DGX H100. Rented nodes of smaller GPUs are
# slower.
NETWORK_BANDWIDTH = 50 * GIGA
KB, MB = 2**10, 2**20
NVLINK3, NVLINK4, NVLINK5 = 300 * GIGA, 450 * GIGA, 900 * GIGA
PCIE3, PCIE4, PCIE5 = 14 * GIGA, 28 * GIGA, 56 * GIGA
GPUS = {
  name: Gpu(
    label=label,
    capability=capability,
    multiprocessors=multiprocessors,
    clock_ghz=clock_ghz,
    memory=int(memory * GIB),
    bandwidth=bandwidth * GIGA,
    l2=l2 * MB,
    shared=shared * KB,
    threads=threads,
    flops=teraflops * TERA,
    link=link,
  )
  for name, label, capability, multiprocessors, clock_ghz, sizes in (
    # name, label, capability, multiprocessors, clock, then:
    # (memory (GiB), bandwidth (GB/s), L2 (MiB), shared (KiB), threads, TFLOP/s, link)
    ("t4", "Tesla T4", (7, 5), 40, 1.59, (15, 320, 4, 64, 1024, 65, PCIE3)),
    ("rtx3060", "GeForce RTX 3060", (8, 6), 28, 1.777, (12, 360, 3, 100, 1536, 25, PCIE4)),
    ("rtx3070", "GeForce RTX 3070", (8, 6), 46, 1.725, (8, 448, 4, 100, 1536, 40, PCIE4)),
    ("rtx3090", "GeForce RTX 3090", (8, 6), 82, 1.695, (24, 936, 6, 100, 1536, 71, PCIE4)),
    ("a10", "A10", (8, 6), 72, 1.695, (22.5, 600, 6, 100, 1536, 125, PCIE4)),
    ("a10g", "A10G", (8, 6), 80, 1.71, (22.5, 600, 6, 100, 1536, 70, PCIE4)),
    ("l4", "L4", (8, 9), 58, 2.04, (22.5, 300, 48, 100, 1536, 121, PCIE4)),
    ("rtx4080", "GeForce RTX 4080", (8, 9), 76, 2.505, (16, 717, 64, 100, 1536, 97, PCIE4)),
    ("rtx4090", "GeForce RTX 4090", (8, 9), 128, 2.52, (24, 1008, 72, 100, 1536, 165, PCIE4)),
    ("rtx5090", "GeForce RTX 5090", (12, 0), 170, 2.41, (32, 1792, 96, 100, 1536, 209, PCIE5)),
    ("a100-40gb", "A100-SXM4-40GB", (8, 0), 108, 1.41, (40, 1555, 40, 164, 2048, 312, NVLINK3)),
    ("a100-80gb", "A100-SXM4-80GB", (8, 0), 108, 1.41, (80, 2039, 40, 164, 2048, 312, NVLINK3)),
    ("h100", "H100 80GB HBM3", (9, 0), 132, 1.98, (80, 3352, 50, 228, 2048, 989, NVLINK4)),
    ("h200", "H200", (9, 0), 132, 1.98, (140, 4800, 50, 228, 2048, 989, NVLINK4)),
    ("b200", "B200", (10, 0), 148, 1.965, (179, 7700, 126, 228, 2048, 2250, NVLINK5)),
  )
  for memory, bandwidth, l2, shared, threads, teraflops, link in (sizes,)
}
GPUS["t4"] = GPUS["t4"]._replace(node=4, bfloat16=False)
TPUS = {
  name: Tpu(
    label=label,
    usable=int(usable * GIB),
    bandwidth=bandwidth * GIGA,
    flops=int(teraflops * TERA),
    link=link * GIGA,
    devices=devices,
  )
  for name, label, usable, bandwidth, teraflops, link, devices in (
    # name, label, usable memory (GiB), bandwidth (GB/s), TFLOP/s, link (GB/s), devices a chip
    ("v5e", "TPU v5 lite", 15.75, 819, 197, 200, 1),
    ("v5p", "TPU v5", 95.74, 2765, 459, 600, 1),
    ("v6e", "TPU v6 lite", 31.25, 1640, 918, 400, 1),
    ("tpu7x", "TPU7x", 94.75, 3690, 1153.5, 300, 2),
  )
}
NVIDIA = "https://www.nvidia.com/en-us/"
GEFORCE = "https://images.nvidia.com/aem-dam/Solutions/geforce/"
AMPERE = (
  "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
)
ADA = f"{GEFORCE}ada/nvidia-ada-gpu-architecture.pdf"
AWS = "https://d1.awsstatic.com/product-marketing/ec2/"
SOURCES = {
  "t4": f"{NVIDIA}data-center/tesla-t4/",
  "rtx3060": f"{NVIDIA}geforce/graphics-cards/30-series/rtx-3060-3060ti/",
  **dict.fromkeys(("rtx3070", "rtx3090"), AMPERE),
  "a10": f"{NVIDIA}data-center/products/a10-gpu/",
  "a10g": f"{AWS}NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf",
  "l4": f"{NVIDIA}data-center/l4/",
  **dict.fromkeys(("rtx4080", "rtx4090"), ADA),
  "rtx5090": f"{GEFORCE}blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf",
  **dict.fromkeys(("a100-40gb", "a100-80gb"), f"{NVIDIA}data-center/a100/"),
  "h100": f"{NVIDIA}data-center/h100/",
  "h200": f"{NVIDIA}data-center/h200/",
  "b200": f"{NVIDIA}data-center/dgx-b200/",
  **{kind: f"https://docs.cloud.google.com/tpu/docs/{kind}" for kind in TPUS},
}
UNSUPPORTED = {
  "v100": "CUDA 13, used by jaxft's plugin, dropped compute capability 7.0; use JAX with CUDA 12",
  # The topology of a v4 has two devices per chip, but the compiler expects one (libtpu 0.0.42 to
  # 0.0.51).
  "v4": "libtpu's compiler fails with an assertion on a machine without a v4 chip; "
  "try its successor, v5p",
}


class Target(NamedTuple):
  """A number of devices of one kind, to plan or compile for."""

  name: str
  kind: str  # a key of GPUS or TPUS, or "cpu"
  count: int
  topology: str  # of a TPU slice, such as 2x4

  @property
  def spec(self) -> Gpu | Tpu | None:
    """The data sheet of the device; None for a CPU."""
    return GPUS.get(self.kind) or TPUS.get(self.kind)

  @property
  def usable_bytes(self) -> int:
    """Usable bytes of a device; CPU devices share the memory of this machine."""
    spec = self.spec
    if spec is None:
      return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.count
    return int(GPU_USABLE_SHARE * spec.memory) if isinstance(spec, Gpu) else spec.usable

  @property
  def link(self) -> int:
    """Bytes/s that a device sends over the slowest link of a collective."""
    spec = self.spec
    assert spec is not None, "a CPU has no links"
    between_nodes = isinstance(spec, Gpu) and self.count > spec.node
    return min(NETWORK_BANDWIDTH, spec.link) if between_nodes else spec.link


def parse_device(name: str) -> Target:
  """Parse a device name such as `h100`, `h100x8`, `v5e:2x4`, `cpu` or `cpux8`.

  Raises:
    RequestError: the name is unknown, or the number of devices is impossible.
  """
  if (kind := name.partition("x")[0].partition(":")[0]) in UNSUPPORTED:
    raise RequestError(f"--device={name!r}: {UNSUPPORTED[kind]}")
  tpu = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
  if tpu and tpu[1] in TPUS:
    chips = math.prod(map(int, tpu[2].split("x")))
    count = TPUS[tpu[1]].devices * chips
    return Target(name=name, kind=tpu[1], count=count, topology=tpu[2])
  for kind in ("cpu", *GPUS):
    match = re.fullmatch(rf"{re.escape(kind)}(?:x(\d+))?", name)
    if match and int(match[1] or 1) > 0:
      count = int(match[1] or 1)
      node = GPUS[kind].node if kind in GPUS else 1
      if count > node and count % node:
        reason = f"{kind} comes in nodes of {node}; give a multiple of {node}, or fewer than {node}"
        raise RequestError(f"--device={name!r}: {reason}")
      return Target(name=name, kind=kind, count=count, topology="")
  gpus = f"{', '.join(GPUS)}, each with xN for N devices"
  tpus = ", ".join(TPUS)
  raise RequestError(
    f"--device={name!r}: unknown; choose cpu, {gpus}, or a slice of {tpus}, such as v5e:2x4"
  )


def read_prices(file: Path) -> dict[str, float]:
  """Read hourly prices per device, in any currency: JSON such as {"h100": 2.5}.

  Raises:
    RequestError: the file is unreadable, a device unknown, or a price not a number.
  """
  flag = f"--prices={str(file)!r}"
  try:
    prices = json.loads(file.read_text(encoding="utf-8"))
  except OSError as error:
    raise RequestError(f"{flag}: {(error.strerror or str(error)).lower()}") from error
  except ValueError as error:
    raise RequestError(f"{flag}: is not JSON: {first_line(error)}") from error
  if not isinstance(prices, dict):
    raise RequestError(f'{flag}: must be a JSON object such as {{"h100": 2.5, "v5e": 1.2}}')
  known = ("cpu", *GPUS, *TPUS)
  for kind, price in prices.items():
    if kind not in known:
      close = difflib.get_close_matches(kind, known, 1)
      hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(known)}"
      raise RequestError(f"{flag}: unknown device {kind!r}; {hint}")
    if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price < math.inf:
      problem = f"{kind!r} costs {price!r}; give the price of one device per hour as a number"
      raise RequestError(f"{flag}: {problem}")
  return prices


def local_target(device: jax.Device, count: int) -> Target:
  """Return the target for local devices; its spec is None for an unknown kind."""
  label = device.device_kind.removeprefix("NVIDIA ")
  kind = next((kind for kind, spec in (GPUS | TPUS).items() if spec.label == label), "")
  return Target(name=f"{count} x {device.device_kind}", kind=kind, count=count, topology="")


def compile_devices(target: Target) -> list[jax.Device]:
  """Return devices to compile for, which need not exist.

  The process must have the environment of `aot_compiler.compiler_env`.
  """
  from jax.experimental import topologies

  if target.kind == "cpu":
    return jax.devices("cpu")[: target.count]
  if isinstance(spec := target.spec, Tpu):
    # libtpu assumes hosts of four chips; a single chip needs other bounds.
    one_chip = target.count == spec.devices
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if one_chip else {}
    topology = topologies.get_topology_desc(platform="tpu", topology_name=target.name, **bounds)
    return list(topology.devices)
  gpu = GPUS[target.kind]
  hosts = -(-target.count // gpu.node)
  shape = f"1x{hosts}x{target.count // hosts}"
  topology = topologies.get_topology_desc(
    "jaxft", "cuda", target_config=_target_config(gpu), topology=shape
  )
  jax_private.pretend_cudnn(CUDNN_VERSION, gpu.capability)
  return list(topology.devices)


def _target_config(gpu: Gpu) -> str:
  """Describe a GPU to XLA (xla/stream_executor/device_description.proto)."""
  major, minor = gpu.capability
  optin = gpu.shared - (1024 if major >= 8 else 0)
  return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared} threads_per_core_limit: {gpu.threads}
  core_count: {gpu.multiprocessors}
  fpus_per_core: {gpu.fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.l2} clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory} shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: {CUDNN_VERSION[0]} minor: {CUDNN_VERSION[1]} }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "NVIDIA {gpu.label}"
"""
