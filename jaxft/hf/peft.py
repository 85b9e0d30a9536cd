"""Saves LoRA adapters in PEFT's format.

The files are adapter_config.json and adapter_model.safetensors. PEFT 0.21 reads them.
"""

import os
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxft.config import Config
from jaxft.errors import StorageError
from jaxft.hf.repo import ADAPTER_CONFIG, ADAPTER_WEIGHTS, HFCheckpoint, is_local
from jaxft.hf.trainable_params import lora_modules
from jaxft.hf.weight_map import SCORE, full_name
from jaxft.model.config import ModelConfig
from jaxft.model.lora import TARGET_MODULES, gather_to_host, qkv_slots
from jaxft.utils.files import atomic_write, write_failure, write_json
from jaxft.utils.types import Json, Params

CARD = """---
library_name: peft
{base}tags:
- lora
- jaxft
---

# LoRA adapters for `{name}`

Rank {r}, alpha {lora_alpha:g}, on {modules}. Trained with jaxft.

```python
from peft import {auto}
model = {auto}.from_pretrained("path/to/this/folder")
```
"""


def _model_card(config: Json) -> str:
  """Return README.md of the adapters.

  A local base model is named by the last part of its path.
  """
  path = config["base_model_name_or_path"]
  local = is_local(path)
  task = "SequenceClassification" if config["task_type"] == "SEQ_CLS" else "CausalLM"
  return CARD.format(
    base="" if local else f"base_model: {path}\n",
    name=path.rstrip("/").split("/")[-1] if local else path,
    modules=", ".join(f"`{name}`" for name in config["target_modules"]),
    auto=f"AutoPeftModelFor{task}",
    r=config["r"],
    lora_alpha=config["lora_alpha"],
  )


def _adapter_config(
  cfg: ModelConfig, model_type: str, targets: list[str], layers: tuple[int, ...], config: Config
) -> Json:
  """Return adapter_config.json for these modules and layers; () for all layers."""
  path = config.model.path
  return {
    "peft_type": "LORA",
    "task_type": "SEQ_CLS" if cfg.classes else "CAUSAL_LM",
    "base_model_name_or_path": os.path.abspath(path) if is_local(path) else path,
    "revision": config.model.revision,
    "r": cfg.lora_rank,
    "lora_alpha": config.lora.alpha,
    "lora_dropout": cfg.lora_dropout,
    "target_modules": targets,
    "layers_to_transform": list(layers) or None,
    "layers_pattern": "h" if layers else None,
    "fan_in_fan_out": model_type == "gpt2",  # its matrices are Conv1D's: (inputs, outputs)
    "bias": "none",
    "modules_to_save": ["score"] if cfg.classes else None,
    "inference_mode": True,
  }


def save_adapters(
  folder: Path, trained: Params, cfg: ModelConfig, source: HFCheckpoint, config: Config
) -> None:
  """Write the adapters in PEFT's format.

  `peft.PeftModel.from_pretrained(base, folder)` loads them. In a run of several processes, all of
  them must call it; process 0 writes.

  Args:
    folder: the folder to write; created if it does not exist.
    trained: `TrainState.params`.
    cfg: the model as the run trains it.
    source: the base model.
    config: the run's config.

  Raises:
    StorageError: the disk failed, or the adapters read back differ from those written.
  """
  model_type = source.hf_config["model_type"]
  targets = {name: t for name, t in lora_modules(model_type).items() if t in cfg.lora_targets}
  layers = dict(cfg.trained)[next(name for name, _ in cfg.trained if name.endswith("lora_a"))]
  tensors = {}
  for name, target in targets.items():
    layer, module = TARGET_MODULES[target]
    adapter = trained["blocks"][layer][module]["adapter"]
    slots = qkv_slots(cfg, module)
    a, b = (gather_to_host(adapter[ab]) for ab in ("lora_a", "lora_b"))
    if slots:
      a, b = (x[:, slots.index("qkv".index(target))] for x in (a, b))
    for i in layers or range(cfg.L):
      prefix = f"base_model.model.{full_name(f'h.{i}.{name}')}"
      tensors[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(a[i].reshape(-1, cfg.lora_rank).T)
      tensors[f"{prefix}.lora_B.weight"] = np.ascontiguousarray(b[i].reshape(cfg.lora_rank, -1).T)
  if cfg.classes:
    tensors[f"base_model.model.{SCORE}"] = gather_to_host(trained["output"]["score"])
  if jax.process_index() > 0:
    return
  adapter_config = _adapter_config(cfg, model_type, sorted(targets), layers, config)
  partial = folder / f".{ADAPTER_WEIGHTS}.partial"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, partial, metadata={"format": "pt"})
    with partial.open("rb") as stream:
      os.fsync(stream.fileno())
    saved = load_file(partial)
    for name, tensor in tensors.items():
      if tensor.tobytes() != saved[name].tobytes():
        raise StorageError(
          f"adapters to {folder}: {name!r} differs when read back; the disk may be failing"
        )
    partial.rename(folder / ADAPTER_WEIGHTS)
    write_json(folder / ADAPTER_CONFIG, adapter_config)
    atomic_write(folder / "README.md", _model_card(adapter_config))
  except (OSError, SafetensorError) as error:
    raise StorageError(f"adapters to {folder}: {write_failure(folder, error)}") from error
  finally:
    partial.unlink(missing_ok=True)
