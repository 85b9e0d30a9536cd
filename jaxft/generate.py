"""Text from a model: python -m jaxft.generate --model PATH_OR_ID [--prompt TEXT ...] [--prompt_file F] [--json]"""

import argparse
import json
import sys
from pathlib import Path

from jaxft.command_line import add_model_flags, open_model
from jaxft.errors import RequestError, run_command
from jaxft.sample import Sampling


def main() -> None:
  parser = argparse.ArgumentParser(
    "python -m jaxft.generate", description="Completes prompts. With none, on a terminal, it asks."
  )
  add_model_flags(parser)
  parser.add_argument("--prompt", nargs="+", action="extend", default=[], metavar="TEXT", help="text to complete")
  parser.add_argument("--prompt_file", metavar="F", help="a file with one prompt a line")
  for name, default in Sampling._field_defaults.items():
    parser.add_argument(
      f"--{name}", type=type(default), default=default, help=f"as in transformers (default: {default})"
    )
  parser.add_argument("--json", action="store_true", help="print one JSON object")
  arguments = parser.parse_args()
  sampling = {name: getattr(arguments, name) for name in Sampling._fields}
  Sampling(**sampling).check()

  prompts = arguments.prompt + (_lines(Path(arguments.prompt_file)) if arguments.prompt_file else [])
  interactive = not prompts and sys.stdin.isatty() and not arguments.json
  if not prompts and not interactive:
    raise RequestError("--prompt is missing: give a text, --prompt_file, or a terminal to ask on")
  ready = open_model(arguments)
  while interactive:
    try:
      prompt = input("prompt> ")
    except (EOFError, KeyboardInterrupt):
      print()
      return
    print(prompt + ready.generate([prompt], **sampling)[0].text)
  completions = ready.generate(prompts, **sampling)
  if arguments.json:
    print(json.dumps({"completions": [completion._asdict() for completion in completions]}, ensure_ascii=False))
  else:
    print("\n\n".join(completion.prompt + completion.text for completion in completions))


def _lines(file: Path) -> list[str]:
  try:
    return file.read_text(encoding="utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise RequestError(f"--prompt_file {str(file)!r}: {error}") from error


if __name__ == "__main__":
  run_command(main)
