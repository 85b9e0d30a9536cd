"""Mesh sizes, and the table from logical axes to mesh axes."""

import math

import jax
import pytest
from jax.sharding import PartitionSpec as P

import jaxft.config
import jaxft.sharding.mesh
from jaxft.errors import RequestError
from jaxft.hf import model_config
from jaxft.sharding import rules


def mesh(data, fsdp, tensor=1, devices=8):
  sizes = jaxft.config.default().mesh
  sizes.data, sizes.fsdp, sizes.tensor = data, fsdp, tensor
  return jaxft.sharding.mesh.make_mesh(sizes, jax.devices()[:devices])


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
def test_mesh_fills_up(asked, got):
  assert tuple(mesh(*asked).shape.values()) == got


@pytest.mark.parametrize("asked", [(3, -1), (1, 16), (-1, 9), (1, -1, 3), (2, 2, 4)])
def test_mesh_that_does_not_fit_names_the_numbers(asked):
  with pytest.raises(RequestError, match=rf"mesh.data={asked[0]}.*mesh.fsdp={asked[1]}.*8 devices"):
    mesh(*asked)


@pytest.mark.parametrize("rows, micro, wanted", [(0, 0, 16), (0, 1, 8), (32, 1, 32), (8, 0, 8)])
def test_an_evaluation_takes_its_own_rows_or_those_of_training(rows, micro, wanted):
  train = jaxft.config.default().train
  train.batch_size, train.micro_batch_size, train.eval_batch_size = 16, micro, rows
  assert rules.eval_batch_size(train, mesh(1, -1)) == wanted


def test_rows_of_an_evaluation_that_cannot_be_split_are_refused():
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
  places = [(s, i, j) for s in range(slices) for j in range(y) for i in range(x)]
  return [Chip(n, (i, j, 0), s, "TPU v5 lite") for n, (s, i, j) in enumerate(places)]


@pytest.mark.parametrize(
  "x, y, slices", [(2, 4, 1), (4, 4, 1), (8, 8, 1), (16, 16, 1), (4, 4, 2), (2, 4, 4)]
)
def test_every_mesh_of_a_slice_has_an_order(x, y, slices):
  """No chips needed: every (data, fsdp, tensor) of powers of two, on one slice or two."""
  devices = chips(x, y, slices)
  powers = [2**i for i in range(9)]
  for shape in [
    (d, len(devices) // d // t, t) for d in powers for t in (1, 2, 4) if len(devices) % (d * t) == 0
  ]:
    if math.gcd(shape[0] * shape[1], slices) < slices:
      with pytest.raises(RequestError, match="tensor parallelism stays within one"):
        jaxft.sharding.mesh._arrange_devices(devices, shape)
      continue
    found = jaxft.sharding.mesh._arrange_devices(devices, shape)
    assert all(
      len({chip.slice_index for chip in group}) == 1 for group in found.reshape(-1, shape[2])
    )
    assert found.shape == shape and {chip.id for chip in found.flat} == set(range(len(devices)))


def test_chips_that_cannot_be_laid_out_are_refused_in_words():
  with pytest.raises(RequestError, match=r"a mesh of \(1, 5, 1\).*cannot be laid out"):
    jaxft.sharding.mesh._arrange_devices(chips(2, 4)[:5], (1, 5, 1))


def test_weights_are_stored_in_slices_and_used_whole():
  axes, shape = ("layers", "embed", None, "heads", None), (3, 40, 3, 5, 8)
  assert rules.partition_spec(axes, shape, mesh(1, 8), rules.STORED) == P(
    None, ("fsdp",), None, ("tensor",), None
  )
  assert rules.partition_spec(axes, shape, mesh(1, 8), rules.COMPUTE) == P(
    None, None, None, ("tensor",), None
  )


def test_an_axis_that_does_not_divide_stays_whole():
  assert rules.partition_spec(("vocab", "embed"), (293, 41), mesh(1, 4, 2), rules.STORED) == P(
    None, None
  )


def test_two_axes_on_one_mesh_axis_are_refused_with_the_spec():
  with pytest.raises(ValueError, match="'embed', 'embed'.*fsdp"):
    rules.partition_spec(("embed", "embed"), (40, 40), mesh(1, 8), rules.STORED)


@pytest.mark.parametrize("batch, micro, steps", [(8, 0, 1), (16, 1, 2), (32, 2, 2), (8, 16, 1)])
def test_accumulation_steps(batch, micro, steps):
  train = jaxft.config.default().train
  train.batch_size, train.micro_batch_size = batch, micro
  assert rules.accumulation_steps(train, mesh(2, 4)) == steps


@pytest.mark.parametrize("batch, micro", [(9, 0), (12, 1), (40, 3)])
def test_batches_that_do_not_come_out_whole_are_refused(batch, micro):
  train = jaxft.config.default().train
  train.batch_size, train.micro_batch_size = batch, micro
  with pytest.raises(RequestError, match=f"batch_size={batch}.*8 devices"):
    rules.accumulation_steps(train, mesh(2, 4))


def test_heads_that_tensor_parallelism_cannot_cut_are_refused_with_the_sizes_that_can():
  xl = model_config.from_hf_config(
    {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25}
  )
  (line,) = jaxft.sharding.mesh.validate_mesh(xl, mesh(1, 4, 2))
  assert (
    line
    == "config.mesh.tensor=2: the model has 25 heads, which 2 devices cannot share; take one of 1, 5, 25"
  )
  assert not jaxft.sharding.mesh.validate_mesh(xl, mesh(1, -1))
  (line,) = jaxft.sharding.mesh.validate_mesh(xl, mesh(1, 6))
  assert line.startswith("config.mesh.fsdp=6: the model is 1600 wide, which 6 devices cannot share")
