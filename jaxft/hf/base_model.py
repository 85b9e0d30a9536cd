"""Resolves `config.model`: a checkpoint or a new model, and a tokenizer."""

import difflib
import json
from pathlib import Path

from jaxft.config import ModelSection
from jaxft.errors import RequestError
from jaxft.hf import model_config, repo
from jaxft.hf.tokenizer import TOKENIZER_FILES, VOCAB_FILES
from jaxft.model.config import ModelConfig
from jaxft.utils.types import Json


def resolve(model: ModelSection, weights: bool = True) -> repo.HFCheckpoint:
  """Return the checkpoint of `config.model`; download it if necessary.

  Args:
    model: `config.model`.
    weights: whether weights must exist, if `model.init` reads them.

  Raises:
    RequestError: a file that the settings name is missing, or two of them contradict each other.
  """
  pretrained = model.init == "pretrained"
  checkpoint = repo.resolve(model.path, model.revision, weights and pretrained, model.torch_bin)
  if not pretrained:
    checkpoint = scratch_checkpoint(model, checkpoint)
  if not model.tokenizer:
    return checkpoint
  return checkpoint._replace(tokenizer=resolve_tokenizer(model.tokenizer))


def scratch_checkpoint(model: ModelSection, checkpoint: repo.HFCheckpoint) -> repo.HFCheckpoint:
  """Return `config.model` with new weights, given the checkpoint of `model.path`."""
  hf_config, cfg = scratch_config(model, checkpoint.hf_config, checkpoint.folder / "config.json")
  return repo.HFCheckpoint(
    folder=checkpoint.folder, hf_config=hf_config, cfg=cfg, tokenizer=checkpoint.tokenizer
  )


def scratch_config(
  model: ModelSection, hf_config: Json | None = None, file: Path | None = None
) -> tuple[Json, ModelConfig]:
  """Return the config.json and the `ModelConfig` of a model with new weights.

  Args:
    model: `config.model`.
    hf_config: config.json of `model.path`; ignored if `model.config` names another file.
    file: the file of `hf_config`, for messages.

  Raises:
    RequestError: no model can have these sizes.
  """
  if model.config:
    file = Path(model.config)
    hf_config = repo.read_json(file)
  hf_config = hf_config or {}
  hf_config = hf_config | _parse_overrides(model.config_overrides, hf_config, file)
  try:
    return hf_config, model_config.from_hf_config(hf_config)
  except RequestError as error:
    overrides = model.config_overrides
    suffix = f" with config.model.config_overrides={overrides!r}" if overrides else ""
    raise RequestError(f"{file}{suffix}: {error}") from error


def resolve_tokenizer(path: str) -> Path:
  """Return the folder of `config.model.tokenizer`; download it if necessary.

  Raises:
    RequestError: the folder has no tokenizer.
  """
  what = f"config.model.tokenizer={path!r}"
  is_local = repo.is_local(path)
  folder = Path(path) if is_local else repo.download(what, path, list(TOKENIZER_FILES))
  if not any((folder / name).is_file() for name in VOCAB_FILES):
    raise RequestError(f"{what}: found no {' or '.join(VOCAB_FILES[:2])} in this folder")
  return folder


def _parse_overrides(text: str, hf_config: Json, file: Path | None) -> Json:
  """Parse `config.model.config_overrides` into values of config.json's types."""
  overrides = {}
  for pair in filter(None, (pair.strip() for pair in text.split(","))):
    key, _, value = map(str.strip, pair.partition("="))
    if key not in hf_config:
      near = difflib.get_close_matches(key, hf_config, 1)
      way_out = f"did you mean {near[0]}?" if near else f"its keys: {', '.join(sorted(hf_config))}"
      raise RequestError(f"config.model.config_overrides: {file} has no key {key!r}; {way_out}")
    overrides[key] = _parse_value(value, hf_config[key], f"config.model.config_overrides: {pair}")
    if key == "model_type" and overrides[key] != hf_config[key]:
      raise RequestError(
        f"model_type={value}: {file} describes a {hf_config[key]} model; "
        "name another config with --config_name"
      )
  return overrides


def _parse_value(text: str, default: object, where: str) -> object:
  if isinstance(default, str):
    return text
  try:
    value = json.loads({"true": "true", "false": "false", "none": "null"}.get(text.lower(), text))
  except ValueError:
    value = text
  if isinstance(default, int | float):
    expected = type(default) if isinstance(default, int) else int | float  # bool is an int
    if not isinstance(value, expected) or isinstance(value, bool) != isinstance(default, bool):
      kind = "True or False" if expected is bool else "a number"
      raise RequestError(f"{where}: must be {kind}, like the default {default!r}")
  return value
