"""Parameters -> tensors as Hugging Face names, shapes and stores them, one at a time."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.hf import load_weights, repo
from jaxft.hf.weight_map import Rule, full_name, hf_shape, short_name, to_hf, unpadded_shape

EXPORT_DTYPES = {
  "float32": np.dtype("float32"),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
  "float16": np.dtype("float16"),
}
CHUNK_BYTES = 2**25  # bytes
DtypeFn = Callable[[str], np.dtype]  # of each tensor, by its full name


def make_dtype_fn(checkpoint: repo.HFCheckpoint, dtype: str) -> DtypeFn:
  """One of `EXPORT_DTYPES` for every tensor; or, for "source", what each has in the checkpoint (a new head: float32)."""
  if dtype != "source":
    return lambda name: EXPORT_DTYPES[dtype]
  source = {
    short_name(name): tensor.dtype
    for name, tensor in load_weights.list_tensors(checkpoint.folder, checkpoint.torch_bin).items()
  }
  return lambda name: source.get(short_name(name), EXPORT_DTYPES["float32"])


class ExportTensor(NamedTuple):
  """A tensor to be written; it leaves the devices piece by piece, in the order of its bytes."""

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  chunks: Callable[[], Iterator[np.ndarray]]

  def to_numpy(self) -> np.ndarray:
    """All of it."""
    return np.concatenate([piece.reshape(-1) for piece in self.chunks()]).reshape(self.shape)

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def always_float32(name: str) -> np.dtype:
  return EXPORT_DTYPES["float32"]


def hf_tensors(
  params: Any, checkpoint: repo.HFCheckpoint, dtype_of: DtypeFn = always_float32
) -> Iterator[ExportTensor]:
  """Parameters as the checkpoint's family names and shapes them; gradients too."""
  leaves = {
    ".".join(key.key for key in path): leaf
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
  }
  for rule in checkpoint.family.rules:
    if rule.param not in leaves:
      continue  # a head that is tied, or one of the other kind
    leaf = leaves.pop(rule.param)
    real = unpadded_shape(
      rule.layout, leaf.shape[1:] if rule.by_layer else leaf.shape, checkpoint.cfg.V
    )
    shape = hf_shape(rule.layout, real)
    for layer in range(leaf.shape[0] if rule.by_layer else 1):
      for index, short in enumerate(rule.names):
        name = full_name(short.format(layer))
        dtype, part = dtype_of(name), layer if rule.by_layer else None
        yield ExportTensor(
          name, dtype, shape, functools.partial(_chunks, rule, leaf, part, dtype, real, index)
        )
  if leaves:
    raise KeyError(f"{sorted(leaves)}: no rule writes these parameters")


def _chunks(
  rule: Rule, leaf: jax.Array, layer: int | None, dtype: np.dtype, real: tuple[int, ...], index: int
) -> Iterator[np.ndarray]:
  """One piece, or for a table of the vocabulary, the largest tensor of most models, as many rows at a time as `CHUNK_BYTES` holds."""
  if not rule.layout.startswith("V "):
    padded = _to_host(leaf, layer, dtype)
    yield to_hf(rule.layout, padded[tuple(slice(size) for size in real)], index)
    return
  rows = max(1, CHUNK_BYTES // (4 * math.prod(leaf.shape[1:])))
  for start in range(0, real[0], rows):
    piece = jax.lax.dynamic_slice_in_dim(leaf, start, min(rows, real[0] - start))
    yield to_hf(rule.layout, _to_host(piece, None, dtype), index)


def _to_host(array: jax.Array, layer: int | None, dtype: np.dtype) -> np.ndarray:
  """The array, or a layer of it, shard by shard: np.asarray would keep a second copy of all of it in the array itself.

  What other processes hold is gathered, one piece at a time; all of them must ask for the same pieces in the same order.
  """
  if not array.is_fully_addressable:
    layer_or_all = (lambda a: a) if layer is None else (lambda a: a[layer])
    return np.asarray(
      jax.jit(layer_or_all, out_shardings=NamedSharding(array.sharding.mesh, PartitionSpec()))(
        array
      )
    ).astype(dtype)
  first = 0 if layer is None else 1
  whole = np.empty(array.shape[first:], dtype)
  for shard in array.addressable_shards:
    if shard.replica_id == 0:
      whole[shard.index[first:]] = shard.data if layer is None else shard.data[layer]
  return whole


def round_to_dtype(params: Any, checkpoint: repo.HFCheckpoint, dtype_of: DtypeFn) -> Any:
  """The parameters, rounded to the dtype in which they are written; several are only those of an unchanged source."""
  written = {tensor.dtype for tensor in hf_tensors(params, checkpoint, dtype_of)}
  return (
    jax.tree.map(lambda leaf: leaf.astype(*written).astype(jnp.float32), params)
    if len(written) == 1
    else params
  )
