"""Evaluate a model on text or labels.

python -m jaxft.evaluate --model PATH_OR_ID --data SOURCE [--json]
"""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

import jaxft.config
from jaxft.cli import parsers
from jaxft.cli.flags import load_model
from jaxft.config import DataSection
from jaxft.data import sources
from jaxft.errors import RequestError, run_command
from jaxft.utils.console import escape_controls
from jaxft.utils.types import Json

MIN_VALUES = {"sequence_length": 0, "batch_size": 1, "stride": 0}  # a value of 0 means not given


def main() -> None:
  """Run the command."""
  arguments = parsers.evaluate().parse_args()

  if not arguments.data and not arguments.workdir:
    raise RequestError("--data is missing; name a file, a glob, a folder or hub:NAME")
  if arguments.layout and not arguments.data:
    raise RequestError(
      f"--layout={arguments.layout}: needs --data; the held-out set of a run keeps the run's layout"
    )
  lines = sources.validate_sources(DataSection(validation=tuple(arguments.data)))
  lines = [line.replace("config.data.validation", "--data") for line in lines]
  settings = {name: getattr(arguments, name) for name in MIN_VALUES}
  for name, value in settings.items():
    if value < MIN_VALUES[name]:
      lines.append(f"--{name}={value}: must be at least 1")
  if lines:
    raise RequestError("\n".join(lines))
  model = load_model(arguments)
  if arguments.data:
    for name in ("text_column", "label_column", "layout", "encoding", "on_bad_row"):
      if value := getattr(arguments, name):
        settings[name] = value
    like = None
    if arguments.workdir:
      like = jaxft.config.load_run_config(Path(arguments.workdir) / "config.json").data
      settings["sequence_length"] = arguments.sequence_length or like.sequence_length
    with parsers.data_flags():
      result = model.evaluate(*arguments.data, like=like, **settings)
  else:
    result = model.evaluate_held_out(**settings)
  if arguments.json:
    print(json.dumps(result))
  else:
    print(_format_result(result))
    print_confusion(result.get("confusion", {}))


def _format_result(result: Json) -> str:
  loss = f"loss {result['loss']:.4f}"
  if "accuracy" in result:
    scores = f"accuracy {result['accuracy']:.1%}, F1 {result['f1']:.3f}"
    return f"{scores}, {loss}, over {result['tokens']:,} texts"
  line = f"{loss} nats per token, perplexity {result['perplexity']:.2f}, "
  line += f"{result['bits_per_byte']:.4f} bits per byte, " if "bits_per_byte" in result else ""
  return f"{line}over {result['tokens']:,} tokens"


def print_confusion(confusion: dict[str, dict[str, int]]) -> None:
  """Print the confusion matrix: how many texts of each label got each prediction."""
  if confusion:
    columns = (Column(escape_controls(f"predicted {name}"), justify="right") for name in confusion)
    table = Table("", *columns, box=None)
    for name, row in confusion.items():
      table.add_row(escape_controls(name), *(f"{count:,}" for count in row.values()))
    Console(soft_wrap=True, highlight=False, markup=False).print(table)


if __name__ == "__main__":
  run_command(main)
