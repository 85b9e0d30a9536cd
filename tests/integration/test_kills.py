"""Runs that are killed at random and aimed moments end as undisturbed ones, bit for bit."""

import itertools
import random
import shutil
import signal
import time

import fault_points
import pytest
from interrupted import SAVE_EVERY, Interrupted, assert_same


def kills_of(part):
  return 3 if part else 1  # `make test` runs part 0 alone


@pytest.mark.parts(2, 101)
def test_killed_runs_end_as_undisturbed_ones(
  interruptible, undisturbed, tmp_path, part, record_property
):
  rng, killed, places, lost, run = random.Random(part), 0, set(), [0], None
  wanted, lines = undisturbed
  names = map("run{}".format, itertools.count())
  while killed < kills_of(part):
    run = run or Interrupted(interruptible, tmp_path / next(names))
    if rng.random() < 0.5:
      place = rng.choice(list(fault_points.FAULT_POINTS))
      process = run.start(place, rng.choice([1, 1, 2, 3]), "SIGKILL")
    else:
      process, place = run.start(), None
      said = "".join(itertools.islice(process.stdout, rng.randrange(lines)))
      assert "Traceback" not in said and "damaged" not in said, said
      time.sleep(rng.expovariate(2))  # half a second, more or less
      process.kill()
    code, _, _ = run.end(process)
    assert code in (0, -signal.SIGKILL)
    if code == 0:
      assert place is None or not run.moment.exists(), place
      assert_same(run, wanted)
      run = None
      continue
    assert place is None or run.moment.exists(), place
    killed, places = killed + 1, places | {place}
    lost.append(run.lost_steps())
    assert lost[-1] <= SAVE_EVERY + 1, (place, lost)
  if run:
    code, said, _ = run.end(run.start())
    assert code == 0, said
    assert_same(run, wanted)
  figures = {
    "most steps lost": max(lost),
    "most places hit in a run of three": len(places - {None}),
  }
  record_property(
    "torture", {"what": "SIGKILL, half aimed, half at random", "tried": killed, "figures": figures}
  )
  shutil.rmtree(tmp_path)
