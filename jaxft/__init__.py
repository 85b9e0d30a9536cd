"""jaxft: fine-tune GPT-2, GPT-Neo and GPT-J in JAX, and get a Hugging Face model back.

import jaxft
run = jaxft.finetune(config, "runs/mine")      # config: jaxft.config.default(), changed
model = jaxft.load(run.export)                 # or a hub id
model.generate(["Once upon a time"])
jaxft.plan_for(config, "h100x8")["fits"]       # without having one
"""

import gc
import importlib
import os
import signal
import sys

if sys.argv[0] == "-m" and any(word.startswith("jaxft.") for word in sys.orig_argv):
  # `python -m jaxft.X` is importing: Ctrl-C ends it without pages of traceback. `run_command`
  # takes the signal back.
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  from jaxft.cli import usage
  from jaxft.utils import environment

  environment.setup()
  # The default is 700: garbage collection took a tenth of the time of the imports.
  gc.set_threshold(10_000, 10, 10)
  usage.print_help(sys.orig_argv)
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install torch

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
