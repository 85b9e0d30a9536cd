"""Views of the layers of a stack: the same memory, and nothing left behind."""

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


def test_layer_views_share_memory_with_stack():
  blocks = stack()
  layers = layer_views.unstack_layers(blocks, L)
  for index, layer in enumerate(layers):
    jax.tree.map(
      np.testing.assert_array_equal, jax.tree.map(operator.itemgetter(index), blocks), layer
    )
  whole, own = blocks["up"]["kernel"], layers[2]["up"]["kernel"]
  assert own.unsafe_buffer_pointer() == whole.unsafe_buffer_pointer() + 2 * 64 * 16 * 4


def test_stack_can_be_donated_after_its_views():
  blocks = stack()
  where = blocks["up"]["kernel"].unsafe_buffer_pointer()
  kernel_sum = jax.jit(lambda layers: layers[1]["up"]["kernel"].sum())
  used = kernel_sum(layer_views.unstack_layers(blocks, L))
  more = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)(blocks)
  assert more["up"]["kernel"].unsafe_buffer_pointer() == where
  assert blocks["up"]["kernel"].is_deleted() and float(used) == sum(range(64 * 16, 2 * 64 * 16))


def test_no_views_of_sharded_or_bfloat16_weights():
  everywhere = jax.sharding.NamedSharding(jax.make_mesh((8,), ("x",)), jax.sharding.PartitionSpec())
  assert layer_views.unstack_layers(jax.device_put(stack(), everywhere), L) is None
  assert layer_views.unstack_layers(stack(jnp.bfloat16), L) is None
