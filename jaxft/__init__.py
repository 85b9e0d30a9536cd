"""jaxft: fine-tune GPT-2, GPT-Neo and GPT-J in JAX, and export to Hugging Face.

import jaxft

c = jaxft.load_config("gpt2_tinystories")  # a shipped config, or a file
run = jaxft.finetune(c, "runs/mine")
model = jaxft.load(run.export)  # or a hub id
model.generate(["Once upon a time"])
jaxft.plan_for(c, "h100x8")["fits"]  # needs no such device
"""

import importlib
import sys

from jaxft.utils import logger

if sys.argv[0] == "-m" and any(word.startswith("jaxft.") for word in sys.orig_argv):
  # `python -m jaxft.X` imports this package first. A plain `import jaxft` does not run this.
  from jaxft.cli import startup

  startup.begin_command()

logger.configure()

__version__ = "0.1.0"
__all__ = ["finetune", "load", "load_config", "plan_for"]

# Imported on first use, because importing jax takes a second.
_MODULES = {
  "finetune": "jaxft.train",
  "load": "jaxft.pretrained",
  "load_config": "jaxft.cli.flags",
  "plan_for": "jaxft.plan.planner",
}


def __getattr__(name: str):
  """Import a public function on first use."""
  if name not in _MODULES:
    raise AttributeError(f"module 'jaxft' has no attribute {name!r}")
  return getattr(importlib.import_module(_MODULES[name]), name)
