"""The search for settings that fit, with a fake compiler: what it takes, rules out and reports."""

import pytest
from test_planner import published

import jaxft.config
from jaxft.hardware import specs
from jaxft.plan import planner, rendering, search


def fake_plan(needs):
  """A compiler whose programs need what `needs` says of a config."""
  compiled = []

  def compile_plan(config):
    compiled.append(config)
    return {
      "peak_bytes": int(needs(config)),
      "host_bytes": 0,
      "step_seconds_estimate": None,
      "accumulation_steps": 1,
    }

  return compile_plan, compiled


def test_search_finds_fitting_settings_and_reasons():
  """It finds what fits, and gives the reason why the others lost."""
  config = published("gpt2-large", train__batch_size=8, data__sequence_length=1024)
  target = specs.parse_device("rtx4090")
  cfg, GIB = planner.resolve_model_config(config), 2**30
  needs = {"none": 60, "dots": 30, "full": 20}
  compile_plan, compiled = fake_plan(
    lambda c: needs[c.memory.remat] * GIB + c.train.micro_batch_size
  )
  advice = search.find_settings(config, cfg, target, compile_plan)
  assert advice["best"] and all(
    "--config.memory.remat=full" in it["overrides"] for it in advice["best"]
  )
  assert all(
    it["peak_bytes"] <= advice["room_bytes"] < target.usable_bytes for it in advice["best"]
  )
  assert all("does not fit: " in it["why"] for it in advice["lost"])
  assert len(compiled) <= search.MAX_COMPILES
  count = len(advice["best"]) + len(advice["lost"])
  assert count == len(compiled)
  assert count + sum(advice["not_compiled"].values()) == advice["candidates"]
  # What is to be pasted is what was compiled.
  for it in advice["best"]:
    changed = config.replace(it["settings"])
    assert search.overrides(changed, it["settings"], target.count) == []
    assert jaxft.config.from_json(jaxft.config.to_json(changed)) == changed


@pytest.mark.parametrize(
  "limit, most, compiles, why",
  [
    ("MAX_COMPILES", 1, 1, "the search ended after 1 compiles"),
    ("MAX_SECONDS", 0, 0, "the search ended after 0 s"),
  ],
)
@pytest.mark.parametrize("needs", [1, 60])
def test_search_budget_is_reported(monkeypatch, limit, most, compiles, why, needs):
  """A search that its budget ends early reports that."""
  monkeypatch.setattr(search, limit, most)
  config = published("gpt2-large", train__batch_size=8, data__sequence_length=1024)
  target = specs.parse_device("rtx4090")
  compile_plan, compiled = fake_plan(lambda c: needs * 2**30)
  advice = search.find_settings(config, planner.resolve_model_config(config), target, compile_plan)
  assert len(compiled) == compiles == len(advice["best"]) + len(advice["lost"])
  assert advice["ended_early"] == why and "estimated to be slower" not in advice["not_compiled"]
  assert compiles + sum(advice["not_compiled"].values()) == advice["candidates"]
  assert advice["not_compiled"][why] > 0
  lines = rendering.rejection_lines({"advice": advice})
  assert f"{advice['not_compiled'][why]} not compiled: {why}" in lines
  assert not any("no settings fit" in line for line in lines)
  assert not any("state alone take" in line for line in lines)
  found_none = any(line.endswith(f"but {why}: others may fit") for line in lines)
  assert found_none == (not advice["best"])


def test_search_skips_compiles_if_state_is_too_large(monkeypatch):
  """Nothing is compiled where weights, gradient and optimizer state alone are too large."""
  monkeypatch.setitem(search.SEARCH_SPACE, "memory.offload", ("none",))
  config = published("EleutherAI/gpt-j-6b", train__batch_size=8, data__sequence_length=2048)
  compile_plan, compiled = fake_plan(lambda c: 0)
  advice = search.find_settings(
    config, planner.resolve_model_config(config), specs.parse_device("t4"), compile_plan
  )
  assert not compiled and not advice["best"] and advice["ended_early"] is None
  last = rendering.rejection_lines({"advice": advice})[-1]
  assert "no settings fit" in last
  assert "weights, gradient and optimizer state alone take" in last
  usable = specs.parse_device("t4").usable_bytes
  assert advice["least_state_bytes"] > 16 * 6.05e9 > usable  # weights, gradient, two moments
