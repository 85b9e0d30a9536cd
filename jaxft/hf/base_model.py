"""What `config.model` names: a checkpoint or the sizes of a new model, and a tokenizer."""

import difflib
import json
from pathlib import Path
from typing import Any

from jaxft.config import ModelSection
from jaxft.errors import RequestError, first_line
from jaxft.hf import model_config, repo
from jaxft.hf.tokenizer import TOKENIZER_FILES, VOCAB_FILES
from jaxft.model.config import ModelConfig


def resolve(model: ModelSection, weights: bool = True) -> repo.HFCheckpoint:
  """Returns the checkpoint of `config.model`, downloaded if need be.

  Args:
    model: `config.model`.
    weights: whether weights must exist, where `model.init` reads them.

  Raises:
    RequestError: one of the things that the settings name is missing, or contradicts another.
  """
  pretrained = model.init == "pretrained"
  checkpoint = repo.resolve(model.path, model.revision, weights and pretrained, model.torch_bin)
  if not pretrained:
    file = checkpoint.folder / "config.json"
    hf_config, cfg = scratch_config(model, checkpoint.hf_config, file)
    checkpoint = repo.HFCheckpoint(checkpoint.folder, hf_config, cfg)
  if not model.tokenizer:
    return checkpoint
  return checkpoint._replace(tokenizer=resolve_tokenizer(model.tokenizer))


def scratch_config(
  model: ModelSection, hf_config: dict[str, Any] | None = None, file: Path | None = None
) -> tuple[dict[str, Any], ModelConfig]:
  """Returns the config.json and the `ModelConfig` of a model with new weights.

  Args:
    model: `config.model`.
    hf_config: what `model.path` has, in `file`; ignored where `model.config` names another.

  Raises:
    RequestError: no model can have these sizes.
  """
  if model.config:
    file = Path(model.config)
    hf_config = repo.read_json(file)
  hf_config = hf_config | _parse_overrides(model.config_overrides, hf_config, file)
  try:
    return hf_config, model_config.from_hf_config(hf_config)
  except RequestError as error:
    overrides = model.config_overrides
    suffix = f" with config.model.config_overrides={overrides!r}" if overrides else ""
    raise RequestError(f"{file}{suffix}: {error}") from error


def resolve_tokenizer(path: str) -> Path:
  """Returns the folder of the tokenizer that `config.model.tokenizer` names, downloaded if need be.

  Raises RequestError where there is none.
  """
  what = f"config.model.tokenizer={path!r}"
  if repo.is_local(path):
    folder = Path(path)
  else:
    import huggingface_hub

    try:
      folder = Path(huggingface_hub.snapshot_download(path, allow_patterns=list(TOKENIZER_FILES)))
    except Exception as error:  # hub and network errors share no class
      raise RequestError(
        f"{what}: no such folder, and the hub gave none ({first_line(error)}); check the id, "
        "or give a folder"
      ) from error
  if not any((folder / name).is_file() for name in VOCAB_FILES):
    raise RequestError(f"{what}: no {', '.join(VOCAB_FILES[:2])} in it")
  return folder


def _parse_overrides(text: str, hf_config: dict[str, Any], file: Path | None) -> dict[str, Any]:
  """Parses `config.model.config_overrides` into values of the types that config.json has."""
  overrides = {}
  for pair in filter(None, (pair.strip() for pair in text.split(","))):
    key, _, value = map(str.strip, pair.partition("="))
    if key not in hf_config:
      near = difflib.get_close_matches(key, hf_config, 1)
      way_out = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(hf_config))}"
      raise RequestError(f"config.model.config_overrides: {key!r} is no key of {file}; {way_out}")
    overrides[key] = _parse_value(value, hf_config[key], f"config.model.config_overrides: {pair}")
    if key == "model_type" and overrides[key] != hf_config[key]:
      raise RequestError(
        f"model_type={value}: {file} is of a {hf_config[key]}; name one with --config_name"
      )
  return overrides


def _parse_value(text: str, default: Any, where: str) -> Any:
  if isinstance(default, str):
    return text
  try:
    value = json.loads({"true": "true", "false": "false", "none": "null"}.get(text.lower(), text))
  except ValueError:
    value = text
  expected = {bool: bool, int: int, float: int | float}.get(type(default))
  same_kind = isinstance(value, bool) == isinstance(default, bool)
  if expected and not (isinstance(value, expected) and same_kind):
    kind = "True or False" if expected is bool else "a number"
    raise RequestError(f"{where}: must be {kind}, as {default!r} is")
  return value
