"""A Hugging Face folder (or hub id) -> ModelConfig, tokenizer files and weights, read straight into their shards."""

import functools
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxft.errors import RequestError, first_line
from jaxft.files import exists
from jaxft.hf import facts, flax_msgpack, torch_pickle
from jaxft.hf.tables import (
  EMBEDDING,
  FAMILIES,
  HEAD,
  PREFIX,
  Family,
  Rule,
  hf_shape,
  short_name,
  stacking_axis,
  to_ours,
  unpadded,
)
from jaxft.model import ModelConfig

DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What a folder needs to be used and to be exported again; weights in other formats stay on the hub.
WANTED = ["*.json", "*.txt", "*.safetensors", "tokenizer.model", "README.md"]
FORMATS = ("model.safetensors", "flax_model.msgpack")  # the first that is there is read
LARGEST_TEXT = (
  2**28
)  # bytes of a .json or .txt file, which is read whole; the tokenizer.json of a large vocabulary has 2^25
PICKLE = "pytorch_model.bin"  # read last, and only when it is asked for


class Checkpoint(NamedTuple):
  """A folder with a config that can be run; its weights are not read yet."""

  folder: Path
  hf_config: dict[str, Any]
  cfg: ModelConfig
  torch_bin: bool = False  # pickles may be read

  @property
  def family(self) -> Family:
    return FAMILIES[self.hf_config["model_type"]]

  @property
  def architecture(self) -> str:
    return self.family.classifier if self.cfg.classes else self.family.architecture


def faults(path: str, weights: bool = True, torch_bin: bool = False) -> list[str]:
  """What is wrong with a local model folder, at most one line; a hub id is not looked up here."""
  try:
    if path and is_local(path):
      _check_folder(Path(path), weights, torch_bin)
  except RequestError as error:
    return [str(error)]
  return []


def is_local(path: str) -> bool:
  """Whether a path is meant, not a hub id: it exists, or it could not be an id (an id is NAME or OWNER/NAME)."""
  return exists(Path(path)) or not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", path)


def find(path: str, revision: str = "main", weights: bool = True, torch_bin: bool = False) -> Checkpoint:
  """The checkpoint that a folder or a hub id names, downloaded if need be; raises RequestError with the way out.

  Args:
    weights: whether the folder must hold weights.
    torch_bin: whether pytorch_model*.bin may be read, where there are no others.
  """
  if is_local(path):
    return _check_folder(Path(path), weights, torch_bin)
  import huggingface_hub

  try:
    folder = Path(huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=WANTED))
    for others in ("*.safetensors", "flax_model*.msgpack", *(["pytorch_model*.bin"] if torch_bin else [])):
      if not weights or any(folder.glob(others)):
        break
      huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=others)
  except Exception as error:  # hub and network errors share no class
    raise RequestError(
      f"model {path!r}: no such folder, and the hub gave none ({first_line(error)}); check the id, or give a folder"
    ) from error
  return _check_folder(folder, weights, torch_bin)


def _check_folder(folder: Path, weights: bool, torch_bin: bool) -> Checkpoint:
  if not folder.is_dir():
    raise RequestError(f"model folder {str(folder)!r}: no such folder; give one, or a hub id such as gpt2")
  config_file = folder / "config.json"
  _refuse_odd_files(folder)
  if not config_file.is_file():
    raise RequestError(
      f"model folder {str(folder)!r}: no config.json in it, so it is not a Hugging Face model; "
      "give a folder with config.json and model.safetensors, or a hub id such as gpt2"
    )
  if weights:
    weight_files(folder, torch_bin)
  return Checkpoint(folder, *read_config(config_file), torch_bin)


def read_config(file: Path) -> tuple[dict[str, Any], ModelConfig]:
  """A parsed config.json and the facts in it; raises RequestError naming the file."""
  hf_config = _json_object(file)
  try:
    return hf_config, facts.model_config(hf_config)
  except RequestError as error:
    raise RequestError(f"{file.parent}: {error}") from error


def weight_files(folder: Path, torch_bin: bool = False) -> list[Path]:
  """The folder's weights, in the first of `FORMATS` that it has: one file, or the shards that an index names.

  A shard lies in the folder itself and is of the format that the index is of.
  """
  for single in (*FORMATS, PICKLE) if torch_bin else FORMATS:
    index = folder / f"{single}.index.json"
    if (folder / single).is_file():
      return _inside(folder, folder / single, [single])
    if index.is_file():
      return _inside(folder, index, _shards(index, Path(single).suffix))
  pickled = any(folder.glob("pytorch_model*.bin"))
  raise RequestError(
    f"model folder {str(folder)!r}: none of {', '.join(FORMATS)} in it, whole or with an index"
    + (
      f"; {PICKLE} is a pickle, which is read (by torch, weights_only) only when asked: --config.model.torch_bin=True to "
      "train, --torch_bin for the other commands"
      if pickled
      else ""
    )
  )


def _shards(index: Path, suffix: str) -> list[str]:
  where = _json_object(index).get("weight_map")
  if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
    raise RequestError(f"{index}: not an index of weights: it has no weight_map of file names")
  for name in where.values():
    if not name.endswith(suffix):
      raise RequestError(f"{index}: {name[:100]!r} is no {suffix} file")
  return sorted(set(where.values()))


def _is_file(file: Path) -> bool:
  try:
    return file.is_file()
  except OSError:  # a name that is too long
    return False


def _json_object(file: Path) -> dict[str, Any]:
  try:
    content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
  except (OSError, ValueError, RecursionError) as error:
    raise RequestError(f"{file}: {first_line(error)}") from error
  if not isinstance(content, dict):
    raise RequestError(f"{file}: not a JSON object")
  return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object; ValueError for one that says a thing twice, of which readers believe either."""
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    raise ValueError(f"{next(name for name in names if names.count(name) > 1)[:100]!r} is in it twice")
  return found


def _inside(folder: Path, named_in: Path, names: list[str]) -> list[Path]:
  for name in names:
    if Path(name).name != name or "\0" in name or not _is_file(folder / name):
      raise RequestError(f"{named_in}: {name[:100]!r} is not a file of this folder")
  return [folder / name for name in names]


def _refuse_odd_files(folder: Path) -> None:
  """Weights, tokenizer and card are read, and some are copied into exports: none may be a file from elsewhere, or a pipe."""
  # The hub's cache links each file to ../../blobs/HASH: its own folders, models--X/snapshots/Y, are what may be left.
  home = folder.resolve()
  home = home.parent.parent if home.parent.name == "snapshots" else home
  for file in folder.rglob("*"):
    if file.is_symlink() and not file.resolve().is_relative_to(home):
      raise RequestError(f"{file}: a link that leads out of this folder")
    if not file.is_file() and not file.is_dir():
      raise RequestError(f"{file}: not an ordinary file")
    if file.suffix in (".json", ".txt") and file.stat().st_size > LARGEST_TEXT:
      raise RequestError(f"{file}: {file.stat().st_size:,} bytes are too many for such a file")


class Tensor(NamedTuple):
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

  def holds(self, array: np.ndarray) -> bool:
    """Whether the file's bytes are those of `array`, read in pieces: the largest tensor is a good part of a host's memory."""
    piece, flat = 2**24, array.reshape(-1).view(np.uint8)
    if (self.dtype, self.shape, self.transposed) != (array.dtype, array.shape, False):
      return False
    with self.file.open("rb") as stream:
      stream.seek(self.offset)
      return all(stream.read(piece)[: flat.size - i] == flat[i : i + piece].data for i in range(0, flat.size, piece))


def tensors(folder: Path, torch_bin: bool = False) -> dict[str, Tensor | torch_pickle.TorchTensor]:
  """Every tensor of the folder's weight files by its name in torch; nothing but headers is read."""
  found, readers = {}, {".safetensors": _safetensors, ".msgpack": _flax, ".bin": _torch}
  for file in weight_files(folder, torch_bin):
    if file.suffix not in readers:
      raise RequestError(f"{file}: not a file of weights; their names end in {', '.join(readers)}")
    for name, tensor in readers[file.suffix](file).items():
      if name in found:
        raise RequestError(f"{file}: tensor {name!r} is in another file of the folder too")
      found[name] = tensor
  return found


def _safetensors(file: Path) -> dict[str, Tensor]:
  try:
    with safe_open(file, framework="numpy"):  # the library checks header, offsets and length against the file
      pass
    with file.open("rb") as stream:
      size = int.from_bytes(stream.read(8), "little")
      header = json.loads(stream.read(size), object_pairs_hook=_once)
  except (SafetensorError, OSError, ValueError, RecursionError) as error:
    raise RequestError(f"{file}: not a safetensors file, or a damaged one ({first_line(error)})") from error
  header.pop("__metadata__", None)
  found = {}
  for name, entry in header.items():
    if entry["dtype"] in ("BOOL", "U8"):
      continue  # causal masks of old checkpoints; a weight of this dtype is then missing by name
    if entry["dtype"] not in DTYPES:
      raise RequestError(f"{file}: tensor {name!r} has dtype {entry['dtype']}, not one of {', '.join(DTYPES)}")
    found[name] = Tensor(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
  return found


def _flax(file: Path) -> dict[str, Tensor]:
  """Flax names its arrays otherwise, and stores every kernel as the transpose of torch's weight (Conv1D's too)."""
  found = {}
  try:
    for path, dtype, shape, offset in flax_msgpack.arrays(file):
      kernel = path[-1] == "kernel"
      name = ".".join((*path[:-1], "weight" if path[-1] in ("kernel", "embedding", "scale") else path[-1]))
      if name in found:
        raise ValueError(f"{name!r} is in it twice")
      found[name] = Tensor(file, dtype, shape[::-1] if kernel else shape, offset, transposed=kernel)
  except (OSError, ValueError, IndexError) as error:
    raise RequestError(f"{file}: not a file that Flax wrote, or a damaged one ({first_line(error)})") from error
  return found


def _torch(file: Path) -> dict[str, torch_pickle.TorchTensor]:
  try:
    return torch_pickle.arrays(file)
  except ImportError as error:
    raise RequestError(f"{file}: torch reads such files, and it is not installed: pip install torch") from error
  except (OSError, ValueError) as error:
    raise RequestError(f"{file}: not weights that torch reads with weights_only ({first_line(error)})") from error


def load(checkpoint: Checkpoint, shapes: Any, shardings: Any) -> Any:
  """The checkpoint's parameters as float32 arrays with these shardings; both trees are those of `model.abstract`.

  Each process reads only the slices that its devices hold, and at most one parameter is in host memory besides the arrays
  themselves. Every tensor is used exactly once: an unknown, a missing, a misshaped or an untied one raises RequestError
  with its name.
  """
  source = _named(checkpoint)
  paths, structure = jax.tree_util.tree_flatten_with_path(shapes)
  wanted = {".".join(key.key for key in path): leaf.shape for path, leaf in paths}
  rules = {rule.ours: rule for rule in checkpoint.family.rules}
  pieces = {path: _take(checkpoint, source, rules[path], shape) for path, shape in wanted.items()}
  if source:
    raise RequestError(
      f"{checkpoint.folder}: tensor {min(source)!r} has no place in a {checkpoint.hf_config['model_type']} "
      f"model of {checkpoint.cfg.L} layers ({len(source)} such tensors)"
    )
  arrays = [
    jax.make_array_from_callback(
      shape, place, functools.partial(_slice, rules[path], checkpoint.cfg.V, pieces[path], shape)
    )
    for (path, shape), place in zip(wanted.items(), jax.tree.leaves(shardings), strict=True)
  ]
  return jax.tree.unflatten(structure, arrays)


def _named(checkpoint: Checkpoint) -> dict[str, Tensor]:
  """The folder's tensors by their names without prefix, less buffers and a tied head."""
  named = {}
  for name, tensor in tensors(checkpoint.folder, checkpoint.torch_bin).items():
    short = short_name(name)
    if short in named:
      raise RequestError(f"{checkpoint.folder}: tensor {short!r} is there with and without {PREFIX!r}")
    if not any(re.fullmatch(pattern, short) for pattern in checkpoint.family.buffers):
      named[short] = tensor
  if checkpoint.cfg.tied and HEAD in named:
    head, embedding = named.pop(HEAD), named.get(EMBEDDING)
    if embedding is None or not np.array_equal(head.view(), embedding.view()):
      raise RequestError(
        f"{checkpoint.folder}: {HEAD} differs from {EMBEDDING}, but config.json ties them (tie_word_embeddings)"
      )
  return named


def _take(checkpoint: Checkpoint, source: dict[str, Tensor], rule: Rule, shape: tuple[int, ...]) -> list[list[Tensor]]:
  """The tensors of a parameter, out of `source`: for each layer, those that are stacked in it."""
  folder, one_layer = checkpoint.folder, unpadded(rule.layout, shape[1:] if rule.by_layer else shape, checkpoint.cfg.V)
  fits, found = hf_shape(rule.layout, one_layer), []
  for layer in range(shape[0] if rule.by_layer else 1):
    names = [name.format(layer) for name in rule.names]
    for name in names:
      if name not in source:
        raise RequestError(f"{folder}: tensor {name!r} is missing")
      if source[name].shape != fits:
        raise RequestError(f"{folder}: tensor {name!r} has shape {source[name].shape}, config.json asks for {fits}")
    found.append([source.pop(name) for name in names])
  return found


def _slice(
  rule: Rule, V: int, layers: list[list[Tensor]], shape: tuple[int, ...], index: tuple[slice, ...]
) -> np.ndarray:
  """The part of a parameter that one device holds, copied out of the files as float32."""
  index = tuple(slice(*cut.indices(size)) for cut, size in zip(index, shape, strict=True))
  part = _aligned(tuple(cut.stop - cut.start for cut in index))
  into, cuts = (part, index[1:]) if rule.by_layer else (part[None], index)
  chosen = layers[index[0]] if rule.by_layer else layers
  axis, one_layer = stacking_axis(rule.layout), unpadded(rule.layout, shape[1:] if rule.by_layer else shape, V)
  if one_layer != shape and not rule.by_layer:  # rows that pad the vocabulary, always the first axis
    real = max(0, V - index[0].start)
    part[real:] = 0
    into = into[:, :real]
  for target, stacked in zip(into, chosen, strict=True):
    if axis is None:
      target[...] = to_ours(rule.layout, stacked[0].view(), one_layer)[cuts]
      continue
    within = cuts[:axis] + cuts[axis + 1 :]
    for place, tensor in zip(np.moveaxis(target, axis, 0), stacked[cuts[axis]], strict=True):
      place[...] = to_ours(rule.layout, tensor.view(), one_layer)[within]
  return part


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
  """Empty float32 at a multiple of 64 bytes: JAX uses such memory on a CPU as it is, instead of copying it."""
  size = 4 * math.prod(shape)
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + size].view(np.float32).reshape(shape)
