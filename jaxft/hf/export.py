"""Exports weights to a Hugging Face folder: written aside, read back, compared, then renamed."""

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

# Keys of config.json that name code to be loaded: an export has no code.
DROPPED_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")
DROPPED_KEYS += ("attn_implementation", "_attn_implementation")
GENERATION_CONFIG = "generation_config.json"
# The folder in a workdir with config and tokenizer of the run's model, and the files it may hold.
RUN_MODEL = "run.model"
RUN_MODEL_FILES = ("config.json", GENERATION_CONFIG, *TOKENIZER_FILES)


def validate_export(out: Path) -> list[str]:
  """Checks whether `out` can be exported to: at most one line. Only an export is ever replaced.

  A link leads to where the export is written, which may be another disk.
  """
  what = f"export to {str(out)!r}"
  if not is_encodable(str(out.absolute())):
    return [f"{what}: its name is not UTF-8, which tokenizers cannot write to; name another folder"]
  try:
    if out.is_symlink() and not out.exists():
      target = os.readlink(out)
      return [f"{what}: a link that leads nowhere; make {target!r}, or name another folder"]
    out = Path(os.path.realpath(out))
    if out in (Path.cwd(), *Path.cwd().parents):
      return [f"{what}: this is where the command was started; name a folder to be made"]
    parent = next(path for path in out.parents if os.path.lexists(path))
    if not parent.is_dir():
      return [f"{what}: {parent} is no folder"]
    for name in (*out.relative_to(parent).parts, _partial_path(out).name, _backup_path(out).name):
      with contextlib.suppress(FileNotFoundError):
        os.lstat(parent / name)  # a name may be too long
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
      return []
    if (out / repo.PARITY_FILE).is_file() and not any(entry.is_dir() for entry in out.iterdir()):
      return []
  except OSError as error:
    return [f"{what}: {error.strerror}"]
  return [
    f"{what}: it is there, and is no earlier export (no {repo.PARITY_FILE} in it); "
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
  """Writes `params` so that transformers' `from_pretrained(out)` loads them.

  In a run of several processes all of them must call it; process 0 writes.

  Args:
    out: the folder. An existing one is replaced if it is empty or an earlier export, else refused.
    params: parameters as `model.abstract_model` nests them, on any mesh.
    checkpoint: where the config comes from.
    dtype: of `EXPORT_DTYPES`, or "source": each tensor's dtype in `stored`, and float32 for a
      tensor that is new.
    stored: None: `checkpoint`.
    tokenizer: what `jaxft.hf.tokenizer.load_tokenizer` returned; None: none is written.
    card: text of the model card (README.md); empty: the checkpoint's own, if it has one.

  Returns:
    The parity report; in processes other than 0 an empty one.

  Raises:
    StorageError: the disk refused, or what was read back is not what was written.
    RequestError: `out` holds something else.
  """
  dtype_of = make_dtype_fn(stored or checkpoint, dtype)
  _check_float16_range(params, checkpoint, dtype_of)
  files, plan = _plan_files(params, checkpoint, dtype_of, max_shard_size)
  if jax.process_index() > 0:
    # Takes part in gathering each chunk, twice: process 0 writes it, and then compares it.
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
      f"export to {out}: {write_failure(out, error)}; what was there before has not been changed"
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
  """Writes a model without weights and card: config.json, generation_config.json, tokenizer.

  Both configs get the begin, end and padding tokens of the tokenizer, with which the model was
  trained.

  Args:
    more: further keys of config.json.
  """
  hf_config = {key: value for key, value in checkpoint.hf_config.items() if key not in DROPPED_KEYS}
  special_ids = _special_ids(hf_config, tokenizer)
  hf_config |= {"architectures": [checkpoint.architecture], **more, **special_ids}
  if checkpoint.cfg.classes and tokenizer:
    hf_config["pad_token_id"] = repo.choose_pad_token(checkpoint, tokenizer)
  if hf_config["model_type"] == "gpt2" and hf_config.get("n_ctx") is None:
    hf_config["n_ctx"] = checkpoint.cfg.P  # which llama.cpp's converter asks for
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
      # jaxft pads on the right, and transformers must where no position_ids are given.
      {"padding_side": "right"} if checkpoint.cfg.classes else {},
      positions=checkpoint.cfg.P,
      pad_token_id=hf_config.get("pad_token_id"),
    )


def validate_workdir(workdir: Path) -> list[str]:
  """Checks that a run's model config can be written into its workdir: at most one line.

  It cannot where other files have the folder's name.
  """
  folder = workdir / RUN_MODEL
  try:
    for file in folder.iterdir():
      if file.name not in RUN_MODEL_FILES or not file.is_file():
        what = f"a run writes its model's config there, and {file.name!r} is none of it"
        return [f"{str(folder)!r}: {what}"]
  except FileNotFoundError:
    pass
  except OSError as error:
    return [f"{str(folder)!r}: {error.strerror}"]
  return []


def is_hf_model(folder: Path) -> bool:
  """Whether a folder has the config.json of a model, not that of a run."""
  return "model_type" in read_json_object(folder / "config.json", [])


def save_run_model(
  workdir: Path, checkpoint: repo.HFCheckpoint, tokenizer: "PreTrainedTokenizerFast"
) -> None:
  """Replaces WORKDIR/run.model by what `write_config_files` writes, in one rename.

  The run's checkpoints can then be used when the model's folder is gone. Raises RequestError where
  the folder holds anything else.
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
  """Finds the folder of a workdir with its model's config and tokenizer.

  A run of before 2026-11-28 has none: None.
  """
  folder = workdir / RUN_MODEL
  # The backup is of a start that was killed in the middle of the replacement.
  candidates = (folder, _backup_path(folder))
  return next((path for path in candidates if (path / "config.json").is_file()), None)


def _special_ids(config: Json, tokenizer: "PreTrainedTokenizerFast | None") -> Json:
  """The tokenizer's special tokens as keys of a config; other end tokens of the config stay."""
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
  """Raises RequestError where transformers would misread an export's config or tokenizer.

  For the time before training: such an error is known long before there are weights to write.
  """
  with tempfile.TemporaryDirectory(prefix="jaxft-") as folder:
    write_config_files(Path(folder), checkpoint, tokenizer, {})
    check_hf_config(Path(folder), checkpoint)
    verify_tokenizer(Path(folder), tokenizer, checkpoint.tokenizer_folder)


def _check_float16_range(params: Params, checkpoint: repo.HFCheckpoint, dtype_of: DtypeFn) -> None:
  """Raises RequestError for a weight beyond the range of float16, if it is written in that."""
  limit = 65520  # float16 ends at 65504, to which anything below the limit is rounded
  for tensor in hf_tensors(params, checkpoint, always_float32):
    if dtype_of(tensor.name) == np.float16:
      maxima = (float(np.abs(chunk).max(initial=0)) for chunk in tensor.chunks())
      largest = max(maxima, default=0.0)
      if not largest < limit:  # NaN neither
        raise RequestError(
          f"{tensor.name} has a weight of {largest:.6g}, and float16 ends at 65504; "
          "export in bfloat16 or float32"
        )


def _plan_files(
  params: Params, checkpoint: repo.HFCheckpoint, dtype_of: DtypeFn, max_shard_size: str
) -> tuple[dict[str, dict[str, ExportTensor]], StateDictSplit]:
  """Plans the tensors of each file, in the order of writing; returns the library's plan too."""
  tensors = {tensor.name: tensor for tensor in hf_tensors(params, checkpoint, dtype_of)}
  plan = split_state_dict_into_shards_factory(
    tensors,
    get_storage_size=lambda tensor: tensor.nbytes,
    get_storage_id=lambda _: None,
    filename_pattern="model{suffix}.safetensors",
    max_shard_size=max_shard_size,
  )
  # Wide dtypes first: each tensor then begins at a multiple of its own item size.
  files = {
    file: {it: tensors[it] for it in sorted(names, key=lambda it: -tensors[it].dtype.itemsize)}
    for file, names in plan.filename_to_tensors.items()
  }
  return files, plan


def _write_safetensors(file: Path, tensors: dict[str, ExportTensor]) -> None:
  """Writes a file with one tensor in memory at a time: the library's writer wants all (0.8)."""
  header: Json = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, tensor in tensors.items():
    start, end = end, end + tensor.nbytes
    dtype = load_weights.DTYPE_NAMES[tensor.dtype]
    header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end]}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
  with file.open("wb") as stream:
    stream.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
      for chunk in tensor.chunks():
        stream.write(chunk.view(np.uint8).data)
    stream.flush()
    os.fsync(stream.fileno())


def _atomic_replace(partial: Path, out: Path) -> None:
  """Renames; an old model stays until the new one is there, but for a moment.

  See `_recover_replace`.
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
  """Gives the old model its name again where a process ended between the two renames."""
  backup = _backup_path(out)
  if backup.exists() and not out.exists():
    backup.rename(out)


def _partial_path(out: Path) -> Path:
  return out.with_name(f".{out.name}.jaxft-partial")


def _backup_path(out: Path) -> Path:
  return out.with_name(f".{out.name}.jaxft-old")
