"""Resolves a Hugging Face id or path to a folder whose files are safe to read, and its config."""

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
from jaxft.utils.files import HUB_URL, exists, is_encodable, reject_lfs_pointer
from jaxft.utils.types import Json

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

# What using and exporting a model needs; weights in other formats stay on the hub.
DOWNLOAD_PATTERNS = ["*.json", "*.txt", "*.safetensors", "*.model", "*.jinja", "README.md"]
WEIGHT_FORMATS = ("model.safetensors", "flax_model.msgpack")  # the first that exists is read
TORCH_PICKLE = "pytorch_model.bin"  # read last, and only on request
# Keys of config.json that describe a head; a new head does not inherit them.
HEAD_KEYS = ("num_labels", "_num_labels", "problem_type", "finetuning_task")
# Of a .json or .txt file, which is read at once; the tokenizer.json of a large vocabulary has 2^25.
MAX_TEXT_BYTES = 2**28
PARITY_FILE = "parity.json"  # of an export: its parity report and the checksums of its files
# Files of PEFT's adapters.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Keys of adapter_config.json -> the values of plain LoRA; any false value is plain as well.
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
PLAIN_LORA["init_lora_weights"] = (True, "gaussian")  # others change the base as well
# All files of a folder that are read, besides weights and their index.
READABLE_FILES = {"config.json", "generation_config.json", "README.md", "encoder.json", "vocab.bpe"}
READABLE_FILES |= {PARITY_FILE, ADAPTER_CONFIG, *TOKENIZER_FILES}


class HFCheckpoint(NamedTuple):
  """A model folder and its parsed config; its weights are not read yet."""

  folder: Path
  hf_config: Json
  cfg: ModelConfig
  torch_bin: bool = False  # pickles may be read
  # The classification head is the run's own: the folder has no weights of it.
  new_head: bool = False
  adapter: Path | None = None  # PEFT's LoRA adapters, merged into the weights as they are read
  tokenizer: Path | None = None  # folder of another tokenizer than the model's own

  @property
  def family(self) -> Family:
    return FAMILIES[self.hf_config["model_type"]]

  @property
  def architecture(self) -> str:
    return self.family.classifier if self.cfg.classes else self.family.architecture

  @property
  def tokenizer_folder(self) -> Path:
    """Where the tokenizer is: adapters may have their own, with which they were trained."""
    if self.tokenizer:
      return self.tokenizer
    if self.adapter and any((self.adapter / name).is_file() for name in VOCAB_FILES):
      return self.adapter
    return self.folder

  @property
  def labels(self) -> list[str]:
    """Names of the classes, in the order of their numbers; [] for a language model."""
    names = self.hf_config.get("id2label") or {}
    return [names.get(str(i), f"LABEL_{i}") for i in range(self.cfg.classes)]


def with_class_head(
  checkpoint: HFCheckpoint, labels: list[str], tokenizer: "PreTrainedTokenizerFast"
) -> HFCheckpoint:
  """Returns the checkpoint with its own classification head, or else a new one for these labels.

  A new head replaces the language head. Raises RequestError where transformers would confuse
  padding with the token that the tokenizer itself puts after a text.
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
  """Returns the padding token: transformers reads the class at the last token that is another."""
  declared = checkpoint.hf_config.get("pad_token_id")
  # A trained head has learned with what its config.json says. A new one needs a token that no text
  # is made of.
  if checkpoint.cfg.classes and not checkpoint.new_head:
    usable = declared in tokenizer.get_vocab().values()
  else:
    usable = is_special(tokenizer, declared)
  candidates = (tokenizer.pad_token_id, declared if usable else None, tokenizer.eos_token_id)
  pad_token_id = next(id for id in candidates if id is not None)
  if tokenize.special_ids_around(tokenizer)[1][-1:] == [pad_token_id]:
    raise RequestError(
      f"{checkpoint.folder}: the tokenizer ends each text with "
      f"{tokenizer.convert_ids_to_tokens(pad_token_id)!r}, which is the "
      "padding token too, and transformers would overlook it; give the tokenizer a pad_token of "
      "its own"
    )
  return pad_token_id


def validate_model(path: str, weights: bool = True, torch_bin: bool = False) -> list[str]:
  """Checks config.model.path if it is a folder: at most one line. A hub id is not looked up."""
  try:
    _reject_url(path)
    if path and is_local(path):
      _open_folder(Path(path), weights, torch_bin)
  except RequestError as error:
    return [f"config.model.path: {error}"]
  return []


def is_local(path: str) -> bool:
  """Whether this is a path: it exists, or it cannot be a hub id (NAME or OWNER/NAME)."""
  return exists(Path(path)) or not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", path)


def resolve(
  path: str, revision: str = "main", weights: bool = True, torch_bin: bool = False
) -> HFCheckpoint:
  """Returns the checkpoint that a folder or a hub id names; downloads it if need be.

  Args:
    weights: whether the folder must hold weights.
    torch_bin: whether pytorch_model*.bin may be read, where there are no others.

  Raises RequestError with the way out.
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
  """Returns the folder with the hub's files of these patterns; raises RequestError about `what`."""
  import huggingface_hub

  try:
    return Path(
      huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=patterns)
    )
  except Exception as error:  # hub and network errors share no class
    raise RequestError(
      f"{what}: no such folder, and the hub gave none ({first_line(error)}); check the id, "
      "or give a folder"
    ) from error


def _reject_url(path: str) -> None:
  if not exists(Path(path)) and (url := HUB_URL.fullmatch(path)):
    if url["datasets"]:
      raise RequestError(f"model {path!r}: the address of a data set, not of a model")
    raise RequestError(f"model {path!r}: an address; give the id alone: {url['id']}")


def _open_folder(folder: Path, weights: bool, torch_bin: bool) -> HFCheckpoint:
  if not folder.is_dir():
    raise RequestError(
      f"model folder {str(folder)!r}: no such folder; give one, or a hub id such as gpt2"
    )
  _check_safe_files(folder, [name for name in READABLE_FILES if os.path.lexists(folder / name)])
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
      f"model folder {str(folder)!r}: no config.json in it, so it is not a Hugging Face model; "
      "give a folder with config.json and model.safetensors, or a hub id such as gpt2"
    )
  verify_checksums(folder, weights=False)
  if weights:
    weight_files(folder, torch_bin)
  return read_checkpoint(folder, torch_bin)


def _resolve_adapter(folder: Path, weights: bool, torch_bin: bool) -> HFCheckpoint:
  """Returns the base model that a folder of LoRA adapters names, to be merged with them when read.

  Raises RequestError for adapters whose maths is not built.
  """
  file = folder / ADAPTER_CONFIG
  config = read_json(file)
  for key, plain in PLAIN_LORA.items():
    if config.get(key) and config[key] not in plain:
      raise RequestError(
        f"{file}: {key}={config[key]!r}: only plain LoRA can be merged here; "
        "merge it with PEFT (merge_and_unload), and give the model"
      )
  base = config.get("base_model_name_or_path")
  revision = config.get("revision") or "main"
  if not isinstance(base, str) or not base or not isinstance(revision, str):
    raise RequestError(f"{file}: base_model_name_or_path={base!r} names no model")
  if weights and not (folder / ADAPTER_WEIGHTS).is_file():
    raise RequestError(
      f"{folder}: no {ADAPTER_WEIGHTS} in it (an adapter_model.bin is a pickle, and not read)"
    )
  if weights:
    _check_safe_files(folder, [ADAPTER_WEIGHTS])
  if not exists(Path(base)) and exists(folder / base):
    base = str(folder / base)
  if (Path(base) / ADAPTER_CONFIG).is_file() and not (Path(base) / "config.json").is_file():
    raise RequestError(
      f"{folder}: adapters of {base!r}, which is a folder of adapters itself; merge that one first"
    )
  try:
    checkpoint = resolve(base, revision, weights, torch_bin)
  except RequestError as error:
    raise RequestError(
      f"{folder}: adapters of {base!r}, which is not there ({first_line(error)})"
    ) from error
  return checkpoint._replace(adapter=folder)


def read_checkpoint(folder: Path, torch_bin: bool = False) -> HFCheckpoint:
  """Parses a folder's config.json; raises RequestError naming the folder."""
  hf_config = read_json(folder / "config.json")
  try:
    cfg = model_config.from_hf_config(hf_config)
  except RequestError as error:
    raise RequestError(f"{folder}: {error}") from error
  return HFCheckpoint(folder=folder, hf_config=hf_config, cfg=cfg, torch_bin=torch_bin)


def weight_files(folder: Path, torch_bin: bool = False) -> list[Path]:
  """Lists the weight files of the first of `WEIGHT_FORMATS` that exists: one, or an index's shards.

  A shard lies in the folder itself and has the format of its index.
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
    f"; {TORCH_PICKLE} is a pickle, which is read (by torch, weights_only) only when asked: "
    "--config.model.torch_bin=True to train, --torch_bin for the other commands"
  )
  raise RequestError(
    f"model folder {str(folder)!r}: none of {', '.join(WEIGHT_FORMATS)} in it, "
    f"whole or with an index{advice if pickled else ''}"
  )


def checksums(folder: Path) -> dict[str, str]:
  """Returns the SHA-256 of every file of an export but its card, which people edit."""
  excluded = (PARITY_FILE, "README.md")
  files = sorted(it for it in folder.iterdir() if it.is_file() and it.name not in excluded)
  with ThreadPoolExecutor() as threads:  # hashing releases Python's lock
    names = (file.name for file in files)
    return dict(zip(names, threads.map(_sha256, files), strict=True))


def verify_checksums(folder: Path, weights: bool) -> None:
  """Raises RequestError when a file of an export has changed: a flipped bit would load silently.

  Folders that jaxft has not exported have no checksums, and pass.

  Args:
    weights: check the weights, or else all other files, which costs little.
  """
  if not (folder / PARITY_FILE).is_file():
    return
  expected = read_json(folder / PARITY_FILE).get("sha256", {})
  if not isinstance(expected, dict):
    raise RequestError(
      f"{folder / PARITY_FILE}: its checksums are not a list of files; export again, or remove it"
    )
  names = [name for name in expected if name.endswith(".safetensors") == weights]
  files = [folder / Path(name).name for name in names]
  with ThreadPoolExecutor() as threads:
    digests = [threads.submit(_sha256, file) for file in files]
  for name, file, digest in zip(names, files, digests, strict=True):
    is_readable = digest.exception() is None
    if not is_readable or digest.result() != expected[name]:
      what = "is not what was exported" if is_readable else "was exported, and cannot be read"
      raise RequestError(
        f"{file}: {what} (by its SHA-256 in {PARITY_FILE}); "
        f"export again, or remove {PARITY_FILE} if you changed it"
      )


def _sha256(file: Path) -> str:
  with file.open("rb") as stream:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_index(index: Path, suffix: str) -> list[str]:
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
    raise RequestError(f"{index}: not an index of weights: it has no weight_map of file names")
  for name in weight_map.values():
    if not name.endswith(suffix):
      raise RequestError(f"{index}: {name[:100]!r} is no {suffix} file")
  return sorted(set(weight_map.values()))


def read_json(file: Path) -> Json:
  """Reads a JSON object; raises RequestError for anything else."""
  try:
    content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=reject_duplicate_keys)
  except (OSError, ValueError, RecursionError) as error:
    raise RequestError(f"{file}: {first_line(error)}") from error
  if not isinstance(content, dict):
    raise RequestError(f"{file}: not a JSON object")
  return content


def reject_duplicate_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
  """Builds a JSON object; ValueError where a key occurs twice: readers disagree on which counts."""
  content = dict(pairs)
  if len(content) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"{twice[:100]!r} is in it twice")
  return content


def _files_in_folder(folder: Path, named_in: Path, names: list[str]) -> list[Path]:
  for name in names:
    plain = Path(name).name == name and "\0" not in name and is_encodable(name)
    # A broken link is refused later, with advice.
    if not plain or not os.path.lexists(folder / name) or (folder / name).is_dir():
      raise RequestError(f"{named_in}: {name[:100]!r} is not a file of this folder")
  _check_safe_files(folder, names)
  return [folder / name for name in names]


def _check_safe_files(folder: Path, names: Iterable[str]) -> None:
  """Raises RequestError where a file that is read or exported lies elsewhere, or is a pipe.

  Other files of the folder are not looked at.
  """
  # The hub's cache links each file to ../../blobs/HASH: only out of its own folders,
  # models--X/snapshots/Y, may a link lead.
  root = folder.resolve()
  root = root.parent.parent if root.parent.name == "snapshots" else root
  for file in (folder / name for name in sorted(names)):
    if file.is_symlink() and not file.resolve().is_relative_to(root):
      raise RequestError(
        f"{file}: a link that leads out of this folder; "
        f"copy the folder with the files themselves: cp -rL {folder} COPY"
      )
    if not file.is_file() and not file.is_dir():
      raise RequestError(f"{file}: not an ordinary file")
    if file.suffix in (".json", ".txt") and file.stat().st_size > MAX_TEXT_BYTES:
      raise RequestError(f"{file}: {file.stat().st_size:,} bytes are too many for such a file")
    reject_lfs_pointer(file)


def fingerprint(checkpoint: HFCheckpoint, whole: bool = False) -> str:
  """Identifies the weights: by all bytes, or by sizes and 17 samples of 64 KB in each file."""
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
