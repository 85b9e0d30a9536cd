"""A long run leaks nothing: memory, files and threads after 2,000 steps are those after 500."""

import os
import sys
import threading
from pathlib import Path

import preloaded
import processes
import pytest

WATCHED = """
import sys
sys.path.insert(0, {tests!r})
import test_soak
test_soak.watch()
"""
STEPS, EVERY = 2000, 20


def watch() -> None:
  """Runs jaxft.train and writes a line every `EVERY` steps, right after a save.

  It has the step, resident KiB, open files and threads.
  """
  from jaxft import train
  from jaxft.checkpoint.manager import CheckpointManager

  wait, seen = CheckpointManager.wait, {"calls": 0}

  def waited(self):
    wait(self)
    seen["calls"] += 1
    if seen["calls"] % EVERY == 0:
      resident = (
        int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
      )
      now = (seen["calls"], resident, len(os.listdir("/proc/self/fd")), threading.active_count())
      print("watched", *now, file=sys.stderr, flush=True)

  CheckpointManager.wait = waited
  sys.argv[0] = "jaxft.train"
  train.main()


@pytest.mark.slow
@pytest.mark.wide
def test_memory_does_not_grow_over_2000_steps(config_file, tmp_path, record_property):
  """They take no more than five hundred, nor more files or threads."""
  settings = {"steps": STEPS, "save_every": EVERY, "eval_every": 100, "log_every": 20}
  flags = [f"--config.train.{name}={value}" for name, value in settings.items()]
  code = WATCHED.format(tests=str(processes.ROOT / "tests" / "support"))
  done = preloaded.run(
    ["-c", code, "--config", config_file, "--workdir", tmp_path / "run", *flags],
    capture_output=True,
    text=True,
    timeout=1500,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  seen = [
    tuple(map(int, line.split()[1:]))
    for line in done.stderr.splitlines()
    if line.startswith("watched")
  ]
  late = [it for it in seen if it[0] >= 500]
  assert len(late) > 70
  growth = max(it[1] for it in late) / late[0][1] - 1
  files, threads = ([it[i] for it in late] for i in (2, 3))
  print(
    f"growth {100 * growth:.2f} %, files {min(files)} to {max(files)}, "
    f"threads {min(threads)} to {max(threads)}"
  )
  assert growth < 0.02
  assert files[-1] <= files[0] and threads[-1] <= threads[0]
  figures = {"growth of memory after step 500, %": round(100 * growth, 2), "open files": max(files)}
  record_property(
    "torture",
    {"what": "2,000 steps, a save every 20, an eval every 100", "tried": 1, "figures": figures},
  )
