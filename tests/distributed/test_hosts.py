"""Several real processes as one run: the same losses, one writer, and an end with a name when one of them is lost."""

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

FROZEN = 8  # seconds of silence that count as lost here
wide = pytest.mark.wide


class Hosts:
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
    logs=None,
    faults=None,
    notes=None,
  ):
    with socket.create_server(("127.0.0.1", 0)) as server:
      port = server.getsockname()[1]
    self.outputs, self.all = [], {}
    for i in range(count) if present is None else present:
      place = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={i}"]
      output = (logs or workdir).with_name(f"{(logs or workdir).name}-{i}.log")
      self.outputs.append(output)
      command = (
        [fault_points.__file__, *faults[i]] if i in (faults or {}) else ["-m", "jaxft.train"]
      )
      command = [noted_batches.__file__, notes / f"{i}.json"] if notes else command
      command += [
        "--config",
        config_file,
        "--workdir",
        workdir,
        *more,
        *place,
        *(only or {}).get(i, ()),
      ]
      with output.open("w") as stream:
        self.all[i] = preloaded.Popen(
          command,
          stdout=stream,
          stderr=subprocess.STDOUT,
          cwd=homes and homes[i],
          env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        )

  def codes(self, timeout=400):
    until = time.monotonic() + timeout
    try:
      return [process.wait(max(0.1, until - time.monotonic())) for process in self.all.values()]
    finally:
      for process in self.all.values():
        process.kill()
        process.wait()

  def said(self):
    return [output.read_text() for output in self.outputs]


def wait_for(condition, timeout=240):
  until = time.monotonic() + timeout
  while not condition():
    assert time.monotonic() < until
    time.sleep(0.1)


def steps_in(workdir):
  file = workdir / "metrics.jsonl"
  return file.exists() and file.read_text().count("train/loss")


@pytest.fixture(scope="module")
def on_one(config_file, tmp_path_factory):
  """The run on as many devices of one process as the largest run here has."""
  workdir = tmp_path_factory.mktemp("one") / "run"
  one = Hosts(config_file, workdir, 1, "--config.mesh.fsdp=4", devices=4, notes=workdir.parent)
  assert one.codes() == [0], one.said()
  return workdir, noted_in(workdir.parent, 1)


def noted_in(folder, count):
  """The rows that the processes were given, by their place; one that several were given is the same row."""
  rows = {}
  for i in range(count):
    for place, digest in json.loads((folder / f"{i}.json").read_text()).items():
      assert rows.setdefault(place, digest) == digest
  return rows


def close(a, b):
  assert a.keys() == b.keys()
  np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("count, devices", [(2, 2), pytest.param(4, 2, marks=wide)])
def test_several_processes_are_one_run_and_their_checkpoints_anyones(
  config_file, tmp_path, on_one, count, devices
):
  workdir, (of_one, rows_of_one) = tmp_path / "run", on_one
  flags = ("--config.mesh.fsdp=-1", "--config.train.save_every=6")
  several = Hosts(config_file, workdir, count, *flags, devices=devices, notes=tmp_path)
  assert several.codes() == [0] * count, several.said()
  close(processes.losses(workdir), processes.losses(of_one))
  assert noted_in(tmp_path, count) == rows_of_one  # every byte of every batch
  held = [len(json.loads((tmp_path / f"{i}.json").read_text())) for i in range(count)]
  assert held == [len(rows_of_one) // count] * count  # each row is given to one process
  first, *others = several.said()
  assert "exported to" in first and not any("step" in said for said in others)  # one of them speaks
  # Their checkpoint restores in one process, which goes on from the middle.
  (workdir / "checkpoints" / "12").rename(tmp_path / "out of the way")
  done = processes.train(
    config_file, workdir, "--config.mesh.fsdp=1", "--config.train.save_every=6"
  )
  assert "continuing at step 6" in done.stdout
  close(processes.losses(workdir), processes.losses(of_one))


@pytest.fixture(scope="module")
def even(tmp_path_factory):
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
def test_every_kind_of_parallelism_crosses_processes(
  config_file, tmp_path, even, count, devices, mesh
):
  model = f"--config.model.path={even}"
  one = Hosts(
    config_file, tmp_path / "one", 1, model, "--config.mesh.fsdp=4", devices=4, notes=tmp_path
  )
  assert one.codes() == [0], one.said()
  rows = noted_in(tmp_path, 1)
  flags = [f"--config.{key}={value}" for key, value in mesh.items()]
  several = Hosts(
    config_file, tmp_path / "run", count, model, *flags, devices=devices, notes=tmp_path
  )
  assert several.codes() == [0] * count, several.said()
  close(processes.losses(tmp_path / "run"), processes.losses(tmp_path / "one"))
  assert noted_in(tmp_path, count) == rows


@pytest.mark.slow
@wide
@pytest.mark.parametrize("kept", ["optimizer", "all"])
def test_what_the_hosts_keep_is_saved_and_exported_by_all_of_them(
  config_file, tmp_path, on_one, kept
):
  workdir, flags = tmp_path / "run", ("--config.mesh.fsdp=-1", "--config.train.save_every=6")
  several = Hosts(config_file, workdir, 2, *flags, f"--config.memory.offload={kept}")
  assert several.codes() == [0, 0], several.said()
  close(processes.losses(workdir), processes.losses(on_one[0]))
  shutil.rmtree(workdir / "checkpoints" / "12")
  again = Hosts(config_file, workdir, 2, *flags, f"--config.memory.offload={kept}")
  assert again.codes() == [0, 0] and "continuing at step 6" in again.said()[0], again.said()
  close(processes.losses(workdir), processes.losses(on_one[0]))


@pytest.mark.slow
@wide
def test_adapters_are_gathered_and_written_by_several_processes(config_file, tmp_path):
  flags = (
    "--config.mesh.fsdp=-1",
    "--config.lora.rank=3",
    "--config.lora.targets=all-linear",
    "--config.optim.learning_rate=0.01",
  )
  several = Hosts(config_file, tmp_path / "two", 2, *flags, devices=2)
  assert several.codes() == [0, 0], several.said()
  processes.train(
    config_file, tmp_path / "one", *flags, env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
  )
  close(processes.losses(tmp_path / "two"), processes.losses(tmp_path / "one"))
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
def saved_by(config_file, tmp_path_factory):
  """Runs of 26 steps by 1, 2 and 4 processes of two devices, each with a checkpoint of step 6: {processes: workdir}."""
  home = tmp_path_factory.mktemp("saved by")
  for count in (1, 2, 4):
    assert Hosts(config_file, home / str(count), count, *LONG).codes() == [0] * count
  return {count: home / str(count) for count in (1, 2, 4)}


@pytest.mark.slow
@wide
@pytest.mark.parametrize("before, after", [*itertools.permutations((1, 2, 4), 2)])
def test_every_number_of_processes_goes_on_from_every_other(
  config_file, tmp_path, saved_by, before, after, record_property
):
  """The state is the saved one, by its checksums, on the other mesh; the twenty losses after it are those of the first run."""
  workdir = shutil.copytree(saved_by[before], tmp_path / "run")
  for step in (12, 18, 24, 26):
    shutil.rmtree(workdir / "checkpoints" / str(step))
  several = Hosts(config_file, workdir, after, *LONG)
  assert several.codes() == [0] * after, several.said()
  assert "continuing at step 6 of 26" in several.said()[0] and "set aside" not in several.said()[0]
  close(processes.losses(workdir), processes.losses(saved_by[before]))
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
def test_a_lost_process_ends_the_others_with_code_5(config_file, tmp_path, count, lost, number):
  workdir = tmp_path / "run"
  more = ("--config.train.steps=100000", "--config.mesh.fsdp=-1", f"--peer_timeout={FROZEN}")
  several = Hosts(config_file, workdir, count, *more, devices=1)
  wait_for(
    lambda: steps_in(workdir) or any(process.poll() is not None for process in several.all.values())
  )
  assert steps_in(workdir), several.said()
  several.all[lost].send_signal(number)
  started = time.monotonic()
  wait_for(
    lambda: all(process.poll() is not None for i, process in several.all.items() if i != lost), 90
  )
  taken = time.monotonic() - started
  several.all[lost].kill()  # where it is only frozen
  codes = several.codes()
  said = [text for i, text in enumerate(several.said()) if i != lost]
  assert [code for i, code in enumerate(codes) if i != lost] == [5] * (count - 1), said
  assert taken < (60 if number == signal.SIGKILL else FROZEN + 30)
  for text in said:
    assert (
      re.search(rf"error: .*process ({lost}|0) is (gone|frozen)", text)
      and "most recent call first" in text
    ), text
  if lost:  # process 0 hears of all others; to them it may be process 0 that went first
    assert f"process {lost} is" in said[0]


def test_a_process_that_does_not_come_is_named(config_file, tmp_path):
  several = Hosts(config_file, tmp_path / "run", 4, "--start_timeout=12", present=(0, 2))
  alone = Hosts(config_file, tmp_path / "alone", 2, "--start_timeout=3", present=(1,))
  assert several.codes(60) == [5, 5]
  for text in several.said():
    assert "error: process 1, 3 did not come within 12 s" in text and "Traceback" not in text
  assert alone.codes(60) == [5]
  assert (
    "waiting for 4 processes at 127.0.0.1" in several.said()[0]
    and "to run alone: --num_processes=1" in several.said()[0]
  )
  assert re.search(r"error: process 0 at 127.0.0.1:\d+ did not answer within 3 s", alone.said()[0])


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_the_roll_is_called_at_any_kind_of_address(host):
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  places = [rendezvous.ProcessInfo(f"{host}:{port}", 2, i) for i in range(2)]
  with ThreadPoolExecutor(2) as pool:
    ends = [
      call.result()
      for call in [pool.submit(rendezvous.connect_peers, place, 20) for place in places]
    ]
  assert [list(peers) for peers in ends] == [[1], [0]]
  for peers in ends:
    for peer in peers.values():
      peer.close()


@pytest.mark.slow
def test_another_config_on_one_host_is_refused_by_key(config_file, tmp_path):
  several = Hosts(config_file, tmp_path / "run", 2, only={1: ["--config.train.seed=5"]})
  assert several.codes(90) == [2, 2], several.said()
  for text in several.said():
    assert "error: config.train.seed=5 on process 1: 0 on process 0; all must be the same" in text
    assert "Traceback" not in text
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "flags, told",
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
def test_flags_that_say_too_little_are_refused(config_file, tmp_path, flags, told):
  done = processes.train(config_file, tmp_path / "run", *flags, check=2)
  assert told in done.stderr


def test_a_pod_that_may_not_ask_who_else_there_is_runs_alone_and_says_so(monkeypatch, capsys):
  monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
  assert rendezvous.detect_processes(None, None, None, 1) is None
  assert "JAX needs pip install kubernetes" in capsys.readouterr().out

  def forbidden(*_):
    raise RuntimeError("Kubernetes API Error: 403 - Forbidden\nand a page more")

  monkeypatch.setattr(clusters.ClusterEnv, "auto_detect_unset_distributed_params", forbidden)
  assert rendezvous.detect_processes(None, None, None, 1) is None
  told = "(Kubernetes API Error: 403 - Forbidden); several processes need --coordinator, --num_processes, --process_id\n"
  assert capsys.readouterr().out.endswith(told)
  with pytest.raises(RequestError, match="looking for the other processes: Kubernetes API Error"):
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
def test_one_process_a_node_has_all_of_its_devices(monkeypatch, environment, alone):
  for name in ("SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE", "JAX_LOCAL_DEVICE_IDS"):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  assert multihost.is_only_local_process() == alone


def test_two_processes_of_one_number_and_strangers_on_the_port(config_file, tmp_path):
  several = Hosts(
    config_file,
    tmp_path / "run",
    3,
    "--start_timeout=40",
    present=(0, 1),
    only={1: ["--process_id=1"]},
  )
  port = int(
    re.search(
      r":(\d+)", several.all[0].args[several.all[0].args.index("--num_processes=3") - 1]
    ).group(1)
  )
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
      wait_for(lambda: connects(port, line, open_ones) or several.all[0].poll() is not None)  # noqa: B023
    assert several.codes(60) == [2, 2], several.said()
  finally:
    for peer in open_ones:
      peer.close()
  assert all("--process_id=1: another process has it too" in text for text in several.said())


def connects(port, line, open_ones):
  try:
    peer = socket.create_connection(("127.0.0.1", port), timeout=1)
  except OSError:
    return False
  open_ones.append(peer)
  peer.sendall(line)
  return True


@pytest.mark.slow
def test_one_host_with_other_weights_is_refused(config_file, folder, tmp_path):
  other = shutil.copytree(folder, tmp_path / "other")
  weights = bytearray((other / "model.safetensors").read_bytes())
  weights[-1] ^= 1
  (other / "model.safetensors").write_bytes(weights)
  # The same relative path on each host, and not the same files behind it.
  homes = [tmp_path / "0", tmp_path / "1"]
  for home, model in zip(homes, (folder, other), strict=True):
    home.mkdir()
    (home / "model").symlink_to(model)
  several = Hosts(
    config_file,
    tmp_path / "run",
    2,
    "--config.model.path=model",
    "--config.mesh.fsdp=-1",
    homes=homes,
  )
  assert several.codes(90) == [2, 2], several.said()
  assert all("error: the files of config.model.path=" in text for text in several.said())


@pytest.mark.slow
@pytest.mark.parametrize("fails", [1, pytest.param(0, marks=wide)])
def test_what_ends_one_process_alone_ends_the_other_soon_and_by_its_name(
  config_file, tmp_path, fails
):
  homes = [tmp_path / "0", tmp_path / "1"]
  for home in homes:
    home.mkdir()
  (homes[fails] / "tokens").write_text("a file where the folder of tokens should be")
  several = Hosts(
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
  assert (codes[fails], codes[1 - fails]) == (4, 5), several.said()
  assert time.monotonic() - began < 40
  assert f"process {fails} ended with exit code 4" in several.said()[1 - fails]


@pytest.mark.slow
@wide
def test_a_workdir_that_is_not_one_folder_is_refused(config_file, tmp_path):
  homes = [tmp_path / "0", tmp_path / "1"]
  for home in homes:
    home.mkdir()
  several = Hosts(config_file, Path("run"), 2, homes=homes, logs=tmp_path / "log")
  assert several.codes(120) == [2, 2], several.said()
  assert all(
    "--workdir='run', on one disk that all processes share=False on process 1" in t
    for t in several.said()
  )


@pytest.mark.slow
@wide
@pytest.mark.parametrize("count, to", [(2, (1,)), (2, (0, 1)), (4, (2,)), (4, (0, 1, 2, 3))])
def test_a_signal_to_one_or_all_saves_one_step_and_ends_with_75(config_file, tmp_path, count, to):
  workdir, more = tmp_path / "run", ("--config.train.steps=100000", "--config.mesh.fsdp=-1")
  several = Hosts(config_file, workdir, count, *more, devices=1)
  wait_for(
    lambda: steps_in(workdir) or any(process.poll() is not None for process in several.all.values())
  )
  for i in to:
    several.all[i].send_signal(signal.SIGUSR1)
  assert several.codes() == [75] * count, several.said()
  assert len({re.search("saved at step [0-9]+", text)[0] for text in several.said()}) == 1, (
    several.said()
  )
  assert all("Traceback" not in text for text in several.said())
  assert len(
    [entry for entry in (workdir / "checkpoints").iterdir() if entry.name.isdecimal()]
  ) in (1, 2)


@pytest.mark.slow
@wide
@pytest.mark.parametrize(
  "place, count", [("record read", "2"), ("state read", "1")]
)  # Orbax reads its metrics before
def test_a_checkpoint_that_one_process_cannot_read_is_left_alone_by_all(
  config_file, tmp_path, place, count
):
  workdir, more = tmp_path / "run", ("--config.mesh.fsdp=-1", "--config.train.save_every=6")
  whole = Hosts(config_file, workdir, 2, *more, devices=1)
  assert whole.codes() == [0, 0], whole.said()
  (workdir / "checkpoints" / "12").rename(tmp_path / "out of the way")
  several = Hosts(config_file, workdir, 2, *more, devices=1, faults={1: (place, count, "EACCES")})
  assert several.codes() == [4, 4], several.said()
  assert all(
    "checkpoints/6: cannot be read now" in text and "Traceback" not in text
    for text in several.said()
  )
  again = Hosts(config_file, workdir, 2, *more, devices=1)
  assert again.codes() == [0, 0] and "continuing at step 6" in again.said()[0], again.said()
