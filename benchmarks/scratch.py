"""A run of a published size with random weights on text that is made up: nothing is downloaded."""

import json
import sys
from pathlib import Path

from ml_collections import ConfigDict

ROOT = Path(__file__).parent.parent


def config_of(folder: Path, model: str, rows: int, length: int, steps: int, dropout: float = 0.0) -> ConfigDict:
  """The settings of such a run; writes the model's config.json, a tokenizer and the text into `folder`."""
  sys.path.insert(0, str(ROOT / "tests"))
  import tiny

  from jaxft import config as settings
  from jaxft.hf.published import PUBLISHED

  tiny.write_gpt2_bpe(folder)
  (folder / "config.json").write_text(json.dumps(PUBLISHED[model]))
  texts = (" ".join(str(n * n) for n in range(m, m + length)) for m in range(max(64, 8 * rows)))
  (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  config = settings.default()
  config.model.path, config.model.init, config.model.dropout = str(folder), "scratch", dropout
  config.data.train, config.data.limit_validation = (str(folder / "texts.jsonl"),), 1
  config.data.sequence_length, config.data.cache_dir = length, str(folder / "tokens")
  config.train.batch_size, config.train.steps, config.train.log_every = rows, steps, 1
  config.train.eval_every = config.train.save_every = 0
  config.train.sample_prompts = ()
  return config
