"""A Hugging Face folder or hub id -> a folder whose files can be trusted to be files, and its ModelConfig."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.data import tokenize
from jaxft.errors import RequestError, first_line
from jaxft.hf import model_config
from jaxft.hf.tokenizer import FILES, VOCAB_FILES, is_special
from jaxft.hf.weight_map import FAMILIES, Family
from jaxft.model.config import ModelConfig
from jaxft.utils.files import HUB_URL, exists, is_encodable, reject_lfs_pointer

# What a folder needs to be used and to be exported again; weights in other formats stay on the hub.
DOWNLOAD_PATTERNS = ["*.json", "*.txt", "*.safetensors", "*.model", "*.jinja", "README.md"]
WEIGHT_FORMATS = ("model.safetensors", "flax_model.msgpack")  # the first that is there is read
HEAD_KEYS = ("num_labels", "_num_labels", "problem_type", "finetuning_task")  # keys of config.json
MAX_TEXT_BYTES = (
  2**28
)  # bytes of a .json or .txt file, which is read whole; the tokenizer.json of a large vocabulary has 2^25
PARITY_FILE = "parity.json"  # what an export was compared with, and the checksums of its files
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's
# Its keys -> what plain LoRA has there; anything that counts as false will do as well.
PLAIN_LORA = {
  "peft_type": ("LORA",),
  "task_type": ("CAUSAL_LM",),
  "bias": ("none",),
  "use_dora": (),
  "use_rslora": (),
}
UNSUPPORTED_LORA = "rank_pattern alpha_pattern modules_to_save trainable_token_indices lora_bias layer_replication target_parameters "
UNSUPPORTED_LORA += "use_qalora use_bdlora alora_invocation_tokens arrow_config"
PLAIN_LORA |= {key: () for key in UNSUPPORTED_LORA.split()}
PLAIN_LORA["init_lora_weights"] = (True, "gaussian")  # others change the base as well
# All that is read of a folder, besides weights and their index.
READABLE_FILES = {
  "config.json",
  "generation_config.json",
  "README.md",
  "encoder.json",
  "vocab.bpe",
  PARITY_FILE,
  ADAPTER_CONFIG,
  *FILES,
}
TORCH_PICKLE = "pytorch_model.bin"  # read last, and only when it is asked for


class HFCheckpoint(NamedTuple):
  """A folder with a config that can be run; its weights are not read yet."""

  folder: Path
  hf_config: dict[str, Any]
  cfg: ModelConfig
  torch_bin: bool = False  # pickles may be read
  new_head: bool = False  # the classes are the run's own: their scores are not in the folder
  adapter: Path | None = (
    None  # LoRA adapters of PEFT that are merged into the weights as they are read
  )
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
    own = self.adapter and any((self.adapter / name).is_file() for name in VOCAB_FILES)
    return self.adapter if own else self.folder

  @property
  def labels(self) -> list[str]:
    """Names of the classes, in the order of their numbers; [] for a language model."""
    names = self.hf_config.get("id2label") or {}
    return [names.get(str(i), f"LABEL_{i}") for i in range(self.cfg.classes)]


def with_class_head(checkpoint: HFCheckpoint, labels: list[str], tokenizer: Any) -> HFCheckpoint:
  """The checkpoint with a classification head: its own, else a new one for these labels in place of its language head.

  Raises RequestError where transformers could not tell padding from what the tokenizer itself puts after a text.
  """
  has_head = checkpoint.cfg.classes > 0
  labels = checkpoint.labels if has_head else labels
  about = {
    key: value for key, value in checkpoint.hf_config.items() if has_head or key not in HEAD_KEYS
  } | {
    "architectures": [checkpoint.family.classifier],
    "id2label": {str(i): label for i, label in enumerate(labels)},
    "label2id": {label: i for i, label in enumerate(labels)},
    "problem_type": "single_label_classification",
    "pad_token_id": choose_pad_token(checkpoint, tokenizer),
  }
  cfg = dataclasses.replace(checkpoint.cfg, classes=len(labels))
  return checkpoint._replace(hf_config=about, cfg=cfg, new_head=not has_head)


def choose_pad_token(checkpoint: HFCheckpoint, tokenizer: Any) -> int:
  """The token that rows are filled up with: transformers reads the class at the last token that is not this one."""
  said, after = checkpoint.hf_config.get("pad_token_id"), tokenize.special_ids_around(tokenizer)[1]
  # A head that was trained has learned with what its config.json says. A new one's must be no token that texts have.
  has_head = checkpoint.cfg.classes and not checkpoint.new_head
  fine = said in tokenizer.get_vocab().values() if has_head else is_special(tokenizer, said)
  known = said if fine else None
  chosen = next(
    id for id in (tokenizer.pad_token_id, known, tokenizer.eos_token_id) if id is not None
  )
  if after[-1:] == [chosen]:
    raise RequestError(
      f"{checkpoint.folder}: the tokenizer ends each text with {tokenizer.convert_ids_to_tokens(chosen)!r}, which is the "
      "padding token too, and transformers would overlook it; give the tokenizer a pad_token of its own"
    )
  return chosen


def validate_model(path: str, weights: bool = True, torch_bin: bool = False) -> list[str]:
  """What is wrong with config.model.path if it is a folder, at most one line; a hub id is not looked up here."""
  try:
    _reject_url(path)
    if path and is_local(path):
      _open_folder(Path(path), weights, torch_bin)
  except RequestError as error:
    return [f"config.model.path: {error}"]
  return []


def is_local(path: str) -> bool:
  """Whether a path is meant, not a hub id: it exists, or it could not be an id (an id is NAME or OWNER/NAME)."""
  return exists(Path(path)) or not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", path)


def resolve(
  path: str, revision: str = "main", weights: bool = True, torch_bin: bool = False
) -> HFCheckpoint:
  """The checkpoint that a folder or a hub id names, downloaded if need be; raises RequestError with the way out.

  Args:
    weights: whether the folder must hold weights.
    torch_bin: whether pytorch_model*.bin may be read, where there are no others.
  """
  _reject_url(path)
  if is_local(path):
    return _open_folder(Path(path), weights, torch_bin)
  import huggingface_hub

  try:
    folder = Path(
      huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=DOWNLOAD_PATTERNS)
    )
    for others in (
      "*.safetensors",
      "flax_model*.msgpack",
      *(["pytorch_model*.bin"] if torch_bin else []),
    ):
      if not weights or any(folder.glob(others)):
        break
      huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=others)
  except Exception as error:  # hub and network errors share no class
    raise RequestError(
      f"config.model.path or --model, {path!r}: no such folder, and the hub gave none ({first_line(error)}); "
      "check the id, or give a folder"
    ) from error
  return _open_folder(folder, weights, torch_bin)


def _reject_url(path: str) -> None:
  if not exists(Path(path)) and (address := HUB_URL.fullmatch(path)):
    if address["datasets"]:
      raise RequestError(f"model {path!r}: the address of a data set, not of a model")
    raise RequestError(f"model {path!r}: an address; give the id alone: {address['id']}")


def _open_folder(folder: Path, weights: bool, torch_bin: bool) -> HFCheckpoint:
  if not folder.is_dir():
    raise RequestError(
      f"model folder {str(folder)!r}: no such folder; give one, or a hub id such as gpt2"
    )
  config_file = folder / "config.json"
  _check_safe_files(folder, [name for name in READABLE_FILES if os.path.lexists(folder / name)])
  of_a_model = [
    *WEIGHT_FORMATS,
    TORCH_PICKLE,
    *(f"{name}.index.json" for name in (*WEIGHT_FORMATS, TORCH_PICKLE)),
  ]
  if (folder / ADAPTER_CONFIG).is_file() and not (
    config_file.is_file() and any((folder / it).is_file() for it in of_a_model)
  ):
    return _resolve_adapter(folder, weights, torch_bin)
  if not config_file.is_file():
    raise RequestError(
      f"model folder {str(folder)!r}: no config.json in it, so it is not a Hugging Face model; "
      "give a folder with config.json and model.safetensors, or a hub id such as gpt2"
    )
  verify_checksums(folder, weights=False)
  if weights:
    weight_files(folder, torch_bin)
  return HFCheckpoint(folder, *read_config(config_file), torch_bin)


def _resolve_adapter(folder: Path, weights: bool, torch_bin: bool) -> HFCheckpoint:
  """A folder of LoRA adapters as the model that they are for, which is found by its name there, and merged with them when read.

  Raises RequestError for adapters whose maths is not built.
  """
  about = read_json(folder / ADAPTER_CONFIG)
  for key, plain in PLAIN_LORA.items():
    if about.get(key) and about[key] not in plain:
      raise RequestError(
        f"{folder / ADAPTER_CONFIG}: {key}={about[key]!r}: only plain LoRA can be merged here; merge it with PEFT (merge_and_unload), "
        "and give the model"
      )
  base, revision = about.get("base_model_name_or_path"), about.get("revision") or "main"
  if not isinstance(base, str) or not base or not isinstance(revision, str):
    raise RequestError(
      f"{folder / ADAPTER_CONFIG}: base_model_name_or_path={base!r} names no model"
    )
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
    found = resolve(base, revision, weights, torch_bin)
  except RequestError as error:
    raise RequestError(
      f"{folder}: adapters of {base!r}, which is not there ({first_line(error)})"
    ) from error
  return found._replace(adapter=folder)


def read_config(file: Path) -> tuple[dict[str, Any], ModelConfig]:
  """A parsed config.json and the facts in it; raises RequestError naming the file."""
  hf_config = read_json(file)
  try:
    return hf_config, model_config.from_hf_config(hf_config)
  except RequestError as error:
    raise RequestError(f"{file.parent}: {error}") from error


def weight_files(folder: Path, torch_bin: bool = False) -> list[Path]:
  """The folder's weights, in the first of `WEIGHT_FORMATS` that it has: one file, or the shards that an index names.

  A shard lies in the folder itself and is of the format that the index is of.
  """
  for single in (*WEIGHT_FORMATS, TORCH_PICKLE) if torch_bin else WEIGHT_FORMATS:
    index = folder / f"{single}.index.json"
    if os.path.lexists(folder / single):
      return _files_in_folder(folder, folder / single, [single])
    if os.path.lexists(index):
      _check_safe_files(folder, [index.name])
      return _files_in_folder(folder, index, _read_index(index, Path(single).suffix))
  pickled = any(folder.glob("pytorch_model*.bin"))
  raise RequestError(
    f"model folder {str(folder)!r}: none of {', '.join(WEIGHT_FORMATS)} in it, whole or with an index"
    + (
      f"; {TORCH_PICKLE} is a pickle, which is read (by torch, weights_only) only when asked: --config.model.torch_bin=True to "
      "train, --torch_bin for the other commands"
      if pickled
      else ""
    )
  )


def checksums(folder: Path) -> dict[str, str]:
  """SHA-256 of every file of an export but its card, which people edit."""
  files = sorted(
    file
    for file in folder.iterdir()
    if file.is_file() and file.name not in (PARITY_FILE, "README.md")
  )
  with ThreadPoolExecutor() as threads:  # hashing leaves Python's lock
    return {
      file.name: found for file, found in zip(files, threads.map(_sha256, files), strict=True)
    }


def verify_checksums(folder: Path, weights: bool) -> None:
  """Raises RequestError when a file of an export is not what it was: a flipped bit in weights or a config loads without a word.

  Folders that jaxft has not exported have no checksums, and pass.

  Args:
    weights: look at weights, or at all other files, which costs little.
  """
  if not (folder / PARITY_FILE).is_file():
    return
  wanted = read_json(folder / PARITY_FILE).get("sha256", {})
  if not isinstance(wanted, dict):
    raise RequestError(
      f"{folder / PARITY_FILE}: its checksums are not a list of files; export again, or remove it"
    )
  chosen = [name for name in wanted if name.endswith(".safetensors") == weights]
  with ThreadPoolExecutor() as threads:
    found = dict(
      zip(chosen, threads.map(lambda name: _sha256(folder / Path(name).name), chosen), strict=True)
    )
  for name in chosen:
    if found[name] != wanted[name]:
      what = "is not what was exported" if found[name] else "was exported, and cannot be read"
      raise RequestError(
        f"{folder / Path(name).name}: {what} (by its SHA-256 in {PARITY_FILE}); export again, or remove {PARITY_FILE} if you changed it"
      )


def _sha256(file: Path) -> str | None:
  try:
    with file.open("rb") as stream:
      return hashlib.file_digest(stream, "sha256").hexdigest()
  except OSError:
    return None


def _read_index(index: Path, suffix: str) -> list[str]:
  where = read_json(index).get("weight_map")
  if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
    raise RequestError(f"{index}: not an index of weights: it has no weight_map of file names")
  for name in where.values():
    if not name.endswith(suffix):
      raise RequestError(f"{index}: {name[:100]!r} is no {suffix} file")
  return sorted(set(where.values()))


def read_json(file: Path) -> dict[str, Any]:
  try:
    content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=reject_duplicate_keys)
  except (OSError, ValueError, RecursionError) as error:
    raise RequestError(f"{file}: {first_line(error)}") from error
  if not isinstance(content, dict):
    raise RequestError(f"{file}: not a JSON object")
  return content


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object; ValueError for one that says a thing twice, of which readers believe either."""
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    raise ValueError(
      f"{next(name for name in names if names.count(name) > 1)[:100]!r} is in it twice"
    )
  return found


def _files_in_folder(folder: Path, named_in: Path, names: list[str]) -> list[Path]:
  for name in names:
    if (
      Path(name).name != name
      or "\0" in name
      or not is_encodable(name)
      or not _can_be_file(folder / name)
    ):
      raise RequestError(f"{named_in}: {name[:100]!r} is not a file of this folder")
  _check_safe_files(folder, names)
  return [folder / name for name in names]


def _can_be_file(file: Path) -> bool:
  """Whether there is something that may be a file: a link that leads nowhere is refused later, with what can be done."""
  return os.path.lexists(file) and not file.is_dir()


def _check_safe_files(folder: Path, names: Iterable[str]) -> None:
  """Files that are read, and some of them copied into exports: none may be a file from elsewhere, or a pipe.

  Whatever else lies in the folder is not looked at.
  """
  # The hub's cache links each file to ../../blobs/HASH: its own folders, models--X/snapshots/Y, are what may be left.
  home = folder.resolve()
  home = home.parent.parent if home.parent.name == "snapshots" else home
  for file in (folder / name for name in sorted(names)):
    if file.is_symlink() and not file.resolve().is_relative_to(home):
      raise RequestError(
        f"{file}: a link that leads out of this folder; copy the folder with the files themselves: cp -rL {folder} COPY"
      )
    if not file.is_file() and not file.is_dir():
      raise RequestError(f"{file}: not an ordinary file")
    if file.suffix in (".json", ".txt") and file.stat().st_size > MAX_TEXT_BYTES:
      raise RequestError(f"{file}: {file.stat().st_size:,} bytes are too many for such a file")
    if file.is_file():
      reject_lfs_pointer(file)


def fingerprint(checkpoint: HFCheckpoint, whole: bool = False) -> str:
  """Tells the weights of one folder from another's: by all bytes, or by sizes and 64 KB at each of 17 places in each file."""
  digest, sample = hashlib.sha256(json.dumps(checkpoint.hf_config, sort_keys=True).encode()), 2**16
  adapter = (
    [checkpoint.adapter / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    if checkpoint.adapter
    else []
  )
  for file in (*weight_files(checkpoint.folder, checkpoint.torch_bin), *adapter):
    size = file.stat().st_size
    digest.update(f"{file.name} {size} ".encode())
    with file.open("rb") as stream:
      if whole:
        digest.update(hashlib.file_digest(stream, "sha256").digest())
      for part in range(0 if whole else 17):
        stream.seek(max(0, size - sample) * part // 16)
        digest.update(stream.read(sample))
  return digest.hexdigest()
