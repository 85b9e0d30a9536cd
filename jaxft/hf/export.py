"""Weights -> a Hugging Face folder, written under a temporary name, read back, compared, and only then put in place."""

import collections
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from jaxft.errors import RequestError, StorageError
from jaxft.hf import load_weights, repo
from jaxft.hf.export_tensors import DtypeFn, ExportTensor, always_float32, hf_tensors, make_dtype_fn
from jaxft.hf.tokenizer import TOKENIZER_FILES, bos_token_id, save_tokenizer, verify_tokenizer
from jaxft.hf.verify import check_hf_config, verify_export
from jaxft.hf.weight_map import EMBEDDING, full_name
from jaxft.utils.files import is_encodable, write_failure, write_json

# Keys of config.json that name code to be loaded: there is none of it in an export.
DROPPED_KEYS = (
  "auto_map",
  "custom_pipelines",
  "attn_implementation",
  "_attn_implementation",
  "trust_remote_code",
)
GENERATION_CONFIG = "generation_config.json"
# The folder in a workdir with config and tokenizer of the run's model, and the files that may be in it.
RUN_MODEL = "run.model"
RUN_MODEL_FILES = ("config.json", GENERATION_CONFIG, *TOKENIZER_FILES)


def validate_export(out: Path) -> list[str]:
  """What is in the way of an export to `out`, at most one line. Only what jaxft has exported is ever replaced.

  A link leads to where the export is written, which may be another disk.
  """
  named = str(out)
  if not is_encodable(str(out.absolute())):
    return [
      f"export to {named!r}: its name is not UTF-8, which tokenizers cannot write to; name another folder"
    ]
  try:
    if out.is_symlink() and not out.exists():
      return [
        f"export to {named!r}: a link that leads nowhere; make {os.readlink(out)!r}, or name another folder"
      ]
    out = Path(os.path.realpath(out))
    if out in (Path.cwd(), *Path.cwd().parents):
      return [
        f"export to {named!r}: this is where the command was started; name a folder to be made"
      ]
    above = next(path for path in out.parents if os.path.lexists(path))
    if not above.is_dir():
      return [f"export to {named!r}: {above} is no folder"]
    for name in (*out.relative_to(above).parts, _partial_path(out).name, _backup_path(out).name):
      with contextlib.suppress(FileNotFoundError):
        os.lstat(above / name)  # a name may be too long
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
      return []
    if (out / repo.PARITY_FILE).is_file() and not any(inside.is_dir() for inside in out.iterdir()):
      return []
  except OSError as error:
    return [f"export to {named!r}: {error.strerror}"]
  return [
    f"export to {named!r}: it is there, and is no earlier export (no {repo.PARITY_FILE} in it); name another folder"
  ]


def export_model(
  out: Path,
  params: Any,
  checkpoint: repo.HFCheckpoint,
  *,
  dtype: str = "float32",
  max_shard_size: str = "5GB",
  card: str = "",
  tokenizer: Any = None,
  stored: repo.HFCheckpoint | None = None,
) -> dict[str, Any]:
  """Writes `params` as a model that transformers' `from_pretrained(out)` loads, and returns its parity report.

  Args:
    out: the folder; one that is already there is replaced if it is empty or an earlier export, and else refused.
    params: parameters as `model.abstract_model` nests them, on any mesh.
    checkpoint: where the config comes from.
    dtype: of `EXPORT_DTYPES`, or "source": for each tensor the dtype that it has in `stored`, and float32 if it is not there.
    stored: None: `checkpoint`.
    tokenizer: what `jaxft.hf.tokenizer.load_tokenizer` returned; None: none is written.
    card: text of the model card (README.md); empty: the checkpoint's own, if it has one.

  Raises:
    StorageError: the disk refused, or what was read back is not what was written.
    RequestError: `out` holds something else.

  In a run of several processes all of them must call it; process 0 writes, and returns the report that the others return empty.
  """
  dtype_of = make_dtype_fn(stored or checkpoint, dtype)
  _check_float16_range(params, checkpoint, dtype_of)
  if jax.process_index() > 0:
    return _join_gathers(params, checkpoint, dtype_of, max_shard_size)
  if lines := validate_export(out):
    raise RequestError("\n".join(lines))
  out = Path(os.path.realpath(out))
  partial = _partial_path(out)
  try:
    _recover_replace(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_weights(partial, params, checkpoint, dtype_of, max_shard_size)
    main_dtype = dtype_of(full_name(EMBEDDING)).name
    write_config_files(
      partial, checkpoint, tokenizer, {"dtype": main_dtype, "torch_dtype": main_dtype}
    )
    if (checkpoint.folder / "README.md").is_file():
      shutil.copyfile(checkpoint.folder / "README.md", partial / "README.md")
    if card:
      (partial / "README.md").write_text(card, encoding="utf-8")
    parity = verify_export(partial, params, checkpoint, dtype_of, tokenizer) | {
      "sha256": repo.checksums(partial)
    }
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
  folder: Path, checkpoint: repo.HFCheckpoint, tokenizer: Any, more: Mapping[str, Any]
) -> None:
  """Writes all of a model but its weights and its card: config.json with `more` in it, generation_config.json, tokenizer.

  Of both configs the tokens that begin, end and fill up a text are the tokenizer's, with which the model was trained.
  """
  hf_config = {key: value for key, value in checkpoint.hf_config.items() if key not in DROPPED_KEYS}
  hf_config |= {
    "architectures": [checkpoint.architecture],
    **more,
    **_special_ids(hf_config, tokenizer),
  }
  if checkpoint.cfg.classes and tokenizer:
    hf_config["pad_token_id"] = repo.choose_pad_token(checkpoint, tokenizer)
  if hf_config["model_type"] == "gpt2" and hf_config.get("n_ctx") is None:
    hf_config["n_ctx"] = checkpoint.cfg.P  # which llama.cpp's converter asks for
  write_json(folder / "config.json", hf_config)
  source = checkpoint.folder / GENERATION_CONFIG
  says = repo.read_json(source) if source.is_file() else {}
  if not checkpoint.cfg.classes or says:
    says = {
      key: hf_config[key] for key in ("bos_token_id", "eos_token_id") if key in hf_config
    } | says
    write_json(folder / GENERATION_CONFIG, says | _special_ids(says, tokenizer))
  if tokenizer:
    # jaxft pads on the right, and transformers must where no position_ids are given.
    more = {"padding_side": "right"} if checkpoint.cfg.classes else {}
    positions, pad = checkpoint.cfg.P, hf_config.get("pad_token_id")
    save_tokenizer(
      tokenizer, checkpoint.tokenizer_folder, folder, more, positions=positions, pad_token_id=pad
    )


def validate_workdir(workdir: Path) -> list[str]:
  """Why config and tokenizer cannot be written into a workdir, at most one line: other files have the folder's name."""
  folder = workdir / RUN_MODEL
  try:
    strange = [
      file.name
      for file in folder.iterdir()
      if file.name not in RUN_MODEL_FILES or not file.is_file()
    ]
  except FileNotFoundError:
    strange = []
  except OSError as error:
    return [f"{str(folder)!r}: {error.strerror}"]
  return [
    f"{str(folder)!r}: a run writes its model's config there, and {name!r} is none of it"
    for name in strange[:1]
  ]


def is_hf_model(folder: Path) -> bool:
  """Whether a folder has the config.json of a model, and not that of a run."""
  try:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):
    return False
  return isinstance(config, dict) and "model_type" in config


def save_run_model(workdir: Path, checkpoint: repo.HFCheckpoint, tokenizer: Any) -> None:
  """Replaces WORKDIR/run.model by what `write_config_files` writes, in one rename.

  The run's checkpoints can then be used when the folder of the model is gone. Raises RequestError where anything else is there.
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
  """The folder of a workdir with config and tokenizer of its model; None where a run of before 2026-11-28 has none."""
  folders = (
    workdir / RUN_MODEL,
    _backup_path(workdir / RUN_MODEL),
  )  # the second: of a start that was killed just then
  return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def _special_ids(says: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
  """The tokenizer's special tokens, as the keys of a config; what else may end a text there stays."""
  if tokenizer is None:
    return {}
  found = {"bos_token_id": bos_token_id(tokenizer), "eos_token_id": tokenizer.eos_token_id}
  found |= {} if tokenizer.pad_token_id is None else {"pad_token_id": tokenizer.pad_token_id}
  if isinstance(ends := says.get("eos_token_id"), list):
    found["eos_token_id"] = [
      found["eos_token_id"],
      *(end for end in ends if end != found["eos_token_id"]),
    ]
  return found


def check_exportable(checkpoint: repo.HFCheckpoint, tokenizer: Any) -> None:
  """Raises RequestError where transformers would not read config and tokenizer of an export as they are meant.

  To be asked before training: what is wrong with them is known long before there are weights to write.
  """
  with tempfile.TemporaryDirectory(prefix="jaxft-") as folder:
    write_config_files(Path(folder), checkpoint, tokenizer, {})
    check_hf_config(Path(folder), checkpoint)
    verify_tokenizer(Path(folder), tokenizer, checkpoint.tokenizer_folder)


def _check_float16_range(params: Any, checkpoint: repo.HFCheckpoint, dtype_of: DtypeFn) -> None:
  """Raises RequestError for a weight that is beyond the largest number of the dtype that it would be written in."""
  limit = 65520  # float16 ends at 65504, to which what is below this is rounded
  for tensor in hf_tensors(params, checkpoint, always_float32):
    if (dtype := dtype_of(tensor.name)) == np.float16:
      largest = max((float(np.abs(piece).max(initial=0)) for piece in tensor.chunks()), default=0.0)
      if not largest < limit:  # NaN neither
        raise RequestError(
          f"{tensor.name} has a weight of {largest:.6g}, and {dtype.name} ends at 65504; export in bfloat16 or float32"
        )


def _write_weights(
  folder: Path, params: Any, checkpoint: repo.HFCheckpoint, dtype_of: DtypeFn, max_shard_size: str
) -> None:
  files, plan = _plan_files(params, checkpoint, dtype_of, max_shard_size)
  for file, tensors in files.items():
    _write_safetensors(folder / file, tensors)
  if plan.is_sharded:
    write_json(
      folder / "model.safetensors.index.json",
      {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename},
    )


def _plan_files(
  params: Any, checkpoint: repo.HFCheckpoint, dtype_of: DtypeFn, max_shard_size: str
) -> tuple[dict[str, dict[str, ExportTensor]], Any]:
  """The tensors of each file, in the order in which they are written, and the library's plan."""
  tensors = {tensor.name: tensor for tensor in hf_tensors(params, checkpoint, dtype_of)}
  plan = split_state_dict_into_shards_factory(
    tensors,
    get_storage_size=lambda tensor: tensor.nbytes,
    get_storage_id=lambda _: None,
    filename_pattern="model{suffix}.safetensors",
    max_shard_size=max_shard_size,
  )
  aligned = lambda name: (
    -tensors[name].dtype.itemsize
  )  # wide ones first: each begins at a multiple of its own size
  files = plan.filename_to_tensors.items()
  return {
    file: {name: tensors[name] for name in sorted(names, key=aligned)} for file, names in files
  }, plan


def _join_gathers(
  params: Any, checkpoint: repo.HFCheckpoint, dtype_of: DtypeFn, max_shard_size: str
) -> dict[str, Any]:
  """The part of a process that does not write: it takes part in gathering each piece, to write it and to compare it."""
  files, _ = _plan_files(params, checkpoint, dtype_of, max_shard_size)
  written = [tensor for tensors in files.values() for tensor in tensors.values()]
  for tensor in (*written, *hf_tensors(params, checkpoint, dtype_of)):
    collections.deque(tensor.chunks(), maxlen=0)
  return {}


def _write_safetensors(file: Path, tensors: dict[str, ExportTensor]) -> None:
  """A safetensors file, one tensor in memory at a time: the library's own writer wants them all (0.8)."""
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for name, tensor in tensors.items():
    start, end = end, end + tensor.nbytes
    header[name] = {
      "dtype": load_weights.DTYPE_NAMES[tensor.dtype],
      "shape": tensor.shape,
      "data_offsets": [start, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
  with file.open("wb") as stream:
    stream.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
      for piece in tensor.chunks():
        stream.write(piece.view(np.uint8).data)
    stream.flush()
    os.fsync(stream.fileno())


def _atomic_replace(partial: Path, out: Path) -> None:
  """Renames; a model that was there before is there until the new one is, but for a moment (see `_recover_replace`)."""
  old = _backup_path(out)
  shutil.rmtree(old, ignore_errors=True)
  if out.exists():
    out.rename(old)
  try:
    partial.rename(out)
  except OSError:
    _recover_replace(out)
    raise
  shutil.rmtree(old, ignore_errors=True)


def _recover_replace(out: Path) -> None:
  """Where something ended the process between the two renames, the old model gets its name again."""
  if _backup_path(out).exists() and not out.exists():
    _backup_path(out).rename(out)


def _partial_path(out: Path) -> Path:
  return out.with_name(f".{out.name}.jaxft-partial")


def _backup_path(out: Path) -> Path:
  return out.with_name(f".{out.name}.jaxft-old")
