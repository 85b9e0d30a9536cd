"""Mesh sizes, and the table from logical axes to mesh axes."""

import math

import jax
import pytest
from jax.sharding import PartitionSpec as P

import jaxft.config
from jaxft.errors import RequestError
from jaxft.hf import model_config
from jaxft.sharding import rules
from jaxft.sharding.mesh import _arrange_devices, make_mesh, validate_mesh


def mesh(data, fsdp, tensor=1, devices=8):
  sizes = jaxft.config.default().mesh
  sizes.data, sizes.fsdp, sizes.tensor = data, fsdp, tensor
  return make_mesh(sizes, jax.devices()[:devices])


@pytest.mark.parametrize(
  "asked, got",
  [
    ((1, -1), (1, 8, 1)),
    ((2, -1), (2, 4, 1)),
    ((-1, 2), (4, 2, 1)),
    ((1, 1), (1, 1, 1)),
    ((2, 2), (2, 2, 1)),
    ((2, -1, 2), (2, 2, 2)),
    ((1, 2, -1), (1, 2, 4)),
  ],
)
def test_mesh_shape_resolves_minus_one(asked, got):
  assert tuple(mesh(*asked).shape.values()) == got


@pytest.mark.parametrize("asked", [(3, -1), (1, 16), (-1, 9), (1, -1, 3), (2, 2, 4)])
def test_mesh_that_does_not_fit_names_sizes(asked):
  with pytest.raises(RequestError, match=rf"mesh.data={asked[0]}.*mesh.fsdp={asked[1]}.*8 devices"):
    mesh(*asked)


@pytest.mark.parametrize("rows, micro, wanted", [(0, 0, 16), (0, 1, 8), (32, 1, 32), (8, 0, 8)])
def test_eval_batch_size_default_and_override(rows, micro, wanted):
  """Its own rows, or else those of a training micro-batch."""
  train = jaxft.config.default().train
  train.batch_size, train.micro_batch_size, train.eval_batch_size = 16, micro, rows
  assert rules.eval_batch_size(train, mesh(1, -1)) == wanted


def test_indivisible_eval_batch_size_is_refused():
  train = jaxft.config.default().train
  train.batch_size, train.eval_batch_size = 16, 12
  with pytest.raises(
    RequestError, match="config.train.eval_batch_size=12: must be a multiple of 8 devices"
  ):
    rules.eval_batch_size(train, mesh(1, -1))


class Chip:
  """A device as `mesh_utils` looks at it."""

  platform, core_on_chip = "tpu", 0

  def __init__(self, id, coords, slice_index, kind):
    self.id, self.coords, self.slice_index, self.device_kind = id, coords, slice_index, kind
    self.process_index = id // 4


def chips(x, y, slices=1):
  positions = [(s, i, j) for s in range(slices) for j in range(y) for i in range(x)]
  return [Chip(n, (i, j, 0), s, "TPU v5 lite") for n, (s, i, j) in enumerate(positions)]


@pytest.mark.parametrize(
  "x, y, slices", [(2, 4, 1), (4, 4, 1), (8, 8, 1), (16, 16, 1), (4, 4, 2), (2, 4, 4)]
)
def test_every_mesh_of_tpu_slices_can_be_arranged(x, y, slices):
  """No chips needed: every (data, fsdp, tensor) of powers of two, on one slice or two."""
  devices = chips(x, y, slices)
  powers = [2**i for i in range(9)]
  for shape in [
    (d, len(devices) // d // t, t) for d in powers for t in (1, 2, 4) if len(devices) % (d * t) == 0
  ]:
    if math.gcd(shape[0] * shape[1], slices) < slices:
      with pytest.raises(RequestError, match="tensor parallelism stays within one"):
        _arrange_devices(devices, shape)
      continue
    found = _arrange_devices(devices, shape)
    assert all(
      len({chip.slice_index for chip in group}) == 1 for group in found.reshape(-1, shape[2])
    )
    assert found.shape == shape and {chip.id for chip in found.flat} == set(range(len(devices)))


def test_devices_without_an_arrangement_are_refused():
  with pytest.raises(RequestError, match=r"a mesh of \(1, 5, 1\).*cannot be laid out"):
    _arrange_devices(chips(2, 4)[:5], (1, 5, 1))


def test_partition_spec_of_stored_and_compute():
  """Weights are stored in slices and gathered for use."""
  axes, shape = ("layers", "embed", None, "heads", None), (3, 40, 3, 5, 8)
  spec = lambda use: rules.partition_spec(axes, shape, mesh(1, 8), use)
  assert spec(rules.STORED) == P(None, ("fsdp",), None, ("tensor",), None)
  assert spec(rules.COMPUTE) == P(None, None, None, ("tensor",), None)


def test_indivisible_axis_is_not_sharded():
  spec = rules.partition_spec(("vocab", "embed"), (293, 41), mesh(1, 4, 2), rules.STORED)
  assert spec == P(None, None)


def test_two_axes_on_one_mesh_axis_are_refused():
  with pytest.raises(ValueError, match="'embed', 'embed'.*fsdp"):
    rules.partition_spec(("embed", "embed"), (40, 40), mesh(1, 8), rules.STORED)


@pytest.mark.parametrize("batch, micro, steps", [(8, 0, 1), (16, 1, 2), (32, 2, 2), (8, 16, 1)])
def test_gradient_accumulation_steps(batch, micro, steps):
  train = jaxft.config.default().train
  train.batch_size, train.micro_batch_size = batch, micro
  assert rules.accumulation_steps(train, mesh(2, 4)) == steps


@pytest.mark.parametrize("batch, micro", [(9, 0), (12, 1), (40, 3)])
def test_indivisible_batch_size_is_refused(batch, micro):
  train = jaxft.config.default().train
  train.batch_size, train.micro_batch_size = batch, micro
  with pytest.raises(RequestError, match=f"batch_size={batch}.*8 devices"):
    rules.accumulation_steps(train, mesh(2, 4))


def test_validate_mesh_names_sizes_that_fit():
  """Heads that tensor parallelism cannot split, and a width that fsdp cannot."""
  xl = model_config.from_hf_config(
    {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25}
  )
  sizes = {"D": xl.D, "N": xl.N, "F": xl.F}
  (line,) = validate_mesh(mesh(1, 4, 2), **sizes)
  assert line == (
    "config.mesh.tensor=2: the model has 25 heads, which 2 devices cannot share; "
    "use one of 1, 5, 25"
  )
  assert not validate_mesh(mesh(1, -1), **sizes)
  (line,) = validate_mesh(mesh(1, 6), **sizes)
  assert line.startswith("config.mesh.fsdp=6: the model is 1600 wide, which 6 devices cannot share")
