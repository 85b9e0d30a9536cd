"""Layers of a stack as arrays of their own: the same memory, and nothing left behind."""

import operator

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.generation import layer_views

L = 3


def stack(dtype=np.float32):
  return {
    "up": {"kernel": jnp.arange(L * 64 * 16, dtype=dtype).reshape(L, 64, 16)},
    "scale": jnp.ones((L, 16), dtype),
  }


def test_layers_are_those_of_the_stack_and_take_no_memory():
  blocks = stack()
  layers = layer_views.unstack_layers(blocks, L)
  for index, layer in enumerate(layers):
    jax.tree.map(
      np.testing.assert_array_equal, jax.tree.map(operator.itemgetter(index), blocks), layer
    )
  whole, own = blocks["up"]["kernel"], layers[2]["up"]["kernel"]
  assert own.unsafe_buffer_pointer() == whole.unsafe_buffer_pointer() + 2 * 64 * 16 * 4


def test_a_stack_can_be_donated_after_its_views_are_gone():
  blocks = stack()
  where = blocks["up"]["kernel"].unsafe_buffer_pointer()
  used = jax.jit(lambda layers: layers[1]["up"]["kernel"].sum())(
    layer_views.unstack_layers(blocks, L)
  )
  more = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)(blocks)
  assert more["up"]["kernel"].unsafe_buffer_pointer() == where
  assert blocks["up"]["kernel"].is_deleted() and float(used) == sum(range(64 * 16, 2 * 64 * 16))


def test_what_is_on_several_devices_or_in_another_format_has_none():
  everywhere = jax.sharding.NamedSharding(jax.make_mesh((8,), ("x",)), jax.sharding.PartitionSpec())
  assert layer_views.unstack_layers(jax.device_put(stack(), everywhere), L) is None
  assert layer_views.unstack_layers(stack(jnp.bfloat16), L) is None
