"""A run of a published size with random weights on text that is made up: nothing is downloaded."""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from children import ROOT
from ml_collections import ConfigDict


def config_of(
  folder: Path, model: str, rows: int, length: int, steps: int, dropout: float = 0.0
) -> ConfigDict:
  """The settings of such a run; writes config.json, a tokenizer and the text into `folder`."""
  sys.path.insert(0, str(ROOT / "tests" / "support"))
  import tiny
  from models import PUBLISHED

  import jaxft.config

  tiny.write_gpt2_bpe(folder)
  (folder / "config.json").write_text(json.dumps(PUBLISHED[model]))
  texts = (" ".join(str(n * n) for n in range(m, m + length)) for m in range(max(64, 8 * rows)))
  (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  config = jaxft.config.default()
  config.model.path, config.model.init, config.model.dropout = str(folder), "scratch", dropout
  config.data.train, config.data.limit_validation = (str(folder / "texts.jsonl"),), 1
  config.data.sequence_length, config.data.cache_dir = length, str(folder / "tokens")
  config.train.batch_size, config.train.steps, config.train.log_every = rows, steps, 1
  config.train.eval_every = config.train.save_every = 0
  config.train.sample_prompts = ()
  return config


class LastStep(Exception):
  """All steps that are wanted were taken."""


def finetune_until(
  last: int,
  config: ConfigDict,
  workdir: Path,
  after_step: Callable[[int, dict[str, Any]], None] = lambda step, numbers: None,
  said: Callable[[str], None] = lambda line: None,
) -> None:
  """`jaxft.finetune`, which ends after step `last` without a checkpoint or an export.

  Those of GPT-J take 90 GiB of disk.

  Args:
    last: less than `config.train.steps`; after the last one a run is evaluated first.
    after_step: takes the number and the metrics of each step.
    said: takes each line that the train loop logs.
  """
  from jaxft import train
  from jaxft.metrics.logger import MetricsLogger
  from jaxft.training import loop, stages

  log_step, log, check_room = MetricsLogger.log_step, loop.log, stages.check_room

  def step(logger, number: int, numbers: dict[str, Any], *rest) -> None:
    log_step(logger, number, numbers, *rest)
    after_step(number, numbers)
    if number == last:
      raise LastStep

  def heard(line: str) -> None:
    log(line)
    said(line)

  MetricsLogger.log_step, loop.log, stages.check_room = step, heard, lambda *_: None
  try:
    with contextlib.suppress(LastStep):
      train.finetune(config, workdir, require=os.environ.get("BENCHMARKS_REQUIRE"))
  finally:
    MetricsLogger.log_step, loop.log, stages.check_room = log_step, log, check_room
