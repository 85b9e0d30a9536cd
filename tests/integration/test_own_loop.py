"""examples/own_loop.py: the loop that users copy gives what `finetune` gives; and `on_step`."""

import json
import runpy

import pages
import pytest
import tiny

import jaxft


@pytest.fixture(scope="module")
def short(folder, stories):
  c = tiny.config(folder, stories)
  c.train.steps, c.train.log_every = 5, 2
  return c


@pytest.fixture(scope="module")
def steps_of_finetune(short, tmp_path_factory):
  """What `on_step` gets, and the run."""
  steps = []
  workdir = tmp_path_factory.mktemp("run")
  run = jaxft.finetune(short, workdir, on_step=lambda *step: steps.append(step))
  return steps, run


def test_example_has_the_losses_and_export_of_finetune(short, steps_of_finetune, tmp_path):
  steps, run = steps_of_finetune
  example = runpy.run_path(str(pages.ROOT / "examples" / "own_loop.py"))
  losses = example["train"](short, str(tmp_path / "export"))
  assert losses == [metrics["loss"] for _, metrics in steps]
  weights = "model.safetensors"
  assert (tmp_path / "export" / weights).read_bytes() == (run.export / weights).read_bytes()
  assert len((pages.ROOT / "examples" / "own_loop.py").read_text().splitlines()) <= 60


def test_on_step_gets_each_step_once_in_order(steps_of_finetune):
  steps, run = steps_of_finetune
  assert [step for step, _ in steps] == [1, 2, 3, 4, 5]
  logged = {line["step"]: line for line in run.metrics if "train/loss" in line}
  assert logged.keys() == {2, 4, 5}
  for step, metrics in steps:
    assert metrics.keys() == {"loss", "grad_norm", "learning_rate", "tokens"}
    if step in logged:
      assert {f"train/{key}": value for key, value in metrics.items()} == {
        key: logged[step][key] for key in logged[step] if key.startswith("train/")
      }


def test_exception_of_on_step_ends_the_run_and_the_next_continues(config, tmp_path):
  config.train.steps, config.train.save_every = 5, 1
  steps = []

  def stop_at_three(step, metrics):
    steps.append(step)
    if len(steps) == 3:
      raise KeyError("the user's own")

  with pytest.raises(KeyError, match="the user's own"):
    jaxft.finetune(config, tmp_path / "run", on_step=stop_at_three)
  about = json.loads((tmp_path / "run" / "about.json").read_text())
  assert about["ending"]["exit_code"] and "the user's own" in about["ending"]["why"]
  jaxft.finetune(config, tmp_path / "run", on_step=stop_at_three)
  # Metrics are read one step late, so step 4 had begun; a save comes before the next step's.
  assert steps[:3] == [1, 2, 3] and steps[-2:] == [4, 5]
