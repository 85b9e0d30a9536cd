"""Write docs/reference/settings.md and commands.md from the settings and from each --help.

    python scripts/make_reference.py            # after a change of a setting or of a flag

Both are committed, so that they can be read without building the site; a test compares them.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from jaxft.cli import commands
from jaxft.config import BY_NAME, SETTINGS, Setting

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "reference"
SECTIONS = {
  "model": "The checkpoint to start from, its tokenizer and its number formats.",
  "data": "Sources, formats and layouts. The guide is [Data](../data.md).",
  "train": "Length of a run, batches, evaluations, checkpoints and samples.",
  "optim": "The optimizer and the learning rate.",
  "mesh": "The devices of a run. The guide is [Many devices](../sharding.md).",
  "memory": "What to recompute and what to offload. The guide is [Memory](../memory.md).",
  "lora": "Adapters. The guide is [LoRA](../recipes/lora.md).",
  "tracking": "TensorBoard, MLflow and others. The guide is [Trackers](../trackers.md).",
  "export": "The Hugging Face folder at the end of a run.",
}
KINDS = {str: "text", int: "whole number", float: "number", bool: "`True` or `False`"}
CODE = re.compile(
  rf"(?<![\w.`/])(?:(?:{'|'.join(SECTIONS)})\.[a-z]\w*(?:=\w+)?|\{{\w+\}}|--[a-z_]{{3,}}"
  r"|[\w.]*\w?\.(?:json|jsonl|csv|parquet|txt)\b(?:@[\d.]+\d)?|[a-z_]+\.[\w.]*\*|WORKDIR(?:/\w+)?"
  r"|hub:[\w\[\]:]+)"
)
WRITTEN = (
  "<!-- Written by scripts/make_reference.py: edit that, or the source, not this page. -->\n"
)
SETTINGS_HEAD = """# Settings

A config file sets these values, and a flag overrides one: `--config.train.batch_size=16`. A setting
that takes several texts takes its flag several times. `--print_config` prints all settings of a run
with their values. The exact rules are in `jaxft/config.py`."""
COMMANDS_HEAD = """# Commands

`jaxft train` and `python -m jaxft.train` are the same command. `--help` prints the flags of a
command, as below. All commands have the same [exit codes](workdir.md#exit-codes).
"""


def values(setting: Setting) -> str:
  """Return the type of a setting, or its choices."""
  wanted = setting.check(("\0",) if setting.kind is tuple else "\0" if setting.kind is str else -9)
  if wanted and wanted.startswith(("one of ", "some of ")):
    text = ", ".join(f"`{it}`" if it else "empty" for it in wanted.split(" of ", 1)[1].split(", "))
    return text if wanted.startswith("one") else f"any of {text}"
  text = "texts" if setting.kind is tuple else KINDS[setting.kind]
  if wanted and wanted.startswith(("at least", "above")):
    text += f", {wanted.replace(str(2**31), '2³¹')}"
  return ", or ".join([text, *(f"`{it}`" for it in setting.literals)])


def escaped(text: str) -> str:
  """Return a description as the text of a table cell."""
  pieces, end = [], 0
  quote = lambda it: re.sub(r"([*<|])", r"\\\1", it)
  for code in CODE.finditer(text):
    pieces += [quote(text[end : code.start()]), f"`{code[0]}`"]
    end = code.end()
  if "`" in text:  # backticks would end inline code
    return quote(text)
  return "".join([*pieces, quote(text[end:])])


def settings_page() -> str:
  lines = [WRITTEN + SETTINGS_HEAD]
  for section, sentence in SECTIONS.items():
    lines += [f"\n## {section}\n", sentence, ""]
    lines += ['<div class="stacked" markdown>', "", "| setting | values | default | meaning |"]
    lines.append("|---|---|---|---|")
    for it in SETTINGS:
      if it.name.startswith(f"{section}."):
        default = "unset" if it.default is None else f"`{it.default}`" if it.default else "empty"
        default = f"`{it.default}`" if isinstance(it.default, int | float) else default
        lines.append(f"| `{it.name}` | {values(it)} | {default} | {escaped(it.doc)} |")
    lines += ["", "</div>"]
  assert {it.split(".")[0] for it in BY_NAME} == SECTIONS.keys()
  return "\n".join(lines) + "\n"


def help_of(*words: str) -> str:
  """Return what `jaxft WORDS --help` prints, in lines of at most 100 columns."""
  environment = {**os.environ, "COLUMNS": "100", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
  command = [sys.executable, "-m", "jaxft", *words, "--help"]
  done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
  if done.returncode:
    sys.exit(f"{' '.join(command)}: {done.stderr}")
  return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def commands_page() -> str:
  lines = [WRITTEN + COMMANDS_HEAD, "```text", help_of(), "```"]
  for name in commands.COMMANDS:
    lines += [f"\n## {name}\n", "```text", help_of(name), "```"]
  return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
  return {FOLDER / "settings.md": settings_page(), FOLDER / "commands.md": commands_page()}


if __name__ == "__main__":
  for file, text in pages().items():
    file.write_text(text, encoding="utf-8")
