"""Weights -> a Hugging Face folder, written under a temporary name, read back, compared, and only then put in place."""

import importlib.util
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from huggingface_hub import split_state_dict_into_shards_factory

import jaxft
from jaxft import model
from jaxft.errors import RequestError, StorageError
from jaxft.files import write_whole
from jaxft.hf import load
from jaxft.hf.tables import full_name, hf_shape, to_hf

EXPORT_DTYPES = {
  "float32": np.dtype("float32"),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
  "float16": np.dtype("float16"),
}
TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "vocab.json",
  "merges.txt",
  "special_tokens_map.json",
  "added_tokens.json",
  "generation_config.json",
  "chat_template.jinja",
)
LOGITS_LIMIT = 500_000_000  # parameters; larger models are compared tensor by tensor alone, which needs no second copy
TOLERANCE = 1e-4  # largest difference of two float32 logits that an export may show, the one the docs promise


def export(
  out: Path,
  params: Any,
  checkpoint: load.Checkpoint,
  *,
  dtype: str = "float32",
  max_shard_size: str = "5GB",
  card: str = "",
) -> dict[str, Any]:
  """Writes `params` as a model that `AutoModelForCausalLM.from_pretrained(out)` loads, and returns its parity report.

  Args:
    out: the folder; one that is already there is replaced, if it is empty or holds a model.
    params: parameters as `model.abstract` nests them, on any mesh.
    checkpoint: where the config and the tokenizer files come from.
    card: text of the model card (README.md).

  Raises:
    StorageError: the disk refused, or what was read back is not what was written.
    RequestError: `out` holds something that is no model.
  """
  if out.exists() and not out.is_dir() or out.is_dir() and any(out.iterdir()) and not (out / "config.json").exists():
    raise RequestError(f"export.out={str(out)!r}: exists and holds no model; name another folder")
  partial = out.with_name(out.name + ".partial")
  try:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_weights(partial, params, checkpoint, EXPORT_DTYPES[dtype], max_shard_size)
    _write_json(
      partial / "config.json",
      checkpoint.hf_config | {"architectures": [checkpoint.family.architecture], "dtype": dtype, "torch_dtype": dtype},
    )
    for name in TOKENIZER_FILES:
      if (checkpoint.folder / name).is_file():
        shutil.copyfile(checkpoint.folder / name, partial / name)
    if not (partial / "generation_config.json").exists():
      ids = {key: checkpoint.hf_config[key] for key in ("bos_token_id", "eos_token_id") if key in checkpoint.hf_config}
      _write_json(partial / "generation_config.json", ids)
    (partial / "README.md").write_text(card, encoding="utf-8")
    parity = verify(partial, params, checkpoint, dtype)
    _write_json(partial / "parity.json", parity)
    _put_in_place(partial, out)
  except OSError as error:
    raise StorageError(f"export to {out}: {error}; nothing that was there before has been changed") from error
  return parity


def hf_tensors(params: Any, checkpoint: load.Checkpoint, dtype: np.dtype):
  """(name, shape, function that gives the tensor): one tensor at a time leaves the devices."""
  leaves = {".".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
  for rule in checkpoint.family.rules:
    if rule.ours not in leaves:
      continue  # a head that is tied
    leaf = leaves.pop(rule.ours)
    shape = hf_shape(rule.layout, leaf.shape[1:] if rule.by_layer else leaf.shape)
    for layer in range(leaf.shape[0] if rule.by_layer else 1):
      for index, name in enumerate(rule.names):

        def tensor(rule=rule, leaf=leaf, layer=layer, index=index):
          return to_hf(rule.layout, _on_host(leaf, layer if rule.by_layer else None, dtype), index)

        yield full_name(name.format(layer)), shape, tensor
  if leaves:
    raise KeyError(f"{sorted(leaves)}: no rule writes these parameters")


def _on_host(array: jax.Array, layer: int | None, dtype: np.dtype) -> np.ndarray:
  """The array, or a layer of it, shard by shard: np.asarray would keep a second copy of all of it in the array itself."""
  first = 0 if layer is None else 1
  whole = np.empty(array.shape[first:], dtype)
  for shard in array.addressable_shards:
    if shard.replica_id == 0:
      whole[shard.index[first:]] = shard.data if layer is None else shard.data[layer]
  return whole


def verify(folder: Path, params: Any, checkpoint: load.Checkpoint, dtype: str) -> dict[str, Any]:
  """Reads the folder back and compares: every tensor bit for bit, and logits in float32.

  The logits of the folder are transformers' own where torch is installed, else those of jaxft's model with the weights read
  back; `reference` says which. Raises StorageError on any difference above `TOLERANCE` (for a narrower dtype than float32,
  against the weights as written).
  """
  written = load.tensors(folder)
  for name, _, tensor in hf_tensors(params, checkpoint, EXPORT_DTYPES[dtype]):
    if not written.pop(name).holds(tensor()):
      raise StorageError(
        f"{folder}: tensor {name!r} read back differs from what was written; the disk is not to be trusted"
      )
  if written:
    raise StorageError(f"{folder}: tensors {sorted(written)} were not meant to be written")
  back = load.find(str(folder))
  if back.cfg != checkpoint.cfg:
    raise StorageError(f"{folder}: config.json read back describes another model: {back.cfg}, not {checkpoint.cfg}")
  report = {"tensors": "bit for bit", "dtype": dtype}
  graph, shapes, _ = model.abstract(checkpoint.cfg, model.Compute())
  if model.parameter_count(shapes) > LOGITS_LIMIT:
    return report | {"logits_max_abs_difference": None, "reference": "tensors only: logits would take a second model"}

  ids_BT = np.random.default_rng(0).integers(checkpoint.cfg.V, size=(2, min(checkpoint.cfg.P, 64))).astype(np.int32)
  if importlib.util.find_spec("torch"):
    reference, theirs = _transformers_logits(folder, ids_BT)
  else:
    here = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
    reference = f"jaxft {jaxft.__version__}, weights read back"
    theirs = _logits(graph, load.load(back, shapes, here), ids_BT)
  rounded = jax.tree.map(lambda p: p.astype(EXPORT_DTYPES[dtype]).astype(jnp.float32), params)
  ours = _logits(graph, rounded, ids_BT)
  difference = float(np.max(np.abs(ours - theirs)))
  if not difference <= TOLERANCE:
    raise StorageError(
      f"{folder}: its float32 logits differ by {difference:.1e} from the trained model's ({reference}); "
      f"at most {TOLERANCE:.0e} is rounding. Please report this"
    )
  return report | {
    "logits_max_abs_difference": difference,
    "tolerance": TOLERANCE,
    "reference": reference,
    "tokens_compared": int(ids_BT.size),
  }


def in_words(parity: dict[str, Any]) -> str:
  """What a parity report says, in one line."""
  difference = parity["logits_max_abs_difference"]
  logits = "" if difference is None else f", logits within {difference:.1e} of the model in memory"
  return f"tensors {parity['tensors']}{logits} (reference: {parity['reference']})"


def _logits(graph: nnx.GraphDef, params: Any, ids_BT: np.ndarray) -> np.ndarray:
  def logits(params):
    decoder = nnx.merge(graph, params)
    return decoder.logits(decoder(jnp.asarray(ids_BT)))

  return np.asarray(jax.jit(logits)(params))


def _transformers_logits(folder: Path, ids_BT: np.ndarray) -> tuple[str, np.ndarray]:
  import torch
  import transformers

  transformers.utils.logging.disable_progress_bar()
  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
  with torch.no_grad():
    logits = theirs(torch.from_numpy(ids_BT).long()).logits.numpy()
  return f"transformers {transformers.__version__}, torch {torch.__version__}", logits


def _write_weights(
  folder: Path, params: Any, checkpoint: load.Checkpoint, dtype: np.dtype, max_shard_size: str
) -> None:
  tensors = {name: (shape, tensor) for name, shape, tensor in hf_tensors(params, checkpoint, dtype)}
  plan = split_state_dict_into_shards_factory(
    tensors,
    get_storage_size=lambda entry: math.prod(entry[0]) * dtype.itemsize,
    get_storage_id=lambda _: None,
    filename_pattern="model{suffix}.safetensors",
    max_shard_size=max_shard_size,
  )
  for file, names in plan.filename_to_tensors.items():
    _write_safetensors(folder / file, {name: tensors[name] for name in names}, dtype)
  if plan.is_sharded:
    _write_json(
      folder / "model.safetensors.index.json", {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    )


def _write_safetensors(file: Path, tensors: dict[str, tuple[tuple[int, ...], Any]], dtype: np.dtype) -> None:
  """A safetensors file, one tensor in memory at a time: the library's own writer wants them all (0.8)."""
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for name, (shape, _) in tensors.items():
    start, end = end, end + math.prod(shape) * dtype.itemsize
    header[name] = {"dtype": load.NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
  with file.open("wb") as stream:
    stream.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in tensors.values():
      stream.write(tensor().view(np.uint8).data)
    stream.flush()
    os.fsync(stream.fileno())


def _write_json(file: Path, content: dict[str, Any]) -> None:
  write_whole(file, json.dumps(content, indent=2) + "\n")


def _put_in_place(partial: Path, out: Path) -> None:
  """Renames; a model that was there before is there until the new one is."""
  old = out.with_name(out.name + ".old")
  shutil.rmtree(old, ignore_errors=True)
  if out.exists():
    out.rename(old)
  partial.rename(out)
  shutil.rmtree(old, ignore_errors=True)
