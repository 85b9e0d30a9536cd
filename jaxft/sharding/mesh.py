"""The device mesh: axes (data, fsdp, tensor), devices, and checks of sizes."""

import collections
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxft.config import MeshSection
from jaxft.errors import RequestError, first_line
from jaxft.utils import backend

MESH_AXES = ("data", "fsdp", "tensor")


def make_mesh(sizes: MeshSection, devices: list[jax.Device] | None = None) -> Mesh:
  """Make a (data, fsdp, tensor) mesh over the devices.

  Sizes that need fewer devices use the first ones, but every process must have some. Neighbors
  along the last axes are neighbors in the network, because tensor parallelism communicates most and
  data parallelism least.

  Args:
    sizes: `config.mesh`; one axis may be -1, for all devices that the other axes leave.
    devices: default: all devices of the run.

  Raises:
    RequestError: the sizes need more devices than exist, or do not divide them if one is -1.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = mesh_shape(sizes, len(devices))
  used = devices[: math.prod(shape.values())]
  if len(used) > 1 and devices[0].platform == "cpu" and backend.has_cpu_mesh_bug():
    raise RequestError(
      f"{_describe(sizes)}: the CPU compiler of jax {jax.__version__} crashes on several devices; "
      "install another jax version, or use one device"
    )
  counts = collections.Counter(device.process_index for device in devices)
  if len(set(counts.values())) > 1:
    lines = ", ".join(f"process {process} has {count}" for process, count in sorted(counts.items()))
    raise RequestError(
      f"processes have different device counts ({lines}); "
      "check the devices of each host with python -m jaxft.doctor"
    )
  if len({device.process_index for device in used}) < len(counts):
    raise RequestError(
      f"{_describe(sizes)}: leaves processes without a device; use all {len(devices)} devices"
    )
  # Auto: the compiler derives shardings and collectives from the constraints in the program. With
  # Explicit, the default of jax.make_mesh (jax 0.10), shardings would be part of every array's
  # type.
  axis_types = (AxisType.Auto,) * len(shape)
  return Mesh(_arrange_devices(used, tuple(shape.values())), tuple(shape), axis_types=axis_types)


def mesh_shape(sizes: MeshSection, num_devices: int) -> dict[str, int]:
  """Return the sizes of the mesh's axes, with -1 resolved.

  Raises:
    RequestError: as `make_mesh`.
  """
  axes = {name: getattr(sizes, name) for name in MESH_AXES}
  fixed = math.prod(size for size in axes.values() if size != -1)
  shape = {name: num_devices // fixed if size == -1 else size for name, size in axes.items()}
  needed = math.prod(shape.values())
  has_rest = -1 in axes.values()
  if needed > num_devices or needed == 0 or (has_rest and needed != num_devices):
    raise RequestError(
      f"{_describe(sizes)}: does not fit {num_devices} devices; "
      f"the product must be at most {num_devices} or, if one size is -1, divide {num_devices}"
    )
  return shape


def _describe(sizes: MeshSection) -> str:
  return ", ".join(f"config.mesh.{name}={getattr(sizes, name)}" for name in MESH_AXES)


def _arrange_devices(devices: list[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
  """Order devices by the network's topology; `tensor` never spans several slices."""
  if devices[0].platform == "cpu":  # any order is fast; this one keeps a process's rows adjacent
    return np.array(devices).reshape(shape)
  num_slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
  # Allow a mesh axis to take part of a physical axis of a torus: some sizes are not a product of
  # whole physical axes.
  options = {"allow_split_physical_axes": True}
  try:
    if num_slices == 1:
      return mesh_utils.create_device_mesh(shape, devices, **options)
    # Split `data` first and then `fsdp` over the slices. The network between slices (DCN) is slow,
    # and these axes communicate least.
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
      f"this way ({first_line(error)}); use all devices, with sizes that are powers of two"
    ) from error
  raise RequestError(
    f"a mesh of {shape} (data, fsdp, tensor) over {num_slices} slices: config.mesh.data x "
    f"config.mesh.fsdp must be a multiple of {num_slices}, so that tensor parallelism stays within "
    "one slice"
  )


def validate_mesh(mesh: Mesh, *, D: int, N: int, F: int) -> list[str]:
  """Check that the mesh can split a model of these sizes.

  Args:
    mesh: the mesh.
    D: model width.
    N: number of heads.
    F: feed-forward width.

  Returns:
    One error line for each size that the mesh does not divide.
  """
  fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
  lines = []
  if D % fsdp:
    sizes = ", ".join(str(n) for n in range(1, 1025) if D % n == 0)
    lines.append(
      f"config.mesh.fsdp={fsdp}: the model is {D} wide, which {fsdp} devices cannot share, so "
      f"each would hold all weights; use one of {sizes}, and config.mesh.data=-1"
    )
  for name, size in (("heads", N), ("columns of the feed-forward layer", F)):
    if size % tensor:
      sizes = ", ".join(str(n) for n in range(1, 65) if N % n == F % n == 0)
      lines.append(
        f"config.mesh.tensor={tensor}: the model has {size} {name}, which {tensor} devices cannot "
        f"share; use one of {sizes}"
      )
  return lines
