"""Text from a model: python -m jaxft.generate --model PATH_OR_ID [--prompt TEXT ...] [--prompt_file F] [--json]"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxft.cli import parsers, run_generation
from jaxft.cli.flags import load_model, unescape
from jaxft.errors import RequestError, run_command
from jaxft.generation import generation_config
from jaxft.generation.sampling import Sampling, resolve_sampling
from jaxft.hf import repo
from jaxft.pretrained import Completion, Pretrained
from jaxft.utils.console import escape_controls

UNLIMITED_TOKENS = (
  2**30
)  # tokens: until the model has no position left, as run_generation.py has it for a negative --length


def main() -> None:
  arguments = parsers.generate().parse_args()
  given = sampling_args(arguments)  # looked at before a model is read
  if "stop_strings" in arguments.given_as:  # run_generation.py: no stop token
    arguments.stop_strings = [text for text in arguments.stop_strings if text]
  stops = [unescape(text, "--stop_strings") for text in arguments.stop_strings or []]
  _check_compat_flags(arguments)

  prompts = arguments.prompt + (
    _read_prompt_file(Path(arguments.prompt_file)) if arguments.prompt_file else []
  )
  asked = bool(prompts or arguments.prompt_file)
  if asked and not prompts:
    raise RequestError(f"--prompt_file {arguments.prompt_file!r}: no line in it has a prompt")
  interactive = not asked and sys.stdin.isatty() and not arguments.json
  if not asked and not sys.stdin.isatty():
    prompts = _read_stdin()
  if not prompts and not interactive:
    raise RequestError(
      "--prompt is missing: give a text, --prompt_file, lines on standard input, or a terminal to ask on"
    )
  if arguments.use_cpu:
    jax.config.update("jax_platforms", "cpu")  # before it looks for devices
  if arguments.model_type and arguments.model:
    found = repo.resolve(arguments.model, arguments.revision, weights=False)
    _check_model_type(arguments.model_type, found)
  writer = Completer(load_model(arguments), given, stops, arguments.prefix or "")
  if arguments.model_type:
    _check_model_type(arguments.model_type, writer.ready.source)
  writer.tell_settings()
  if interactive:
    return interactive_loop(writer)
  if len(prompts) == 1 and sys.stdout.isatty() and not arguments.json:
    return writer.write(prompts[0])
  completions = writer.complete(prompts)
  if arguments.json:
    told = {"completions": [completion._asdict() for completion in completions]}
    print(json.dumps(told, ensure_ascii=sys.stdout.encoding.lower() != "utf-8"))
  else:
    print("\n\n".join(completion.prompt + completion.text for completion in completions))


class Completer:
  """A model, and how it is to write."""

  def __init__(self, ready: Pretrained, given: dict[str, Any], stops: list[str], prefix: str):
    self.ready, self._given, self._stops, self._prefix = ready, given, stops, prefix

  def tell_settings(self) -> None:
    """Says what of the given and of the model's generation_config.json is of no account."""
    found = generation_config.load(self.ready.source.folder, self._given)
    if found.ignored:
      print(f"{found.file}: not followed: {', '.join(found.ignored)}", file=sys.stderr)
    for line in found.warnings:
      print(line, file=sys.stderr)
    positions = self.ready.source.cfg.P
    for name in ("max_new_tokens", "max_length"):
      if positions < self._given.get(name, 0) < UNLIMITED_TOKENS:
        print(
          f"--{name}={self._given[name]}: a text ends at the model's {positions} positions",
          file=sys.stderr,
        )

  def complete(
    self, prompts: list[str], tell: Callable[[int, str], None] | None = None
  ) -> list[Completion]:
    """The completions, whose prompts are without the prefix that the model reads before them."""
    whole = [self._prefix + prompt for prompt in prompts]
    found = self.ready.generate(whole, stop_strings=self._stops, on_text=tell, **self._given)
    return [it._replace(prompt=it.prompt.removeprefix(self._prefix)) for it in found]

  def write(self, prompt: str) -> None:
    """Writes what follows a prompt to the terminal, as it comes; of several texts one after the other.

    Beams may be several.
    """
    sampling = generation_config.load(self.ready.source.folder, self._given).sampling
    if sampling.num_beams > 1 or sampling.num_return_sequences > 1:
      print("\n\n".join(escape_controls(it.prompt + it.text) for it in self.complete([prompt])))
    else:
      print(escape_controls(prompt), end="", flush=True)
      self.complete(
        [prompt], tell=lambda _, added: print(escape_controls(added), end="", flush=True)
      )
      print()


def interactive_loop(writer: Completer) -> None:
  """Asks for prompts on the terminal, which remembers them (arrow up), and writes each completion as it comes."""
  with contextlib.suppress(ImportError):  # `input` edits lines with it, where the platform has it
    import readline  # noqa: F401

  while True:
    try:
      prompt = input("prompt> ")
    except (EOFError, KeyboardInterrupt):
      print()
      return
    try:
      writer.write(prompt)
    except KeyboardInterrupt:  # enough of this one
      print()
    except RequestError as error:  # a prompt that is too long
      print(f"error: {error}")


def sampling_args(arguments: argparse.Namespace) -> dict[str, Any]:
  """Fields of `Sampling`, and do_sample, of the command line, and what --model_type adds to them.

  Raises RequestError on values that mean nothing, alone or together, by the names that were given.
  """
  names = (*Sampling._fields, "do_sample")
  given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
  if arguments.given_as.get("max_new_tokens") == "length" and given["max_new_tokens"] < 0:
    given["max_new_tokens"] = UNLIMITED_TOKENS
  if arguments.model_type:
    added = run_generation.missing_defaults(given)
    told = ", ".join(f"{name}={value}" for name, value in added.items())
    print(
      f"--model_type={arguments.model_type}: as run_generation.py has it: {told or 'all is given'}",
      file=sys.stderr,
    )
    given |= added
  try:
    Sampling(
      **{name: value for name, value in given.items() if name in Sampling._fields}
    ).validate_values()
    resolve_sampling(given)
  except RequestError as error:
    text = str(error)
    for name, called in arguments.given_as.items():
      text = text.replace(f"--{name}=", f"--{called}=")
    raise RequestError(text) from error
  return given


def _check_compat_flags(arguments: argparse.Namespace) -> None:
  """Refuses flags that are nothing here, and says what those are that are not quite what they were."""
  for name, (value, why) in run_generation.FIXED.items():
    if getattr(arguments, name) is (not value):
      raise RequestError(f"--{name}={not value}: {why}; leave it out")
  for name, reason in run_generation.UNSUPPORTED.items():
    if value := getattr(arguments, name):
      raise RequestError(f"--{name}={value}: {reason}")
  if arguments.use_cpu and arguments.require:
    raise RequestError(f"--use_cpu and --require={arguments.require}: leave one of the two out")
  if arguments.fp16:
    print(
      f"--{arguments.given_as.get('fp16', 'fp16')}: {run_generation.FLAG_NOTES['fp16']}",
      file=sys.stderr,
    )
  if "stop_strings" in arguments.given_as:
    print(
      "--stop_token: as --stop_strings: the text ends with it, and run_generation.py leaves it out",
      file=sys.stderr,
    )


def _check_model_type(model_type: str, source: repo.HFCheckpoint) -> None:
  """Raises RequestError for a model of another family."""
  if run_generation.MODEL_TYPES[model_type] != (found := source.hf_config["model_type"]):
    raise RequestError(
      f"--model_type={model_type}: {source.folder / 'config.json'} says {found}; give --model_type={found}"
    )


def _read_prompt_file(file: Path) -> list[str]:
  try:
    return _split_prompts(file.read_text(encoding="utf-8-sig"))
  except (OSError, UnicodeDecodeError) as error:
    raise RequestError(f"--prompt_file {str(file)!r}: {error}") from error


def _read_stdin() -> list[str]:
  """The prompts on standard input."""
  try:
    with open(sys.stdin.fileno(), encoding="utf-8-sig", newline="", closefd=False) as stream:
      return _split_prompts(stream.read())
  except (OSError, UnicodeDecodeError) as error:
    raise RequestError(
      f"--prompt is missing, and standard input cannot be read: {error}"
    ) from error


def _split_prompts(text: str) -> list[str]:
  """One a line; empty lines are none."""
  return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]


if __name__ == "__main__":
  run_command(main)
