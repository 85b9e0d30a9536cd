"""Print versions, devices, memory and disk, and report missing packages.

python -m jaxft.doctor
"""

import importlib.metadata
import platform
import shutil
import sys

import psutil  # pyrefly: ignore[untyped-import]  (it has no types)
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from jaxft.cli import parsers
from jaxft.errors import RequestError, first_line, run_command

PACKAGES = (
  "jax jaxlib flax optax orbax-checkpoint grain numpy transformers tokenizers safetensors "
  "huggingface_hub ml_collections datasets rich"
).split()
# Package -> (purpose, extra of jaxft). The CUDA plugin alone compiles; to run it needs CUDA too.
EXTRAS = {
  "jax-cuda13-plugin": ("planning for GPUs", "plan"),
  "nvidia-cudnn-cu13": ("an NVIDIA GPU", "cuda"),
  "libtpu": ("a TPU", "tpu"),
  "tensorboardX": ("TensorBoard", "tracking"),
  "mlflow-skinny": ("MLflow", "tracking"),
  "wandb": ("W&B", "tracking"),
  "trackio": ("Trackio", "tracking"),
}


def main() -> None:
  """Print the report, and exit with code 2 if it found an error."""
  parsers.Parser(
    "python -m jaxft.doctor", "Print installed versions, devices and memory; report errors."
  ).parse_args()
  table = Table(Column(overflow="fold"), Column(overflow="fold"), show_header=False, box=None)
  add_row = table.add_row
  errors = []
  add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
  for name in ("jaxft", *PACKAGES):
    add_row(name, version := _version(name) or "missing")
    if version == "missing":
      errors.append(f"{name} is missing: pip install {'-e .' if name == 'jaxft' else name}")
  for name, (purpose, extra) in EXTRAS.items():
    advice = f'not installed; for {purpose}: pip install "jaxft[{extra}]"'
    add_row(name, _version(name) or escape(advice))
  try:
    import flax.nnx  # noqa: F401 - flax fails at import if its version does not match jax
    import jax

    from jaxft.utils import backend

    backend.configure_jax()
    name, reason = backend.init_backend()
    for device in jax.devices():
      limit = (device.memory_stats() or {}).get("bytes_limit")
      size = f", {limit / 2**30:.1f} GiB" if limit else ""
      add_row(f"device {device.id}", device.device_kind + size)
    if name == "gpu":
      limit = f"up to {backend.pinned_limit() / 2**30:.0f} GiB of the host memory"
      add_row("pinned memory", f"{limit}, for config.memory.offload")
    elif backend.cpu_override() and backend.has_nvidia_gpu():
      add_row("device", backend.cpu_warning(reason))
    elif reason:
      errors.append(backend.cpu_warning(reason))
    for line in backend.known_bugs():
      add_row("known bug", line)
  except RequestError as error:
    errors.append(str(error))
  except Exception as error:
    errors.append(f"jax and flax do not start ({first_line(error)}): reinstall jaxft")
  ram = psutil.virtual_memory()
  add_row("memory", f"{ram.available / 2**30:.1f} GiB available of {ram.total / 2**30:.1f} GiB")
  add_row("free disk", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB in this folder")
  width = None if sys.stdout.isatty() else 200  # commands to copy stay on one line in a pipe
  Console(soft_wrap=True, highlight=False, width=width).print(table)
  for message in errors:
    print(f"error: {message}", file=sys.stderr)
  sys.exit(2 if errors else 0)


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


if __name__ == "__main__":
  run_command(main)
