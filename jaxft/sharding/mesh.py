"""The device mesh: its axes (data, fsdp, tensor), its devices, and which meshes a model allows."""

import collections
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from jaxft.errors import RequestError, first_line
from jaxft.utils import backend

MESH_AXES = ("data", "fsdp", "tensor")


def make_mesh(sizes: ConfigDict, devices: list[jax.Device] | None = None) -> Mesh:
  """Make a (data, fsdp, tensor) mesh over the devices; -1 takes what the other axes leave.

  Sizes that need fewer devices than there are use the first ones, but with several processes each
  must have some. Neighbours in the last axes are neighbours in the network: tensor parallelism
  communicates most, data parallelism least. Raises RequestError when sizes need more devices than
  there are, or -1 does not come out whole.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = mesh_shape(sizes, len(devices))
  used = devices[: math.prod(shape.values())]
  if len(used) > 1 and devices[0].platform == "cpu" and backend.has_cpu_mesh_bug():
    raise RequestError(
      f"{_describe(sizes)}: the CPU compiler of jax {jax.__version__} crashes on several devices; "
      "install another jax, or use one"
    )
  counts = collections.Counter(device.process_index for device in devices)
  if len(set(counts.values())) > 1:
    lines = ", ".join(f"process {process} has {count}" for process, count in sorted(counts.items()))
    raise RequestError(
      f"{lines} devices: all processes must have as many; one may have lost a device (jaxft.doctor)"
    )
  if len({device.process_index for device in used}) < len(counts):
    raise RequestError(
      f"{_describe(sizes)}: leaves processes without a device; use all {len(devices)} devices"
    )
  # Auto: the compiler chooses collectives from the constraints. jax.make_mesh would default to
  # Explicit (jax 0.10).
  axis_types = (AxisType.Auto,) * len(shape)
  return Mesh(_arrange_devices(used, tuple(shape.values())), tuple(shape), axis_types=axis_types)


def mesh_shape(sizes: ConfigDict, num_devices: int) -> dict[str, int]:
  """The sizes of the mesh's axes, with -1 resolved; raises RequestError as `make_mesh` does."""
  fixed = math.prod(sizes[name] for name in MESH_AXES if sizes[name] != -1)
  shape = {name: num_devices // fixed if sizes[name] == -1 else sizes[name] for name in MESH_AXES}
  needed = math.prod(shape.values())
  has_rest = any(sizes[name] == -1 for name in MESH_AXES)
  if needed > num_devices or needed == 0 or (has_rest and needed != num_devices):
    raise RequestError(
      f"{_describe(sizes)}: does not fit {num_devices} devices; "
      f"the product must be at most {num_devices}, and with -1 it must divide it"
    )
  return shape


def _describe(sizes: ConfigDict) -> str:
  return ", ".join(f"config.mesh.{name}={sizes[name]}" for name in MESH_AXES)


def _arrange_devices(devices: list[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
  """Order the devices as a slice or a cluster is fast; several slices never share `tensor`."""
  if devices[0].platform == "cpu":  # order does not matter, and a process's rows stay adjacent
    return np.array(devices).reshape(shape)
  num_slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
  # On a torus a mesh axis may be part of a physical one, where no whole ones multiply to its size.
  options = {"allow_split_physical_axes": True}
  try:
    if num_slices == 1:
      return mesh_utils.create_device_mesh(shape, devices, **options)
    dcn_shape = [1] * len(shape)
    remaining = num_slices
    for axis, size in enumerate(shape[:-1]):
      dcn_shape[axis] = math.gcd(size, remaining)
      remaining //= dcn_shape[axis]
    if remaining == 1:
      ici_shape = tuple(size // dcn for size, dcn in zip(shape, dcn_shape, strict=True))
      return mesh_utils.create_hybrid_device_mesh(ici_shape, tuple(dcn_shape), devices, **options)
  except (NotImplementedError, ValueError, AssertionError) as error:
    raise RequestError(
      f"a mesh of {shape} (data, fsdp, tensor): {len(devices)} of these devices cannot be laid out "
      f"so ({first_line(error)}); use all of them, with sizes that are powers of two"
    ) from error
  raise RequestError(
    f"a mesh of {shape} (data, fsdp, tensor) over {num_slices} slices: config.mesh.data x "
    "config.mesh.fsdp must be a multiple, so that tensor parallelism stays within one"
  )


def validate_mesh(mesh: Mesh, *, D: int, N: int, F: int) -> list[str]:
  """One error line for each of these sizes of a `ModelConfig` that the mesh cannot split."""
  fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
  lines = []
  if D % fsdp:
    sizes = ", ".join(str(n) for n in range(1, 1025) if D % n == 0)
    lines.append(
      f"config.mesh.fsdp={fsdp}: the model is {D} wide, which {fsdp} devices cannot share, so "
      f"each would hold all of it; take one of {sizes}, and config.mesh.data=-1 for the rest"
    )
  for name, size in (("heads", N), ("columns of the feed-forward layer", F)):
    if size % tensor:
      sizes = ", ".join(str(n) for n in range(1, 65) if N % n == F % n == 0)
      lines.append(
        f"config.mesh.tensor={tensor}: the model has {size} {name}, which {tensor} devices cannot "
        f"share; take one of {sizes}"
      )
  return lines
