"""Print the extra memory of saving, verifying and restoring a state on the host, as JSON.

python tests/support/peak_of_saving.py FOLDER; the unit is the state's largest leaf.
"""

import gc
import json
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.checkpoint.checksums import checksums
from jaxft.checkpoint.manager import CheckpointManager
from jaxft.config import default
from jaxft.sharding.mesh import make_mesh

LEAVES, SHAPE = 3, (16, 2**15, 256)  # 512 MiB each


def resident_bytes() -> int:
  line = next(
    line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")
  )
  return int(line.split()[1]) * 1024


class Peak(threading.Thread):
  """The most memory while it runs, beside what there was before, in leaves."""

  def __enter__(self):
    gc.collect()
    self.before, self.most, self.over = resident_bytes(), 0, False
    self.start()
    return self

  def run(self):
    while not self.over:
      self.most = max(self.most, resident_bytes())
      time.sleep(0.005)

  def __exit__(self, *_):
    self.over = True
    self.join()
    self.leaves = (self.most - self.before) / (4 * np.prod(SHAPE))


def main(folder: Path) -> None:
  sharding = NamedSharding(make_mesh(default().mesh), PartitionSpec(), memory_kind="pinned_host")
  draw = lambda seed: np.random.default_rng(seed).random(SHAPE, np.float32)
  state = {
    str(i): jax.make_array_from_callback(SHAPE, sharding, draw(i).__getitem__)
    for i in range(LEAVES)
  }
  like = {name: jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=sharding) for name in state}
  wanted = checksums(state)
  checkpoints = CheckpointManager(folder, 1, writes=True, low_memory=True)
  with Peak() as save:  # and the first one is read back
    checkpoints.save(1, state, {})
  del state
  with Peak() as restore:
    found = checkpoints.restore(1, like)
  assert checksums(found) == wanted
  checkpoints.close()
  print(json.dumps({"save": save.leaves, "restore": restore.leaves - LEAVES}))


if __name__ == "__main__":
  main(Path(sys.argv[1]))
