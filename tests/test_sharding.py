"""Mesh sizes, and the table from logical axes to mesh axes."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from jaxft import config as settings
from jaxft import sharding
from jaxft.errors import RequestError


def mesh(data, fsdp, devices=8):
  sizes = settings.default().mesh
  sizes.data, sizes.fsdp = data, fsdp
  return sharding.make_mesh(sizes, jax.devices()[:devices])


@pytest.mark.parametrize(
  "asked, got", [((1, -1), (1, 8)), ((2, -1), (2, 4)), ((-1, 2), (4, 2)), ((1, 1), (1, 1)), ((2, 2), (2, 2))]
)
def test_mesh_fills_up(asked, got):
  assert tuple(mesh(*asked).shape.values()) == got


@pytest.mark.parametrize("asked", [(3, -1), (1, 16), (-1, 9)])
def test_mesh_that_does_not_fit_names_the_numbers(asked):
  with pytest.raises(RequestError, match=rf"mesh.data={asked[0]}.*mesh.fsdp={asked[1]}.*8 devices"):
    mesh(*asked)


def test_weights_are_stored_in_slices_and_used_whole():
  axes, shape = ("layers", "embed", None, "heads", None), (3, 40, 3, 5, 8)
  assert sharding.spec(axes, shape, mesh(1, 8), sharding.STORED) == P(None, ("fsdp",), None, None, None)
  assert sharding.spec(axes, shape, mesh(1, 8), sharding.USED) == P(None, None, None, None, None)


def test_an_axis_that_does_not_divide_stays_whole():
  assert sharding.spec(("vocab", "embed"), (293, 41), mesh(1, 8), sharding.STORED) == P(None, None)


def test_two_axes_on_one_mesh_axis_are_refused_with_the_spec():
  with pytest.raises(ValueError, match="'embed', 'embed'.*fsdp"):
    sharding.spec(("embed", "embed"), (40, 40), mesh(1, 8), sharding.STORED)


@pytest.mark.parametrize("batch, micro, steps", [(8, 0, 1), (16, 1, 2), (32, 2, 2), (8, 16, 1)])
def test_accumulation_steps(batch, micro, steps):
  train = settings.default().train
  train.batch_size, train.micro_batch_size = batch, micro
  assert sharding.accumulation_steps(train, mesh(2, 4)) == steps


@pytest.mark.parametrize("batch, micro", [(9, 0), (12, 1), (40, 3)])
def test_batches_that_do_not_come_out_whole_are_refused(batch, micro):
  train = settings.default().train
  train.batch_size, train.micro_batch_size = batch, micro
  with pytest.raises(RequestError, match=f"batch_size={batch}.*8 devices"):
    sharding.accumulation_steps(train, mesh(2, 4))
