"""The device mesh: its axes (data, fsdp, tensor), its devices, and which meshes a model allows."""

import collections
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from jaxft.errors import RequestError, first_line
from jaxft.utils import backend

MESH_AXES = ("data", "fsdp", "tensor")  # of a mesh


def make_mesh(sizes: ConfigDict, devices: list[jax.Device] | None = None) -> Mesh:
  """A (data, fsdp, tensor) mesh over the devices; -1 takes what the other axes leave.

  Sizes that need fewer devices than there are use the first ones, but with several processes each must have some. Neighbours
  in the last axes are neighbours in the network: tensor parallelism talks most, copies of the data least. Raises RequestError
  when sizes need more devices than there are, or -1 does not come out whole.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = mesh_shape(sizes, len(devices))
  needed = math.prod(shape.values())
  if needed > 1 and devices[0].platform == "cpu" and backend.has_cpu_mesh_bug():
    raise RequestError(
      f"{_describe(sizes)}: the CPU compiler of jax {jax.__version__} crashes on several devices; install another jax, or use one"
    )
  of_process = collections.Counter(device.process_index for device in devices)
  if len(set(of_process.values())) > 1:
    told = ", ".join(
      f"process {process} has {count}" for process, count in sorted(of_process.items())
    )
    raise RequestError(
      f"{told} devices: all processes must have as many; one may have lost a device (jaxft.doctor)"
    )
  if len({device.process_index for device in devices[:needed]}) < len(
    {device.process_index for device in devices}
  ):
    raise RequestError(
      f"{_describe(sizes)}: leaves processes without a device; use all {len(devices)} devices"
    )
  # Auto: the compiler chooses collectives from the constraints. jax.make_mesh would default to Explicit (jax 0.10).
  return Mesh(
    _arrange_devices(devices[:needed], tuple(shape.values())),
    tuple(shape),
    axis_types=(AxisType.Auto,) * len(shape),
  )


def mesh_shape(sizes: ConfigDict, devices: int) -> dict[str, int]:
  """The sizes of the mesh's axes over so many devices, with what -1 stands for; raises RequestError as `make_mesh` does."""
  asked = {name: sizes[name] for name in MESH_AXES}
  fixed = math.prod(size for size in asked.values() if size != -1)
  shape = {name: devices // fixed if size == -1 else size for name, size in asked.items()}
  needed = math.prod(shape.values())
  if needed > devices or needed == 0 or (-1 in asked.values() and needed != devices):
    raise RequestError(
      f"{_describe(sizes)}: does not fit {devices} devices; the product must be at most {devices}, "
      "and with -1 it must divide it"
    )
  return shape


def _describe(sizes: ConfigDict) -> str:
  return ", ".join(f"config.mesh.{name}={sizes[name]}" for name in MESH_AXES)


def _arrange_devices(devices: list[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
  """The devices in the order in which a slice or a cluster is fast; several slices share the first axes, `tensor` none."""
  if (
    devices[0].platform == "cpu"
  ):  # the order is of no account, and the rows of a process are next to each other
    return np.array(devices).reshape(shape)
  slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
  split = {
    "allow_split_physical_axes": True
  }  # of a torus, where no whole ones multiply to the size of an axis
  try:
    if slices == 1:
      return mesh_utils.create_device_mesh(shape, devices, **split)
    across, left = [1] * len(shape), slices
    for axis, size in enumerate(shape[:-1]):
      across[axis] = math.gcd(size, left)
      left //= across[axis]
    if left == 1:
      within = tuple(size // parts for size, parts in zip(shape, across, strict=True))
      return mesh_utils.create_hybrid_device_mesh(within, tuple(across), devices, **split)
  except (NotImplementedError, ValueError, AssertionError) as error:
    raise RequestError(
      f"a mesh of {shape} (data, fsdp, tensor): {len(devices)} of these devices cannot be laid out so ({first_line(error)}); "
      "use all of them, with sizes that are powers of two"
    ) from error
  raise RequestError(
    f"a mesh of {shape} (data, fsdp, tensor) over {slices} slices: config.mesh.data x config.mesh.fsdp must be a multiple, so "
    "that tensor parallelism stays within one"
  )


def validate_mesh(cfg: Any, mesh: Mesh) -> list[str]:
  """One line for each size of the model (a `model.ModelConfig`) that the mesh cannot cut."""
  fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
  lines = [
    f"config.mesh.fsdp={fsdp}: the model is {cfg.D} wide, which {fsdp} devices cannot share, so each would hold all of it; "
    f"take one of {', '.join(str(n) for n in range(1, 1025) if cfg.D % n == 0)}, and config.mesh.data=-1 for the rest"
  ] * bool(cfg.D % fsdp)
  return lines + [
    f"config.mesh.tensor={tensor}: the model has {size} {what}, which {tensor} devices cannot share; "
    f"take one of {', '.join(str(n) for n in range(1, 65) if cfg.N % n == cfg.F % n == 0)}"
    for what, size in (("heads", cfg.N), ("columns of the feed-forward layer", cfg.F))
    if size % tensor
  ]
