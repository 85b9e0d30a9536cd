"""Compiles in a separate process: CUDA and TPU each need an environment before JAX is imported.

Run as a module it is that process: one JSON request a line on standard input, one answer a line on
standard output.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from typing import NamedTuple

import jax

import jaxft.config
from jaxft.errors import JaxftError, RequestError, first_line
from jaxft.hardware import specs
from jaxft.model.config import ModelConfig
from jaxft.plan.measure import measure_step
from jaxft.utils import backend
from jaxft.utils.types import Json

# Added to the caller's environment. Compiler flags come after the caller's, which a run has too: of
# two the last counts.
COMPILER_ENV = {
  "JAX_PLATFORMS": "cpu",  # do not look for a device: the topology brings its own
  "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # no driver here, so the version checks cannot run
  "XLA_FLAGS": "--xla_gpu_autotune_level=0",  # autotuning would need the device
  "TPU_SKIP_MDS_QUERY": "1",  # do not look for a metadata server
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is taken, so two plans may be made at once
  "LIBTPU_INIT_ARGS": backend.LIBTPU_STACK_FLAG,
  "TF_CPP_MIN_LOG_LEVEL": "3",
  "JAX_TRACEBACK_FILTERING": "off",  # the last line of what it says is then the error
}
FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
PLUGINS = {"gpu": "jax_plugins.xla_cuda13", "tpu": "libtpu"}
INSTALL_COMMAND = 'pip install "jaxft[plan]"'


class CompileRequest(NamedTuple):
  """One thing to compile."""

  config: str  # as `jaxft.config.to_json` writes it
  cfg: Json  # fields of the ModelConfig
  device: str
  text: bool = False  # return the compiled programs' texts too


class Compiler:
  """The process, started at the first request and again after it has died. A context manager."""

  def __enter__(self) -> "Compiler":
    self._process: subprocess.Popen[str] | None = None
    self._cpus = 0
    return self

  def __exit__(self, *_: object) -> None:
    self._end()

  def __call__(self, request: CompileRequest) -> Json:
    """Return what `measure_step` does, or {"refused": reason} from the compiler or jaxft.

    Raises RequestError when the compiler for the device is not installed, or the process dies.
    """
    target = specs.parse_device(request.device)
    check_compiler_installed(target)
    cpus = target.count if target.kind == "cpu" else 1
    process = self._process
    if process is None or cpus > self._cpus:
      process = self._start(cpus)
    assert process.stdin and process.stdout  # both are pipes
    try:
      process.stdin.write(json.dumps(request._asdict()) + "\n")
      process.stdin.flush()
    except BrokenPipeError:
      pass  # the reason it died follows
    for line in process.stdout:
      if line.startswith("answer: "):
        return json.loads(line.removeprefix("answer: "))
    code = process.wait()
    self._stderr.seek(0)
    last = (self._stderr.read().strip() or "it said nothing").splitlines()[-1]
    self._end()
    raise RequestError(f"--device={request.device!r}: the compiler ended with code {code}: {last}")

  def _start(self, cpus: int) -> subprocess.Popen[str]:
    self._end()
    self._cpus = cpus
    self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
    self._process = subprocess.Popen(
      [sys.executable, "-m", "jaxft.plan.aot_compiler"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._stderr,
      text=True,
      env=compiler_env() | {"JAX_NUM_CPU_DEVICES": str(cpus)},
    )
    return self._process

  def _end(self) -> None:
    if self._process is not None:
      self._process.kill()
      self._process.communicate()
      self._stderr.close()
      self._process = None


def compiler_env() -> dict[str, str]:
  """Return the environment of the process that compiles."""

  def merge_flags(name: str) -> str:
    return f"{os.environ.get(name, '')} {COMPILER_ENV[name]}".strip()

  flags = {name: merge_flags(name) for name in FLAG_VARIABLES}
  if backend.has_slice_bug():
    flags["XLA_FLAGS"] = backend.disable_slice_pass(flags["XLA_FLAGS"])
  return os.environ | COMPILER_ENV | flags


def check_compiler_installed(target: specs.Target) -> None:
  """Raise RequestError, with the install command, if the target's compiler is missing."""
  plugin = "tpu" if target.kind in specs.TPUS else "gpu" if target.kind in specs.GPUS else None
  if plugin and not _installed(PLUGINS[plugin]):
    problem = "its compiler is not installed"
    raise RequestError(f"--device={target.name!r}: {problem}; {INSTALL_COMMAND}")


def _installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    return False


def main() -> None:
  for line in sys.stdin:
    request = CompileRequest(**json.loads(line))
    try:
      config = jaxft.config.from_json(request.config)
      cfg = ModelConfig(**request.cfg)
      answer = measure_step(config, cfg, specs.parse_device(request.device), request.text)
    # The compilers refuse with the last two as well: an unknown topology, an instruction they lack.
    except (JaxftError, jax.errors.JaxRuntimeError, AssertionError, NotImplementedError) as error:
      answer = {"refused": str(error) if isinstance(error, JaxftError) else first_line(error)}
    print("answer: " + json.dumps(answer), flush=True)


if __name__ == "__main__":
  main()
