"""Exports weights to a Hugging Face folder.

The files are written to a temporary folder next to the target, read back and compared. Only then do
they replace the target, so a failed export never damages an earlier one.
"""

import collections
import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory

from jaxft.errors import RequestError, StorageError
from jaxft.hf import load_weights, repo
from jaxft.hf.export_tensors import DtypeFn, ExportTensor, always_float32, hf_tensors, make_dtype_fn
from jaxft.hf.tokenizer import TOKENIZER_FILES, bos_token_id, save_tokenizer, verify_tokenizer
from jaxft.hf.verify import check_hf_config, verify_export
from jaxft.hf.weight_map import EMBEDDING, full_name
from jaxft.utils.files import is_encodable, read_json_object, write_failure, write_json
from jaxft.utils.types import Json, Params

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

# Keys of config.json that name code to load. An export contains no code.
DROPPED_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")
DROPPED_KEYS += ("attn_implementation", "_attn_implementation")
GENERATION_CONFIG = "generation_config.json"
# Folder in a workdir with the config and tokenizer of the run's model, and the files it may hold.
RUN_MODEL = repo.RUN_MODEL
RUN_MODEL_FILES = ("config.json", GENERATION_CONFIG, *TOKENIZER_FILES)


def validate_export(out: Path) -> list[str]:
  """Check whether `out` can be exported to; return at most one error.

  Only an earlier export or an empty folder may be replaced. If `out` is a link, the export is
  written to its target, which may be on another disk.
  """
  what = f"export to {str(out)!r}"
  if not is_encodable(str(out.absolute())):
    return [
      f"{what}: its name is not UTF-8, and tokenizers cannot write to it; name another folder"
    ]
  try:
    if out.is_symlink() and not out.exists():
      target = os.readlink(out)
      return [f"{what}: a broken link; create {target!r}, or name another folder"]
    out = Path(os.path.realpath(out))
    if out in (Path.cwd(), *Path.cwd().parents):
      return [f"{what}: is or contains the current folder; name a new folder"]
    parent = next(path for path in out.parents if os.path.lexists(path))
    if not parent.is_dir():
      return [f"{what}: {parent} is not a folder"]
    for name in (*out.relative_to(parent).parts, _partial_path(out).name, _backup_path(out).name):
      with contextlib.suppress(FileNotFoundError):
        os.lstat(parent / name)  # raises OSError if the name is too long
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
      return []
    if (out / repo.PARITY_FILE).is_file() and not any(entry.is_dir() for entry in out.iterdir()):
      return []
  except OSError as error:
    return [f"{what}: {error.strerror}"]
  return [
    f"{what}: it already exists and is not an earlier export (it has no {repo.PARITY_FILE}); "
    "name another folder"
  ]


def export_model(
  out: Path,
  params: Params,
  checkpoint: repo.HFCheckpoint,
  *,
  dtype: str = "float32",
  max_shard_size: str = "5GB",
  card: str = "",
  tokenizer: "PreTrainedTokenizerFast | None" = None,
  stored: repo.HFCheckpoint | None = None,
) -> Json:
  """Write `params` so that transformers' `from_pretrained(out)` loads them.

  In a run of several processes, all of them must call it; process 0 writes.

  Args:
    out: the folder. It may be new, empty or an earlier export; anything else is refused.
    params: parameters nested as in `model.abstract_model`, on any mesh.
    checkpoint: the source of the config.
    dtype: one of `EXPORT_DTYPES`, or "source": each tensor's dtype in `stored`, and float32 for a
      tensor that is new.
    max_shard_size: the largest weight file, such as "5GB".
    card: text of the model card (README.md); "" copies the checkpoint's card, if it has one.
    tokenizer: from `jaxft.hf.tokenizer.load_tokenizer`; None writes no tokenizer.
    stored: the checkpoint whose dtypes "source" uses; None means `checkpoint`.

  Returns:
    The parity report; {} in processes other than 0.

  Raises:
    StorageError: the disk failed, or the files read back differ from those written.
    RequestError: `out` cannot be replaced, or a weight is beyond the range of the dtype.
  """
  dtype_of = make_dtype_fn(stored or checkpoint, dtype)
  _check_float16_range(params, checkpoint, dtype_of)
  files, plan = _plan_files(params, checkpoint, dtype_of, max_shard_size)
  if jax.process_index() > 0:
    # Gathering a chunk is a collective. Process 0 asks for each chunk twice: to write, to compare.
    written = (tensor for tensors in files.values() for tensor in tensors.values())
    for tensor in itertools.chain(written, hf_tensors(params, checkpoint, dtype_of)):
      collections.deque(tensor.chunks(), maxlen=0)
    return {}
  if lines := validate_export(out):
    raise RequestError("\n".join(lines))
  out = Path(os.path.realpath(out))
  partial = _partial_path(out)
  try:
    _recover_replace(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file, tensors in files.items():
      _write_safetensors(partial / file, tensors)
    if plan.is_sharded:
      index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
      write_json(partial / "model.safetensors.index.json", index)
    main_dtype = dtype_of(full_name(EMBEDDING)).name
    dtypes = {"dtype": main_dtype, "torch_dtype": main_dtype}
    write_config_files(partial, checkpoint, tokenizer, dtypes)
    if (checkpoint.folder / "README.md").is_file():
      shutil.copyfile(checkpoint.folder / "README.md", partial / "README.md")
    if card:
      (partial / "README.md").write_text(card, encoding="utf-8")
    parity = verify_export(partial, params, checkpoint, dtype_of, tokenizer)
    parity |= {"sha256": repo.checksums(partial)}
    write_json(partial / repo.PARITY_FILE, parity)
    _atomic_replace(partial, out)
  except OSError as error:
    raise StorageError(
      f"export to {out}: {write_failure(out, error)}; an earlier export is unchanged"
    ) from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return parity


def write_config_files(
  folder: Path,
  checkpoint: repo.HFCheckpoint,
  tokenizer: "PreTrainedTokenizerFast | None",
  more: Mapping[str, object],
) -> None:
  """Write config.json, generation_config.json and the tokenizer of a model.

  Both configs get the begin, end and padding tokens of the tokenizer that the model was trained
  with.

  Args:
    folder: an existing folder.
    checkpoint: the source of both configs.
    tokenizer: the tokenizer to save; None writes none.
    more: further keys of config.json.
  """
  hf_config = {key: value for key, value in checkpoint.hf_config.items() if key not in DROPPED_KEYS}
  special_ids = _special_ids(hf_config, tokenizer)
  hf_config |= {"architectures": [checkpoint.architecture], **more, **special_ids}
  if checkpoint.cfg.classes and tokenizer:
    hf_config["pad_token_id"] = repo.choose_pad_token(checkpoint, tokenizer)
  if hf_config["model_type"] == "gpt2" and hf_config.get("n_ctx") is None:
    hf_config["n_ctx"] = checkpoint.cfg.P  # llama.cpp's converter requires it
  write_json(folder / "config.json", hf_config)
  source = checkpoint.folder / GENERATION_CONFIG
  generation = repo.read_json(source) if source.is_file() else {}
  if not checkpoint.cfg.classes or generation:
    defaults = {key: hf_config[key] for key in ("bos_token_id", "eos_token_id") if key in hf_config}
    generation = defaults | generation
    write_json(folder / GENERATION_CONFIG, generation | _special_ids(generation, tokenizer))
  if tokenizer:
    save_tokenizer(
      tokenizer,
      checkpoint.tokenizer_folder,
      folder,
      # jaxft pads on the right. transformers must too: without position_ids it counts from 0.
      {"padding_side": "right"} if checkpoint.cfg.classes else {},
      positions=checkpoint.cfg.P,
      pad_token_id=hf_config.get("pad_token_id"),
    )


def validate_workdir(workdir: Path) -> list[str]:
  """Check that WORKDIR/run.model can be written; return at most one error.

  It cannot be written if that folder holds other files.
  """
  folder = workdir / RUN_MODEL
  try:
    for file in folder.iterdir():
      if file.name not in RUN_MODEL_FILES or not file.is_file():
        what = (
          f"a run saves its model's config here, but the folder holds {file.name!r}; move it away"
        )
        return [f"{str(folder)!r}: {what}"]
  except FileNotFoundError:
    pass
  except OSError as error:
    return [f"{str(folder)!r}: {error.strerror}"]
  return []


def is_hf_model(folder: Path) -> bool:
  """Return whether a folder has the config.json of a model, not that of a run."""
  return "model_type" in read_json_object(folder / "config.json", [])


def save_run_model(
  workdir: Path, checkpoint: repo.HFCheckpoint, tokenizer: "PreTrainedTokenizerFast"
) -> None:
  """Save the config and tokenizer of a run's model to WORKDIR/run.model.

  The run's checkpoints then stay usable after the base model's folder is gone.

  Raises:
    RequestError: the folder holds other files.
    StorageError: the disk failed.
  """
  folder = workdir / RUN_MODEL
  partial = _partial_path(folder)
  try:
    _recover_replace(folder)
    if lines := validate_workdir(workdir):
      raise RequestError("\n".join(lines))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write_config_files(partial, checkpoint, tokenizer, {})
    _atomic_replace(partial, folder)
  except OSError as error:
    raise StorageError(f"{folder}: {write_failure(folder, error)}") from error


def find_run_model(workdir: Path) -> Path | None:
  """Return the folder of a workdir with its model's config and tokenizer.

  Returns None for a run from before 2026-11-28, which did not save it.
  """
  folder = workdir / RUN_MODEL
  # The backup exists if a process was killed between the two renames of `_atomic_replace`.
  candidates = (folder, _backup_path(folder))
  return next((path for path in candidates if (path / "config.json").is_file()), None)


def _special_ids(config: Json, tokenizer: "PreTrainedTokenizerFast | None") -> Json:
  """Return the tokenizer's special tokens as keys of config.json.

  Other end tokens of the config are kept.
  """
  if tokenizer is None:
    return {}
  eos = tokenizer.eos_token_id
  ids: Json = {"bos_token_id": bos_token_id(tokenizer), "eos_token_id": eos}
  if tokenizer.pad_token_id is not None:
    ids["pad_token_id"] = tokenizer.pad_token_id
  if isinstance(ends := config.get("eos_token_id"), list):
    ids["eos_token_id"] = [eos, *(end for end in ends if end != eos)]
  return ids


def check_exportable(checkpoint: repo.HFCheckpoint, tokenizer: "PreTrainedTokenizerFast") -> None:
  """Check before training that transformers will read an export correctly.

  Raises:
    RequestError: transformers would misread the config or the tokenizer.
  """
  with tempfile.TemporaryDirectory(prefix="jaxft-") as folder:
    write_config_files(Path(folder), checkpoint, tokenizer, {})
    check_hf_config(Path(folder), checkpoint)
    verify_tokenizer(Path(folder), tokenizer, checkpoint.tokenizer_folder)


def _check_float16_range(params: Params, checkpoint: repo.HFCheckpoint, dtype_of: DtypeFn) -> None:
  """Raise RequestError if a weight exported in float16 is beyond its range."""
  limit = 65520  # the largest float16 is 65504; anything below the limit rounds to it
  for tensor in hf_tensors(params, checkpoint, always_float32):
    if dtype_of(tensor.name) == np.float16:
      maxima = (float(np.abs(chunk).max(initial=0)) for chunk in tensor.chunks())
      largest = max(maxima, default=0.0)
      if not largest < limit:  # also true for NaN
        raise RequestError(
          f"{tensor.name} has a weight of {largest:.6g}, beyond float16's maximum of 65504; "
          "export in bfloat16 or float32"
        )


def _plan_files(
  params: Params, checkpoint: repo.HFCheckpoint, dtype_of: DtypeFn, max_shard_size: str
) -> tuple[dict[str, dict[str, ExportTensor]], StateDictSplit]:
  """Return the tensors of each file in writing order, and the library's own plan."""
  tensors = {tensor.name: tensor for tensor in hf_tensors(params, checkpoint, dtype_of)}
  plan = split_state_dict_into_shards_factory(
    tensors,
    get_storage_size=lambda tensor: tensor.nbytes,
    get_storage_id=lambda _: None,
    filename_pattern="model{suffix}.safetensors",
    max_shard_size=max_shard_size,
  )
  # Wide dtypes first, so that each tensor starts at a multiple of its item size.
  files = {
    file: {it: tensors[it] for it in sorted(names, key=lambda it: -tensors[it].dtype.itemsize)}
    for file, names in plan.filename_to_tensors.items()
  }
  return files, plan


def _write_safetensors(file: Path, tensors: dict[str, ExportTensor]) -> None:
  """Write a safetensors file with one tensor in memory at a time.

  The library's own writer needs all tensors in memory (0.8).
  """
  header: Json = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, tensor in tensors.items():
    start, end = end, end + tensor.nbytes
    dtype = load_weights.DTYPE_NAMES[tensor.dtype]
    header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end]}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # the data must start at a multiple of 8 bytes
  with file.open("wb") as stream:
    stream.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
      for chunk in tensor.chunks():
        stream.write(chunk.view(np.uint8).data)
    stream.flush()
    os.fsync(stream.fileno())


def _atomic_replace(partial: Path, out: Path) -> None:
  """Rename `partial` to `out`.

  The old `out` is kept as a backup until the rename has succeeded. A kill between the two renames
  leaves only the backup, which `_recover_replace` restores.
  """
  backup = _backup_path(out)
  shutil.rmtree(backup, ignore_errors=True)
  if out.exists():
    out.rename(backup)
  try:
    partial.rename(out)
  except OSError:
    _recover_replace(out)
    raise
  shutil.rmtree(backup, ignore_errors=True)


def _recover_replace(out: Path) -> None:
  """Restore the backup if an earlier process ended between the two renames."""
  backup = _backup_path(out)
  if backup.exists() and not out.exists():
    backup.rename(out)


def _partial_path(out: Path) -> Path:
  return out.with_name(f".{out.name}.jaxft-partial")


def _backup_path(out: Path) -> Path:
  return out.with_name(f".{out.name}.jaxft-old")
