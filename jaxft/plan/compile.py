"""The very step that training jits, compiled for a target in a process of its own, and what the compiler says of it.

`measure` starts the process: CUDA and TPU each want an environment of their own before JAX is imported, and the caller needs
neither. Run as a module it is that process: one JSON request a line on standard input, one answer a line on standard output.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxft import config as settings
from jaxft import program, sharding
from jaxft.errors import JaxftError, RequestError, first_line
from jaxft.model import ModelConfig
from jaxft.plan import hlo, targets

ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",  # do not look for a device: the topology brings its own
  "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # no driver here, so the version checks cannot run
  "XLA_FLAGS": "--xla_gpu_autotune_level=0",  # autotuning would need the device
  "TPU_SKIP_MDS_QUERY": "1",  # do not look for a metadata server
  "TF_CPP_MIN_LOG_LEVEL": "3",
}
PLUGINS = {"gpu": "jax_plugins.xla_cuda13", "tpu": "libtpu"}
INSTALL = 'pip install "jaxft[plan]"'


class Request(NamedTuple):
  """One thing to compile."""

  config: str  # as `jaxft.config.to_json` writes it
  cfg: dict[str, Any]  # fields of the ModelConfig
  device: str
  text: bool = False  # return the compiled program's text too


def measure(requests: list[Request]) -> list[dict[str, Any]]:
  """Answers for the requests, in order, all from one process; see `figures` for what is in one.

  An answer of what the compiler or jaxft refuses has only "refused", with the reason. Raises RequestError when the compiler for
  a device is not installed, or the process dies.
  """
  for request in requests:
    kind = targets.find(request.device).kind
    plugin = "tpu" if kind in targets.TPUS else "gpu" if kind in targets.GPUS else None
    if plugin and not _installed(PLUGINS[plugin]):
      raise RequestError(f"--device={request.device!r}: its compiler is not installed; {INSTALL}")
  child = subprocess.run(
    [sys.executable, "-m", "jaxft.plan.compile"],
    input="".join(json.dumps(request._asdict()) + "\n" for request in requests),
    capture_output=True,
    text=True,
    env=os.environ | ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": str(max(_cpus(request.device) for request in requests))},
  )
  answers = [
    json.loads(line.removeprefix("answer: ")) for line in child.stdout.splitlines() if line.startswith("answer: ")
  ]
  if len(answers) != len(requests):
    last = (child.stderr.strip() or "it said nothing").splitlines()[-1]
    raise RequestError(f"the compiler for {requests[len(answers)].device} ended with code {child.returncode}: {last}")
  return answers


def figures(request: Request) -> dict[str, Any]:
  """What the compiler says of a request, in bytes a device: arguments by part, temporaries, peak; collectives; seconds."""
  config, cfg = settings.from_json(request.config), ModelConfig(**request.cfg)
  target = targets.find(request.device)
  mesh = sharding.make_mesh(config.mesh, targets.devices(target))
  T = config.data.sequence_length
  row = {"ids": np.zeros(T, np.int32), "targets": np.zeros(T, np.int32), "mask": np.zeros(T, bool)}
  if config.data.layout == "pack" and not cfg.classes:
    row |= {"segments": row["ids"], "positions": row["ids"]}
  run = program.build(config, cfg, mesh, max(config.train.steps, 1), row)
  started = time.monotonic()
  lowered = run.train_step.lower(run.state, run.batch)
  lower_seconds, started = time.monotonic() - started, time.monotonic()
  compiled = lowered.compile()
  compile_seconds = time.monotonic() - started
  memory, text = compiled.memory_analysis(), compiled.as_text()
  found = hlo.collectives(text)
  parts = {"parameters": run.state.params, "optimizer": run.state.opt, "batch": run.batch}
  return {
    "device_kind": mesh.devices.flat[0].device_kind,
    "devices": mesh.size,
    "mesh": dict(mesh.shape),
    "arguments": {what: _bytes_a_device(tree) for what, tree in parts.items()},
    "argument_bytes": memory.argument_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
    "code_bytes": memory.generated_code_size_in_bytes,
    "peak_bytes": _peak(memory, target),
    "host_bytes": memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
    "collective_bytes": hlo.by_kind(found),
    "lower_seconds": round(lower_seconds, 1),
    "compile_seconds": round(compile_seconds, 1),
  } | ({"text": text} if request.text else {})


def _peak(memory: Any, target: targets.Target) -> int:
  """Most memory of a device at once.

  A GPU takes all temporaries as one block, next to the arguments; outputs live in donated arguments, but for some numbers. On a
  TPU the compiler's own figure counts, which is the same from libtpu 0.0.42 to 0.0.51; its sum of temporaries is not (6.4 GiB
  before 0.0.51, 5.2 from then on, for the same program).
  """
  if target.kind in targets.TPUS:
    return memory.peak_memory_in_bytes
  taken = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  return taken + memory.output_size_in_bytes - memory.alias_size_in_bytes


def _bytes_a_device(tree: Any) -> int:
  shard = lambda leaf: int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
  return sum(map(shard, jax.tree.leaves(tree)))


def _cpus(device: str) -> int:
  target = targets.find(device)
  return target.count if target.kind == "cpu" else 1


def _installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    return False


def _refusal(error: Exception) -> str:
  """A compiler's page of text in one line, with its numbers."""
  text = str(error)
  full = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", text)
  return f"needs {full[1]} of {full[2]} of memory" if full else first_line(error)


def main() -> None:
  for line in sys.stdin:
    try:
      answer = figures(Request(**json.loads(line)))
    # The compilers' own refusals come as the last two as well: a topology that does not exist, an instruction it lacks.
    except (JaxftError, jax.errors.JaxRuntimeError, AssertionError, NotImplementedError) as error:
      answer = {"refused": _refusal(error)}
    print("answer: " + json.dumps(answer), flush=True)


if __name__ == "__main__":
  main()
