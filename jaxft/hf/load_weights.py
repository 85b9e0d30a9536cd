"""Reads the weights of a Hugging Face folder directly into sharded arrays."""

import functools
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from jaxft.errors import RequestError, first_line
from jaxft.hf import flax_msgpack, repo, torch_pickle, weight_map
from jaxft.hf.torch_pickle import TorchTensor
from jaxft.hf.weight_map import Rule, layer_shape, short_name
from jaxft.utils.types import Params, PyTree

DTYPES = {
  "F32": np.dtype("float32"),
  "F16": np.dtype("float16"),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorRef(NamedTuple):
  """The location of one tensor in a file."""

  file: Path
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int  # bytes from the start of the file
  transposed: bool = False  # the file stores the transpose, as Flax does for kernels

  def view(self) -> np.ndarray:
    """Memory-map the tensor: bytes are read on use and freed with the view."""
    if not math.prod(self.shape):
      return np.empty(self.shape, self.dtype)
    stored = self.shape[::-1] if self.transposed else self.shape
    view = np.memmap(self.file, self.dtype, "r", self.offset, stored)
    return view.T if self.transposed else view

  def bytes_equal(self, chunks: Iterable[np.ndarray]) -> bool:
    """Return whether the file's bytes equal those of the concatenated chunks."""
    left = math.prod(self.shape) * self.dtype.itemsize
    with self.file.open("rb") as stream:
      stream.seek(self.offset)
      for chunk in chunks:
        left -= chunk.nbytes
        if chunk.dtype != self.dtype:
          return False
        if stream.read(chunk.nbytes) != chunk.reshape(-1).view(np.uint8).data:
          return False
    return left == 0 and not self.transposed


class MergedTensor(NamedTuple):
  """A matrix and the LoRA adapter to add to it."""

  tensor: "StoredTensor"
  a: np.ndarray  # (rank, inputs), float32
  b: np.ndarray  # (outputs, rank), float32, times the adapter's scale
  inputs_first: bool  # the matrix is (inputs, outputs), as in Conv1D

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the matrix."""
    return self.tensor.shape

  def view(self) -> np.ndarray:
    """Compute the merged matrix in float32."""
    delta = self.a.T @ self.b.T if self.inputs_first else self.b @ self.a
    return self.tensor.view().astype(np.float32) + delta


StoredTensor: TypeAlias = TensorRef | TorchTensor | MergedTensor


def list_tensors(folder: Path, torch_bin: bool = False) -> dict[str, TensorRef | TorchTensor]:
  """List a folder's tensors by their names in torch; read only headers."""
  tensors = {}
  readers = {".safetensors": _safetensors, ".msgpack": _flax_msgpack, ".bin": _torch}
  for file in repo.weight_files(folder, torch_bin):
    if file.suffix not in readers:
      raise RequestError(f"{file}: not a weight file; supported are {', '.join(readers)}")
    for name, tensor in readers[file.suffix](file).items():
      if name in tensors:
        raise RequestError(f"{file}: another file of the folder also has tensor {name!r}")
      tensors[name] = tensor
  return tensors


def _safetensors(file: Path) -> dict[str, TensorRef]:
  try:
    # Opening is a check: the library compares header, offsets and length with the file.
    with safe_open(file, framework="numpy"):
      pass
    with file.open("rb") as stream:
      size = int.from_bytes(stream.read(8), "little")
      header = json.loads(stream.read(size), object_pairs_hook=repo.reject_duplicate_keys)
  except (SafetensorError, OSError, ValueError, RecursionError) as error:
    raise RequestError(f"{file}: not a valid safetensors file ({first_line(error)})") from error
  header.pop("__metadata__", None)
  tensors = {}
  for name, entry in header.items():
    if entry["dtype"] in ("BOOL", "U8"):
      # Causal masks of old checkpoints. A weight of this dtype is reported as missing later.
      continue
    if entry["dtype"] not in DTYPES:
      raise RequestError(
        f"{file}: tensor {name!r} has dtype {entry['dtype']}; supported are {', '.join(DTYPES)}"
      )
    tensors[name] = TensorRef(
      file=file,
      dtype=DTYPES[entry["dtype"]],
      shape=tuple(entry["shape"]),
      offset=8 + size + entry["data_offsets"][0],
    )
  return tensors


def _flax_msgpack(file: Path) -> dict[str, TensorRef]:
  """List the tensors of a Flax file by their names in torch.

  Flax stores kernels as the transpose of torch's weights, also of Conv1D's.
  """
  tensors = {}
  try:
    for path, dtype, shape, offset in flax_msgpack.list_arrays(file):
      kernel = path[-1] == "kernel"
      leaf = "weight" if path[-1] in ("kernel", "embedding", "scale") else path[-1]
      name = ".".join((*path[:-1], leaf))
      if name in tensors:
        raise ValueError(f"it has {name!r} twice")
      shape = shape[::-1] if kernel else shape
      tensors[name] = TensorRef(
        file=file, dtype=dtype, shape=shape, offset=offset, transposed=kernel
      )
  except (OSError, ValueError, IndexError) as error:
    raise RequestError(f"{file}: not a valid Flax file ({first_line(error)})") from error
  return tensors


def _torch(file: Path) -> dict[str, TorchTensor]:
  try:
    return torch_pickle.load_tensors(file)
  except ImportError as error:
    raise RequestError(
      f"{file}: reading this file needs torch, which is not installed: pip install torch"
    ) from error
  except (OSError, ValueError) as error:
    raise RequestError(
      f"{file}: torch cannot read these weights with weights_only ({first_line(error)})"
    ) from error


def load_params(checkpoint: repo.HFCheckpoint, shapes: Params, shardings: PyTree) -> Params:
  """Load the checkpoint's parameters into sharded arrays.

  Each process reads only the slices that its devices hold. Besides the arrays themselves, host
  memory holds at most one parameter at a time. Every tensor must be used exactly once. A new
  classification head is drawn at random and replaces the folder's language head.

  Args:
    checkpoint: the folder and its config.
    shapes: shapes and dtypes, nested as in `model.abstract_model`.
    shardings: the same tree of shardings, or one sharding for all.

  Raises:
    RequestError: a tensor is unknown, missing, of the wrong shape, or differs from the one that it
      is tied to; the message names it.
  """
  repo.verify_checksums(checkpoint.folder, weights=True)
  tensors = _tensors_by_name(checkpoint)
  leaves: Params = flatten_dict(shapes, sep=".")
  rules = {rule.param: rule for rule in checkpoint.family.rules}
  readers: dict[str, Callable[[tuple[slice, ...]], np.ndarray]] = {}
  for path, leaf in sorted(leaves.items()):
    rule = rules[path]
    if checkpoint.new_head and rule.hf == weight_map.SCORE:
      readers[path] = _init_scores(leaf.shape, checkpoint.cfg.init_std)
      continue
    layers = _take_tensors(checkpoint, tensors, rule, leaf.shape)
    readers[path] = functools.partial(_read_slice, rule, checkpoint.cfg.V, layers, leaf.shape)
  if tensors:
    raise RequestError(
      f"{checkpoint.folder}: a {checkpoint.hf_config['model_type']} model of {checkpoint.cfg.L} "
      f"layers has no tensor {min(tensors)!r} ({len(tensors)} such tensors)"
    )
  shardings: PyTree = flatten_dict(jax.tree.broadcast(shardings, shapes), sep=".")

  def load(path: str) -> jax.Array:
    leaf = leaves[path]
    read = lambda index: readers[path](index or ()).astype(leaf.dtype, copy=False)
    return jax.make_array_from_callback(leaf.shape, shardings[path], read)

  return unflatten_dict({path: load(path) for path in readers}, sep=".")


def _tensors_by_name(checkpoint: repo.HFCheckpoint) -> dict[str, StoredTensor]:
  """Return the folder's tensors by short name, without buffers and a tied head."""
  tensors: dict[str, StoredTensor] = {}
  for name, tensor in list_tensors(checkpoint.folder, checkpoint.torch_bin).items():
    short = short_name(name)
    if short in tensors:
      raise RequestError(
        f"{checkpoint.folder}: tensor {short!r} occurs both with and without the prefix "
        f"{weight_map.PREFIX!r}"
      )
    if not any(re.fullmatch(pattern, short) for pattern in checkpoint.family.buffers):
      tensors[short] = tensor
  if checkpoint.cfg.tied and weight_map.LM_HEAD in tensors:
    head = tensors.pop(weight_map.LM_HEAD)
    embedding = tensors.get(weight_map.EMBEDDING)
    if embedding is None or not np.array_equal(head.view(), embedding.view()):
      raise RequestError(
        f"{checkpoint.folder}: {weight_map.LM_HEAD} differs from {weight_map.EMBEDDING}, "
        "but config.json ties them (tie_word_embeddings)"
      )
  if checkpoint.adapter:
    _merge_lora(checkpoint, checkpoint.adapter, tensors)
  if checkpoint.new_head:  # it replaces the language head
    for name in (weight_map.LM_HEAD, weight_map.LM_HEAD_BIAS):
      tensors.pop(name, None)
  return tensors


def _merge_lora(
  checkpoint: repo.HFCheckpoint, adapter: Path, tensors: dict[str, StoredTensor]
) -> None:
  """Replace each tensor that has an adapter by a `MergedTensor`.

  Raises RequestError for an adapter of a tensor that does not exist.
  """
  file = adapter / repo.ADAPTER_WEIGHTS
  config_file = adapter / repo.ADAPTER_CONFIG
  config = repo.read_json(config_file)
  rank = config.get("r")
  alpha = config.get("lora_alpha")
  if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
    raise RequestError(f"{config_file}: r={rank!r} and lora_alpha={alpha!r} must be numbers")
  adapters = _safetensors(file)
  suffix = ".lora_A.weight"
  modules = {name.removesuffix(suffix) for name in adapters if name.endswith(suffix)}
  unknown = adapters.keys() - {f"{module}.lora_{ab}.weight" for module in modules for ab in "AB"}
  missing = [name for module in modules if (name := f"{module}.lora_B.weight") not in adapters]
  if unknown or missing or not modules:
    raise RequestError(
      f"{file}: not the adapters of plain LoRA "
      f"({min([*unknown, *missing], default='no tensor in it')!r})"
    )
  inputs_first = checkpoint.hf_config["model_type"] == "gpt2"
  for module in sorted(modules):
    name = short_name(module.removeprefix("base_model.model.") + ".weight")
    a, b = (adapters[f"{module}.lora_{ab}.weight"].view().astype(np.float32) for ab in "AB")
    shape = (a.shape[-1], b.shape[0]) if inputs_first else (b.shape[0], a.shape[-1])
    if name not in tensors or tensors[name].shape != shape or not a.shape[0] == b.shape[-1] == rank:
      raise RequestError(
        f"{file}: {module!r} has shapes {a.shape} and {b.shape}, which fit no matrix of "
        f"{checkpoint.folder} at rank {rank}"
      )
    tensors[name] = MergedTensor(
      tensor=tensors[name], a=a, b=alpha / rank * b, inputs_first=inputs_first
    )


def _init_scores(shape: tuple[int, ...], std: float) -> Callable[[tuple[slice, ...]], np.ndarray]:
  scores = std * np.random.default_rng(0).standard_normal(shape, np.float32)
  return lambda index: scores[index]


def _take_tensors(
  checkpoint: repo.HFCheckpoint,
  tensors: dict[str, StoredTensor],
  rule: Rule,
  shape: tuple[int, ...],
) -> list[list[StoredTensor]]:
  """Remove a parameter's tensors from `tensors` and return them.

  Returns one list per layer, in the order of the stacking axis.
  """
  folder = checkpoint.folder
  expected = weight_map.hf_shape(rule.layout, layer_shape(rule, shape, checkpoint.cfg.V))
  layers = []
  for layer in range(shape[0] if rule.by_layer else 1):
    names = [name.format(layer) for name in rule.names]
    for name in names:
      if name not in tensors:
        raise RequestError(f"{folder}: tensor {name!r} is missing")
      if tensors[name].shape != expected:
        raise RequestError(
          f"{folder}: tensor {name!r} has shape {tensors[name].shape}, "
          f"but config.json requires {expected}"
        )
    layers.append([tensors.pop(name) for name in names])
  return layers


def _read_slice(
  rule: Rule,
  V: int,
  layers: list[list[StoredTensor]],
  shape: tuple[int, ...],
  index: tuple[slice, ...],
) -> np.ndarray:
  """Read the slice of a parameter that one device holds, as float32.

  `layers` has the tensors of each layer (of one for a parameter without a layer axis). If several
  tensors form one parameter, as q, k and v do, they are read one by one along the stacking axis.
  """
  index = tuple(slice(*cut.indices(size)) for cut, size in zip(index, shape, strict=True))
  result = _empty_aligned(tuple(cut.stop - cut.start for cut in index))
  targets, cuts = (result, index[1:]) if rule.by_layer else (result[None], index)
  axis = weight_map.stacking_axis(rule.layout)
  unpadded = layer_shape(rule, shape, V)
  # The files lack the rows that pad the vocabulary (always the first axis). Those rows are zero.
  if unpadded != shape and not rule.by_layer:
    num_rows = max(0, V - index[0].start)
    result[num_rows:] = 0
    targets = targets[:, :num_rows]
  for target, stacked in zip(targets, layers[index[0]] if rule.by_layer else layers, strict=True):
    if axis is None:
      target[...] = weight_map.from_hf(rule.layout, stacked[0].view(), unpadded)[cuts]
      continue
    other_cuts = cuts[:axis] + cuts[axis + 1 :]
    for slot, tensor in zip(np.moveaxis(target, axis, 0), stacked[cuts[axis]], strict=True):
      slot[...] = weight_map.from_hf(rule.layout, tensor.view(), unpadded)[other_cuts]
  return result


def _empty_aligned(shape: tuple[int, ...]) -> np.ndarray:
  """Allocate aligned float32 memory.

  JAX on a CPU can use memory aligned to 64 bytes without a copy.
  """
  size = 4 * math.prod(shape)
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + size].view(np.float32).reshape(shape)
