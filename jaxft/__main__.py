"""The console script: `jaxft COMMAND ...` runs `python -m jaxft.COMMAND ...`."""

import contextlib
import runpy
import sys

from jaxft.cli import commands, startup
from jaxft.utils import environment


def main() -> None:
  """Run the command that `sys.argv` names, or print the list of commands.

  Exit with code 2 for an unknown command, and if no command is given.
  """
  name, *words = sys.argv[1:] or [""]
  if name == "quickstart":
    if {*commands.HELP} & {*words}:
      print(commands.QUICKSTART_HELP, end="")
      return
    name, words = "train", ["--config", "quickstart", *words]
  if name in commands.COMMANDS:
    sys.orig_argv = [commands.SCRIPT, name, *words]  # usage texts and reports have this command
    startup.begin_command()
    sys.argv[1:] = words
    if not sys.flags.safe_path:
      sys.path.append("")  # a config may import from the current folder, as with `python -m`
    runpy.run_module(f"jaxft.{name}", run_name="__main__", alter_sys=True)
    return
  environment.setup()
  texts = dict.fromkeys(["", *commands.HELP], commands.overview)
  texts |= dict.fromkeys(commands.VERSION, commands.version) | {"completion": commands.completion}
  if name not in texts:
    print(f"error: {commands.suggestion(name)}", file=sys.stderr)
    sys.exit(2)
  with contextlib.suppress(BrokenPipeError):
    print(texts[name](), flush=True)
  sys.exit(0 if name else 2)


if __name__ == "__main__":
  main()
