"""Tokenise, pack and report the data: python -m jaxft.prepare --config configs/X.py [--config.a.b=value ...] [--json]"""

import json
import sys
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

import jaxft.config
from jaxft.cli import flags, usage
from jaxft.data import dataset, sources
from jaxft.errors import RequestError, run_command
from jaxft.hf import base_model, repo
from jaxft.hf.tokenizer import fingerprint, load_tokenizer
from jaxft.utils.console import ProgressBar, escape_controls, log

PREVIEW_ROWS = 3  # rows shown


def main() -> None:
  arguments = flags.parse(usage.PREPARE, ("json",))
  config = arguments.config
  lines = jaxft.config.validate(config)
  if not lines:
    lines += sources.validate_sources(config.data)
  if not lines:  # as in train.py: reading a model's config takes seconds
    lines += repo.validate_model(config.model.path, weights=False)
  if lines:
    raise RequestError("\n".join(lines))
  source = base_model.resolve(config.model, weights=False)
  if config.data.sequence_length > source.cfg.P:
    raise RequestError(
      f"config.data.sequence_length={config.data.sequence_length}: the model has {source.cfg.P} positions"
    )
  tokenizer = load_tokenizer(source.tokenizer_folder, source.cfg.V)
  tell = (lambda line: print(line, file=sys.stderr)) if arguments.json else log
  with ProgressBar("tokenising", 1) as meter:
    data = dataset.prepare_data(
      config.data,
      tokenizer,
      fingerprint(tokenizer),
      lambda done, total: meter.update(done, total=total),
      tell,
    )
  found = json.loads(data.to_json(config.train))
  if arguments.json:
    print(json.dumps(found))
    return
  console = Console(soft_wrap=True, highlight=False)
  console.print(_table(found))
  for i in np.linspace(0, len(data.train) - 1, min(PREVIEW_ROWS, len(data.train))).astype(int):
    console.print(Text(f"\nrow {i}, learned in green, not learned in grey:", style="bold"))
    console.print(_preview(data.train[i], tokenizer, data.labels))


def _table(found: dict[str, Any]) -> Table:
  table = Table(Column(overflow="fold"), Column(overflow="fold"), show_header=False, box=None)
  for name, value in found.items():
    if isinstance(value, dict):
      value = (
        ", ".join(
          f"{key.replace('_', ' ')} {_format_number(of)}"
          for key, of in value.items()
          if of not in ({}, None)
        )
        or "none"
      )
    table.add_row(name.replace("_", " "), Text(escape_controls(_format_number(value))))
  return table


def _format_number(value: Any) -> str:
  if isinstance(value, dict):
    return "(" + ", ".join(f"{key} {_format_number(of)}" for key, of in value.items()) + ")"
  return f"{value:,}" if isinstance(value, int) else str(value)


def _preview(row: dict[str, np.ndarray], tokenizer: Any, labels: list[str]) -> Text:
  """The row's text, coloured by whether each token is learned; what follows the last learned token is padding."""
  text, last = Text(), int(np.flatnonzero(row["mask"])[-1])  # no row is without a learned token
  if labels:
    return Text(escape_controls(tokenizer.decode(row["ids"][: last + 1])), "grey50").append(
      f" -> {labels[row['targets'][last]]}", "green"
    )
  runs = np.flatnonzero(np.diff(row["mask"][: last + 1])) + 1
  for start, stop in zip([0, *runs], [*runs, last + 1], strict=True):
    text.append(
      escape_controls(tokenizer.decode(row["targets"][start:stop])),
      "green" if row["mask"][start] else "grey50",
    )
  return text


if __name__ == "__main__":
  run_command(main)
