"""Ahead-of-time compilation in a separate process.

The compilers for CUDA and TPU need environment variables that are set before JAX is imported. Run
as a module, this file is that process. It reads one JSON request per line from standard input, and
writes one answer per line to standard output.
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

# Added to the caller's environment. Compiler flags are appended to the caller's, which also apply
# to the run. If a flag is set twice, the last value counts.
COMPILER_ENV = {
  "JAX_PLATFORMS": "cpu",  # do not look for devices: the topology defines them
  "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # no driver here, so the version checks cannot run
  "XLA_FLAGS": "--xla_gpu_autotune_level=0",  # autotuning needs the device
  "TPU_SKIP_MDS_QUERY": "1",  # do not look for a metadata server
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so two plans may run in parallel
  "LIBTPU_INIT_ARGS": backend.LIBTPU_STACK_FLAG,
  "TF_CPP_MIN_LOG_LEVEL": "3",
  "JAX_TRACEBACK_FILTERING": "off",  # so that the last line of the output is the error
}
FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
PLUGINS = {"gpu": "jax_plugins.xla_cuda13", "tpu": "libtpu"}
INSTALL_COMMAND = 'pip install "jaxft[plan]"'


class CompileRequest(NamedTuple):
  """A config and a device to compile for."""

  config: str  # JSON of `jaxft.config.to_json`
  cfg: Json  # fields of the ModelConfig
  device: str
  text: bool = False  # also return the text of the compiled programs


class Compiler:
  """The compiler process, started at the first request, or after it died.

  A context manager.
  """

  def __enter__(self) -> "Compiler":
    self._process: subprocess.Popen[str] | None = None
    self._cpus = 0
    return self

  def __exit__(self, *_: object) -> None:
    self._end()

  def __call__(self, request: CompileRequest) -> Json:
    """Compile, and return the result of `measure_step`.

    If jaxft or the compiler refuses the config, return {"refused": reason}.

    Raises:
      RequestError: the compiler is not installed, or its process dies.
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
      pass  # the process died; its error is read below
    for line in process.stdout:
      if line.startswith("answer: "):
        return json.loads(line.removeprefix("answer: "))
    code = process.wait()
    self._stderr.seek(0)
    last = (self._stderr.read().strip() or "no output").splitlines()[-1]
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
  """Return the environment of the compiler process."""

  def merge_flags(name: str) -> str:
    return f"{os.environ.get(name, '')} {COMPILER_ENV[name]}".strip()

  flags = {name: merge_flags(name) for name in FLAG_VARIABLES}
  if backend.has_slice_bug():
    flags["XLA_FLAGS"] = backend.disable_slice_pass(flags["XLA_FLAGS"])
  return os.environ | COMPILER_ENV | flags


def check_compiler_installed(target: specs.Target) -> None:
  """Raise RequestError, with the install command, if the compiler is missing."""
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
  """Answer requests until standard input ends."""
  for line in sys.stdin:
    request = CompileRequest(**json.loads(line))
    try:
      config = jaxft.config.from_json(request.config)
      cfg = ModelConfig(**request.cfg)
      answer = measure_step(config, cfg, specs.parse_device(request.device), request.text)
    # The compilers raise the last two for an unknown topology or an unsupported instruction.
    except (JaxftError, jax.errors.JaxRuntimeError, AssertionError, NotImplementedError) as error:
      answer = {"refused": str(error) if isinstance(error, JaxftError) else first_line(error)}
    print("answer: " + json.dumps(answer), flush=True)


if __name__ == "__main__":
  main()
