"""jaxft: fine-tune GPT-2, GPT-Neo and GPT-J in JAX, and get a Hugging Face model back.

import jaxft
run = jaxft.finetune(config, "runs/mine")      # config: jaxft.config.default(), changed
model = jaxft.load(run.export)                 # or a hub id
model.generate(["Once upon a time"])
jaxft.plan_for(config, "h100x8")["fits"]       # without having one
"""

import importlib
import sys

if sys.argv[0] == "-m" and any(word.startswith("jaxft.") for word in sys.orig_argv):
  # `python -m jaxft.X` imports this package first. Nothing else is done by an import of jaxft.
  from jaxft.cli import startup

  startup.begin_command()

__version__ = "0.1.0"
__all__ = ["finetune", "load", "plan_for"]

# Imported when they are first used: jax takes a second.
_MODULES = {
  "finetune": "jaxft.train",
  "load": "jaxft.pretrained",
  "plan_for": "jaxft.plan.planner",
}


def __getattr__(name: str):
  if name not in _MODULES:
    raise AttributeError(f"module 'jaxft' has no attribute {name!r}")
  return getattr(importlib.import_module(_MODULES[name]), name)
