"""Read generation_config.json, end texts at stop strings, and stream text."""

import collections
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jaxft.errors import RequestError, first_line
from jaxft.generation.sampling_config import (
  LENGTH_LIMITS,
  Sampling,
  Settings,
  resolve_sampling,
  validate_do_sample,
)
from jaxft.utils.types import Json

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerBase

FILE_NAME = "generation_config.json"
REPLACEMENT_CHAR = "\ufffd"  # an incomplete character decodes to it

# Unsupported settings of a generation_config.json that would change the text.
UNSUPPORTED = (
  "early_stopping bad_words_ids suppress_tokens begin_suppress_tokens stop_strings "
  "forced_bos_token_id forced_eos_token_id sequence_bias typical_p epsilon_cutoff eta_cutoff "
  "renormalize_logits exponential_decay_length_penalty encoder_repetition_penalty num_beam_groups "
  "diversity_penalty penalty_alpha"
).split()


class GenerationConfig(NamedTuple):
  """The settings in effect, and where they come from."""

  sampling: Sampling
  stop_ids: frozenset[int]  # tokens that end a text
  ignored: tuple[str, ...]  # settings of the file that are not supported
  warnings: tuple[str, ...]  # one line for each setting that another one overrides
  file: Path
  from_file: Json  # fields of `sampling` that the file sets

  def with_context(self, error: RequestError) -> RequestError:
    """Return the error with the file's settings that it mentions."""
    settings = ", ".join(
      f"{name}={value}" for name, value in self.from_file.items() if f"--{name}=" in str(error)
    )
    return RequestError(f"{error} ({self.file} has {settings})") if settings else error


def load(folder: Path, given: Settings) -> GenerationConfig:
  """Merge given settings, the model's generation_config.json, and defaults.

  Given settings override the file, which overrides the defaults of `Sampling`. `do_sample: false`
  in the file, or beams without `do_sample`, means temperature 0, unless a temperature is given.
  Without either, tokens are sampled. If max_length and max_new_tokens are both given, or both in
  the file, max_new_tokens wins, as in transformers. The same holds for min_length and
  min_new_tokens.

  Args:
    folder: the model's folder, with or without a generation_config.json.
    given: fields of `Sampling`, and `do_sample`.

  Raises:
    RequestError: the file is unreadable, or a value is invalid.
  """
  given, warnings = resolve_sampling(given)
  do_sample = given.pop("do_sample", None)
  file = Path(folder) / FILE_NAME
  settings = _read_json(file)
  defaults = Sampling._field_defaults
  from_file = {name: settings.get(name) for name in defaults if name != "seed"}
  from_file = {name: value for name, value in from_file.items() if value is not None}
  is_beam_search = (from_file | given).get("num_beams", 1) != 1 and not settings.get("do_sample")
  if not do_sample and (settings.get("do_sample") is False or is_beam_search):
    from_file["temperature"] = 0.0
  for name, value in from_file.items():
    number = int | float if isinstance(defaults[name], float) else int
    if not isinstance(value, number) or isinstance(value, bool):
      raise RequestError(f"{file}: {name}={value!r}: must be a number")
    from_file[name] = type(defaults[name])(value)
  warnings += _drop_overridden(from_file, given, file)
  from_file = {name: value for name, value in from_file.items() if name not in given}
  eos = settings.get("eos_token_id")
  eos_ids = eos if isinstance(eos, list) else [eos]
  config = GenerationConfig(
    sampling=Sampling(**from_file | given),
    stop_ids=frozenset(token for token in eos_ids if isinstance(token, int)),
    ignored=tuple(name for name in UNSUPPORTED if settings.get(name)),
    warnings=tuple(warnings),
    file=file,
    from_file=from_file,
  )
  try:
    if do_sample:
      validate_do_sample(config.sampling.temperature, config.sampling.num_beams)
    config.sampling.validate()
  except RequestError as error:
    raise config.with_context(error) from error
  return config


def _read_json(file: Path) -> Json:
  if not file.is_file():
    return {}
  try:
    settings = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
      raise ValueError("not an object")
  except (OSError, ValueError, RecursionError) as error:
    raise RequestError(f"{file}: cannot be read as JSON ({first_line(error)})") from error
  return settings


def _drop_overridden(from_file: Json, given: Settings, file: Path) -> list[str]:
  """Drop the file's length limits that another limit overrides; return warnings."""
  warnings = []
  for total, new in LENGTH_LIMITS:
    if new in given:
      dropped = total
      why = f"--{new}={given[new]} is given"
    elif given.get(total):
      dropped = new
      why = f"--{total}={given[total]} is given"
    elif new in from_file and total not in given:
      dropped = total
      why = f"the file sets {new}={from_file[new]} too"
    else:
      continue
    if value := from_file.pop(dropped, 0):
      warnings.append(f"{file}: {dropped}={value}: ignored, because {why}")
  return warnings


class TextStreamer:
  """Stream texts and end them at stop strings.

  This is a token callback for `Generator`.
  """

  def __init__(
    self,
    tokenizer: "PreTrainedTokenizerBase",
    stop_strings: Sequence[str],
    on_text: Callable[[int, str], None] | None,
  ):
    if not all(stop_strings):
      raise RequestError("--stop_strings: must not be empty strings")
    self._tokenizer = tokenizer
    self._stop_strings = stop_strings
    self._on_text = on_text
    self._num_sent = collections.Counter()  # characters of each text
    self._longest = max((len(stop.encode()) for stop in stop_strings), default=0)

  def __call__(self, index: int, ids: list[int]) -> bool:
    """Stream one text after each new token.

    Text is sent once its last character is complete. Returns whether a stop string ends it.
    """
    if self._on_text and not (text := self._decode(ids)).endswith(REPLACEMENT_CHAR):
      self.flush(index, text)
    if not self._stop_strings:
      return False
    tail = self._decode(ids[-self._longest - 1 :])  # each token has at least a byte
    return any(stop in tail for stop in self._stop_strings)

  def _decode(self, ids: list[int]) -> str:
    text = self._tokenizer.decode(ids)
    assert isinstance(text, str)  # a list only if `ids` were a list of lists
    return text

  def flush(self, index: int, text: str) -> None:
    """Send the rest of the text, after the part that was already sent."""
    if self._on_text and len(text) > self._num_sent[index]:
      self._on_text(index, text[self._num_sent[index] :])
      self._num_sent[index] = len(text)
