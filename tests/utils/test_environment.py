"""Processes without streams, home or width, or with JAX flags that jaxft is not made for."""

import json
import os
import random
import re
import subprocess
import sys

import jax
import pytest
from processes import ROOT

import jaxft.utils.environment
from jaxft.data import token_cache
from jaxft.utils import backend

MODEL = ROOT / "assets" / "quickstart" / "model"
GENERATE = ("generate", "--model", MODEL, "--prompt", "Once", "--max_new_tokens", "2", "--json")
# What one meets: (variables, or a redirection of the shell; exit code; what is then said on
# standard error).
KINDS = [
  ({"JAX_ENABLE_X64": "1"}, 0, "warning: JAX_ENABLE_X64=True is not supported; jaxft runs with"),
  ({"JAX_NUMPY_DTYPE_PROMOTION": "strict"}, 0, "jaxft runs with standard"),
  ({"JAX_NUMPY_RANK_PROMOTION": "raise"}, 0, "jaxft runs with allow"),
  ({"JAX_DEFAULT_PRNG_IMPL": "rbg"}, 0, "jaxft runs with threefry2x32"),
  ({"JAX_THREEFRY_PARTITIONABLE": "0"}, 0, "jaxft runs with True"),
  ({"JAX_TRANSFER_GUARD": "disallow"}, 0, "jaxft runs with None"),
  ({"JAX_NO_TRACING": "1"}, 0, "jaxft runs with False"),
  ({"JAX_ENABLE_X64": "maybe"}, 2, "error: JAX_ENABLE_X64='maybe': invalid truth value"),
  ({"JAX_NUM_CPU_DEVICES": "x"}, 2, "error: JAX_NUM_CPU_DEVICES='x': Invalid value"),
  ({"HF_HUB_DOWNLOAD_TIMEOUT": "x"}, 2, "error: HF_HUB_DOWNLOAD_TIMEOUT='x': invalid literal"),
  ({"JAX_DEFAULT_DEVICE": "gpu"}, 0, "jaxft runs with None"),
  ({"JAX_DEBUG_NANS": "1"}, 0, ""),
  ({"JAX_PLATFORMS": "cuda"}, 2, r"error: JAX finds no device \(JAX_PLATFORMS=cuda\)"),
  ({"JAX_PLATFORMS": "tpu,gpu"}, 2, "error: JAX finds no device"),
  ({"COLUMNS": "0"}, 0, ""),
  ({"COLUMNS": "12"}, 0, ""),
  ({"COLUMNS": "many"}, 0, ""),
  ({"TERM": "dumb"}, 0, ""),
  ({"PYTHONIOENCODING": "ascii"}, 0, ""),
  ({"PYTHONIOENCODING": "cp1252"}, 0, ""),
  ({"LC_ALL": "C", "PYTHONUTF8": "0"}, 0, ""),
  ({"LANG": "", "PYTHONWARNINGS": "ignore"}, 0, ""),
  ({"XDG_CACHE_HOME": "/proc/none"}, 0, ""),
  ({"HOME": ""}, 0, ""),
  ({"TMPDIR": "/no/such/folder"}, 0, ""),
  ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, 0, ""),
  ({"OMP_NUM_THREADS": "0"}, 0, ""),
  ({"FORCE_COLOR": "1"}, 0, ""),
  (">&-", 0, ""),
  ("2>&-", 0, ""),
  ("<&-", 0, ""),
  ("<&- >&- 2>&-", 0, ""),
]
PARTS = 9


def start(words, variables, redirection):
  command = [
    "sh",
    "-c",
    f'exec "$@" {redirection}',
    "sh",
    sys.executable,
    "-m",
    f"jaxft.{words[0]}",
    *map(str, words[1:]),
  ]
  return subprocess.run(
    command,
    env=os.environ | variables,
    capture_output=True,
    text=True,
    errors="replace",
    timeout=300,
  )


def ends_well(change, code, message, redirection=""):
  variables, redirection = (change, redirection) if isinstance(change, dict) else ({}, change)
  done = start(GENERATE, variables, redirection)
  assert done.returncode == code, (change, done.stderr[-2000:])
  assert "Traceback" not in done.stderr and re.search(message, done.stderr), (change, done.stderr)
  if code == 0 and ">&-" not in redirection.replace("2>&-", ""):
    assert json.loads(done.stdout)["completions"][0]["prompt"] == "Once", change


@pytest.mark.slow
def test_type_changing_variables_together():
  """All variables that change types, at once."""
  types = {name: value for change, _, _ in KINDS[:5] for name, value in change.items()}
  ends_well(types, 0, "jaxft runs with threefry2x32", "<&-")


@pytest.mark.slow
@pytest.mark.parametrize(
  "part", [pytest.param(i, marks=[pytest.mark.wide] * (i > 0)) for i in range(PARTS)]
)
def test_awkward_environments(part):
  """Each kind once, and a pair of them."""
  for change, code, message in KINDS[part::PARTS]:
    ends_well(change, code, message)
  good = [change for change, code, _ in KINDS if not code and isinstance(change, dict)]
  first, second = random.Random(part).sample(good, 2)
  ends_well(first | second, 0, "")


@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 1, 2]])
def test_closed_stream_becomes_null_device(tmp_path, closed):
  """Otherwise the next file would get its number, and what is printed would be written into it."""
  code = (
    "import os, sys; from jaxft.utils import environment; environment.setup()\n"
    f"file = os.open({str(tmp_path / 'file')!r}, os.O_WRONLY | os.O_CREAT)\n"
    "print('printed'); print('said', file=sys.stderr); sys.stdout.flush(); os.write(1, b'x'); "
    "os.write(2, b'y')\n"
    "sys.exit(file < 3 or bool(sys.stdin.read()))"
  )
  redirections = " ".join(f"{number}{'<' if number == 0 else '>'}&-" for number in closed)
  done = subprocess.run(
    ["sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, "-c", code],
    cwd=ROOT,
    stdin=subprocess.DEVNULL,
  )
  assert done.returncode == 0 and (tmp_path / "file").read_bytes() == b""


def test_user_without_home_gets_temporary_one(tmp_path, monkeypatch):
  def nobody(_):
    raise KeyError("uid not found")

  monkeypatch.delenv("HOME")
  monkeypatch.setattr(jaxft.utils.environment.pwd, "getpwuid", nobody)
  monkeypatch.setattr(jaxft.utils.environment.tempfile, "gettempdir", lambda: str(tmp_path))
  jaxft.utils.environment.setup()
  (home,) = tmp_path.iterdir()
  assert os.environ["HOME"] == str(home) and home.stat().st_mode & 0o777 == 0o700
  monkeypatch.delenv("HOME")
  monkeypatch.setattr(jaxft.utils.environment.os, "getuid", lambda: 12345)
  (tmp_path / "jaxft-home-12345").mkdir()  # another user's
  jaxft.utils.environment.setup()
  assert (
    os.environ["HOME"].startswith(f"{tmp_path}/jaxft-home-")
    and os.environ["HOME"] != f"{tmp_path}/jaxft-home-12345"
  )
  monkeypatch.delenv("HOME")
  (tmp_path / "jaxft-home-12345").rmdir()
  (tmp_path / "jaxft-home-12345").touch()
  jaxft.utils.environment.setup()
  assert os.path.isdir(os.environ["HOME"])


def test_columns_have_a_minimum_of_forty(monkeypatch):
  for said, used in (("0", "40"), ("12", "40"), ("200", "200"), ("", "")):
    monkeypatch.setenv("COLUMNS", said)
    jaxft.utils.environment.setup()
    assert os.environ["COLUMNS"] == used


def test_type_changing_flags_are_reset(capsys):
  jax.config.update("jax_enable_x64", True)
  backend.configure_jax()
  assert not jax.config.jax_enable_x64
  assert "JAX_ENABLE_X64=True" in capsys.readouterr().err


def test_read_only_token_cache_is_read(tmp_path, monkeypatch):
  def make(folder):
    writer = token_cache.TokenWriter(folder, "train", "int32")
    return {"files": writer.close()}

  made = token_cache.load_or_build(tmp_path, {"a": 1}, make, print)
  # as root, who may write everywhere
  monkeypatch.setattr(token_cache.os, "access", lambda path, how: False)
  monkeypatch.setattr(
    token_cache.FileLock,
    "acquire",
    lambda *_, **__: pytest.fail("a lock is a file that is written"),
  )
  assert token_cache.load_or_build(tmp_path, {"a": 1}, make, print) == made


def test_folder_named_jaxft_does_not_shadow_it(tmp_path):
  """After git clone and pip install -e jaxft, beside the checkout, jaxft/ is not the package."""
  (tmp_path / "jaxft" / "jaxft").mkdir(parents=True)
  code = "import jaxft; print(jaxft.__file__, jaxft.load.__name__)"
  environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0 and done.stdout.split()[1] == "load", done.stderr


def test_only_library_variables_are_blamed(monkeypatch, capsys):
  """For an import that fails."""
  codes = []
  monkeypatch.setattr(jaxft.utils.environment.os, "_exit", codes.append)
  monkeypatch.setenv("HF_TIMEOUT", "soon")
  jaxft.utils.environment._env_error_hook(
    ValueError, ValueError("invalid literal for int(): 'soon'"), None
  )
  assert codes == [2] and capsys.readouterr().err.startswith(
    "error: HF_TIMEOUT='soon': invalid literal"
  )
  for message in ("the path and the home of this user", f"not a number: {os.environ['PATH']!r}"):
    jaxft.utils.environment._env_error_hook(ValueError, ValueError(message), None)
    assert capsys.readouterr().err == f"ValueError: {message}\n"
  assert codes == [2]


def test_default_device_of_a_program_stays():
  before = jax.config.jax_default_device
  try:
    for chosen in (jax.devices()[1], None):
      jax.config.update("jax_default_device", chosen)
      backend.configure_jax()
      assert jax.config.jax_default_device == chosen
  finally:
    jax.config.update("jax_default_device", before)


def test_load_without_torch_gives_no_advice(folder):
  """transformers would advise to install it, when it is imported."""
  code = (
    "import importlib.util as util; real = util.find_spec\n"
    "util.find_spec = lambda name, *more: None if name == 'torch' else real(name, *more)\n"
    f"import jaxft; jaxft.load({str(folder)!r})"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0 and "PyTorch" not in done.stdout + done.stderr, done.stderr


def test_import_of_jaxft_sets_nothing():
  """Neither signals nor the environment nor log levels: those are a command's."""
  code = """
import logging, os, signal, sys, pkgutil, importlib
import flax, grain, orbax.checkpoint, datasets, huggingface_hub, transformers
def state():
  levels = [logging.getLogger(name).level for name in ("", "asyncio", "absl")]
  handlers = [signal.getsignal(it) for it in (signal.SIGINT, signal.SIGTERM)]
  return dict(os.environ), levels, handlers, sys.excepthook, sys.unraisablehook
before = state()
import jaxft
for it in pkgutil.walk_packages(jaxft.__path__, "jaxft."):
  if not it.name.endswith("__main__"):
    importlib.import_module(it.name)
assert state() == before, (before, state())
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
