"""The search for settings that fit, with a compiler whose answers are known: what it takes, leaves out, and says."""

import pytest
from test_plan import published

import jaxft.config
from jaxft.hardware import specs
from jaxft.plan import planner, rendering, search


def fake_plan(needs):
  """A compiler whose programs need what `needs` says of a config."""
  asked = []

  def of(config):
    asked.append(config)
    return {
      "peak_bytes": int(needs(config)),
      "host_bytes": 0,
      "step_seconds_estimate": None,
      "accumulation_steps": 1,
    }

  return of, asked


def test_the_search_finds_what_fits_and_says_why_the_rest_lost():
  config, target = (
    published("gpt2-large", train__batch_size=8, data__sequence_length=1024),
    specs.parse_device("rtx4090"),
  )
  cfg, GIB = planner.resolve_model_config(config), 2**30
  needs = {"none": 60, "dots": 30, "full": 20}
  of, asked = fake_plan(lambda c: needs[c.memory.remat] * GIB + c.train.micro_batch_size)
  advice = search.find_settings(config, cfg, target, of)
  assert advice["best"] and all(
    "--config.memory.remat=full" in it["overrides"] for it in advice["best"]
  )
  assert all(
    it["peak_bytes"] <= advice["room_bytes"] < target.usable_bytes for it in advice["best"]
  )
  assert (
    all("does not fit, by" in it["why"] for it in advice["lost"])
    and len(asked) <= search.MAX_COMPILES
  )
  compiled = len(advice["best"]) + len(advice["lost"])
  assert (
    compiled == len(asked)
    and compiled + sum(advice["not_compiled"].values()) == advice["candidates"]
  )
  # What is to be pasted is what was compiled.
  for it in advice["best"]:
    changed = search.with_settings(config, it["settings"])
    again = jaxft.config.from_json(jaxft.config.to_json(changed))
    assert search.overrides(changed, it["settings"], target.count) == [] and jaxft.config.flatten(
      again
    ) == jaxft.config.flatten(changed)


@pytest.mark.parametrize(
  "limit, most, compiles, why",
  [
    ("MAX_COMPILES", 1, 1, "the search ended after 1 compiles"),
    ("MAX_SECONDS", 0, 0, "the search ended after 0 s"),
  ],
)
@pytest.mark.parametrize("needs", [1, 60])
def test_a_search_that_is_cut_short_says_so(monkeypatch, limit, most, compiles, why, needs):
  monkeypatch.setattr(search, limit, most)
  config, target = (
    published("gpt2-large", train__batch_size=8, data__sequence_length=1024),
    specs.parse_device("rtx4090"),
  )
  of, asked = fake_plan(lambda c: needs * 2**30)
  advice = search.find_settings(config, planner.resolve_model_config(config), target, of)
  assert len(asked) == compiles == len(advice["best"]) + len(advice["lost"])
  assert advice["ended_early"] == why and "estimated to be slower" not in advice["not_compiled"]
  assert (
    compiles + sum(advice["not_compiled"].values()) == advice["candidates"]
    and advice["not_compiled"][why] > 0
  )
  said = rendering.rejection_lines({"advice": advice})
  assert f"{advice['not_compiled'][why]} not compiled: {why}" in said
  assert not any(
    "nothing of what was tried fits" in line or "state alone take" in line for line in said
  )
  assert any(line.endswith(f"before {why}; there may be one") for line in said) == (
    not advice["best"]
  )


def test_the_search_compiles_nothing_where_state_alone_is_too_large(monkeypatch):
  monkeypatch.setitem(search.SEARCH_SPACE, "memory.offload", ("none",))
  config = published("EleutherAI/gpt-j-6b", train__batch_size=8, data__sequence_length=2048)
  of, asked = fake_plan(lambda c: 0)
  advice = search.find_settings(
    config, planner.resolve_model_config(config), specs.parse_device("t4"), of
  )
  assert not asked and not advice["best"] and advice["ended_early"] is None
  assert "nothing of what was tried fits" in (
    last := rendering.rejection_lines({"advice": advice})[-1]
  )
  assert "weights, gradient and optimizer state alone take" in last
  assert (
    advice["least_state_bytes"] > 16 * 6.05e9 > specs.parse_device("t4").usable_bytes
  )  # weights, gradient, two moments
