"""What a model makes of a text, or of labels: python -m jaxft.evaluate --model PATH_OR_ID --data SOURCE [--json]"""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

import jaxft.config
from jaxft.cli import parsers
from jaxft.cli.flags import load_model
from jaxft.data import sources
from jaxft.errors import RequestError, run_command
from jaxft.utils.console import escape_controls

MIN_VALUES = {"sequence_length": 0, "batch_size": 1, "stride": 0}  # 0: not given


def main() -> None:
  arguments = parsers.evaluate().parse_args()

  if not arguments.data and not arguments.workdir:
    raise RequestError("--data is missing: name a file, a glob, a folder or hub:NAME")
  if arguments.layout and not arguments.data:
    raise RequestError(
      f"--layout={arguments.layout}: goes with --data; what a run has held out is read as in the run"
    )
  lines = [
    line.replace("config.data.validation", "--data")
    for line in sources.validate_sources({"validation": arguments.data})
  ]
  how = {name: getattr(arguments, name) for name in MIN_VALUES}
  lines += [
    f"--{name}={value}: must be at least 1"
    for name, value in how.items()
    if value < MIN_VALUES[name]
  ]
  if lines:
    raise RequestError("\n".join(lines))
  ready = load_model(arguments)
  if arguments.data:
    columns = {
      name: value
      for name in ("text_column", "label_column", "layout")
      if (value := getattr(arguments, name))
    }
    like = (
      jaxft.config.load_run_config(Path(arguments.workdir) / "config.json").data
      if arguments.workdir
      else None
    )
    how["sequence_length"] = arguments.sequence_length or (like.sequence_length if like else 0)
    result = ready.evaluate(*arguments.data, like=like, **how, **columns)
  else:
    result = ready.evaluate_held_out(**how)
  if arguments.json:
    print(json.dumps(result))
  else:
    told = f"loss {result['loss']:.4f}"
    if "accuracy" in result:
      told = f"accuracy {result['accuracy']:.1%}, F1 {result['f1']:.3f}, {told}, over {result['tokens']:,} texts"
    else:
      told += f" nats a token, perplexity {result['perplexity']:.2f}, "
      told += f"{result['bits_per_byte']:.4f} bits a byte, " if "bits_per_byte" in result else ""
      told += f"over {result['tokens']:,} tokens"
    print(told)
    print_confusion(result.get("confusion", {}))


def print_confusion(confusion: dict[str, dict[str, int]]) -> None:
  """Prints how many texts of each label were taken for which."""
  if confusion:
    table = Table(
      "",
      *(Column(escape_controls(f"taken for {name}"), justify="right") for name in confusion),
      box=None,
    )
    for name, row in confusion.items():
      table.add_row(escape_controls(name), *(f"{count:,}" for count in row.values()))
    Console(soft_wrap=True, highlight=False, markup=False).print(table)


if __name__ == "__main__":
  run_command(main)
