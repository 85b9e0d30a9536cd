"""Child processes of benchmarks: environment, answer, end. Needs only the standard library."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path

ROOT = Path(__file__).parent.parent


def environment(**more: str) -> dict[str, str]:
  """This process's, with the checkout in front of what PYTHONPATH has."""
  paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
  return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | more


def jax_device():
  """JAX's first device, set up as jaxft does; with BENCHMARKS_REQUIRE=gpu an error if it is no GPU.

  JAX_PLATFORMS=cuda,cpu does not see to that: if CUDA does not start, JAX (0.10 to 0.12) logs it
  and takes the CPU.
  """
  import jax

  from jaxft.utils import backend

  backend.configure_jax()
  backend.require_device(os.environ.get("BENCHMARKS_REQUIRE"))
  return jax.devices()[0]


def torch_device() -> str:
  """cuda or cpu; likewise."""
  import torch

  if torch.cuda.is_available():
    return "cuda"
  if os.environ.get("BENCHMARKS_REQUIRE"):
    raise RuntimeError("torch computes on the CPU: torch.cuda.is_available() is False")
  return "cpu"


def answer(command: list[str], seconds: float | None = None) -> dict:
  """The JSON of a command's last line, or {"error": why there is none}.

  After `seconds` it is killed, with what it started.
  """
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, env=environment(), process_group=0
  ) as child:
    try:
      lines = child.communicate(timeout=seconds)[0].decode(errors="replace").splitlines()
    except subprocess.TimeoutExpired:
      kill_group(child)
      return {"error": f"no answer in {seconds:.0f} s"}
    except BaseException:
      kill_group(child)
      raise
  with contextlib.suppress(IndexError, ValueError):
    if isinstance(found := json.loads(lines[-1]), dict):
      return found
  return {"error": f"ended with code {child.returncode} and no answer"}


def kill_group(child: subprocess.Popen) -> None:
  """Kills a child that leads a process group, and what it started there."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(child.pid, signal.SIGKILL)
  child.wait()


def contender(names: Collection[str]) -> Callable[[str], tuple[str, float | None]]:
  """A type for argparse: "NAME" or "NAME=SECONDS"."""

  def parsed(text: str) -> tuple[str, float | None]:
    name, _, seconds = text.partition("=")
    if name not in names:
      raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(map(repr, names))}")
    return name, float(seconds) if seconds else None

  return parsed


class quiet:
  """Sends standard output to standard error: the last line of standard output is the answer."""

  def __enter__(self) -> None:
    sys.stdout.flush()
    self._stdout = os.dup(1)
    os.dup2(2, 1)

  def __exit__(self, *_) -> None:
    sys.stdout.flush()
    os.dup2(self._stdout, 1)
