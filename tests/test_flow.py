"""docs/architecture.md: the calls from the train loop to the forward pass are those of its list."""

import inspect
import re
import traceback
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxft.config
from jaxft.hf import model_config
from jaxft.hf.known_models import PUBLISHED
from jaxft.model.layers import Block
from jaxft.sharding.mesh import make_mesh
from jaxft.training.build import build_train_program

PACKAGE = Path(jaxft.config.__file__).parent
SECTION = (PACKAGE.parent / "docs" / "architecture.md").read_text().split("## From the loop")[1]
STEPS = re.findall(r"^-> (\w+) +(\S+\.py)", SECTION.split("## ")[0], re.MULTILINE)
MAX_HOPS = 4


def jaxft_calls(frame):
  """(function, file) of each function or method of jaxft on the stack, outermost first.

  Functions inside of a function are part of it.
  """
  calls = []
  for code in reversed([frame.f_code for frame, _ in traceback.walk_stack(frame)]):
    file = Path(code.co_filename)
    if file.is_relative_to(PACKAGE):
      name = code.co_qualname
      call = (name.split(".<locals>")[0], str(file.relative_to(PACKAGE)))
      calls += [call] if calls[-1:] != [call] else []
  return calls


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_train_step_reaches_a_block_in_four_calls(monkeypatch, remat, accumulation):
  stacks = []
  forward = Block.__call__

  def record(self, *args, **kwargs):
    stacks.append(jaxft_calls(inspect.currentframe().f_back))
    return forward(self, *args, **kwargs)

  monkeypatch.setattr(Block, "__call__", record)
  config = jaxft.config.default()
  config.mesh.fsdp = 1
  config.memory.remat = remat
  config.train.batch_size = 4
  config.train.micro_batch_size = 4 // accumulation
  T = config.data.sequence_length = 7
  row = {name: np.zeros(T, np.int32) for name in ("ids", "targets")} | {"mask": np.ones(T, bool)}
  cfg = model_config.from_hf_config(PUBLISHED["gpt2"] | {"n_embd": 14, "n_layer": 3, "n_head": 7})
  program = build_train_program(config, cfg, make_mesh(config.mesh), 1, row)
  jax.eval_shape(program.train_step.__wrapped__, program.state, program.batch)
  assert stacks
  for calls in stacks:
    functions = [(name.split(".")[0].removeprefix("make_"), file) for name, file in calls]
    # The last call, of the block itself, is the one that is recorded.
    assert [*functions, ("Block", "model/layers.py")] == STEPS
    assert len(STEPS) <= MAX_HOPS
