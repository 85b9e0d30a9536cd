"""Writes the model card of an export."""

import contextlib
import json
from pathlib import Path

import jaxft
import jaxft.config
from jaxft.utils.types import Json
from jaxft.utils.units import format_count

CARD = """---
library_name: transformers
pipeline_tag: {task}
{base}tags:
- jaxft
---

# {name}

{what} with jaxft {version}.

| | |
|---|---|
{facts}

```python
from transformers import {auto}, AutoTokenizer
model = {auto}.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

`parity.json` compares the logits of this folder with those of the trained model.
"""
# Head -> the hub's task tag, and the class that loads the model.
TASKS = {
  "lm": ("text-generation", "AutoModelForCausalLM"),
  "classification": ("text-classification", "AutoModelForSequenceClassification"),
}


def model_card(workdir: Path, step: int, local: bool) -> str:
  """Return README.md of a model exported at `step`.

  Its facts are from the files of the run's workdir. Local paths are cut to their last part.

  Args:
    workdir: the run's workdir.
    step: the step of the exported weights.
    local: whether the base model is a folder; the hub links the page of a hub id.
  """
  config = jaxft.config.load_run_config(workdir / "config.json")
  batch_size = config.train.batch_size
  length = config.data.sequence_length
  optim = config.optim
  path = config.model.path
  pretrained = config.model.init == "pretrained"
  name = path.rstrip("/").split("/")[-1]
  hub_id = pretrained and not local
  facts = {
    "training text": ", ".join(source.rstrip("/").split("/")[-1] for source in config.data.train),
    "steps": f"{step:,} of {batch_size} sequences of {length} tokens",
    "optimizer": f"{optim.name}, peak learning rate {optim.learning_rate:g}, {optim.schedule}",
  }
  for report in _read_json_lines(workdir / "data_report.json"):
    documents = format_count(report["rows"]["trained"], "document")
    sequences = min(batch_size, report["sequences"]["trained"])
    facts["training text"] += f": {documents}, {report['tokens']['trained']:,} tokens"
    facts["steps"] = f"{step:,} of {format_count(sequences, 'sequence')} of {length} tokens"
    if not report["tokens"]["held_out"]:
      facts["eval loss"] = "none: the run held out no text"
  metrics = _read_json_lines(workdir / "metrics.jsonl")
  evals = [line for line in metrics if "eval/loss" in line and line["step"] <= step]
  if evals:
    for key, metric in (
      ("eval/loss", "eval loss"),
      ("eval/accuracy", "accuracy"),
      ("eval/f1", "F1"),
    ):
      if key in evals[0]:
        ends = (f"{line[key]:.4f} at step {line['step']:,}" for line in (evals[0], evals[-1]))
        facts[metric] = ", ".join(ends)
    if "eval/floor" in evals[0]:
      facts["eval loss"] += f" (entropy floor: {evals[0]['eval/floor']:.4f})"
  task, auto = TASKS[config.model.head]
  base = f"Fine-tuned from `{path if hub_id else name}`"
  return CARD.format(
    task=task,
    auto=auto,
    base=f"base_model: {path}\n" if hub_id else "",
    name=f"{name}, fine-tuned" if pretrained else name,
    what=base if pretrained else "Trained from scratch",
    version=jaxft.__version__,
    facts="\n".join(f"| {key} | {fact} |" for key, fact in facts.items()),
  )


def _read_json_lines(file: Path) -> list[Json]:
  """Read the objects of a .json or .jsonl file.

  Skips a file that the user has removed, and a line that a killed process left incomplete.
  """
  if not file.is_file():
    return []
  text = file.read_text(encoding="utf-8", errors="replace")
  objects = []
  for line in [text] if file.suffix == ".json" else text.splitlines():
    with contextlib.suppress(ValueError):
      objects.append(json.loads(line))
  return objects
