"""benchmarks/gpu_short.sh without a GPU: all parts with tiny shapes; failures stay apart."""

import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import ROOT, lines

sys.path.append(str(ROOT / "benchmarks"))

import children
import gpu_parts
import gpu_runner
import page
import train_tables
from gpu_runner import Part, Runner

SCRIPT = ROOT / "benchmarks" / "gpu_short.sh"
H100 = "NVIDIA H100 80GB HBM3"
HAS_TORCH = all(map(importlib.util.find_spec, ("torch", "transformers", "accelerate")))
NEED_TORCH = {"warm", "agree", "streamed", "train124", "generate", "eager"}
NAMES = [part.name for part in gpu_parts.PARTS]
# What differs from another part in nothing but shapes and contenders, and what takes minutes, runs
# before a release.
LIKE_OTHERS = {
  "train124",
  "warm",
  "agree",
  "neo",
  "xl",
  "more124",
  "dropout",
  "none124",
  "eager",
  "medium",
  "kernels",
}
start = Runner._start
SAY = "-c \"print('said')\""
OUT_FILES = {"summary.txt", "results.jsonl", "logs.txt", "benchmarks.md"}


def part(name, command, **how):
  return Part(
    **({"phase": 1, "limit": 60, "least": 0, "tiny": ""} | how), name=name, command=command
  )


def script(*words, **environment):
  environment = children.environment(PYTHON=sys.executable, GPU_TINY="1", **environment)
  return subprocess.run(
    ["bash", SCRIPT, *words], env=environment, capture_output=True, text=True, timeout=1500
  )


def tried(out, names):
  names = [name for name in NAMES if name in names and (HAS_TORCH or name not in NEED_TORCH)]
  before = page.PAGE.read_bytes()
  # no caches of other versions
  done = script("all", "0", OUT=str(out), TMPDIR=str(out.parent), PARTS=" ".join(names))
  assert page.PAGE.read_bytes() == before
  assert done.returncode == 0, done.stdout + done.stderr + (out / "logs.txt").read_text()[-6000:]
  summary = (out / "summary.txt").read_text().splitlines()
  assert [sum(f" {name}: ok, " in line for line in summary) for name in names] == [1] * len(names)
  assert summary[-1].endswith("no part failed")
  found = lines(out / "results.jsonl")
  assert {
    line["name"]: line["code"] for line in found if line["benchmark"] == "part"
  } == dict.fromkeys(names, 0)
  assert {line["device"] for line in found if "device" in line} <= {"cpu"}  # "warm" has none
  return out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """What a run of the script left, with every part that is like no other."""
  return tried(tmp_path_factory.mktemp("gpu"), set(NAMES) - LIKE_OTHERS)


@pytest.mark.slow
def test_each_part_runs_with_tiny_shapes(tiny):
  """And leaves its figures."""
  # small, and at most eight
  assert {file.name for file in tiny.iterdir()} == OUT_FILES | {"gaps.svg", "trace.tar.gz"}
  assert "no measurement" in (tiny / "benchmarks.md").read_text().splitlines()[0]
  log = (tiny / "logs.txt").read_text()
  assert "smoke | exported to" in log and "machine | jax " in log
  found = {line["benchmark"]: line for line in lines(tiny / "results.jsonl")}
  assert any(line.get("device") == "cpu" for line in found.values())
  assert {"run", "part", "section", "attention", "offload", "gaps"} <= found.keys()
  assert found["offload"]["step_seconds"] > 0 and found["offload"]["planned_peak_bytes"] > 0
  assert not HAS_TORCH or found["agree"]["verdict"] == "agrees"


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize("name", sorted(LIKE_OTHERS))
def test_similar_parts_run_too(name, tmp_path):
  out = tried(tmp_path, {name})
  if name == "train124" and HAS_TORCH:
    assert {line.get("contender") for line in lines(out / "results.jsonl")} >= {"Trainer, SDPA"}


@pytest.fixture
def root(tmp_path):
  """A checkout's pages and configs, to write to."""
  for name in ("docs", "configs"):
    shutil.copytree(ROOT / name, tmp_path / "root" / name)
  return tmp_path / "root"


def tables(root, *folders):
  command = [sys.executable, ROOT / "benchmarks" / "gpu_tables.py", *folders, "--root", root]
  return subprocess.run(command, env=children.environment(), capture_output=True, text=True)


@pytest.mark.slow
def test_cpu_figures_are_not_written_as_gpu(tiny, root):
  before = (root / "docs" / "benchmarks.md").read_text()
  done = tables(root, tiny)
  assert done.returncode == 1 and "measured on a GPU; nothing is written" in done.stderr
  assert (root / "docs" / "benchmarks.md").read_text() == before


@pytest.mark.slow
def test_gpu_figures_become_tables(tiny, root, tmp_path):
  """And the expectation of a config."""
  folder = tmp_path / "h100"
  shutil.copytree(tiny, folder)
  text = (
    (tiny / "results.jsonl")
    .read_text()
    .replace('"device": "cpu"', f'"device": "{H100}"')
    .replace("a CPU", H100)
  )
  text = text.replace('"peak_bytes": null', '"peak_bytes": 6000000000').replace("tiny-gpt2", "gpt2")
  (folder / "gaps.svg").write_text("of the card")
  trained = json.dumps({"benchmark": "train", "at": 1, **trained_by("jaxft", 300.0)}) + "\n"
  # the last line is cut off
  (folder / "results.jsonl").write_text(text + trained + '{"benchmark": "tra')
  done = tables(root, folder, tiny)
  assert done.returncode == 0, done.stderr
  assert "lines are of a CPU, and left out" in done.stdout
  written = (root / "docs" / "benchmarks.md").read_text()
  assert f"<!-- a model larger than the device, gpt2 on {H100} -->" in written
  assert f"<!-- training gpt2 on {H100}, 8 x 1024 tokens, dropout 0, remat dots -->" in written
  assert f"| gptj, gpt2, 1 x 64, offload=all, remat=full | {H100} | " in written
  assert (root / "docs" / "gaps-gpt2-cpu.svg").read_text() == "of the card"  # the name is the run's
  config = (root / "configs" / "gptj_6b_8gb.py").read_text()
  assert max(map(len, config.splitlines())) <= 100  # `make lint` checks it too
  words = " ".join(config.split())
  assert f"With random ones on a {H100}" in words and "5.59 GiB" in words
  assert "not measured yet: it needs" in (root / "configs" / "gptj_6b_24gb.py").read_text()
  assert all(len(line) <= 128 for line in config.splitlines())
  compile(config, "config", "exec")


# ---- The runner ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "it", [it for it in gpu_parts.PARTS if "benchmarks/" in it.command], ids=lambda it: it.name
)
def test_part_flags_are_known_to_its_command(it, tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  for tiny in (False, True):
    file, *flags = Runner(tmp_path, tiny=tiny).command(it, tmp_path)
    monkeypatch.setattr(sys, "argv", [file, *flags])
    asked = importlib.import_module(Path(file).stem).parsed()
    assert Path(file).exists() and not [
      value for value in vars(asked).values() if "{" in str(value)
    ]


def test_time_limits_scale_with_patience(tmp_path):
  train = next(it for it in gpu_parts.PARTS if it.name == "train124")
  assert "Trainer, SDPA, torch.compile=90" in Runner(tmp_path).command(train, tmp_path)
  assert "Trainer, SDPA, torch.compile=900" in Runner(tmp_path, patience=10).command(
    train, tmp_path
  )


def test_hanging_part_is_killed_with_children(tmp_path):
  """The other parts run."""
  child = "import subprocess, sys, time; it = subprocess.Popen(['sleep', '600'], process_group=0); "
  child += "print(it.pid, flush=True); "
  runner = Runner(tmp_path)
  runner.run((part("hangs", f'-c "{child}time.sleep(600)"', limit=2), part("next", SAY)))
  assert runner.states == {"hangs": "killed after 2 s", "next": "ok"} and runner.end() == 1
  pid = (tmp_path / "logs.txt").read_text().splitlines()[0].removeprefix("hangs | ")
  assert (
    not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]
  )
  summary = (tmp_path / "summary.txt").read_text().splitlines()
  assert "hangs: killed after 2 s" in summary[0] and summary[1].endswith("next: ok, 0 s | said")
  assert summary[-1].endswith("failed: hangs (killed after 2 s)")


def test_crashed_part_does_not_stop_the_rest(tmp_path):
  """Nor does one that is killed."""
  runner = Runner(tmp_path)
  killed = part(
    "killed", "-c \"import os; print('begun', flush=True); os.kill(os.getpid(), 9)\"", group="one"
  )
  crashes = part("crashes", '-c "raise ValueError(12)"', group="one")
  runner.run((killed, crashes, part("beside", SAY, group="one"), part("next", SAY)))
  assert runner.states == {"killed": "code -9", "crashes": "code 1", "beside": "ok", "next": "ok"}
  results = {line["name"]: line["told"] for line in lines(tmp_path / "results.jsonl")}
  assert results == {
    "killed": "begun",
    "crashes": "ValueError: 12",
    "beside": "said",
    "next": "said",
  }
  assert runner.end() == 1


def test_part_that_cannot_start_fails(tmp_path, monkeypatch):
  # lines that are none of ours cost nothing
  (tmp_path / "results.jsonl").write_text('null\n{"benchmark": 3}\n')
  runner = Runner(tmp_path)
  monkeypatch.setattr(
    Runner,
    "_start",
    lambda self, part, work: 1 / 0 if part.name == "one" else start(self, part, work),
  )
  runner.run((part("one", SAY), part("two", SAY)))
  assert (
    runner.states == {"one": "ZeroDivisionError: division by zero", "two": "ok"}
    and runner.end() == 1
  )


def test_part_without_time_left_is_skipped(tmp_path):
  """And named."""
  runner = Runner(tmp_path, seconds=30)
  runner.run((part("long", SAY, least=60), part("short", SAY)))
  assert runner.states == {"long": "skipped", "short": "ok"} and runner.end() == 0
  assert "skipped, no time was left: long" in (tmp_path / "summary.txt").read_text()


def test_fallback_part_runs_after_a_failure(tmp_path):
  for command, state in ((SAY, "not needed"), ('-c "raise SystemExit(1)"', "ok")):
    runner = Runner(tmp_path)
    runner.run((part("large", command), part("small", SAY, instead_of="large")))
    assert runner.states["small"] == state


@pytest.mark.parametrize(
  "name",
  [
    "attention",
    pytest.param("smoke", marks=pytest.mark.slow),
    *(pytest.param(name, marks=[pytest.mark.slow, pytest.mark.wide]) for name in ("gptj", "trace")),
  ],
)
def test_part_without_a_gpu_ends_in_one_line(name, tmp_path, monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")  # JAX falls back to the CPU
  runner = Runner(tmp_path)
  runner.run(tuple(it for it in gpu_parts.PARTS if it.name == name))
  assert runner.states[name].startswith("code ") and runner.end() == 1
  (line,) = [
    line
    for line in (tmp_path / "summary.txt").read_text().splitlines()
    if f" {name}: code " in line
  ]
  assert "--require gpu: JAX computes on the cpu" in line


def test_cpu_figures_fail_if_a_gpu_is_required(tmp_path):
  noting = "import sys; sys.path.append('benchmarks'); import page; page.note('x', device='cpu')"
  runner = Runner(tmp_path)
  runner.run((part("strays", f'-c "{noting}"'),))
  assert runner.states == {"strays": "computed on the CPU"} and runner.end() == 1


def test_default_requires_a_gpu_and_its_memory(tmp_path, monkeypatch):
  """Unless the user chose a platform."""
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  monkeypatch.setenv("PYTHONPATH", "/brought/along")
  smoke = gpu_parts.PARTS[0]
  found = Runner(tmp_path).environment(smoke)
  assert (found["JAX_PLATFORMS"], found["XLA_CLIENT_MEM_FRACTION"]) == ("cuda,cpu", "0.25")
  assert found["BENCHMARKS_REQUIRE"] == "gpu" and "--require gpu" in " ".join(
    Runner(tmp_path).command(smoke, tmp_path)
  )
  assert found["PYTHONPATH"] == f"{ROOT}{os.pathsep}/brought/along"


RUNS = """
import sys
from pathlib import Path
sys.path.append({benchmarks!r})
import gpu_parts
from gpu_runner import Part
command = "-c \\"import os, time; print(os.getpid(), flush=True); time.sleep(60)\\""
first = Part("first", 1, 60, 0, {say!r}, "")
gpu_parts.PARTS = (first, Part("second", 1, 60, 0, command, ""), Part("third", 1, 9, 0, "", ""))
sys.argv = ["gpu_parts.py", "1", "100", "--out", sys.argv[1]]
sys.exit(gpu_parts.main())
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_interrupted_run_keeps_its_results(ending, tmp_path):
  code = RUNS.format(benchmarks=str(ROOT / "benchmarks"), say=SAY)
  runner = subprocess.Popen(
    [sys.executable, "-c", code, tmp_path], env=children.environment(), stdout=subprocess.DEVNULL
  )
  log, until = tmp_path / "logs.txt", time.monotonic() + 30
  while not (log.exists() and "second | " in log.read_text()):
    assert time.monotonic() < until and runner.poll() is None
    time.sleep(0.05)
  runner.send_signal(ending)
  time.sleep(0.01)
  runner.send_signal(ending)  # as an impatient user does
  assert runner.wait(20) == (-9 if ending == signal.SIGKILL else 128 + ending)
  second = int(log.read_text().split("second | ")[1].split()[0])
  if ending == signal.SIGKILL:
    gpu_runner.kill_session(second)
  else:
    assert not gpu_runner.session_members(second)
    assert f"ended by {ending.name}" in (tmp_path / "summary.txt").read_text()
  assert "first: ok, 0 s | said" in (tmp_path / "summary.txt").read_text()
  assert [
    line["name"] for line in lines(tmp_path / "results.jsonl") if line.get("state") == "ok"
  ] == ["first"]
  assert "third" not in (tmp_path / "summary.txt").read_text()
  assert (tmp_path / "benchmarks.md").read_text().endswith(page.PAGE.read_text())


def test_long_log_keeps_both_ends(tmp_path):
  """The beginning and the end of a log stay."""
  Runner(tmp_path).run(
    (part("talks", "-c \"[print(f'line {i}', 'x' * 90) for i in range(5000)]\""),)
  )
  log = (tmp_path / "logs.txt").read_text()
  assert (
    len(log) < 150_000
    and "talks | line 0 x" in log
    and "[...]" in log
    and "talks | line 4999 x" in log
  )


def test_part_survives_an_unwritable_log(tmp_path):
  """As on a full disk: what it says is read on, or it would wait for ever."""
  (tmp_path / "logs.txt").mkdir()
  runner = Runner(tmp_path)
  runner.run((part("talks", "-c \"[print(f'line {i}', 'x' * 90) for i in range(5000)]\""),))
  assert runner.states == {"talks": "ok"} and "line 4999" in (tmp_path / "summary.txt").read_text()


def test_user_variables_override_those_of_parts(tmp_path, monkeypatch):
  monkeypatch.delenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", raising=False)
  asks = part("asks", SAY, environment={"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": "104"})
  for own in ("104", "48"):
    assert Runner(tmp_path).environment(asks)["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"] == own
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "48")


@pytest.mark.parametrize(
  "words, parts, message",
  [
    (["1"], "", "bash benchmarks/gpu_short.sh 1 330"),
    (["1", "soon"], "", "bash benchmarks/gpu_short.sh 1 330"),
    (["7", "330"], "", "invalid choice: '7'"),
    (["--help", "330"], "", "bash benchmarks/gpu_short.sh 1 330"),
    (["1", "99999999999999999999"], "", "bash benchmarks/gpu_short.sh 1 330"),
    (["1", "330"], "smoke --check", "bash benchmarks/gpu_short.sh 1 330"),
    (["1", "330"], "smoke gptj", "no part of phase 1: gptj; there are smoke, attention"),
  ],
)
def test_wrong_command_ends_in_one_line(words, parts, message, tmp_path):
  done = script(*words, OUT=str(tmp_path), PARTS=parts)
  assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


# ---- What benchmarks share -----------------------------------------------------------------------


def test_silent_contender_is_killed_with_children():
  code = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); "
  code += "time.sleep(600)"
  began = time.monotonic()
  assert children.answer([sys.executable, "-c", code], 1) == {"error": "no answer in 1 s"}
  assert time.monotonic() - began < 30
  assert children.answer([sys.executable, "-c", "print('{\"a\": 1}')"]) == {"a": 1}
  assert children.answer([sys.executable, "-c", "print(7); raise SystemExit(3)"]) == {
    "error": "ended with code 3 and no answer"
  }


def trained_by(contender, speed, remat="dots"):
  """A line of results.jsonl."""
  settings = {
    "model": "gpt2",
    "rows": 8,
    "length": 1024,
    "steps": 40,
    "dropout": 0.0,
    "checkpointing": False,
  }
  settings |= {"filled_caches": True, "remat": remat}
  taken = {
    "first_step_seconds": 9.0,
    "peak_bytes": 2**30,
    "device": H100,
    "turn": 1,
    "versions": "2026",
  }
  return {"settings": settings, "contender": contender, "tokens_per_second": speed, **taken}


def test_contenders_share_a_table():
  """Those of several commands."""
  error = {"contender": "Trainer, SDPA", "turn": 1, "error": "out of memory"}
  error["settings"] = trained_by("jaxft", 300.0)["settings"]
  noted = [
    trained_by("jaxft", 300.0),
    error,
    trained_by("jaxft", 250.0, "none"),
    trained_by("Trainer, eager", 200.0),
  ]
  found = train_tables.sections(json.loads(json.dumps(noted)))
  name = f"training gpt2 on {H100}, 8 x 1024 tokens, dropout 0, remat"
  assert list(found) == [f"{name} dots", f"{name} none"]
  dots, none = (text.splitlines()[4:] for _, text in found.values())
  assert [row.split("|")[1].strip() for row in dots] == ["jaxft", "Trainer, SDPA", "Trainer, eager"]
  assert (
    "| 300 (300 to 300) | 1.50 |" in dots[0]
    and "out of memory" in dots[1]
    and "| 1.25 |" in none[0]
  )


def test_newest_figures_of_a_contender_are_shown():
  """Of several runs into a folder."""
  turns = [
    {"run": "1.5", "tokens_per_second": 1},
    {"run": "2.5", "tokens_per_second": 2},
    {"run": "3.5", "error": "x"},
  ]
  assert train_tables.of_newest_run(turns) == turns[1:2]
  assert train_tables.of_newest_run(turns[2:]) == turns[2:] and train_tables.of_newest_run([]) == []
  # without gpu_parts.py
  assert train_tables.of_newest_run([{"error": "x"}, {"a": 1}]) == [{"error": "x"}, {"a": 1}]


def test_heading_has_no_local_paths(tmp_path, monkeypatch):
  """The heading of a section has no files of this machine."""
  monkeypatch.setattr(page, "OUT", str(tmp_path))
  monkeypatch.setattr(
    sys, "argv", ["x.py", "--rows", "8", "--caches", "/here/it/is", "--trace", "--model", "gpt2"]
  )
  page.put("a table", "benchmarks/x.py", "| 1 |", H100)
  (line,) = lines(tmp_path / "results.jsonl")
  assert (
    line["command"] == "benchmarks/x.py --rows 8 --trace --model gpt2" and line["device"] == H100
  )
  text = page.with_sections("head\n", [line, line | {"text": "| 2 |"}])
  assert (
    text.startswith("head\n\n## A table: `python benchmarks/x.py --rows 8")
    and "| 1 |" not in text
    and "| 2 |" in text
  )
