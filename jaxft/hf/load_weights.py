"""The weights of a Hugging Face folder, read straight into their shards."""

import functools
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxft.errors import RequestError, first_line
from jaxft.hf import flax_msgpack, torch_pickle
from jaxft.hf.repo import (
  ADAPTER_CONFIG,
  ADAPTER_WEIGHTS,
  HFCheckpoint,
  read_json,
  reject_duplicate_keys,
  verify_checksums,
  weight_files,
)
from jaxft.hf.weight_map import (
  EMBEDDING,
  LM_HEAD,
  LM_HEAD_BIAS,
  PREFIX,
  SCORE,
  Rule,
  from_hf,
  hf_shape,
  short_name,
  stacking_axis,
  unpadded_shape,
)

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
  transposed: bool = False  # as it lies in the file

  def view(self) -> np.ndarray:
    """The tensor, memory-mapped: bytes are read when they are used, and leave memory with the view."""
    if not math.prod(self.shape):
      return np.empty(self.shape, self.dtype)
    stored = self.shape[::-1] if self.transposed else self.shape
    view = np.memmap(self.file, self.dtype, "r", self.offset, stored)
    return view.T if self.transposed else view

  def bytes_equal(self, chunks: Iterable[np.ndarray]) -> bool:
    """Whether the file's bytes equal those of the chunks, one after another."""
    left = math.prod(self.shape) * self.dtype.itemsize
    with self.file.open("rb") as stream:
      stream.seek(self.offset)
      for chunk in chunks:
        left -= chunk.nbytes
        if (
          chunk.dtype != self.dtype
          or stream.read(chunk.nbytes) != chunk.reshape(-1).view(np.uint8).data
        ):
          return False
    return left == 0 and not self.transposed


def list_tensors(
  folder: Path, torch_bin: bool = False
) -> dict[str, TensorRef | torch_pickle.TorchTensor]:
  """Every tensor of the folder's weight files by its name in torch; nothing but headers is read."""
  found, readers = {}, {".safetensors": _safetensors, ".msgpack": _flax_msgpack, ".bin": _torch}
  for file in weight_files(folder, torch_bin):
    if file.suffix not in readers:
      raise RequestError(f"{file}: not a file of weights; their names end in {', '.join(readers)}")
    for name, tensor in readers[file.suffix](file).items():
      if name in found:
        raise RequestError(f"{file}: tensor {name!r} is in another file of the folder too")
      found[name] = tensor
  return found


def _safetensors(file: Path) -> dict[str, TensorRef]:
  try:
    with safe_open(
      file, framework="numpy"
    ):  # the library checks header, offsets and length against the file
      pass
    with file.open("rb") as stream:
      size = int.from_bytes(stream.read(8), "little")
      header = json.loads(stream.read(size), object_pairs_hook=reject_duplicate_keys)
  except (SafetensorError, OSError, ValueError, RecursionError) as error:
    raise RequestError(
      f"{file}: not a safetensors file, or a damaged one ({first_line(error)})"
    ) from error
  header.pop("__metadata__", None)
  found = {}
  for name, entry in header.items():
    if entry["dtype"] in ("BOOL", "U8"):
      continue  # causal masks of old checkpoints; a weight of this dtype is then missing by name
    if entry["dtype"] not in DTYPES:
      raise RequestError(
        f"{file}: tensor {name!r} has dtype {entry['dtype']}, not one of {', '.join(DTYPES)}"
      )
    found[name] = TensorRef(
      file, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]
    )
  return found


def _flax_msgpack(file: Path) -> dict[str, TensorRef]:
  """Flax names its arrays otherwise, and stores every kernel as the transpose of torch's weight (Conv1D's too)."""
  found = {}
  try:
    for path, dtype, shape, offset in flax_msgpack.list_arrays(file):
      kernel = path[-1] == "kernel"
      name = ".".join(
        (*path[:-1], "weight" if path[-1] in ("kernel", "embedding", "scale") else path[-1])
      )
      if name in found:
        raise ValueError(f"{name!r} is in it twice")
      found[name] = TensorRef(
        file, dtype, shape[::-1] if kernel else shape, offset, transposed=kernel
      )
  except (OSError, ValueError, IndexError) as error:
    raise RequestError(
      f"{file}: not a file that Flax wrote, or a damaged one ({first_line(error)})"
    ) from error
  return found


def _torch(file: Path) -> dict[str, torch_pickle.TorchTensor]:
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


def load_params(checkpoint: HFCheckpoint, shapes: Any, shardings: Any) -> Any:
  """The checkpoint's parameters as arrays with these shapes, dtypes and shardings; both trees are those of `model.abstract_model`.

  Each process reads only the slices that its devices hold, and at most one parameter is in host memory besides the arrays
  themselves. Every tensor is used exactly once: an unknown, a missing, a misshaped or an untied one raises RequestError
  with its name. A new classification head is drawn, and takes the place of the language head in the folder.
  """
  verify_checksums(checkpoint.folder, weights=True)
  source = _tensors_by_name(checkpoint)
  paths, structure = jax.tree_util.tree_flatten_with_path(shapes)
  wanted = {".".join(key.key for key in path): leaf for path, leaf in paths}
  rules = {rule.param: rule for rule in checkpoint.family.rules}
  readers = {}
  for path, leaf in wanted.items():
    shape = leaf.shape
    if checkpoint.new_head and rules[path].hf == SCORE:
      readers[path] = _init_scores(shape, checkpoint.cfg.init_std)
      continue
    pieces = _take_tensors(checkpoint, source, rules[path], shape)
    readers[path] = functools.partial(_read_slice, rules[path], checkpoint.cfg.V, pieces, shape)
  if source:
    raise RequestError(
      f"{checkpoint.folder}: tensor {min(source)!r} has no place in a {checkpoint.hf_config['model_type']} "
      f"model of {checkpoint.cfg.L} layers ({len(source)} such tensors)"
    )
  arrays = [
    jax.make_array_from_callback(
      leaf.shape,
      place,
      lambda index, path=path, dtype=leaf.dtype: readers[path](index).astype(dtype, copy=False),
    )
    for (path, leaf), place in zip(wanted.items(), jax.tree.leaves(shardings), strict=True)
  ]
  return jax.tree.unflatten(structure, arrays)


def _tensors_by_name(checkpoint: HFCheckpoint) -> dict[str, TensorRef]:
  """The folder's tensors by their names without prefix, less buffers and a tied head."""
  named = {}
  for name, tensor in list_tensors(checkpoint.folder, checkpoint.torch_bin).items():
    short = short_name(name)
    if short in named:
      raise RequestError(
        f"{checkpoint.folder}: tensor {short!r} is there with and without {PREFIX!r}"
      )
    if not any(re.fullmatch(pattern, short) for pattern in checkpoint.family.buffers):
      named[short] = tensor
  if checkpoint.cfg.tied and LM_HEAD in named:
    head, embedding = named.pop(LM_HEAD), named.get(EMBEDDING)
    if embedding is None or not np.array_equal(head.view(), embedding.view()):
      raise RequestError(
        f"{checkpoint.folder}: {LM_HEAD} differs from {EMBEDDING}, but config.json ties them (tie_word_embeddings)"
      )
  if checkpoint.adapter:
    _merge_lora(checkpoint, named)
  if checkpoint.new_head:  # it takes the place of the language head
    for name in (LM_HEAD, LM_HEAD_BIAS):
      named.pop(name, None)
  return named


class MergedTensor(NamedTuple):
  """A matrix with what a LoRA adapter adds to it."""

  tensor: TensorRef
  a: np.ndarray  # (rank, inputs), float32
  b: np.ndarray  # (outputs, rank), float32, with the scale of the adapter in it
  inputs_first: bool  # as Conv1D's matrices lie

  @property
  def shape(self) -> tuple[int, ...]:
    return self.tensor.shape

  def view(self) -> np.ndarray:
    change = self.a.T @ self.b.T if self.inputs_first else self.b @ self.a
    return self.tensor.view().astype(np.float32) + change


def _merge_lora(checkpoint: HFCheckpoint, named: dict[str, Any]) -> None:
  """Replaces each tensor that the adapters change by a `MergedTensor`; raises RequestError for one that is not there."""
  file, about = checkpoint.adapter / ADAPTER_WEIGHTS, read_json(checkpoint.adapter / ADAPTER_CONFIG)
  rank, alpha = about.get("r"), about.get("lora_alpha")
  if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
    raise RequestError(
      f"{checkpoint.adapter / ADAPTER_CONFIG}: r={rank!r} and lora_alpha={alpha!r} must be numbers"
    )
  found = _safetensors(file)
  pairs = {name.removesuffix(".lora_A.weight") for name in found if name.endswith(".lora_A.weight")}
  other = found.keys() - {f"{pair}.lora_{part}.weight" for pair in pairs for part in "AB"}
  missing = [name for pair in pairs if (name := f"{pair}.lora_B.weight") not in found]
  if other or missing or not pairs:
    raise RequestError(
      f"{file}: {min([*other, *missing], default='no tensor in it')!r}: not the adapters of plain LoRA"
    )
  for pair in sorted(pairs):
    name = short_name(pair.removeprefix("base_model.model.") + ".weight")
    a, b = (found[f"{pair}.lora_{part}.weight"].view().astype(np.float32) for part in "AB")
    inputs_first = checkpoint.hf_config["model_type"] == "gpt2"
    fits = (a.shape[-1], b.shape[0]) if inputs_first else (b.shape[0], a.shape[-1])
    if name not in named or named[name].shape != fits or not a.shape[0] == b.shape[-1] == rank:
      raise RequestError(
        f"{file}: {pair!r} {a.shape}, {b.shape}: no such matrix in {checkpoint.folder}, or of rank {rank}"
      )
    named[name] = MergedTensor(named[name], a, alpha / rank * b, inputs_first)


def _init_scores(shape: tuple[int, ...], std: float) -> Callable[[tuple[slice, ...]], np.ndarray]:
  scores = std * np.random.default_rng(0).standard_normal(shape, np.float32)
  return lambda index: scores[index]


def _take_tensors(
  checkpoint: HFCheckpoint, source: dict[str, TensorRef], rule: Rule, shape: tuple[int, ...]
) -> list[list[TensorRef]]:
  """The tensors of a parameter, out of `source`: for each layer, those that are stacked in it."""
  folder, one_layer = (
    checkpoint.folder,
    unpadded_shape(rule.layout, shape[1:] if rule.by_layer else shape, checkpoint.cfg.V),
  )
  fits, found = hf_shape(rule.layout, one_layer), []
  for layer in range(shape[0] if rule.by_layer else 1):
    names = [name.format(layer) for name in rule.names]
    for name in names:
      if name not in source:
        raise RequestError(f"{folder}: tensor {name!r} is missing")
      if source[name].shape != fits:
        raise RequestError(
          f"{folder}: tensor {name!r} has shape {source[name].shape}, config.json asks for {fits}"
        )
    found.append([source.pop(name) for name in names])
  return found


def _read_slice(
  rule: Rule,
  V: int,
  layers: list[list[TensorRef]],
  shape: tuple[int, ...],
  index: tuple[slice, ...],
) -> np.ndarray:
  """The part of a parameter that one device holds, copied out of the files as float32."""
  index = tuple(slice(*cut.indices(size)) for cut, size in zip(index, shape, strict=True))
  part = _empty_aligned(tuple(cut.stop - cut.start for cut in index))
  into, cuts = (part, index[1:]) if rule.by_layer else (part[None], index)
  chosen = layers[index[0]] if rule.by_layer else layers
  axis, one_layer = (
    stacking_axis(rule.layout),
    unpadded_shape(rule.layout, shape[1:] if rule.by_layer else shape, V),
  )
  if (
    one_layer != shape and not rule.by_layer
  ):  # rows that pad the vocabulary, always the first axis
    real = max(0, V - index[0].start)
    part[real:] = 0
    into = into[:, :real]
  for target, stacked in zip(into, chosen, strict=True):
    if axis is None:
      target[...] = from_hf(rule.layout, stacked[0].view(), one_layer)[cuts]
      continue
    within = cuts[:axis] + cuts[axis + 1 :]
    for place, tensor in zip(np.moveaxis(target, axis, 0), stacked[cuts[axis]], strict=True):
      place[...] = from_hf(rule.layout, tensor.view(), one_layer)[within]
  return part


def _empty_aligned(shape: tuple[int, ...]) -> np.ndarray:
  """Empty float32 at a multiple of 64 bytes: JAX uses such memory on a CPU as it is, instead of copying it."""
  size = 4 * math.prod(shape)
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + size].view(np.float32).reshape(shape)
