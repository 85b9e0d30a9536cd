"""Converts parameters to Hugging Face tensors, one at a time."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.hf import load_weights, repo
from jaxft.hf.weight_map import Rule, full_name, hf_shape, layer_shape, short_name, to_hf
from jaxft.utils.types import Params

EXPORT_DTYPES = {name: jnp.dtype(name) for name in ("float32", "bfloat16", "float16")}
CHUNK_BYTES = 2**25
DtypeFn = Callable[[str], np.dtype]  # full name of a tensor -> the dtype to export it in


def make_dtype_fn(checkpoint: repo.HFCheckpoint, dtype: str) -> DtypeFn:
  """Return a function from a tensor's name to its export dtype.

  Args:
    checkpoint: read only for "source".
    dtype: one of `EXPORT_DTYPES`, or "source" for each tensor's dtype in the checkpoint. A tensor
      that the checkpoint lacks, such as a new head, is float32.
  """
  if dtype != "source":
    return lambda name: EXPORT_DTYPES[dtype]
  tensors = load_weights.list_tensors(checkpoint.folder, checkpoint.torch_bin)
  source = {short_name(name): tensor.dtype for name, tensor in tensors.items()}
  return lambda name: source.get(short_name(name), EXPORT_DTYPES["float32"])


class ExportTensor(NamedTuple):
  """A tensor to write.

  Its chunks are copied from the devices one at a time, in byte order.
  """

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  chunks: Callable[[], Iterator[np.ndarray]]

  def to_numpy(self) -> np.ndarray:
    """Return the whole tensor."""
    return np.concatenate([chunk.reshape(-1) for chunk in self.chunks()]).reshape(self.shape)

  @property
  def nbytes(self) -> int:
    """Size in bytes."""
    return math.prod(self.shape) * self.dtype.itemsize


def always_float32(name: str) -> np.dtype:
  """Return float32 for every tensor: a `DtypeFn`."""
  return EXPORT_DTYPES["float32"]


def hf_tensors(
  params: Params, checkpoint: repo.HFCheckpoint, dtype_of: DtypeFn = always_float32
) -> Iterator[ExportTensor]:
  """Yield parameters (or gradients) as tensors of the checkpoint's family."""
  leaves: Params = flatten_dict(params, sep=".")
  for rule in checkpoint.family.rules:
    if rule.param not in leaves:
      continue  # a tied head, or the kind of head that this model does not have
    leaf = leaves.pop(rule.param)
    shape = layer_shape(rule, leaf.shape, checkpoint.cfg.V)
    for layer in range(leaf.shape[0]) if rule.by_layer else (None,):
      for index, short in enumerate(rule.names):
        name = full_name(short.format(layer))
        dtype = dtype_of(name)
        yield ExportTensor(
          name=name,
          dtype=dtype,
          shape=hf_shape(rule.layout, shape),
          chunks=functools.partial(_chunks, rule, leaf, layer, dtype, shape, index),
        )
  if leaves:
    raise KeyError(f"{sorted(leaves)}: no rule writes these parameters")


def _chunks(
  rule: Rule,
  leaf: jax.Array,
  layer: int | None,
  dtype: np.dtype,
  shape: tuple[int, ...],
  index: int,
) -> Iterator[np.ndarray]:
  """Yield a tensor as one chunk, or a vocabulary table as chunks of `CHUNK_BYTES`.

  The vocabulary table is the largest tensor of most models.
  """
  if not rule.layout.startswith("V "):
    padded = _to_host(leaf, layer, dtype)
    yield to_hf(rule.layout, padded[tuple(slice(size) for size in shape)], index)
    return
  rows = max(1, CHUNK_BYTES // (4 * math.prod(leaf.shape[1:])))
  for start in range(0, shape[0], rows):
    chunk = jax.lax.dynamic_slice_in_dim(leaf, start, min(rows, shape[0] - start))
    yield to_hf(rule.layout, _to_host(chunk, None, dtype), index)


def _to_host(array: jax.Array, layer: int | None, dtype: np.dtype) -> np.ndarray:
  """Copy an array, or one layer of it, to host memory.

  Shards are copied one at a time, because np.asarray would cache a second copy inside the array.
  Shards of other processes are gathered. That is a collective, so all processes must ask for the
  same chunks in the same order.
  """
  if not array.is_fully_addressable:
    assert isinstance(array.sharding, NamedSharding)  # all processes share a mesh
    select = (lambda a: a) if layer is None else (lambda a: a[layer])
    replicated = NamedSharding(array.sharding.mesh, PartitionSpec())
    return np.asarray(jax.jit(select, out_shardings=replicated)(array)).astype(dtype)
  first = 0 if layer is None else 1
  result = np.empty(array.shape[first:], dtype)
  for shard in array.addressable_shards:
    if shard.replica_id == 0:
      result[shard.index[first:]] = shard.data if layer is None else shard.data[layer]
  return result


def round_to_dtype(params: Params, checkpoint: repo.HFCheckpoint, dtype_of: DtypeFn) -> Params:
  """Round the parameters to their export dtype, and return them as float32.

  Parameters with several export dtypes are returned unchanged. That happens only for an unmodified
  source, which needs no rounding.
  """
  dtypes = {tensor.dtype for tensor in hf_tensors(params, checkpoint, dtype_of)}
  if len(dtypes) != 1:
    return params
  return jax.tree.map(lambda leaf: leaf.astype(*dtypes).astype(jnp.float32), params)
