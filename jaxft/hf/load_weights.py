"""The weights of a Hugging Face folder, read straight into their shards."""

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
  """Where one tensor lies in a file."""

  file: Path
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int  # bytes from the start of the file
  transposed: bool = False  # in the file

  def view(self) -> np.ndarray:
    """Memory-maps the tensor: bytes are read when used, and leave memory with the view."""
    if not math.prod(self.shape):
      return np.empty(self.shape, self.dtype)
    stored = self.shape[::-1] if self.transposed else self.shape
    view = np.memmap(self.file, self.dtype, "r", self.offset, stored)
    return view.T if self.transposed else view

  def bytes_equal(self, chunks: Iterable[np.ndarray]) -> bool:
    """Whether the file's bytes are those of the chunks, one after another."""
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
  """A matrix with what a LoRA adapter adds to it."""

  tensor: "StoredTensor"
  a: np.ndarray  # (rank, inputs), float32
  b: np.ndarray  # (outputs, rank), float32, times the adapter's scale
  inputs_first: bool  # as in Conv1D's matrices

  @property
  def shape(self) -> tuple[int, ...]:
    return self.tensor.shape

  def view(self) -> np.ndarray:
    delta = self.a.T @ self.b.T if self.inputs_first else self.b @ self.a
    return self.tensor.view().astype(np.float32) + delta


StoredTensor: TypeAlias = TensorRef | TorchTensor | MergedTensor


def list_tensors(folder: Path, torch_bin: bool = False) -> dict[str, TensorRef | TorchTensor]:
  """Lists the tensors of the weight files by their names in torch; only headers are read."""
  tensors = {}
  readers = {".safetensors": _safetensors, ".msgpack": _flax_msgpack, ".bin": _torch}
  for file in repo.weight_files(folder, torch_bin):
    if file.suffix not in readers:
      raise RequestError(f"{file}: not a file of weights; their names end in {', '.join(readers)}")
    for name, tensor in readers[file.suffix](file).items():
      if name in tensors:
        raise RequestError(f"{file}: tensor {name!r} is in another file of the folder too")
      tensors[name] = tensor
  return tensors


def _safetensors(file: Path) -> dict[str, TensorRef]:
  try:
    # The library checks header, offsets and length against the file.
    with safe_open(file, framework="numpy"):
      pass
    with file.open("rb") as stream:
      size = int.from_bytes(stream.read(8), "little")
      header = json.loads(stream.read(size), object_pairs_hook=repo.reject_duplicate_keys)
  except (SafetensorError, OSError, ValueError, RecursionError) as error:
    raise RequestError(
      f"{file}: not a safetensors file, or a damaged one ({first_line(error)})"
    ) from error
  header.pop("__metadata__", None)
  tensors = {}
  for name, entry in header.items():
    if entry["dtype"] in ("BOOL", "U8"):
      continue  # causal masks of old checkpoints; a weight of this dtype is then missing by name
    if entry["dtype"] not in DTYPES:
      raise RequestError(
        f"{file}: tensor {name!r} has dtype {entry['dtype']}, not one of {', '.join(DTYPES)}"
      )
    tensors[name] = TensorRef(
      file=file,
      dtype=DTYPES[entry["dtype"]],
      shape=tuple(entry["shape"]),
      offset=8 + size + entry["data_offsets"][0],
    )
  return tensors


def _flax_msgpack(file: Path) -> dict[str, TensorRef]:
  """Flax has other names, and stores kernels as the transpose of torch's (Conv1D's too)."""
  tensors = {}
  try:
    for path, dtype, shape, offset in flax_msgpack.list_arrays(file):
      kernel = path[-1] == "kernel"
      leaf = "weight" if path[-1] in ("kernel", "embedding", "scale") else path[-1]
      name = ".".join((*path[:-1], leaf))
      if name in tensors:
        raise ValueError(f"{name!r} is in it twice")
      shape = shape[::-1] if kernel else shape
      tensors[name] = TensorRef(
        file=file, dtype=dtype, shape=shape, offset=offset, transposed=kernel
      )
  except (OSError, ValueError, IndexError) as error:
    raise RequestError(
      f"{file}: not a file that Flax wrote, or a damaged one ({first_line(error)})"
    ) from error
  return tensors


def _torch(file: Path) -> dict[str, TorchTensor]:
  try:
    return torch_pickle.load_tensors(file)
  except ImportError as error:
    raise RequestError(
      f"{file}: torch reads such files, and it is not installed: pip install torch"
    ) from error
  except (OSError, ValueError) as error:
    raise RequestError(
      f"{file}: not weights that torch reads with weights_only ({first_line(error)})"
    ) from error


def load_params(checkpoint: repo.HFCheckpoint, shapes: Params, shardings: PyTree) -> Params:
  """Loads the checkpoint's parameters with the shapes, dtypes and shardings of two trees.

  Both are trees of `model.abstract_model`; one sharding is that of all. Each process reads only the
  slices that its devices hold, and at most one parameter is in host memory besides the arrays
  themselves. Every tensor is used exactly once: an unknown, a missing, a misshaped or an untied one
  raises RequestError with its name. A new classification head is drawn; it replaces the folder's
  language head.
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
      f"{checkpoint.folder}: tensor {min(tensors)!r} does not belong in a "
      f"{checkpoint.hf_config['model_type']} model of {checkpoint.cfg.L} layers "
      f"({len(tensors)} such tensors)"
    )
  shardings: PyTree = flatten_dict(jax.tree.broadcast(shardings, shapes), sep=".")

  def load(path: str) -> jax.Array:
    leaf = leaves[path]
    read = lambda index: readers[path](index or ()).astype(leaf.dtype, copy=False)
    return jax.make_array_from_callback(leaf.shape, shardings[path], read)

  return unflatten_dict({path: load(path) for path in readers}, sep=".")


def _tensors_by_name(checkpoint: repo.HFCheckpoint) -> dict[str, StoredTensor]:
  """The folder's tensors by their names without prefix, less buffers and a tied head."""
  tensors: dict[str, StoredTensor] = {}
  for name, tensor in list_tensors(checkpoint.folder, checkpoint.torch_bin).items():
    short = short_name(name)
    if short in tensors:
      raise RequestError(
        f"{checkpoint.folder}: tensor {short!r} is there with and without {weight_map.PREFIX!r}"
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
  """Replaces each tensor that the adapters change by a `MergedTensor`.

  Raises RequestError for a tensor that does not exist.
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
      f"{file}: {min([*unknown, *missing], default='no tensor in it')!r}: "
      "not the adapters of plain LoRA"
    )
  inputs_first = checkpoint.hf_config["model_type"] == "gpt2"
  for module in sorted(modules):
    name = short_name(module.removeprefix("base_model.model.") + ".weight")
    a, b = (adapters[f"{module}.lora_{ab}.weight"].view().astype(np.float32) for ab in "AB")
    shape = (a.shape[-1], b.shape[0]) if inputs_first else (b.shape[0], a.shape[-1])
    if name not in tensors or tensors[name].shape != shape or not a.shape[0] == b.shape[-1] == rank:
      raise RequestError(
        f"{file}: {module!r} {a.shape}, {b.shape}: no such matrix in {checkpoint.folder}, "
        f"or of rank {rank}"
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
  """Takes a parameter's tensors out of `tensors`: for each layer, those that are stacked in it."""
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
          f"config.json asks for {expected}"
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
  """Copies the slice of a parameter that one device holds out of the files, as float32."""
  index = tuple(slice(*cut.indices(size)) for cut, size in zip(index, shape, strict=True))
  result = _empty_aligned(tuple(cut.stop - cut.start for cut in index))
  targets, cuts = (result, index[1:]) if rule.by_layer else (result[None], index)
  axis = weight_map.stacking_axis(rule.layout)
  unpadded = layer_shape(rule, shape, V)
  # Rows that pad the vocabulary, which is always the first axis.
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
  """Empty float32 at a multiple of 64 bytes, which JAX on a CPU uses as it is, without a copy."""
  size = 4 * math.prod(shape)
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + size].view(np.float32).reshape(shape)
