"""A Hugging Face folder (or hub id) -> ModelConfig, tokenizer files and weights, read straight into their shards."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxft.errors import RequestError, first_line
from jaxft.hf import facts
from jaxft.hf.tables import FAMILIES, Family, Rule, hf_shape, to_ours
from jaxft.model import ModelConfig

DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}
# What a folder needs to be used and to be exported again; weights in other formats stay on the hub.
WANTED = ["*.json", "*.txt", "*.safetensors", "tokenizer.model"]


class Checkpoint(NamedTuple):
  """A folder with a config that can be run; its weights are not read yet."""

  folder: Path
  hf_config: dict[str, Any]
  cfg: ModelConfig

  @property
  def family(self) -> Family:
    return FAMILIES[self.hf_config["model_type"]]


def faults(path: str, weights: bool = True) -> list[str]:
  """What is wrong with a local model folder, at most one line; a hub id is not looked up here."""
  try:
    if path and is_local(path):
      _check_folder(Path(path), weights)
  except RequestError as error:
    return [str(error)]
  return []


def is_local(path: str) -> bool:
  """Whether a path is meant, not a hub id: it exists, or it could not be an id (an id is NAME or OWNER/NAME)."""
  return Path(path).exists() or not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", path)


def find(path: str, revision: str = "main", weights: bool = True) -> Checkpoint:
  """The checkpoint that a folder or a hub id names, downloaded if need be; raises RequestError with the way out."""
  if is_local(path):
    return _check_folder(Path(path), weights)
  import huggingface_hub

  try:
    folder = huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=WANTED)
  except Exception as error:  # hub and network errors share no class
    raise RequestError(
      f"config.model.path={path!r}: no such folder, and the hub gave none "
      f"({first_line(error)}); check the id, or give a folder"
    ) from error
  return _check_folder(Path(folder), weights)


def _check_folder(folder: Path, weights: bool) -> Checkpoint:
  if not folder.is_dir():
    raise RequestError(f"model folder {str(folder)!r}: no such folder; give one, or a hub id such as gpt2")
  config_file = folder / "config.json"
  if not config_file.is_file():
    raise RequestError(
      f"model folder {str(folder)!r}: no config.json in it, so it is not a Hugging Face model; "
      "give a folder with config.json and model.safetensors, or a hub id such as gpt2"
    )
  if weights:
    weight_files(folder)
  return Checkpoint(folder, *read_config(config_file))


def read_config(file: Path) -> tuple[dict[str, Any], ModelConfig]:
  """A parsed config.json and the facts in it; raises RequestError naming the file."""
  try:
    hf_config = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise RequestError(f"{file}: {error}") from error
  if not isinstance(hf_config, dict):
    raise RequestError(f"{file}: not a JSON object")
  try:
    return hf_config, facts.model_config(hf_config)
  except RequestError as error:
    raise RequestError(f"{file.parent}: {error}") from error


def weight_files(folder: Path) -> list[Path]:
  """model.safetensors, or the shards its index names (plain names only: a shard lies in the folder itself)."""
  single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
  if single.is_file():
    return [single]
  if not index.is_file():
    raise RequestError(f"model folder {str(folder)!r}: no model.safetensors and no model.safetensors.index.json in it")
  try:
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise RequestError(f"{index}: not an index of weights ({error!r})") from error
  for name in names:
    if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
      raise RequestError(f"{index}: {name!r} is not a file of this folder")
  return [folder / name for name in names]


def tensors(folder: Path) -> dict[str, np.ndarray]:
  """Every tensor of the folder's safetensors files by name, memory-mapped: bytes are read when they are used."""
  found = {}
  for file in weight_files(folder):
    try:
      with safe_open(file, framework="numpy"):  # the library checks header, offsets and length against the file
        pass
      with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    except (SafetensorError, OSError, ValueError) as error:
      raise RequestError(f"{file}: not a safetensors file, or a damaged one ({error})") from error
    header.pop("__metadata__", None)
    data = np.memmap(file, np.uint8, mode="r", offset=8 + size) if header else None
    for name, entry in header.items():
      if name in found:
        raise RequestError(f"{file}: tensor {name!r} is in another file of the folder too")
      if entry["dtype"] not in DTYPES:
        if entry["dtype"] in ("BOOL", "U8"):
          continue  # only causal-mask buffers have these; `load` refuses the name if it is anything else
        raise RequestError(f"{file}: tensor {name!r} has dtype {entry['dtype']}, not one of {', '.join(DTYPES)}")
      start, end = entry["data_offsets"]
      found[name] = data[start:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
  return found


def load(checkpoint: Checkpoint, shapes: Any, shardings: Any) -> Any:
  """The checkpoint's parameters as float32 arrays with these shardings; both trees are those of `model.abstract`.

  Each process reads only the slices that its devices hold. Every tensor is used exactly once: an unknown, a missing, a
  misshaped or an untied one raises RequestError with its name.
  """
  family, source = checkpoint.family, _named(checkpoint)
  by_path = {
    ".".join(key.key for key in path): (path, shape) for path, shape in jax.tree_util.tree_flatten_with_path(shapes)[0]
  }
  placed = dict(zip(by_path, jax.tree.leaves(shardings), strict=True))
  arrays = {}
  for rule in family.rules:
    shape = by_path[rule.ours][1].shape
    layers = [_take(checkpoint.folder, source, rule, layer, shape) for layer in range(shape[0] if rule.stacked else 1)]
    arrays[rule.ours] = jax.make_array_from_callback(
      shape, placed[rule.ours], lambda index, rule=rule, layers=layers: _slice(layers, index, rule.stacked)
    )
  if source:
    raise RequestError(
      f"{checkpoint.folder}: tensor {min(source)!r} has no place in a {checkpoint.hf_config['model_type']} "
      f"model of {checkpoint.cfg.L} layers ({len(source)} such tensors)"
    )
  return jax.tree.unflatten(jax.tree.structure(shapes), [arrays[path] for path in by_path])


def _named(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
  """The folder's tensors by their names without prefix, less buffers and the tied head."""
  family, named = checkpoint.family, {}
  for name, tensor in tensors(checkpoint.folder).items():
    short = name.removeprefix(family.prefix)
    if short in named:
      raise RequestError(f"{checkpoint.folder}: tensor {short!r} is there with and without {family.prefix!r}")
    if not any(re.fullmatch(pattern, short) for pattern in family.buffers):
      named[short] = tensor
  head = named.pop(family.head, None)
  if head is not None and not np.array_equal(head, named.get(family.tied_to, ())):
    raise RequestError(f"{checkpoint.folder}: {family.head} differs from {family.tied_to}, which it must be tied to")
  return named


def _take(folder: Path, source: dict[str, np.ndarray], rule: Rule, layer: int, shape: tuple[int, ...]) -> np.ndarray:
  """One layer's tensor, out of `source`, as a view in our layout."""
  name = rule.hf.format(layer)
  ours = shape[1:] if rule.stacked else shape
  tensor, wanted = source.pop(name, None), hf_shape(rule.layout, ours)
  if tensor is None:
    raise RequestError(f"{folder}: tensor {name!r} is missing")
  if tensor.shape != wanted:
    raise RequestError(f"{folder}: tensor {name!r} has shape {tensor.shape}, config.json asks for {wanted}")
  return to_ours(rule.layout, tensor, ours)


def _slice(layers: list[np.ndarray], index: tuple[slice, ...], stacked: bool) -> np.ndarray:
  """The part of a parameter that one device holds, copied out of the mapped files as float32."""
  if not stacked:
    return np.ascontiguousarray(layers[0][index], np.float32)
  return np.stack([layer[index[1:]] for layer in layers[index[0]]]).astype(np.float32, copy=False)
