"""The model card of an export."""

import contextlib
import json
from pathlib import Path
from typing import Any

import jaxft
import jaxft.config
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

`parity.json` says how far this folder's logits are from those of the model that was trained.
"""
# What a model does, as the hub's tag of it, and the class that loads it.
TASKS = {
  "lm": ("text-generation", "AutoModelForCausalLM"),
  "classification": ("text-classification", "AutoModelForSequenceClassification"),
}


def model_card(workdir: Path, step: int, local: bool) -> str:
  """README.md of a model exported at `step`: the facts of the run, as the files of its workdir tell them.

  Args:
    local: the model that it began with is a folder, not a hub id, whose page the hub would link.

  Local paths are cut to their last part.
  """
  config = jaxft.config.load_run_config(workdir / "config.json")
  path, pretrained = config.model.path, config.model.init == "pretrained"
  name = path.rstrip("/").split("/")[-1]
  hub_id = pretrained and not local
  facts = {
    "training text": ", ".join(source.rstrip("/").split("/")[-1] for source in config.data.train),
    "steps": f"{step:,} of {config.train.batch_size} sequences of {config.data.sequence_length} tokens",
    "optimizer": f"{config.optim.name}, peak learning rate {config.optim.learning_rate:g}, {config.optim.schedule}",
  }
  for report in _read_json_lines(workdir / "data_report.json"):
    documents, rows = (
      report["rows"]["trained"],
      min(config.train.batch_size, report["sequences"]["trained"]),
    )
    facts["training text"] += (
      f": {format_count(documents, 'document')}, {report['tokens']['trained']:,} tokens"
    )
    facts["steps"] = (
      f"{step:,} of {format_count(rows, 'sequence')} of {config.data.sequence_length} tokens"
    )
    if not report["tokens"]["held_out"]:
      facts["eval loss"] = "none: nothing was held out"
  evals = [
    line
    for line in _read_json_lines(workdir / "metrics.jsonl")
    if "eval/loss" in line and line["step"] <= step
  ]
  if evals:
    first, last = evals[0], evals[-1]
    floor = f" (entropy of the text: {first['eval/floor']:.4f})" if "eval/floor" in first else ""
    losses = [f"{line['eval/loss']:.4f} at step {line['step']:,}" for line in (first, last)]
    facts["eval loss"] = ", ".join(losses) + floor
    for key, what in (("eval/accuracy", "accuracy"), ("eval/f1", "F1")):
      if key in first:
        facts[what] = ", ".join(
          f"{line[key]:.4f} at step {line['step']:,}" for line in (first, last)
        )
  task, auto = TASKS[config.model.head]
  return CARD.format(
    task=task,
    auto=auto,
    base=f"base_model: {path}\n" if hub_id else "",
    name=f"{name}, fine-tuned" if pretrained else name,
    what=f"Fine-tuned from `{path if hub_id else name}`"
    if pretrained
    else "Trained from new weights",
    version=jaxft.__version__,
    facts="\n".join(f"| {what} | {fact} |" for what, fact in facts.items()),
  )


def _read_json_lines(file: Path) -> list[dict[str, Any]]:
  """The objects of a .json or .jsonl file; none where the user has removed it, nor of a line that a kill has cut short."""
  if not file.is_file():
    return []
  text, objects = file.read_text(encoding="utf-8", errors="replace"), []
  for part in [text] if file.suffix == ".json" else text.splitlines():
    with contextlib.suppress(ValueError):
      objects.append(json.loads(part))
  return objects
