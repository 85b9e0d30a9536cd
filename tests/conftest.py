"""Eight fake devices, a shared compile cache, and small models made without jaxft."""

import os
import tempfile
from pathlib import Path

# Before jax starts. Sub-processes inherit the cache: a program is compiled once in a whole test run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"jaxft-test-xla-{os.getuid()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

import tiny


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
  """A GPT-2 folder as transformers would write it: odd, distinct sizes, every bias random."""
  return tiny.write_gpt2(tmp_path_factory.mktemp("models") / "tiny", seed=0)


@pytest.fixture(scope="session")
def stories(tmp_path_factory) -> Path:
  """A .jsonl of small stories."""
  return tiny.write_stories(tmp_path_factory.mktemp("data") / "stories.jsonl", 120, seed=0)


@pytest.fixture
def config(folder, stories):
  """A run of seconds: 12 steps of 8 rows on one device."""
  return tiny.config(folder, stories)
