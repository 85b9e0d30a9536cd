"""Train, and record the rows that each device of this process gets.

python tests/support/noted_batches.py FILE [arguments of jaxft.train] writes {"step/name/index in
the batch": SHA-256 of the row's bytes}.
"""

import hashlib
import json
import runpy
import sys
from pathlib import Path

from jaxft.data import loader


def noted(batches, file: Path):
  rows = {}
  for step, batch in enumerate(batches, 1):
    for name, array in batch.items():
      for shard in array.addressable_shards:
        first = shard.index[1].start or 0
        for a, b in (
          (a, b) for a in range(shard.data.shape[0]) for b in range(shard.data.shape[1])
        ):
          index = a * array.shape[1] + first + b  # the same with and without accumulation
          digest = hashlib.sha256(bytes(shard.data[a, b])).hexdigest()
          # its copies on other devices
          assert rows.setdefault(f"{step}/{name}/{index}", digest) == digest
    file.write_text(json.dumps(rows))
    yield batch


if __name__ == "__main__":
  file, *arguments = sys.argv[1:]
  original = loader.train_batches
  loader.train_batches = lambda *args, **how: noted(original(*args, **how), Path(file))
  sys.argv = ["jaxft.train", *arguments]
  runpy.run_module("jaxft.train", run_name="__main__", alter_sys=True)
