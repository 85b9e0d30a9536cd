"""How a model is to write: what its generation_config.json says, where a text is to stop, and telling it as it comes."""

import collections
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.errors import RequestError, first_line
from jaxft.generation.sampling import LENGTH_LIMITS, Sampling, resolve_sampling, validate_do_sample

FILE_NAME = "generation_config.json"
REPLACEMENT_CHAR = "\ufffd"  # what a tokenizer makes of bytes that are no character yet


# What else a generation_config.json may have that would change a text.
UNSUPPORTED = (
  "early_stopping bad_words_ids suppress_tokens begin_suppress_tokens stop_strings "
  "forced_bos_token_id forced_eos_token_id sequence_bias typical_p epsilon_cutoff eta_cutoff renormalize_logits "
  "exponential_decay_length_penalty encoder_repetition_penalty num_beam_groups diversity_penalty penalty_alpha"
).split()


class GenerationConfig(NamedTuple):
  sampling: Sampling
  stop_ids: frozenset[int]  # tokens that end a text
  ignored: tuple[str, ...]  # names in the file
  warnings: tuple[str, ...]  # what is of no account, and why
  file: Path
  of_file: dict[str, Any]  # what of `sampling` the file says

  def with_context(self, error: RequestError) -> RequestError:
    """The error, with what the file has to do with it."""
    named = [
      f"{name}={value}" for name, value in self.of_file.items() if f"--{name}=" in str(error)
    ]
    return RequestError(f"{error} ({self.file} has {', '.join(named)})") if named else error


def load(folder: Path, given: Mapping[str, Any]) -> GenerationConfig:
  """What is given, then what the folder's generation_config.json says, then the defaults of `Sampling`.

  `do_sample: false` in the file, or beams without `do_sample`, is temperature 0 here, unless a temperature is given. A text is
  drawn where nothing says how. Where max_length and max_new_tokens are both given, or both in the file, the latter counts, as
  in transformers; so with min_length and min_new_tokens. Raises RequestError for a file that cannot be read, or a value that
  means nothing.

  Args:
    given: fields of `Sampling`, and `do_sample`.
  """
  given, lines = resolve_sampling(given)
  drawn = given.pop("do_sample", None)
  file, says = Path(folder) / FILE_NAME, {}
  if file.is_file():
    try:
      says = json.loads(file.read_text(encoding="utf-8"))
      if not isinstance(says, dict):
        raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
      raise RequestError(f"{file}: not JSON that can be read ({first_line(error)})") from error
  defaults = Sampling._field_defaults
  known = {name: says[name] for name in defaults if name != "seed" and says.get(name) is not None}
  beams = (known | given).get("num_beams", 1) != 1 and not says.get("do_sample")
  if not drawn and (says.get("do_sample") is False or beams):
    known["temperature"] = 0.0
  for name, value in known.items():
    number = int | float if isinstance(defaults[name], float) else int
    if not isinstance(value, number) or isinstance(value, bool):
      raise RequestError(f"{file}: {name}={value!r}: must be a number")
    known[name] = type(defaults[name])(value)
  lines += _drop_overridden(known, given, file)
  known = {name: value for name, value in known.items() if name not in given}
  sampling = Sampling(**known | given)
  ends = says.get("eos_token_id")
  ends = ends if isinstance(ends, list) else [ends]
  not_followed = tuple(name for name in UNSUPPORTED if says.get(name))
  ends = frozenset(end for end in ends if isinstance(end, int))
  found = GenerationConfig(sampling, ends, not_followed, tuple(lines), file, known)
  try:
    if drawn:
      validate_do_sample(sampling.temperature, sampling.num_beams)
    sampling.validate()
  except RequestError as error:
    raise found.with_context(error) from error
  return found


def _drop_overridden(known: dict[str, Any], given: Mapping[str, Any], file: Path) -> list[str]:
  """Takes out of the file's limits those that do not count beside others, given or its own; a line for each other's."""
  lines = []
  for whole, new in LENGTH_LIMITS:
    if new in given:
      lost, why = whole, f"--{new}={given[new]} is given"
    elif given.get(whole):
      lost, why = new, f"--{whole}={given[whole]} is given"
    elif new in known and whole not in given:
      lost, why = whole, f"{new}={known[new]} is there too"
    else:
      continue
    if value := known.pop(lost, 0):
      lines.append(f"{file}: {lost}={value}: of no account, as {why}")
  return lines


class TextStreamer:
  """For `Generator`: ends a text at a stop string, and tells what is added to each text as it comes."""

  def __init__(
    self, tokenizer: Any, stop_strings: Sequence[str], tell: Callable[[int, str], None] | None
  ):
    if not all(stop_strings):
      raise RequestError("--stop_strings: must be texts, and not empty")
    self._decode, self._stops, self._tell, self._told = (
      tokenizer.decode,
      stop_strings,
      tell,
      collections.Counter(),
    )
    self._longest = max((len(stop.encode()) for stop in stop_strings), default=0)

  def __call__(self, text: int, ids: list[int]) -> bool:
    if self._tell and not (whole := self._decode(ids)).endswith(REPLACEMENT_CHAR):
      self.flush(text, whole)
    tail = (
      self._decode(ids[-self._longest - 1 :]) if self._stops else ""
    )  # a token is at least a byte
    return any(stop in tail for stop in self._stops)

  def flush(self, text: int, whole: str) -> None:
    """Tells what of the text has not been told."""
    if self._tell and len(whole) > self._told[text]:
      self._tell(text, whole[self._told[text] :])
      self._told[text] = len(whole)
