"""The commands of `jaxft` and the configs that it finds by name; imported early, so it is light."""

import re
import sys
from pathlib import Path

import jaxft

SCRIPT = "jaxft"  # the first word of `sys.orig_argv` when the console script runs
# Command -> its file. The first line of the file describes it.
COMMANDS = {
  "train": "train.py",
  "generate": "generate.py",
  "evaluate": "evaluate.py",
  "export": "export.py",
  "prepare": "prepare.py",
  "plan": "plan/__main__.py",
  "report": "report.py",
  "tokenizer": "tokenizer.py",
  "doctor": "doctor.py",
}
QUICKSTART = "Fine-tune the small model that jaxft includes: offline, three to six minutes"
QUICKSTART_HELP = f"""jaxft quickstart [--workdir DIR] [--config.a.b=value ...]

{QUICKSTART}.

The same as `jaxft train --config quickstart`: it takes the flags of `jaxft train`, and resumes a
stopped run. The run is in runs/quickstart: report.html shows it, export/ has the model.
"""
HELP = ("-h", "--help")
VERSION = ("-V", "--version")
# For bash, and for zsh after `autoload bashcompinit; bashcompinit`.
COMPLETION = r"""_jaxft() {
  local word="${COMP_WORDS[COMP_CWORD]}" command="${COMP_WORDS[1]}"
  if [ "$COMP_CWORD" = 1 ]; then
    COMPREPLY=($(compgen -W "COMMANDS" -- "$word"))
  elif [ "$3" = --config ]; then
    COMPREPLY=($(compgen -W "CONFIGS" -- "$word"; compgen -f -- "$word"))
  elif [ "${word:0:1}" = - ]; then
    COMPREPLY=($(compgen -W "$(jaxft "$command" --help | grep -oE -- '--[a-z_]+')" -- "$word"))
  fi
}
complete -o default -F _jaxft jaxft"""

PACKAGE = Path(__file__).resolve().parent.parent
# A wheel has a copy of configs/ in jaxft/shipped (setup.py); a checkout has the folder itself.
CONFIG_FOLDERS = (PACKAGE / "shipped" / "configs", PACKAGE.parent / "configs")
CONFIG_NAME = re.compile(r"(?:configs/)?([A-Za-z]\w*)(?:\.py)?")


def overview() -> str:
  """Return what `jaxft --help` prints: the commands and the shipped configs."""
  import textwrap

  lines = {name: _first_line(file) for name, file in COMMANDS.items()}
  lines["quickstart"] = QUICKSTART
  names = ", ".join(shipped_configs()) or "none"
  return "\n".join(
    [
      "jaxft COMMAND [--help] [flags]",
      "",
      *(f"  {name:12}{line}" for name, line in lines.items()),
      "",
      textwrap.fill(f"Configs that --config finds by name: {names}", 90),
      "",
      "`python -m jaxft.COMMAND` runs the same command.",
      '`eval "$(jaxft completion)"` makes bash complete commands, flags and configs.',
    ]
  )


def completion() -> str:
  """Return what `jaxft completion` prints, for a shell to evaluate."""
  names = " ".join([*COMMANDS, "quickstart"])
  return COMPLETION.replace("COMMANDS", names).replace("CONFIGS", " ".join(shipped_configs()))


def version() -> str:
  """Return what `jaxft --version` prints."""
  return f"jaxft {jaxft.__version__}"


def suggestion(word: str) -> str:
  """Return the error for a first word that is not a command."""
  if word.startswith("-") and (near := _nearest(word, [*HELP, *VERSION])):
    return f"{word!r}: unknown flag; did you mean {near}?"
  if word.startswith("-"):
    return f"{word!r}: name a command before the flags, such as: jaxft train {word}"
  near = _nearest(word, [*COMMANDS, "quickstart"])
  hint = f"did you mean {near}?" if near else "jaxft --help lists them"
  return f"{word!r}: unknown command; {hint}"


def as_typed(usage: str) -> str:
  """Return a usage text with this command as the user typed it: python -m jaxft.X, or jaxft X."""
  if sys.orig_argv[:1] != [SCRIPT]:
    return usage
  shorter = re.sub(r"python -m jaxft\.(\w+)", rf"{SCRIPT} \1", usage)
  head, blank, rest = shorter.partition("\n\n")  # the head's lines are aligned with the first one
  return head.replace("\n" + " " * (len("python -m ")), "\n") + blank + rest


def shipped_configs() -> dict[str, Path]:
  """Return the files of the shipped configs by name; a container may have none."""
  for folder in CONFIG_FOLDERS:
    if (folder / "quickstart.py").is_file():
      return {file.stem: file for file in sorted(folder.glob("*.py"))}
  return {}


def find_config(name: str) -> Path | None:
  """Return the config of this name: in configs/ of the current folder, or a shipped one."""
  if not (match := CONFIG_NAME.fullmatch(name)):
    return None
  own = Path("configs", f"{match[1]}.py")
  return own if own.is_file() else shipped_configs().get(match[1])


def config_suggestion(name: str) -> str:
  """Return the shipped names that resemble a name, for an error."""
  names = [*shipped_configs()]
  if near := _nearest(Path(name).stem, names):
    return f"did you mean {near}?"
  return f"shipped configs: {', '.join(names)}" if names else "name a file"


def _nearest(word: str, names: list[str]) -> str | None:
  import difflib

  return next(iter(difflib.get_close_matches(word, names, 1)), None)


def _first_line(file: str) -> str:
  """Return the first line of a module's docstring, without its command and its full stop."""
  with (PACKAGE / file).open(encoding="utf-8") as stream:
    line = stream.readline().strip().lstrip("r").strip('"')
  return line.partition(": python -m")[0].rstrip(".")
