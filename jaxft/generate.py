"""Text from a model: python -m jaxft.generate --model PATH_OR_ID [--prompt TEXT ...] [--prompt_file F] [--json]"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from jaxft import generation, parsers
from jaxft.command_line import open_model, unescaped
from jaxft.errors import RequestError, run_command
from jaxft.pretrained import Pretrained
from jaxft.run.tracking import visible
from jaxft.sample import Sampling


def main() -> None:
  arguments = parsers.generate().parse_args()
  sampling = {name: value for name in Sampling._fields if (value := getattr(arguments, name)) is not None}
  Sampling(**sampling).check_values()  # before a model is read
  how = sampling | {"stop_strings": [unescaped(text, "--stop_strings") for text in arguments.stop_strings]}

  prompts = arguments.prompt + (_lines(Path(arguments.prompt_file)) if arguments.prompt_file else [])
  interactive = not prompts and sys.stdin.isatty() and not arguments.json
  if not prompts and not interactive:
    raise RequestError("--prompt is missing: give a text, --prompt_file, or a terminal to ask on")
  ready = open_model(arguments)
  if left_out := generation.of(ready.source.folder, sampling).not_followed:
    print(f"{ready.source.folder / generation.FILE}: not followed: {', '.join(left_out)}", file=sys.stderr)
  if interactive:
    return talk(ready, how)
  if len(prompts) == 1 and sys.stdout.isatty() and not arguments.json:
    return write(ready, prompts[0], how)
  completions = ready.generate(prompts, **how)
  if arguments.json:
    told = {"completions": [completion._asdict() for completion in completions]}
    print(json.dumps(told, ensure_ascii=sys.stdout.encoding.lower() != "utf-8"))
  else:
    print("\n\n".join(completion.prompt + completion.text for completion in completions))


def talk(ready: Pretrained, how: dict[str, Any]) -> None:
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
      write(ready, prompt, how)
    except KeyboardInterrupt:  # enough of this one
      print()
    except RequestError as error:  # a prompt that is too long
      print(f"error: {error}")


def write(ready: Pretrained, prompt: str, how: dict[str, Any]) -> None:
  """Writes what follows a prompt to the terminal, as it comes; several texts of it, which beams may be, one after the other."""
  given = {name: value for name, value in how.items() if name in Sampling._fields}
  sampling = generation.of(ready.source.folder, given).sampling
  if sampling.num_beams > 1 or sampling.num_return_sequences > 1:
    found = ready.generate([prompt], **how)
    print("\n\n".join(visible(it.prompt + it.text) for it in found))
  else:
    print(visible(prompt), end="", flush=True)
    ready.generate([prompt], tell=lambda _, added: print(visible(added), end="", flush=True), **how)
    print()


def _lines(file: Path) -> list[str]:
  try:
    return [line for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
  except (OSError, UnicodeDecodeError) as error:
    raise RequestError(f"--prompt_file {str(file)!r}: {error}") from error


if __name__ == "__main__":
  run_command(main)
