"""The model card of an export."""

from typing import Any

from ml_collections import ConfigDict

import jaxft

CARD = """---
library_name: transformers
pipeline_tag: text-generation
{base}tags:
- jaxft
---

# {name}

{what} with jaxft {version}.

| | |
|---|---|
| training text | {sources}: {documents:,} documents, {tokens:,} tokens |
| steps | {steps:,} of {batch_size} sequences of {length} tokens |
| optimizer | {optimizer}, peak learning rate {rate:g}, {schedule} |
| eval loss | {before:.4f} before, {after:.4f} after{floor} |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

`parity.json` says how far this folder's logits are from those of the model that was trained.
"""


def model_card(
  config: ConfigDict, report: dict[str, Any], before: float, after: float, floor: float | None, steps: int
) -> str:
  """README.md of the exported folder: the facts of the run. Local paths are cut to their last part."""
  path, pretrained = config.model.path, config.model.init == "pretrained"
  name = path.rstrip("/").split("/")[-1]
  hub_id = pretrained and path.count("/") <= 1 and not path.startswith((".", "/"))
  return CARD.format(
    base=f"base_model: {path}\n" if hub_id else "",
    name=f"{name}, fine-tuned" if pretrained else name,
    what=f"Fine-tuned from `{path if hub_id else name}`" if pretrained else "Trained from new weights",
    version=jaxft.__version__,
    sources=", ".join(source.rstrip("/").split("/")[-1] for source in config.data.train),
    documents=report["rows"]["trained"],
    tokens=report["tokens"]["trained"],
    steps=steps,
    batch_size=config.train.batch_size,
    length=config.data.sequence_length,
    optimizer=config.optim.name,
    rate=config.optim.learning_rate,
    schedule=config.optim.schedule,
    before=before,
    after=after,
    floor="" if floor is None else f" (entropy of the text: {floor:.4f})",
  )
