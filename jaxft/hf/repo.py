"""Resolves a Hugging Face id or path to a folder and its parsed config.

Every file is checked before it is read: it must be a regular file inside the folder.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jaxft.data import tokenize
from jaxft.errors import RequestError, first_line
from jaxft.hf import model_config
from jaxft.hf.tokenizer import TOKENIZER_FILES, VOCAB_FILES, is_special
from jaxft.hf.weight_map import FAMILIES, Family
from jaxft.model.config import ModelConfig
from jaxft.utils.files import (
  HUB_URL,
  exists,
  is_encodable,
  read_json_object,
  reject_lfs_pointer,
)
from jaxft.utils.types import Json

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

# The files needed to use and export a model. Weights in other formats are not downloaded.
DOWNLOAD_PATTERNS = ["*.json", "*.txt", "*.safetensors", "*.model", "*.jinja", "README.md"]
WEIGHT_FORMATS = ("model.safetensors", "flax_model.msgpack")  # the first that exists is read
TORCH_PICKLE = "pytorch_model.bin"  # read last, and only on request: a pickle can run code
# Keys of config.json that describe a head. A new head does not inherit them.
HEAD_KEYS = ("num_labels", "_num_labels", "problem_type", "finetuning_task")
# Limit for .json and .txt files, which are read whole. A large tokenizer.json has 2^25.
MAX_TEXT_BYTES = 2**28
PARITY_FILE = "parity.json"  # an export's parity report and the checksums of its files
RUN_MODEL = "run.model"  # folder in a workdir with the config and tokenizer of the run's model
# Files of an adapter folder in PEFT's format.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Keys of adapter_config.json -> their values in plain LoRA. Any false value is plain LoRA too.
PLAIN_LORA: dict[str, tuple[object, ...]] = {
  "peft_type": ("LORA",),
  "task_type": ("CAUSAL_LM",),
  "bias": ("none",),
}
PLAIN_LORA |= dict.fromkeys(
  "use_dora use_rslora rank_pattern alpha_pattern modules_to_save trainable_token_indices "
  "lora_bias layer_replication target_parameters use_qalora use_bdlora alora_invocation_tokens "
  "arrow_config".split(),
  (),
)
PLAIN_LORA["init_lora_weights"] = (True, "gaussian")  # other values change the base model too
# All files of a folder that jaxft reads, except weights and their index.
READABLE_FILES = {"config.json", "generation_config.json", "README.md", "encoder.json", "vocab.bpe"}
READABLE_FILES |= {PARITY_FILE, ADAPTER_CONFIG, *TOKENIZER_FILES}


class HFCheckpoint(NamedTuple):
  """A model folder and its parsed config; its weights are read later."""

  folder: Path
  hf_config: Json
  cfg: ModelConfig
  torch_bin: bool = False  # whether pytorch_model*.bin may be read
  # The run adds the classification head, so the folder has no weights for it.
  new_head: bool = False
  adapter: Path | None = (
    None  # folder of LoRA adapters, which are merged into the weights on reading
  )
  tokenizer: Path | None = None  # folder of a tokenizer that replaces the model's own

  @property
  def family(self) -> Family:
    """Weight names and class names of the model's family."""
    return FAMILIES[self.hf_config["model_type"]]

  @property
  def architecture(self) -> str:
    """Name of transformers' class for this model and head."""
    return self.family.classifier if self.cfg.classes else self.family.architecture

  @property
  def tokenizer_folder(self) -> Path:
    """Folder of the tokenizer, which may be the one of the adapters."""
    if self.tokenizer:
      return self.tokenizer
    if self.adapter and any((self.adapter / name).is_file() for name in VOCAB_FILES):
      return self.adapter
    return self.folder

  @property
  def labels(self) -> list[str]:
    """Class names by class id; [] for a language model."""
    names = self.hf_config.get("id2label") or {}
    return [names.get(str(i), f"LABEL_{i}") for i in range(self.cfg.classes)]


def with_class_head(
  checkpoint: HFCheckpoint, labels: list[str], tokenizer: "PreTrainedTokenizerFast"
) -> HFCheckpoint:
  """Return the checkpoint with its classification head, or a new one for `labels`.

  A new head replaces the language head.

  Raises:
    RequestError: the tokenizer ends each text with the padding token, see `choose_pad_token`.
  """
  has_head = checkpoint.cfg.classes > 0
  labels = checkpoint.labels if has_head else labels
  dropped = () if has_head else HEAD_KEYS
  hf_config = {key: value for key, value in checkpoint.hf_config.items() if key not in dropped}
  hf_config |= {
    "architectures": [checkpoint.family.classifier],
    "id2label": {str(i): label for i, label in enumerate(labels)},
    "label2id": {label: i for i, label in enumerate(labels)},
    "problem_type": "single_label_classification",
    "pad_token_id": choose_pad_token(checkpoint, tokenizer),
  }
  cfg = dataclasses.replace(checkpoint.cfg, classes=len(labels))
  return checkpoint._replace(hf_config=hf_config, cfg=cfg, new_head=not has_head)


def choose_pad_token(checkpoint: HFCheckpoint, tokenizer: "PreTrainedTokenizerFast") -> int:
  """Return the padding token of a classifier.

  transformers reads the class at the last token that is not padding. So no text may contain the
  padding token.

  Raises:
    RequestError: the tokenizer ends each text with the padding token.
  """
  declared = checkpoint.hf_config.get("pad_token_id")
  # A trained head keeps the token of its config.json, which it was trained with. A new head needs
  # a token that no ordinary text contains.
  if checkpoint.cfg.classes and not checkpoint.new_head:
    usable = declared in tokenizer.get_vocab().values()
  else:
    usable = is_special(tokenizer, declared)
  candidates = (tokenizer.pad_token_id, declared if usable else None, tokenizer.eos_token_id)
  pad_token_id = next(id for id in candidates if id is not None)
  if tokenize.special_ids_around(tokenizer)[1][-1:] == [pad_token_id]:
    raise RequestError(
      f"{checkpoint.folder}: the tokenizer ends each text with "
      f"{tokenizer.convert_ids_to_tokens(pad_token_id)!r}, which is also the "
      "padding token, so transformers would ignore it; give the tokenizer a separate pad_token"
    )
  return pad_token_id


def validate_model(path: str, weights: bool = True, torch_bin: bool = False) -> list[str]:
  """Check config.model.path if it is a folder; return at most one error.

  A hub id is not looked up.
  """
  try:
    _reject_url(path)
    if path and is_local(path):
      _open_folder(Path(path), weights, torch_bin)
  except RequestError as error:
    return [f"config.model.path: {error}"]
  return []


def is_local(path: str) -> bool:
  """Return whether this is a path: it exists, or is not NAME or OWNER/NAME."""
  return exists(Path(path)) or not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", path)


def resolve(
  path: str, revision: str = "main", weights: bool = True, torch_bin: bool = False
) -> HFCheckpoint:
  """Return the checkpoint of a folder or hub id; download it if necessary.

  Args:
    path: a folder or a hub id.
    revision: branch, tag or commit of a hub id.
    weights: whether the folder must contain weights.
    torch_bin: whether pytorch_model*.bin may be read if no other weights exist.

  Raises:
    RequestError: it is not a model that jaxft can use.
  """
  _reject_url(path)
  if is_local(path):
    return _open_folder(Path(path), weights, torch_bin)
  what = f"config.model.path or --model, {path!r}"
  folder = download(what, path, DOWNLOAD_PATTERNS, revision)
  weight_patterns = ["*.safetensors", "flax_model*.msgpack"]
  weight_patterns += ["pytorch_model*.bin"] if torch_bin else []
  for pattern in weight_patterns if weights else ():
    if any(folder.glob(pattern)):
      break
    download(what, path, [pattern], revision)
  return _open_folder(folder, weights, torch_bin)


def download(what: str, hub_id: str, patterns: list[str], revision: str | None = None) -> Path:
  """Return the local folder of a hub id's files that match `patterns`.

  Raises RequestError, which begins with `what`, if the hub does not deliver them.
  """
  import huggingface_hub

  try:
    return Path(
      huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=patterns)
    )
  except Exception as error:  # hub and network errors share no class
    raise RequestError(
      f"{what}: not a local folder, and the download from the hub failed ({first_line(error)}); "
      "check the id, or give a folder; the model of --config quickstart needs no network"
    ) from error


def _reject_url(path: str) -> None:
  if not exists(Path(path)) and (url := HUB_URL.fullmatch(path)):
    if url["datasets"]:
      raise RequestError(f"model {path!r}: this is the URL of a data set; give the id of a model")
    raise RequestError(f"model {path!r}: this is a URL; give only the id: {url['id']}")


def _open_folder(folder: Path, weights: bool, torch_bin: bool) -> HFCheckpoint:
  if not folder.is_dir():
    raise RequestError(
      f"model folder {str(folder)!r}: no such folder; give another, or a hub id such as gpt2"
    )
  _check_safe_files(folder, [name for name in READABLE_FILES if os.path.lexists(folder / name)])
  _reject_workdir(folder)
  has_config = (folder / "config.json").is_file()
  has_weights = any(
    (folder / f"{name}{suffix}").is_file()
    for name in (*WEIGHT_FORMATS, TORCH_PICKLE)
    for suffix in ("", ".index.json")
  )
  if (folder / ADAPTER_CONFIG).is_file() and not (has_config and has_weights):
    return _resolve_adapter(folder, weights, torch_bin)
  if not has_config:
    raise RequestError(
      f"model folder {str(folder)!r}: it has no config.json, so it is not a Hugging Face model; "
      "give a folder with config.json and model.safetensors, or a hub id such as gpt2"
    )
  verify_checksums(folder, weights=False)
  if weights:
    weight_files(folder, torch_bin)
  return read_checkpoint(folder, torch_bin)


def _reject_workdir(folder: Path) -> None:
  """Raise RequestError for the folder of a run, and name the run's export."""
  config = read_json_object(folder / "config.json", [])
  has_run_config = isinstance(config.get("model"), dict) and isinstance(config.get("train"), dict)
  if "model_type" in config or not (has_run_config or (folder / RUN_MODEL).is_dir()):
    return
  export = folder / "export"
  way_out = f"give its export, {str(export)!r}"
  if not (export / "config.json").is_file():
    way_out = f"export it first: python -m jaxft.export --workdir {folder} --out {export}"
  raise RequestError(
    f"model folder {str(folder)!r}: this is the folder of a run, not of a model; {way_out}"
  )


def _resolve_adapter(folder: Path, weights: bool, torch_bin: bool) -> HFCheckpoint:
  """Return the base model of a folder of LoRA adapters.

  Reading its weights merges the adapters. Raises RequestError for adapters that are not plain LoRA.
  """
  file = folder / ADAPTER_CONFIG
  config = read_json(file)
  for key, plain in PLAIN_LORA.items():
    if config.get(key) and config[key] not in plain:
      raise RequestError(
        f"{file}: {key}={config[key]!r} is not supported, only plain LoRA is; "
        "merge it with PEFT (merge_and_unload), and give the merged model"
      )
  base = config.get("base_model_name_or_path")
  revision = config.get("revision") or "main"
  if not isinstance(base, str) or not base or not isinstance(revision, str):
    raise RequestError(f"{file}: base_model_name_or_path={base!r} must name the base model")
  if weights and not (folder / ADAPTER_WEIGHTS).is_file():
    raise RequestError(
      f"{folder}: it has no {ADAPTER_WEIGHTS} (adapter_model.bin is a pickle and is not read); "
      "save the adapters as safetensors"
    )
  if weights:
    _check_safe_files(folder, [ADAPTER_WEIGHTS])
  if not exists(Path(base)) and exists(folder / base):
    base = str(folder / base)
  if (Path(base) / ADAPTER_CONFIG).is_file() and not (Path(base) / "config.json").is_file():
    raise RequestError(
      f"{folder}: the base model {base!r} is itself a folder of adapters; merge that one first"
    )
  try:
    checkpoint = resolve(base, revision, weights, torch_bin)
  except RequestError as error:
    raise RequestError(
      f"{folder}: cannot load the adapters' base model {base!r} ({first_line(error)})"
    ) from error
  return checkpoint._replace(adapter=folder)


def read_checkpoint(folder: Path, torch_bin: bool = False) -> HFCheckpoint:
  """Parse a folder's config.json; raise RequestError if it is wrong."""
  hf_config = read_json(folder / "config.json")
  try:
    cfg = model_config.from_hf_config(hf_config)
  except RequestError as error:
    raise RequestError(f"{folder}: {error}") from error
  return HFCheckpoint(folder=folder, hf_config=hf_config, cfg=cfg, torch_bin=torch_bin)


def weight_files(folder: Path, torch_bin: bool = False) -> list[Path]:
  """List a folder's weight files: one file, or the shards of an index.

  They have the first of `WEIGHT_FORMATS` that exists. Shards must be in the folder itself and have
  the format of their index.

  Raises:
    RequestError: the folder has no weights that may be read, or an unsafe file.
  """
  for name in (*WEIGHT_FORMATS, TORCH_PICKLE) if torch_bin else WEIGHT_FORMATS:
    index = folder / f"{name}.index.json"
    if os.path.lexists(folder / name):
      return _files_in_folder(folder, folder / name, [name])
    if os.path.lexists(index):
      _check_safe_files(folder, [index.name])
      return _files_in_folder(folder, index, _read_index(index, Path(name).suffix))
  pickled = any(folder.glob("pytorch_model*.bin"))
  advice = (
    f"; to read {TORCH_PICKLE}, a pickle, with torch (weights_only), set "
    "--config.model.torch_bin=True to train, or --torch_bin for other commands"
  )
  raise RequestError(
    f"model folder {str(folder)!r}: it has no {' or '.join(WEIGHT_FORMATS)}, "
    f"nor an index of either{advice if pickled else ''}"
  )


def checksums(folder: Path) -> dict[str, str]:
  """Return the SHA-256 of every file of an export, except its model card.

  People edit model cards.
  """
  excluded = (PARITY_FILE, "README.md")
  files = sorted(it for it in folder.iterdir() if it.is_file() and it.name not in excluded)
  with ThreadPoolExecutor() as threads:  # hashing releases Python's lock
    names = (file.name for file in files)
    return dict(zip(names, threads.map(_sha256, files), strict=True))


def verify_checksums(folder: Path, weights: bool) -> None:
  """Check the files of an export; a flipped bit would otherwise load silently.

  Folders that jaxft has not exported have no checksums and pass.

  Args:
    folder: a model folder.
    weights: whether to check the weights, or all other files, which is quick.

  Raises:
    RequestError: a file no longer matches its SHA-256.
  """
  if not (folder / PARITY_FILE).is_file():
    return
  expected = read_json(folder / PARITY_FILE).get("sha256", {})
  if not isinstance(expected, dict):
    raise RequestError(
      f"{folder / PARITY_FILE}: its sha256 is not an object of file names; export again, or remove "
      "this file"
    )
  names = [name for name in expected if name.endswith(".safetensors") == weights]
  files = [folder / Path(name).name for name in names]
  with ThreadPoolExecutor() as threads:
    digests = [threads.submit(_sha256, file) for file in files]
  for name, file, digest in zip(names, files, digests, strict=True):
    is_readable = digest.exception() is None
    if not is_readable or digest.result() != expected[name]:
      what = "has changed since the export" if is_readable else "can no longer be read"
      raise RequestError(
        f"{file}: this file {what} (by its SHA-256 in {PARITY_FILE}); "
        f"export again, or remove {PARITY_FILE} if you changed it"
      )


def _sha256(file: Path) -> str:
  with file.open("rb") as stream:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_index(index: Path, suffix: str) -> list[str]:
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
    raise RequestError(f"{index}: not an index of weights: weight_map must map to file names")
  for name in weight_map.values():
    if not name.endswith(suffix):
      raise RequestError(f"{index}: {name[:100]!r} is not a {suffix} file")
  return sorted(set(weight_map.values()))


def read_json(file: Path) -> Json:
  """Read a JSON object; raise RequestError for anything else."""
  try:
    content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=reject_duplicate_keys)
  except (OSError, ValueError, RecursionError) as error:
    raise RequestError(f"{file}: {first_line(error)}") from error
  if not isinstance(content, dict):
    raise RequestError(f"{file}: not a JSON object")
  return content


def reject_duplicate_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
  """Build a JSON object; raise ValueError if a key occurs twice.

  JSON readers disagree on which of the two values counts.
  """
  content = dict(pairs)
  if len(content) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"it has the key {twice[:100]!r} twice")
  return content


def _files_in_folder(folder: Path, named_in: Path, names: list[str]) -> list[Path]:
  for name in names:
    plain = Path(name).name == name and "\0" not in name and is_encodable(name)
    # `_check_safe_files` refuses a broken link, with advice.
    if not plain or not os.path.lexists(folder / name) or (folder / name).is_dir():
      raise RequestError(f"{named_in}: {name[:100]!r} is not a file of this folder")
  _check_safe_files(folder, names)
  return [folder / name for name in names]


def _check_safe_files(folder: Path, names: Iterable[str]) -> None:
  """Raise RequestError if a file is a link out of the folder, a pipe, or too large.

  Only files that jaxft reads or exports are checked.
  """
  # The hub's cache links each file to ../../blobs/HASH. Only links from its folders
  # models--X/snapshots/Y may lead that far up.
  root = folder.resolve()
  root = root.parent.parent if root.parent.name == "snapshots" else root
  for file in (folder / name for name in sorted(names)):
    if file.is_symlink() and not file.resolve().is_relative_to(root):
      raise RequestError(
        f"{file}: a link to a file outside this folder; "
        f"copy the folder with its link targets: cp -rL {folder} COPY"
      )
    if not file.is_file() and not file.is_dir():
      raise RequestError(f"{file}: not a regular file")
    if file.suffix in (".json", ".txt") and file.stat().st_size > MAX_TEXT_BYTES:
      raise RequestError(
        f"{file}: too large: {file.stat().st_size:,} bytes; the limit is {MAX_TEXT_BYTES:,}"
      )
    reject_lfs_pointer(file)


def fingerprint(checkpoint: HFCheckpoint, whole: bool = False) -> str:
  """Return a hash of the weights.

  It covers all bytes if `whole`, otherwise the size and 17 samples of 64 KB of each file.
  """
  digest = hashlib.sha256(json.dumps(checkpoint.hf_config, sort_keys=True).encode())
  sample_bytes = 2**16
  files = weight_files(checkpoint.folder, checkpoint.torch_bin)
  if checkpoint.adapter:
    files += [checkpoint.adapter / ADAPTER_CONFIG, checkpoint.adapter / ADAPTER_WEIGHTS]
  for file in files:
    size = file.stat().st_size
    digest.update(f"{file.name} {size} ".encode())
    with file.open("rb") as stream:
      if whole:
        digest.update(hashlib.file_digest(stream, "sha256").digest())
      for i in range(0 if whole else 17):
        stream.seek(max(0, size - sample_bytes) * i // 16)
        digest.update(stream.read(sample_bytes))
  return digest.hexdigest()
