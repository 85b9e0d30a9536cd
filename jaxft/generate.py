"""Generate text from a model.

python -m jaxft.generate --model PATH_OR_ID [--prompt TEXT ...] [--json]
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from jaxft.cli import parsers, run_generation
from jaxft.cli.flags import load_model, unescape
from jaxft.errors import RequestError, run_command
from jaxft.generation import generation_config
from jaxft.generation.sampling_config import Sampling, resolve_sampling
from jaxft.hf import repo
from jaxft.pretrained import Completion, Pretrained
from jaxft.utils.console import escape_controls

# A negative --length of run_generation.py means: until all positions of the model are used.
UNLIMITED_TOKENS = 2**30


def main() -> None:
  """Run the command."""
  arguments = parsers.generate().parse_args()
  settings = sampling_args(arguments)  # checked before the model is loaded, which is slow
  if "stop_strings" in arguments.given_as:  # in run_generation.py, "" means no stop token
    arguments.stop_strings = [text for text in arguments.stop_strings if text]
  stop_strings = [unescape(text, "--stop_strings") for text in arguments.stop_strings or []]
  _check_compat_flags(arguments)

  prompts = arguments.prompt
  if arguments.prompt_file:
    prompts = prompts + _read_prompt_file(Path(arguments.prompt_file))
    if not prompts:
      raise RequestError(
        f"--prompt_file={arguments.prompt_file!r}: contains no prompts; write one per line"
      )
  interactive = not prompts and sys.stdin.isatty() and not arguments.json
  if not prompts and not sys.stdin.isatty():
    prompts = _read_stdin()
  if not prompts and not interactive:
    raise RequestError(
      "--prompt is missing; give a text, --prompt_file, or lines on standard input, or run on a "
      "terminal"
    )
  if arguments.use_cpu:
    jax.config.update("jax_platforms", "cpu")  # before JAX looks for devices
  if arguments.model_type and arguments.model:
    checkpoint = repo.resolve(arguments.model, arguments.revision, weights=False)
    _check_model_type(arguments.model_type, checkpoint)
  completer = Completer(
    model=load_model(arguments),
    settings=settings,
    stop_strings=stop_strings,
    prefix=arguments.prefix or "",
  )
  if arguments.model_type:
    _check_model_type(arguments.model_type, completer.model.source)
  completer.print_settings()
  if interactive:
    return interactive_loop(completer)
  if len(prompts) == 1 and sys.stdout.isatty() and not arguments.json:
    return completer.stream(prompts[0])
  completions = completer.complete(prompts)
  if arguments.json:
    output = {"completions": [completion._asdict() for completion in completions]}
    print(json.dumps(output, ensure_ascii=sys.stdout.encoding.lower() != "utf-8"))
  else:
    print("\n\n".join(completion.prompt + completion.text for completion in completions))


@dataclasses.dataclass(frozen=True)
class Completer:
  """A model with its sampling settings, stop strings and prefix."""

  model: Pretrained
  settings: dict[str, float]
  stop_strings: list[str]
  prefix: str

  def print_settings(self) -> None:
    """Print a line to stderr for each setting that has no effect.

    The setting comes from a flag or from the model's generation_config.json.
    """
    config = generation_config.load(self.model.source.folder, self.settings)
    if config.ignored:
      print(f"{config.file}: ignored, not supported: {', '.join(config.ignored)}", file=sys.stderr)
    for line in config.warnings:
      print(line, file=sys.stderr)
    positions = self.model.source.cfg.P
    for name in ("max_new_tokens", "max_length"):
      if positions < self.settings.get(name, 0) < UNLIMITED_TOKENS:
        flag = f"--{name}={self.settings[name]}"
        print(f"{flag}: texts end at the model's {positions} positions", file=sys.stderr)

  def complete(
    self, prompts: list[str], on_text: Callable[[int, str], None] | None = None
  ) -> list[Completion]:
    """Return the completions, with prompts as given, without the prefix.

    Args:
      prompts: texts to complete; the model reads the prefix before each.
      on_text: called with the index of a prompt and each new piece of its completion.
    """
    completions = self.model.generate(
      [self.prefix + prompt for prompt in prompts],
      stop_strings=self.stop_strings,
      on_text=on_text,
      **self.settings,
    )
    return [it._replace(prompt=it.prompt.removeprefix(self.prefix)) for it in completions]

  def stream(self, prompt: str) -> None:
    """Stream one completion to the terminal.

    Several completions, or beams, are printed when all are done.
    """
    sampling = generation_config.load(self.model.source.folder, self.settings).sampling
    if sampling.num_beams > 1 or sampling.num_return_sequences > 1:
      print("\n\n".join(escape_controls(it.prompt + it.text) for it in self.complete([prompt])))
    else:
      write = functools.partial(print, end="", flush=True)
      write(escape_controls(prompt))
      self.complete([prompt], on_text=lambda _, text: write(escape_controls(text)))
      print()


def interactive_loop(completer: Completer) -> None:
  """Ask for prompts on the terminal, and stream a completion of each."""
  # With readline, `input` can edit lines and recall earlier prompts. Some platforms lack it.
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401

  while True:
    try:
      prompt = input("prompt> ")
    except (EOFError, KeyboardInterrupt):
      print()
      return
    try:
      completer.stream(prompt)
    except KeyboardInterrupt:  # stops this completion only
      print()
    except RequestError as error:  # such as a prompt that is too long
      print(f"error: {error}")


def sampling_args(arguments: argparse.Namespace) -> dict[str, float]:
  """Return the sampling settings of the command line.

  These are fields of `Sampling`, and do_sample. --model_type adds run_generation.py's defaults.

  Raises:
    RequestError: values are invalid, alone or together. The error names the flags as given.
  """
  names = (*Sampling._fields, "do_sample")
  settings = {name: value for name in names if (value := getattr(arguments, name)) is not None}
  if arguments.given_as.get("max_new_tokens") == "length" and settings["max_new_tokens"] < 0:
    settings["max_new_tokens"] = UNLIMITED_TOKENS
  if arguments.model_type:
    added = run_generation.missing_defaults(settings)
    text = ", ".join(f"{name}={value}" for name, value in added.items()) or "none (all are set)"
    print(
      f"--model_type={arguments.model_type}: defaults of run_generation.py: {text}", file=sys.stderr
    )
    settings |= added
  try:
    fields = {name: value for name, value in settings.items() if name in Sampling._fields}
    Sampling(**fields).validate_values()
    resolve_sampling(settings)
  except RequestError as error:
    message = str(error)
    for name, flag in arguments.given_as.items():
      message = message.replace(f"--{name}=", f"--{flag}=")
    raise RequestError(message) from error
  return settings


def _check_compat_flags(arguments: argparse.Namespace) -> None:
  """Reject run_generation.py's unsupported flags.

  Prints a note on each flag with another meaning.
  """
  for name, (value, reason) in run_generation.FIXED.items():
    if getattr(arguments, name) is (not value):
      raise RequestError(f"--{name}={not value}: {reason}; leave it out")
  for name, reason in run_generation.UNSUPPORTED.items():
    if value := getattr(arguments, name):
      raise RequestError(f"--{name}={value}: {reason}")
  if arguments.use_cpu and arguments.require:
    raise RequestError(f"--use_cpu and --require={arguments.require}: use only one of the two")
  if arguments.fp16:
    flag = arguments.given_as.get("fp16", "fp16")
    print(f"--{flag}: {run_generation.FLAG_NOTES['fp16']}", file=sys.stderr)
  if "stop_strings" in arguments.given_as:
    print(
      "--stop_token: same as --stop_strings: the text ends with it; run_generation.py removes it",
      file=sys.stderr,
    )


def _check_model_type(model_type: str, checkpoint: repo.HFCheckpoint) -> None:
  """Raise RequestError for a model of another family."""
  actual = checkpoint.hf_config["model_type"]
  if run_generation.MODEL_TYPES[model_type] != actual:
    raise RequestError(
      f"--model_type={model_type}: {checkpoint.folder / 'config.json'} has {actual}; "
      f"set --model_type={actual}"
    )


def _read_prompt_file(file: Path) -> list[str]:
  try:
    return _split_prompts(file.read_text(encoding="utf-8-sig"))
  except OSError as error:
    reason = (error.strerror or str(error)).lower()
    raise RequestError(f"--prompt_file={str(file)!r}: {reason}; name a text file") from error
  except UnicodeDecodeError as error:
    raise RequestError(f"--prompt_file={str(file)!r}: is not UTF-8; convert it") from error


def _read_stdin() -> list[str]:
  """Read prompts from standard input, one per line."""
  try:
    with open(sys.stdin.fileno(), encoding="utf-8-sig", newline="", closefd=False) as stream:
      return _split_prompts(stream.read())
  except (OSError, UnicodeDecodeError) as error:
    raise RequestError(
      f"--prompt is missing, and standard input cannot be read: {error}"
    ) from error


def _split_prompts(text: str) -> list[str]:
  """Split lines into prompts, without the empty ones."""
  return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]


if __name__ == "__main__":
  run_command(main)
