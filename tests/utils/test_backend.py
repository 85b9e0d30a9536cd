"""JAX's configuration, and the warnings and errors if it would compute on the wrong device."""

import dataclasses
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
import tiny
from processes import ROOT

import jaxft.config
import jaxft.train
import jaxft.training.build
from jaxft import doctor
from jaxft.errors import RequestError
from jaxft.hf import model_config
from jaxft.hf.known_models import PUBLISHED
from jaxft.plan.measure import dummy_row
from jaxft.sharding.mesh import make_mesh
from jaxft.training.build import build_train_program
from jaxft.training.memory import (
  check_fits,
  host_bytes,
  max_host_bytes,
  pinned_memory_warning,
)
from jaxft.utils import backend

GIB = 2**30


@pytest.fixture(autouse=True)
def clean(monkeypatch):
  """As on a machine without a GPU, whose user has set nothing."""
  for name in (
    backend.PINNED_LIMIT_ENV,
    backend.HOST_MEMORY_ENV,
    "XLA_FLAGS",
    "CUDA_VISIBLE_DEVICES",
  ):
    monkeypatch.setenv(name, "")  # so that what a test leaves there is undone
    monkeypatch.delenv(name)
  monkeypatch.setattr(backend, "NVIDIA_PATHS", ("/nowhere",))
  monkeypatch.setattr(backend, "PCI_DEVICES", "/nowhere/*")
  monkeypatch.setattr(backend, "_own_env_vars", set())
  backend._warn.cache_clear()
  before = jax.config.jax_platforms
  jax.devices()  # JAX has started, with what tests/conftest.py says
  yield
  jax.config.update("jax_platforms", before)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
  """As on one with an NVIDIA driver."""
  (tmp_path / "nvidiactl").touch()
  monkeypatch.setattr(backend, "NVIDIA_PATHS", (str(tmp_path / "nvidiactl"),))


# ---- Slices in loops, and other faults of a version ----------------------------------------------


@pytest.mark.parametrize(
  "before, after",
  [
    ("", "--xla_disable_hlo_passes=dynamic-slice-annotator"),
    ("--xla_a=1", "--xla_a=1 --xla_disable_hlo_passes=dynamic-slice-annotator"),
    (
      "--xla_disable_hlo_passes=b,c",
      "--xla_disable_hlo_passes=b,c --xla_disable_hlo_passes=dynamic-slice-annotator",
    ),
  ],
)
def test_slice_pass_is_disabled_with_user_flags(before, after):
  """Passes that the user has disabled stay so."""
  assert backend.disable_slice_pass(before) == after == backend.disable_slice_pass(after)


@pytest.mark.parametrize(
  "version, wrong, crashes",
  [
    ((0, 10, 2), True, False),
    ((0, 11, 0), True, False),
    ((0, 11, 1), False, False),
    ((0, 11, 2), False, True),
    ((0, 12, 0), False, False),
  ],
)
def test_known_bugs_by_version(monkeypatch, version, wrong, crashes):
  monkeypatch.setattr(jax, "__version_info__", version)
  assert (backend.has_slice_bug(), backend.has_cpu_mesh_bug()) == (wrong, crashes)
  assert len(backend.known_bugs()) == wrong + crashes
  monkeypatch.setattr(backend, "ACCELERATOR_PATHS", ("/nowhere",))
  backend.configure_jax()
  assert "XLA_FLAGS" not in os.environ  # it is of no account without a GPU
  monkeypatch.setattr(backend, "ACCELERATOR_PATHS", ("/dev/null",))
  backend.configure_jax()
  assert (backend.SLICE_PASS in os.environ.get("XLA_FLAGS", "")) == wrong


def test_annotated_slices_are_rejected(monkeypatch):
  """If JAX started before the pass was disabled."""
  compiled = SimpleNamespace(as_text=lambda: 'backend_config={"dynamic_slice_config":{}}')
  monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
  with pytest.raises(RequestError, match="install jax 0.11.1 or newer"):
    backend.check_slices(compiled, "gpu")
  backend.check_slices(compiled, "cpu")
  backend.check_slices(SimpleNamespace(as_text=lambda: ""), "gpu")
  monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
  backend.check_slices(compiled, "gpu")


def test_cpu_meshes_are_rejected_with_bug(monkeypatch):
  """The compiler would crash."""
  monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
  sizes = jaxft.config.default().mesh
  sizes.fsdp = -1
  assert make_mesh(sizes, jax.devices()[:1]).size == 1
  with pytest.raises(RequestError, match="crashes on several devices"):
    make_mesh(sizes, jax.devices()[:2])


def test_jax_platforms_follow_device_files(monkeypatch, tmp_path):
  """A card without its driver's files too: they may come into being when CUDA starts."""
  monkeypatch.setattr(backend, "ACCELERATOR_PATHS", ("/nowhere",))
  for has_card, platforms in ((False, "cpu"), (True, None)):
    jax.config.update("jax_platforms", None)
    monkeypatch.setattr(backend, "has_nvidia_gpu", lambda has_card=has_card: has_card)
    backend.configure_jax()
    assert jax.config.jax_platforms == platforms


# ---- Memory of the host --------------------------------------------------------------------------


def test_host_memory_from_variable(monkeypatch):
  shown = backend.host_memory_bytes()
  assert 0 < shown <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  monkeypatch.setenv(backend.HOST_MEMORY_ENV, "128")
  assert backend.host_memory_bytes() == 128 * GIB
  for wrong in ("much", "0", "1e-12", "-3", "nan", "inf", "1e400"):
    monkeypatch.setenv(backend.HOST_MEMORY_ENV, wrong)
    with pytest.raises(RequestError, match="JAXFT_HOST_MEMORY_GIB=.*must be a number of GiB"):
      backend.host_memory_bytes()


@pytest.mark.parametrize(
  "groups, files, limit",
  [
    ("0::/a/b\n", {"a/memory.max": "max", "a/b/memory.max": f"{3 * GIB}"}, 3 * GIB),
    ("0::/a/b\n", {"a/memory.max": f"{2 * GIB}", "a/b/memory.max": f"{3 * GIB}"}, 2 * GIB),
    (
      "5:memory:/slurm/job_7\n4:cpu:/\n",
      {"memory/slurm/job_7/memory.limit_in_bytes": f"{2 * GIB}"},
      2 * GIB,
    ),
    ("5:memory:/slurm/job_7\n4:cpu:/\n", {"memory/memory.limit_in_bytes": f"{4 * GIB}"}, 4 * GIB),
  ],
)
def test_host_memory_from_cgroups(monkeypatch, tmp_path, groups, files, limit):
  """Those of containers and of SLURM, in versions 1 and 2, and of the groups around them."""
  (tmp_path / "cgroup").write_text(groups)
  for name, text in files.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(f"{text}\n")
  monkeypatch.setattr(backend, "CGROUP_FILE", tmp_path / "cgroup")
  monkeypatch.setattr(backend, "CGROUP_ROOT", tmp_path)
  assert min(backend._cgroup_limits()) == limit


def test_pinned_limit_is_80_percent_or_the_need(monkeypatch):
  """80 % of the host, or what a run needs, with headroom."""
  from jax._src import xla_bridge

  monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
  monkeypatch.setenv(backend.HOST_MEMORY_ENV, "128")
  backend.configure_jax()
  assert os.environ[backend.PINNED_LIMIT_ENV] == "103"  # whole GiB, upwards
  backend.limit_pinned_memory(90 * GIB)
  assert backend.pinned_limit() == 103 * GIB
  backend.limit_pinned_memory(None)  # what is offloaded depends on devices that are not known yet
  assert backend.pinned_limit() == 103 * GIB
  backend.limit_pinned_memory(20 * GIB)
  assert backend.pinned_limit() == 30 * GIB


@pytest.mark.parametrize("own", ["103", "104"])  # the first is the default, too
def test_users_pinned_limit_stays(monkeypatch, own):
  from jax._src import xla_bridge

  monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
  monkeypatch.setenv(backend.HOST_MEMORY_ENV, "128")
  monkeypatch.setenv(backend.PINNED_LIMIT_ENV, own)
  backend.configure_jax()
  backend.limit_pinned_memory(20 * GIB)
  assert backend.pinned_limit() == int(own) * GIB


def test_pinned_pool_has_gaps():
  """Blocks of 3 MiB lie in regions of 4, 4 and 8; the last may be what is left of the limit."""
  block = 3 * 2**20
  for count, least in ((1, 3), (2, 7), (3, 11), (4, 14)):
    assert backend.pool_fits([block] * count, least * 2**20)
    assert not backend.pool_fits([block] * count, least * 2**20 - 1)


def test_pinned_limit_is_fixed_after_start(monkeypatch):
  monkeypatch.setenv(backend.HOST_MEMORY_ENV, "128")
  backend.configure_jax()
  jax.devices()
  backend.limit_pinned_memory(20 * GIB)
  assert backend.pinned_limit() == 103 * GIB


@pytest.mark.parametrize("model", ["gpt2", "EleutherAI/gpt-neo-125m", "EleutherAI/gpt-j-6b"])
@pytest.mark.parametrize(
  "more",
  [
    {"memory.offload": "all"},
    {"memory.offload": "optimizer", "optim.name": "adafactor"},
    {"memory.offload": "all", "model.param_dtype": "bfloat16", "optim.name": "lion"},
    {"memory.offload": "none"},
  ],
  ids=str,
)
def test_host_bytes_known_before_devices(model, more):
  """And are those of the program itself."""
  config = jaxft.config.default()
  for name, value in more.items():
    section, key = name.split(".")
    config[section][key] = value
  cfg = dataclasses.replace(model_config.from_hf_config(PUBLISHED[model]), L=2)
  run = build_train_program(
    config, cfg, make_mesh(config.mesh, jax.devices()[:1]), 10, dummy_row(config, cfg)
  )
  assert max_host_bytes(config, cfg) == host_bytes(run)


def test_host_bytes_depend_on_replicas():
  """On devices that each have a copy."""
  config, cfg = jaxft.config.default(), model_config.from_hf_config(PUBLISHED["gpt2"])
  config.memory.offload = "all"
  one = max_host_bytes(config, cfg)
  config.mesh.data = 2
  assert max_host_bytes(config, cfg) == 2 * one
  config.mesh.data = -1
  assert max_host_bytes(config, cfg) is None
  config.mesh.data, config.mesh.zero_stage = 1, 1
  assert max_host_bytes(config, cfg) is None
  config.mesh.zero_stage = 3
  assert max_host_bytes(config, cfg) == one
  assert max_host_bytes(config, dataclasses.replace(cfg, trained=(("norm.scale", ()),))) is None


def test_more_than_pinned_limit_is_rejected(monkeypatch):
  config = jaxft.config.default()
  config.memory.offload = "all"
  cfg = model_config.from_hf_config(PUBLISHED["gpt2"])
  run = build_train_program(
    config, cfg, make_mesh(config.mesh, jax.devices()[:1]), 10, dummy_row(config, cfg)
  )
  check_fits(run, config)
  gpu = SimpleNamespace(
    platform="gpu", memory_stats=lambda: {"bytes_limit": 8 * GIB}, device_kind="a card"
  )
  batch = SimpleNamespace(mesh=SimpleNamespace(local_devices=[gpu]))
  on_gpu = SimpleNamespace(
    **vars(run),
    host_mask=run.host_mask,
    batch_sharding=batch,
  )
  monkeypatch.setenv(backend.PINNED_LIMIT_ENV, "1")
  with pytest.raises(
    RequestError,
    match="XLA may pin 1,073,741,824 .* XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB .*JAXFT_HOST_MEM",
  ):
    check_fits(on_gpu, config)
  monkeypatch.setenv(backend.PINNED_LIMIT_ENV, "2")
  check_fits(on_gpu, config)
  assert pinned_memory_warning(on_gpu) == ""
  monkeypatch.setattr(backend, "pinned_limit", lambda: host_bytes(run))  # no byte for gaps
  check_fits(on_gpu, config)
  assert pinned_memory_warning(run) == ""
  assert "warning: offload needs 1,991,5" in pinned_memory_warning(on_gpu)


# ---- The CPU, where there is a GPU ---------------------------------------------------------------


def test_no_warning_without_a_gpu(capsys):
  backend.require_device(None)
  assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
  "environment, plugin, reason",
  [
    ({"JAX_PLATFORMS": "cpu"}, True, "JAX_PLATFORMS=cpu is set"),
    ({"CUDA_VISIBLE_DEVICES": ""}, True, "CUDA_VISIBLE_DEVICES='' hides the GPU"),
    ({"CUDA_VISIBLE_DEVICES": "-1"}, True, "CUDA_VISIBLE_DEVICES='-1' hides the GPU"),
    (
      {"CUDA_VISIBLE_DEVICES": "NoDevFiles"},
      True,
      "CUDA_VISIBLE_DEVICES='NoDevFiles' hides the GPU",
    ),
    ({}, False, 'JAX has no CUDA plugin; pip install "jaxft[cuda]"'),
    ({}, True, "CUDA does not start"),
  ],
)
def test_cpu_fallback_warns_once(gpu, monkeypatch, capsys, environment, plugin, reason):
  """And is an error if a GPU is required."""
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  jax.config.update("jax_platforms", environment.get("JAX_PLATFORMS"))
  monkeypatch.setattr(backend, "_has_module", lambda name: plugin)
  backend.require_device(None)
  backend.require_device(None)
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(
    f"warning: this machine has an NVIDIA GPU, but JAX computes on the CPU: {reason}"
  )
  with pytest.raises(RequestError, match="--require gpu: JAX computes on the cpu: ") as refusal:
    backend.require_device("gpu")
  assert reason in str(refusal.value)


def test_gpu_without_driver_is_detected(monkeypatch, tmp_path):
  jax.config.update("jax_platforms", None)
  monkeypatch.setattr(backend, "PCI_DEVICES", str(tmp_path / "*"))
  monkeypatch.setattr(backend, "_has_module", lambda name: True)
  for name, vendor, kind in (("audio", "0x10de", "0x040300"), ("other", "0x1af4", "0x030000")):
    (tmp_path / name).mkdir()
    (tmp_path / name / "vendor").write_text(f"{vendor}\n")
    (tmp_path / name / "class").write_text(f"{kind}\n")
  assert not backend.has_nvidia_gpu() and backend.init_backend() == ("cpu", "")
  (tmp_path / "other" / "vendor").write_text("0x10de\n")
  assert "its driver is not loaded" in backend.init_backend()[1]


def test_require_tpu_fails_without_one():
  with pytest.raises(RequestError, match="--require tpu: JAX computes on the cpu"):
    backend.require_device("tpu")


def test_jax_log_explains_a_cpu_fallback(monkeypatch, capsys):
  """As of a TPU that does not answer, on a machine without an NVIDIA GPU."""

  def falls_back():
    logging.getLogger("jax._src.xla_bridge").warning("A TPU may be present. Falling back to cpu.")
    return "cpu"

  monkeypatch.setattr(jax, "default_backend", falls_back)
  backend.require_device(None)
  assert (
    capsys.readouterr().err
    == "warning: JAX computes on the CPU: A TPU may be present. Falling back to cpu.\n"
  )


@pytest.mark.parametrize("hidden, code", [(None, 2), ("-1", 0)])
def test_doctor_reports_bugs_and_missing_gpu(gpu, monkeypatch, capsys, hidden, code):
  """But for one that the user has hidden."""
  jax.config.update("jax_platforms", None)
  monkeypatch.setattr(backend, "configure_jax", lambda: None)
  monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
  monkeypatch.setattr(sys, "argv", ["doctor"])
  if hidden:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
  with pytest.raises(SystemExit) as ended:
    doctor.main()
  out, err = (" ".join(text.split()) for text in capsys.readouterr())  # a table breaks its lines
  assert ended.value.code == code and "compiler crashes on several devices" in out
  warning = "this machine has an NVIDIA GPU, but JAX computes on the CPU: "
  assert warning in (err if code else out)


@pytest.mark.slow
def test_finetune_limits_pinning_and_checks_slices(folder, stories, tmp_path, monkeypatch, capsys):
  seen, config = [], tiny.config(folder, stories)
  monkeypatch.setattr(backend, "limit_pinned_memory", lambda nbytes: seen.append(nbytes))
  monkeypatch.setattr(backend, "check_slices", lambda compiled, platform: seen.append(platform))
  monkeypatch.setattr(
    jaxft.training.memory, "pinned_memory_warning", lambda run: "warning: of gaps"
  )
  jaxft.train.finetune(config, tmp_path / "resident", dry_run=True)
  assert seen == []
  config.memory.offload = "all"
  jaxft.train.finetune(config, tmp_path / "streamed", dry_run=True)
  assert len(seen) == 2 and seen[0] > 0 and seen[1] == "cpu"
  assert "warning: of gaps" in capsys.readouterr().out


@pytest.mark.slow
def test_commands_honour_require_gpu(config_file, folder, tmp_path):
  """In one line, with exit code 2, before they have written anything."""
  train = ["jaxft.train", "--config", str(config_file), "--workdir", str(tmp_path / "run")]
  generate = ["jaxft.generate", "--model", str(folder), "--prompt", "a"]
  for command, said, environment in (
    ([*generate, "--require", "gpu"], "error: --require gpu: JAX computes on the cpu", {}),
    ([*train, "--require=gpus"], "error: --require='gpus': must be one of gpu, tpu", {}),
    (train, "error: JAX finds no device (JAX_PLATFORMS=cuda): ", {"JAX_PLATFORMS": "cuda"}),
  ):
    done = subprocess.run(
      [sys.executable, "-m", *command],
      capture_output=True,
      text=True,
      cwd=ROOT,
      env=os.environ | environment,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith(said), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
  assert (
    not (tmp_path / "run" / "checkpoints").exists()
    and not (tmp_path / "run" / "config.json").exists()
  )
