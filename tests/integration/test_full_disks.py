"""Runs that find the disk full lose nothing, and end as undisturbed ones once there is room."""

import contextlib
import itertools
import random
import re
import shutil

import pytest
from interrupted import Interrupted, assert_same, same_bits, state, steps

WRITING = [
  "save begun",
  "arrays written",
  "checkpoint renamed",
  "file written, not renamed",
  "line of metrics",
]
WRITING += ["weights exported", "export about to be renamed", "tokens written"]


@pytest.fixture(scope="module")
def halfway(interruptible, shared):
  """The workdir of a run that was asked to stop after seven steps of twelve."""

  def make(home):
    run = Interrupted(interruptible, home / "run")
    code, said, _ = run.end(run.start("step logged", 7, "SIGTERM"))
    assert code == 75, said

  return shared("halfway", make) / "run"


@pytest.mark.parts(1, 100)
def test_full_disk_exits_with_code_4_and_loses_nothing(
  interruptible, undisturbed, halfway, tmp_path, part, record_property
):
  rng = random.Random(part)
  for number in itertools.count():
    run = Interrupted(interruptible, shutil.copytree(halfway, tmp_path / f"run{number}"))
    newest = max(steps(run.workdir))
    before = state(run.workdir, newest)
    if rng.random() < 0.5:
      process = run.start(rng.choice(WRITING), rng.choice([1, 2, 3]), "ENOSPC")
    else:
      process = run.start(largest_file=rng.choice([500, 3_000, 20_000, 60_000, 100_000]))
    code, said, _ = run.end(process)
    if newest in steps(run.workdir):  # newer ones may have replaced it
      assert same_bits(state(run.workdir, newest), before)
    assert max(steps(run.workdir), default=0) >= newest
    if code:
      break
    # What was left of the run did not come to that point, or wrote no such file.
    assert_same(run, undisturbed[0])
  assert code == 4 and re.search(r"error: .*/.*bytes", said), said
  code, said, _ = run.end(run.start())
  assert code == 0, said
  assert_same(run, undisturbed[0])
  record_property(
    "torture", {"what": "disk full: ENOSPC where files are written, RLIMIT_FSIZE", "tried": 1}
  )


@pytest.mark.slow
@pytest.mark.parts(1, 8)
def test_disk_filled_by_others_loses_nothing(
  interruptible, undisturbed, small_disk, part, record_property
):
  run = Interrupted(interruptible, small_disk / "run")
  process = run.start()
  for line in process.stdout:
    if line.startswith(f"step {1 + part}/"):
      break
  with (small_disk / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
    while ballast.write(bytes(4096)):
      pass
  code, said, _ = run.end(process)
  assert code == 4 and re.search(r"error: .*/.*bytes", said), said
  code, said, _ = run.end(run.start())
  assert code == 4 and re.search(r"bytes .*free", said), said
  (small_disk / "ballast").unlink()
  code, said, _ = run.end(run.start())
  assert code == 0, said
  assert_same(run, undisturbed[0])
  record_property(
    "torture", {"what": "disk full: a small tmpfs, filled during the run", "tried": 2}
  )
