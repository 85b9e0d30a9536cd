"""GPT-2 XL, 1.5 billion parameters, in and out of eight devices: memory, and every byte."""

import json
import math
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

MIB = 2**20
SCRIPT = """
import resource, sys
# Not part of an installation: where tests have it, transformers imports it, which takes 200 MB.
sys.modules["torch"] = None
import jax
jax.config.update("jax_num_cpu_devices", 8)
from pathlib import Path
from jaxft import config
from jaxft.hf import export, load_weights, repo
from jaxft.model.compute import ComputeConfig
from jaxft.model.decoder import abstract_model
from jaxft.sharding import rules
from jaxft.sharding.mesh import make_mesh

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
checkpoint = repo.resolve(sys.argv[1])
mesh = make_mesh(config.default().mesh)
_, shapes, axes = abstract_model(checkpoint.cfg, ComputeConfig())
shardings = rules.tree_shardings("parameters", shapes, axes, mesh)
params = jax.block_until_ready(load_weights.load_params(checkpoint, shapes, shardings))
print(peak())
out = Path(sys.argv[2])
export.export_model(out, params, checkpoint, dtype="bfloat16", max_shard_size="900MB")
print(peak())
"""


@pytest.mark.wide
def test_gpt2_xl_export_round_trip_on_8_devices(tmp_path):
  """GPT-2 XL is loaded onto eight devices and exported again: memory, and every byte."""
  shapes = tiny.gpt2_shapes(V=50257, P=1024, D=1600, F=6400, L=48)
  folder = tiny.write_gpt2(tmp_path / "tiny", seed=0).rename(tmp_path / "xl")
  (folder / "model.safetensors").unlink()
  config = json.loads((folder / "config.json").read_text())
  config |= dict(
    vocab_size=50257, n_positions=1024, n_embd=1600, n_inner=6400, n_layer=48, n_head=25
  )
  (folder / "config.json").write_text(json.dumps(config))
  noise = (
    np.random.default_rng(0)
    .standard_normal(50257 * 1600 + 10**6, np.float32)
    .astype(ml_dtypes.bfloat16)
  )
  index = {}
  for part, names in enumerate(np.array_split(list(shapes), 5)):
    file = f"model-{part}.safetensors"
    save_file(  # another piece of the noise for each, so that no two tensors are alike
      {
        name: noise[i * 997 : i * 997 + math.prod(shapes[name])].reshape(shapes[name])
        for i, name in enumerate(names)
      },
      folder / file,
    )
    index |= {str(name): file for name in names}
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))

  done = subprocess.run(
    [sys.executable, "-c", SCRIPT, folder, tmp_path / "out"],
    capture_output=True,
    text=True,
    env=os.environ | {"MALLOC_ARENA_MAX": "2"},
  )
  assert done.returncode == 0, done.stderr
  loaded, exported = map(int, done.stdout.split())
  own, largest = 4 * 1_557_611_200, 4 * 50257 * 1600
  print(f"weights {own / MIB:,.0f} MiB, peak after load {loaded / MIB:,.0f} MiB")
  print(f"peak after export {exported / MIB:,.0f} MiB")
  assert loaded < own + largest + 300 * MIB and exported < own + largest + 300 * MIB
  written = {file.name for file in (tmp_path / "out").glob("model-*.safetensors")}
  assert len(written) > 3
  weight_map = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())[
    "weight_map"
  ]
  assert weight_map.keys() == shapes.keys()
  from jaxft.hf import load_weights

  before, after = load_weights.list_tensors(folder), load_weights.list_tensors(tmp_path / "out")
  for name in shapes:
    np.testing.assert_array_equal(
      before[name].view().view(np.uint16), after[name].view().view(np.uint16)
    )
