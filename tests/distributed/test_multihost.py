"""Real processes as one run: the same losses, one writer, and a named end when one is lost."""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fault_points
import noted_batches
import numpy as np
import preloaded
import processes
import pytest
import tiny
from jax._src import clusters
from safetensors.numpy import load_file

from jaxft.distributed import multihost, rendezvous
from jaxft.errors import RequestError

PEER_TIMEOUT = 8  # seconds of silence that count as lost here
wide = pytest.mark.wide


class ProcessGroup:
  """Processes that were started as one run."""

  def __init__(
    self,
    config_file,
    workdir,
    count,
    *more,
    devices=2,
    present=None,
    only=None,
    homes=None,
    log_file=None,
    faults=None,
    notes=None,
  ):
    with socket.create_server(("127.0.0.1", 0)) as server:
      port = server.getsockname()[1]
    self.files = []
    self.all = {}
    for i in range(count) if present is None else present:
      flags = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={i}"]
      flags += (only or {}).get(i, ())
      file = (log_file or workdir).with_name(f"{(log_file or workdir).name}-{i}.log")
      self.files.append(file)
      command = ["-m", "jaxft.train"]
      if notes:
        command = [noted_batches.__file__, notes / f"{i}.json"]
      elif i in (faults or {}):
        command = [fault_points.__file__, *faults[i]]
      command += ["--config", config_file, "--workdir", workdir, *more, *flags]
      with file.open("w") as stream:
        self.all[i] = preloaded.Popen(
          command,
          stdout=stream,
          stderr=subprocess.STDOUT,
          cwd=homes and homes[i],
          env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        )

  def codes(self, timeout=400):
    deadline = time.monotonic() + timeout
    try:
      return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.all.values()]
    finally:
      for process in self.all.values():
        process.kill()
        process.wait()

  def logs(self):
    return [file.read_text() for file in self.files]


def wait_for(condition, timeout=240):
  deadline = time.monotonic() + timeout
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.1)


def steps_in(workdir):
  file = workdir / "metrics.jsonl"
  return file.exists() and file.read_text().count("train/loss")


@pytest.fixture(scope="module")
def one_process_run(config_file, tmp_path_factory):
  """A run of one process with as many devices as the largest run below."""
  workdir = tmp_path_factory.mktemp("one") / "run"
  one = ProcessGroup(
    config_file, workdir, 1, "--config.mesh.fsdp=4", devices=4, notes=workdir.parent
  )
  assert one.codes() == [0], one.logs()
  return workdir, recorded_rows(workdir.parent, 1)


def recorded_rows(folder, count):
  """Digests of the rows that the processes got, by index; a row that several got is the same."""
  rows = {}
  for i in range(count):
    for index, digest in json.loads((folder / f"{i}.json").read_text()).items():
      assert rows.setdefault(index, digest) == digest
  return rows


def assert_losses_close(a, b):
  assert a.keys() == b.keys()
  np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("count, devices", [(2, 2), pytest.param(4, 2, marks=wide)])
def test_multihost_run_matches_one_process(config_file, tmp_path, one_process_run, count, devices):
  """Losses, batches and one writer; the checkpoint restores in one process, too."""
  workdir, (one_workdir, one_rows) = tmp_path / "run", one_process_run
  flags = ("--config.mesh.fsdp=-1", "--config.train.save_every=6")
  several = ProcessGroup(config_file, workdir, count, *flags, devices=devices, notes=tmp_path)
  assert several.codes() == [0] * count, several.logs()
  assert_losses_close(processes.losses(workdir), processes.losses(one_workdir))
  assert recorded_rows(tmp_path, count) == one_rows  # every byte of every batch
  num_rows = [len(json.loads((tmp_path / f"{i}.json").read_text())) for i in range(count)]
  assert num_rows == [len(one_rows) // count] * count  # each row goes to one process
  first, *others = several.logs()
  assert "exported to" in first and not any("step" in log for log in others)  # only one logs
  # Their checkpoint restores in one process, which goes on from the middle.
  (workdir / "checkpoints" / "12").rename(tmp_path / "out of the way")
  done = processes.train(
    config_file, workdir, "--config.mesh.fsdp=1", "--config.train.save_every=6"
  )
  assert "continuing at step 6" in done.stdout
  assert_losses_close(processes.losses(workdir), processes.losses(one_workdir))


@pytest.fixture(scope="module")
def divisible_model(tmp_path_factory):
  """A model that tensor parallelism divides."""
  return tiny.write_gpt2(tmp_path_factory.mktemp("even") / "model", seed=0, N=4, F=52)


@pytest.mark.slow
@wide
@pytest.mark.parametrize(
  "count, devices, mesh",
  [
    (2, 2, {"mesh.fsdp": 2, "mesh.tensor": 2}),
    (2, 2, {"mesh.fsdp": 1, "mesh.tensor": 4}),  # a tensor group of two processes
    (2, 2, {"mesh.fsdp": -1, "train.micro_batch_size": 1}),
    (4, 1, {"mesh.data": 2, "mesh.fsdp": 2, "mesh.zero_stage": 1, "train.micro_batch_size": 1}),
    (2, 2, {"mesh.data": -1, "mesh.fsdp": 1, "mesh.zero_stage": 0}),
  ],
)
def test_every_mesh_axis_spans_processes(
  config_file, tmp_path, divisible_model, count, devices, mesh
):
  model = f"--config.model.path={divisible_model}"
  one = ProcessGroup(
    config_file, tmp_path / "one", 1, model, "--config.mesh.fsdp=4", devices=4, notes=tmp_path
  )
  assert one.codes() == [0], one.logs()
  rows = recorded_rows(tmp_path, 1)
  flags = [f"--config.{key}={value}" for key, value in mesh.items()]
  several = ProcessGroup(
    config_file, tmp_path / "run", count, model, *flags, devices=devices, notes=tmp_path
  )
  assert several.codes() == [0] * count, several.logs()
  assert_losses_close(processes.losses(tmp_path / "run"), processes.losses(tmp_path / "one"))
  assert recorded_rows(tmp_path, count) == rows


@pytest.mark.slow
@wide
@pytest.mark.parametrize("offload", ["optimizer", "all"])
def test_multihost_offload_save_and_resume(config_file, tmp_path, one_process_run, offload):
  """Offloaded state is saved, restored and exported by all processes."""
  workdir, flags = tmp_path / "run", ("--config.mesh.fsdp=-1", "--config.train.save_every=6")
  several = ProcessGroup(config_file, workdir, 2, *flags, f"--config.memory.offload={offload}")
  assert several.codes() == [0, 0], several.logs()
  assert_losses_close(processes.losses(workdir), processes.losses(one_process_run[0]))
  shutil.rmtree(workdir / "checkpoints" / "12")
  again = ProcessGroup(config_file, workdir, 2, *flags, f"--config.memory.offload={offload}")
  assert again.codes() == [0, 0] and "continuing at step 6" in again.logs()[0], again.logs()
  assert_losses_close(processes.losses(workdir), processes.losses(one_process_run[0]))


@pytest.mark.slow
@wide
def test_multihost_lora_export(config_file, tmp_path):
  flags = (
    "--config.mesh.fsdp=-1",
    "--config.lora.rank=3",
    "--config.lora.targets=all-linear",
    "--config.optim.learning_rate=0.01",
  )
  several = ProcessGroup(config_file, tmp_path / "two", 2, *flags, devices=2)
  assert several.codes() == [0, 0], several.logs()
  processes.train(
    config_file, tmp_path / "one", *flags, env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
  )
  assert_losses_close(processes.losses(tmp_path / "two"), processes.losses(tmp_path / "one"))
  for name in ("adapter/adapter_model.safetensors", "export/model.safetensors"):
    ours, theirs = (load_file(tmp_path / of / name) for of in ("two", "one"))
    assert ours.keys() == theirs.keys()
    for key in ours:
      np.testing.assert_allclose(ours[key], theirs[key], atol=1e-4)


LONG = (
  "--config.train.steps=26",
  "--config.train.save_every=6",
  "--config.train.keep=9",
  "--config.mesh.fsdp=-1",
)


@pytest.fixture(scope="module")
def saved_runs(config_file, tmp_path_factory):
  """Workdirs of 26 steps by 1, 2 and 4 processes of two devices, with a checkpoint of step 6."""
  home = tmp_path_factory.mktemp("saved by")
  for count in (1, 2, 4):
    assert ProcessGroup(config_file, home / str(count), count, *LONG).codes() == [0] * count
  return {count: home / str(count) for count in (1, 2, 4)}


@pytest.mark.slow
@wide
@pytest.mark.parametrize("before, after", [*itertools.permutations((1, 2, 4), 2)])
def test_resume_with_other_number_of_processes(
  config_file, tmp_path, saved_runs, before, after, record_property
):
  """The state is the saved one, by its checksums, and twenty losses are those of the first run."""
  workdir = shutil.copytree(saved_runs[before], tmp_path / "run")
  for step in (12, 18, 24, 26):
    shutil.rmtree(workdir / "checkpoints" / str(step))
  several = ProcessGroup(config_file, workdir, after, *LONG)
  assert several.codes() == [0] * after, several.logs()
  assert "continuing at step 6 of 26" in several.logs()[0] and "set aside" not in several.logs()[0]
  assert_losses_close(processes.losses(workdir), processes.losses(saved_runs[before]))
  record_property("torture", {"what": "ordered pairs of 1, 2 and 4 processes", "tried": 1})


@pytest.mark.parametrize(
  "count, lost, number",
  [
    (2, 0, signal.SIGKILL),
    pytest.param(2, 1, signal.SIGSTOP, marks=wide),
    pytest.param(4, 3, signal.SIGKILL, marks=wide),
    pytest.param(4, 0, signal.SIGKILL, marks=wide),
    pytest.param(4, 2, signal.SIGSTOP, marks=wide),
    pytest.param(4, 0, signal.SIGSTOP, marks=wide),
  ],
)
def test_lost_process_ends_others_with_code_5(config_file, tmp_path, count, lost, number):
  workdir = tmp_path / "run"
  more = ("--config.train.steps=100000", "--config.mesh.fsdp=-1", f"--peer_timeout={PEER_TIMEOUT}")
  several = ProcessGroup(config_file, workdir, count, *more, devices=1)
  wait_for(
    lambda: steps_in(workdir) or any(process.poll() is not None for process in several.all.values())
  )
  assert steps_in(workdir), several.logs()
  several.all[lost].send_signal(number)
  started = time.monotonic()
  wait_for(
    lambda: all(process.poll() is not None for i, process in several.all.items() if i != lost), 90
  )
  taken = time.monotonic() - started
  several.all[lost].kill()  # where it is only frozen
  codes = several.codes()
  logs = [text for i, text in enumerate(several.logs()) if i != lost]
  assert [code for i, code in enumerate(codes) if i != lost] == [5] * (count - 1), logs
  assert taken < (60 if number == signal.SIGKILL else PEER_TIMEOUT + 30)
  for text in logs:
    assert re.search(rf"error: .*process ({lost}|0) is (gone|frozen)", text), text
    assert "most recent call first" in text, text
  if lost:  # process 0 hears of all others; to them it may be process 0 that went first
    assert f"process {lost} is" in logs[0]


def test_missing_process_is_named(config_file, tmp_path):
  several = ProcessGroup(config_file, tmp_path / "run", 4, "--start_timeout=12", present=(0, 2))
  alone = ProcessGroup(config_file, tmp_path / "alone", 2, "--start_timeout=3", present=(1,))
  assert several.codes(60) == [5, 5]
  for text in several.logs():
    assert "error: process 1, 3 did not connect within 12 s" in text and "Traceback" not in text
  assert alone.codes(60) == [5]
  assert "waiting for 4 processes at 127.0.0.1" in several.logs()[0]
  assert "to run a single process, pass --num_processes=1" in several.logs()[0]
  assert re.search(r"error: process 0 at 127.0.0.1:\d+ did not answer within 3 s", alone.logs()[0])


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_rendezvous_over_ipv4_and_ipv6(host):
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  infos = [rendezvous.ProcessInfo(f"{host}:{port}", 2, i) for i in range(2)]
  with ThreadPoolExecutor(2) as pool:
    calls = [pool.submit(rendezvous.connect_peers, info, 20) for info in infos]
    results = [call.result() for call in calls]
  assert [list(peers) for peers in results] == [[1], [0]]
  for peers in results:
    for peer in peers.values():
      peer.close()


@pytest.mark.slow
def test_different_config_of_process_names_key(config_file, tmp_path):
  several = ProcessGroup(config_file, tmp_path / "run", 2, only={1: ["--config.train.seed=5"]})
  assert several.codes(90) == [2, 2], several.logs()
  for text in several.logs():
    assert "error: config.train.seed=5 on process 1: 0 on process 0; all processes must" in text
    assert "Traceback" not in text
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--num_processes=2"], "--coordinator, --process_id: missing"),
    (
      ["--coordinator=x", "--num_processes=2", "--process_id=0"],
      "--coordinator='x': must be HOST:PORT",
    ),
    (
      ["--coordinator=x:1", "--num_processes=2", "--process_id=2"],
      "--process_id=2: must be from 0 to 1",
    ),
    (["--start_timeout=0"], "--start_timeout=0: must be at least 1 second"),
  ],
)
def test_incomplete_multihost_flags_are_refused(config_file, tmp_path, flags, message):
  done = processes.train(config_file, tmp_path / "run", *flags, check=2)
  assert message in done.stderr


def test_pod_without_permission_runs_alone(monkeypatch, capsys):
  """A Kubernetes pod that may not list the others runs alone, and logs that."""
  monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
  assert rendezvous.detect_processes(None, None, None, 1) is None
  assert "JAX needs a package: pip install kubernetes" in capsys.readouterr().out

  def forbidden(*_):
    raise RuntimeError("Kubernetes API Error: 403 - Forbidden\nand a page more")

  monkeypatch.setattr(clusters.ClusterEnv, "auto_detect_unset_distributed_params", forbidden)
  assert rendezvous.detect_processes(None, None, None, 1) is None
  advice = "several processes need --coordinator, --num_processes, --process_id"
  message = f"(Kubernetes API Error: 403 - Forbidden); {advice}\n"
  assert capsys.readouterr().out.endswith(message)
  with pytest.raises(RequestError, match="cannot find the other processes: Kubernetes API Error"):
    rendezvous.detect_processes(None, 2, None, 1)
  assert rendezvous.detect_processes(None, 1, None, 1) is None


@pytest.mark.parametrize(
  "environment, alone",
  [
    ({}, False),
    ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, True),
    ({"SLURM_STEP_TASKS_PER_NODE": "8(x4)"}, False),
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
    ({"SLURM_STEP_TASKS_PER_NODE": "1", "JAX_LOCAL_DEVICE_IDS": "0,1"}, False),
  ],
)
def test_only_local_process_has_all_devices(monkeypatch, environment, alone):
  for name in ("SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE", "JAX_LOCAL_DEVICE_IDS"):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  assert multihost.is_only_local_process() == alone


def test_duplicate_process_id_and_port_scanners(config_file, tmp_path):
  """Other programs may connect to the port, but no process id may come twice."""
  several = ProcessGroup(
    config_file,
    tmp_path / "run",
    3,
    "--start_timeout=40",
    present=(0, 1),
    only={1: ["--process_id=1"]},
  )
  args = several.all[0].args
  port = int(re.search(r":(\d+)", args[args.index("--num_processes=3") - 1])[1])
  strangers = [
    b"GET / HTTP/1.0\r\n\r\n",
    b"[" * 1900 + b"\n",
    b'{"process": Infinity, "processes": 3}\n',
    b"\n",
  ]
  twice = json.dumps({"process": 1, "processes": 3}).encode() + b"\n"
  open_ones = []
  try:
    for line in (*strangers, twice):
      wait_for(
        lambda line=line: connects(port, line, open_ones) or several.all[0].poll() is not None
      )
    assert several.codes(60) == [2, 2], several.logs()
  finally:
    for peer in open_ones:
      peer.close()
  assert all("--process_id=1: another process has the same id" in text for text in several.logs())


def connects(port, line, open_ones):
  try:
    peer = socket.create_connection(("127.0.0.1", port), timeout=1)
  except OSError:
    return False
  open_ones.append(peer)
  peer.sendall(line)
  return True


@pytest.mark.slow
def test_different_weights_of_process_are_refused(config_file, folder, tmp_path):
  other = shutil.copytree(folder, tmp_path / "other")
  weights = bytearray((other / "model.safetensors").read_bytes())
  weights[-1] ^= 1
  (other / "model.safetensors").write_bytes(weights)
  # The same relative path on each host, and not the same files behind it.
  homes = [tmp_path / "0", tmp_path / "1"]
  for home, model in zip(homes, (folder, other), strict=True):
    home.mkdir()
    (home / "model").symlink_to(model)
  several = ProcessGroup(
    config_file,
    tmp_path / "run",
    2,
    "--config.model.path=model",
    "--config.mesh.fsdp=-1",
    homes=homes,
  )
  assert several.codes(90) == [2, 2], several.logs()
  assert all("error: the files of config.model.path=" in text for text in several.logs())


@pytest.mark.slow
@pytest.mark.parametrize("fails", [1, pytest.param(0, marks=wide)])
def test_failed_process_ends_others_by_name(config_file, tmp_path, fails):
  homes = [tmp_path / "0", tmp_path / "1"]
  for home in homes:
    home.mkdir()
  (homes[fails] / "tokens").write_text("a file where the folder of tokens should be")
  several = ProcessGroup(
    config_file,
    tmp_path / "run",
    2,
    "--config.data.cache_dir=tokens",
    "--config.mesh.fsdp=-1",
    homes=homes,
  )
  wait_for(lambda: several.all[fails].poll() is not None)
  began = time.monotonic()
  codes = several.codes(60)
  assert (codes[fails], codes[1 - fails]) == (4, 5), several.logs()
  assert time.monotonic() - began < 40
  assert f"process {fails} ended with exit code 4" in several.logs()[1 - fails]


@pytest.mark.slow
@wide
def test_workdir_that_is_not_shared_is_refused(config_file, tmp_path):
  homes = [tmp_path / "0", tmp_path / "1"]
  for home in homes:
    home.mkdir()
  several = ProcessGroup(config_file, Path("run"), 2, homes=homes, log_file=tmp_path / "log")
  assert several.codes(120) == [2, 2], several.logs()
  assert all(
    "--workdir='run' (must be on a shared disk): visible=False on process 1" in t
    for t in several.logs()
  )


@pytest.mark.slow
@wide
@pytest.mark.parametrize("count, to", [(2, (1,)), (2, (0, 1)), (4, (2,)), (4, (0, 1, 2, 3))])
def test_signal_to_any_process_saves_one_step(config_file, tmp_path, count, to):
  """All processes save the same step and end with code 75."""
  workdir, more = tmp_path / "run", ("--config.train.steps=100000", "--config.mesh.fsdp=-1")
  several = ProcessGroup(config_file, workdir, count, *more, devices=1)
  wait_for(
    lambda: steps_in(workdir) or any(process.poll() is not None for process in several.all.values())
  )
  for i in to:
    several.all[i].send_signal(signal.SIGUSR1)
  assert several.codes() == [75] * count, several.logs()
  logs = several.logs()
  assert len({re.search("saved at step [0-9]+", text)[0] for text in logs}) == 1, logs
  assert all("Traceback" not in text for text in logs)
  saved = [entry for entry in (workdir / "checkpoints").iterdir() if entry.name.isdecimal()]
  assert len(saved) in (1, 2)


@pytest.mark.slow
@wide
# Orbax reads its metrics before.
@pytest.mark.parametrize("point, count", [("record read", "2"), ("state read", "1")])
def test_checkpoint_unreadable_for_one_process(config_file, tmp_path, point, count):
  """A checkpoint that one process cannot read is changed by none."""
  workdir, more = tmp_path / "run", ("--config.mesh.fsdp=-1", "--config.train.save_every=6")
  first = ProcessGroup(config_file, workdir, 2, *more, devices=1)
  assert first.codes() == [0, 0], first.logs()
  (workdir / "checkpoints" / "12").rename(tmp_path / "out of the way")
  several = ProcessGroup(
    config_file, workdir, 2, *more, devices=1, faults={1: (point, count, "EACCES")}
  )
  assert several.codes() == [4, 4], several.logs()
  assert all(
    "checkpoints/6: cannot be read now" in text and "Traceback" not in text
    for text in several.logs()
  )
  again = ProcessGroup(config_file, workdir, 2, *more, devices=1)
  assert again.codes() == [0, 0] and "continuing at step 6" in again.logs()[0], again.logs()
