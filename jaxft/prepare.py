"""Tokenize and pack the data of a config, and print a report.

python -m jaxft.prepare --config configs/X.py [--json]
"""

import json
import sys
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

import jaxft.config
from jaxft.cli import flags, usage
from jaxft.data import dataset, sources
from jaxft.data.packing import PackedRow
from jaxft.errors import RequestError, run_command
from jaxft.hf import base_model, repo
from jaxft.hf.tokenizer import fingerprint, load_tokenizer
from jaxft.utils.console import ProgressBar, escape_controls
from jaxft.utils.logger import log
from jaxft.utils.types import Json

PREVIEW_ROWS = 3


def main() -> None:
  """Run the command."""
  arguments = flags.parse(usage.PREPARE, ("json",))
  config = jaxft.config.resolve(arguments.config)
  lines = sources.validate_sources(config.data)
  if not lines:  # as in train.py: bad sources are reported before a model's config is read
    lines += repo.validate_model(config.model.path, weights=False)
  if lines:
    raise RequestError("\n".join(lines))
  source = base_model.resolve(config.model, weights=False)
  if config.data.sequence_length > source.cfg.P:
    raise RequestError(
      f"config.data.sequence_length={config.data.sequence_length}: "
      f"must be at most {source.cfg.P}, the model's positions"
    )
  tokenizer = load_tokenizer(source.tokenizer_folder, source.cfg.V)
  print_line = (lambda line: print(line, file=sys.stderr)) if arguments.json else log
  with ProgressBar("tokenizing", 1) as bar:
    data = dataset.prepare_data(
      config.data,
      tokenizer,
      fingerprint(tokenizer),
      lambda done, total: bar.update(done, total=total),
      print_line,
    )
  report = json.loads(data.to_json(config.train))
  if arguments.json:
    print(json.dumps(report))
    return
  console = Console(soft_wrap=True, highlight=False)
  console.print(_table(report))
  decode = lambda ids: escape_controls(str(tokenizer.decode(ids)))
  for i in np.linspace(0, len(data.train) - 1, min(PREVIEW_ROWS, len(data.train))).astype(int):
    console.print(Text(f"\nsequence {i}, learned in green, not learned in gray:", style="bold"))
    console.print(_preview(data.train[i], decode, data.labels))


def _table(report: Json) -> Table:
  table = Table(Column(overflow="fold"), Column(overflow="fold"), show_header=False, box=None)
  for name, value in report.items():
    text = _format_number(value)
    if isinstance(value, dict):
      items = {key.replace("_", " "): it for key, it in value.items() if it not in ({}, None)}
      text = ", ".join(f"{key} {_format_number(it)}" for key, it in items.items()) or "none"
    table.add_row(name.replace("_", " "), Text(escape_controls(text)))
  return table


def _format_number(value: object) -> str:
  if isinstance(value, dict):
    return "(" + ", ".join(f"{key} {_format_number(it)}" for key, it in value.items()) + ")"
  return f"{value:,}" if isinstance(value, int) else str(value)


def _preview(row: PackedRow, decode: Callable[[np.ndarray], str], labels: list[str]) -> Text:
  """Decode a row for display, without its padding.

  Learned tokens are green, others gray.
  """
  last = int(np.flatnonzero(row["mask"])[-1])  # each row has a learned token
  if labels:
    text = Text(decode(row["ids"][: last + 1]), "grey50")
    return text.append(f" -> {labels[row['targets'][last]]}", "green")
  text = Text()
  edges = np.flatnonzero(np.diff(row["mask"][: last + 1])) + 1
  for start, stop in zip([0, *edges], [*edges, last + 1], strict=True):
    text.append(decode(row["targets"][start:stop]), "green" if row["mask"][start] else "grey50")
  return text


if __name__ == "__main__":
  run_command(main)
