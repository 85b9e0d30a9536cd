"""What `config.model` names: a checkpoint or the sizes of a new model, and a tokenizer."""

import difflib
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxft.errors import RequestError, first_line
from jaxft.hf import model_config, repo, tokenizer
from jaxft.model.config import ModelConfig


def resolve(model: ConfigDict, weights: bool = True) -> repo.HFCheckpoint:
  """The checkpoint of `config.model`, downloaded if need be.

  Args:
    model: `config.model`.
    weights: whether weights must be there, where `model.init` reads them.

  Raises:
    RequestError: one of what the settings name is not there, or does not go with the others.
  """
  pretrained = model.init == "pretrained"
  found = repo.resolve(model.path, model.revision, weights and pretrained, model.torch_bin)
  if not pretrained:
    hf_config, cfg = scratch_config(model, found.hf_config, found.folder / "config.json")
    found = repo.HFCheckpoint(found.folder, hf_config, cfg)
  return found._replace(tokenizer=resolve_tokenizer(model.tokenizer)) if model.tokenizer else found


def scratch_config(
  model: ConfigDict, hf_config: dict[str, Any] | None = None, file: Path | None = None
) -> tuple[dict[str, Any], ModelConfig]:
  """The config.json of a model that is drawn from scratch, and the facts in it.

  Args:
    model: `config.model`.
    hf_config: what `model.path` has, in `file`; of no account where `model.config` names another.

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
    among = (
      f" with config.model.config_overrides={model.config_overrides!r}"
      if model.config_overrides
      else ""
    )
    raise RequestError(f"{file}{among}: {error}") from error


def resolve_tokenizer(path: str) -> Path:
  """The folder of the tokenizer that `config.model.tokenizer` names; raises RequestError where there is none."""
  if repo.is_local(path):
    folder = Path(path)
  else:
    import huggingface_hub

    try:
      folder = Path(
        huggingface_hub.snapshot_download(path, allow_patterns=list(tokenizer.TOKENIZER_FILES))
      )
    except Exception as error:  # hub and network errors share no class
      raise RequestError(
        f"config.model.tokenizer={path!r}: no such folder, and the hub gave none ({first_line(error)}); check the id, "
        "or give a folder"
      ) from error
  if not any((folder / name).is_file() for name in tokenizer.VOCAB_FILES):
    raise RequestError(
      f"config.model.tokenizer={path!r}: no {', '.join(tokenizer.VOCAB_FILES[:2])} in it"
    )
  return folder


def _parse_overrides(text: str, hf_config: dict[str, Any], file: Path | None) -> dict[str, Any]:
  """The pairs of `config.model.config_overrides`, each a value of the type that config.json has there."""
  found = {}
  for pair in filter(None, (pair.strip() for pair in text.split(","))):
    key, _, value = (part.strip() for part in pair.partition("="))
    if key not in hf_config:
      near = difflib.get_close_matches(key, hf_config, 1)
      way_out = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(hf_config))}"
      raise RequestError(f"config.model.config_overrides: {key!r} is no key of {file}; {way_out}")
    found[key] = _parse_value(value, hf_config[key], f"config.model.config_overrides: {pair}")
    if key == "model_type" and found[key] != hf_config[key]:
      raise RequestError(
        f"model_type={value}: {file} is of a {hf_config[key]}; name one with --config_name"
      )
  return found


def _parse_value(text: str, before: Any, where: str) -> Any:
  if isinstance(before, str):
    return text
  try:
    value = json.loads({"true": "true", "false": "false", "none": "null"}.get(text.lower(), text))
  except ValueError:
    value = text
  wanted = {bool: bool, int: int, float: int | float}.get(type(before))
  if wanted and (
    not isinstance(value, wanted) or isinstance(value, bool) != isinstance(before, bool)
  ):
    raise RequestError(
      f"{where}: must be {'True or False' if wanted is bool else 'a number'}, as {before!r} is"
    )
  return value
