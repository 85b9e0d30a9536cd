"""Packed examples do not see each other or padding, and have the loss of one example per row."""

import jax
import numpy as np
import pytest
from flax import nnx

import jaxft.model.decoder
from jaxft.data import tokenize
from jaxft.data.packing import PackedDataset
from jaxft.hf import model_config
from jaxft.model.compute import ComputeConfig
from jaxft.model.loss import cross_entropy_sum

T, EOS = 24, 0
CONFIGS = {
  "gpt2": dict(n_positions=31, n_embd=20, n_layer=2, n_head=2),
  "gpt_neo": dict(
    max_position_embeddings=31,
    hidden_size=20,
    num_layers=2,
    num_heads=2,
    attention_types=[[["global", "local"], 1]],
    window_size=3,
  ),
  "gptj": dict(n_positions=31, n_embd=20, n_layer=2, n_head=2, rotary_dim=4),
}


@pytest.fixture(params=CONFIGS, scope="module")
def decoder(request):
  cfg = model_config.from_hf_config(
    {"model_type": request.param, "vocab_size": 97} | CONFIGS[request.param]
  ).with_dropout(0.0)
  graph, _, _ = jaxft.model.decoder.abstract_model(cfg, ComputeConfig())
  params = nnx.to_pure_dict(nnx.state(jaxft.model.decoder.init_model(cfg, ComputeConfig())))
  noise = np.random.default_rng(0)
  return graph, jax.tree.map(
    lambda p: p + 0.2 * noise.standard_normal(p.shape).astype(np.float32), params
  )


def stored(lengths, seed=0):
  """Random examples; every second one has a prompt."""
  rng, ends = np.random.default_rng(seed), np.cumsum([0, *lengths])
  prompts = np.array([length // 2 if i % 2 else 0 for i, length in enumerate(lengths)], np.int32)
  ids = rng.integers(1, 97, ends[-1]).astype(np.uint16)
  ids[ends[1:] - 1] = EOS
  return tokenize.TokenArrays(ids, ends, prompts, np.zeros(0), np.zeros(0))


def batch(rows):
  picked = [rows[i] for i in range(len(rows))]
  return {name: np.stack([row[name] for row in picked]) for name in picked[0]}


def hidden_states(net, part):
  optional = {f"{name}_BT": part[name] for name in ("segments", "positions") if name in part}
  return net(part["ids"], **optional)[0]


def loss_and_gradient(decoder, part):
  graph, params = decoder

  @jax.jit
  def run(params):
    def loss(params):
      net = nnx.merge(graph, params)
      return (
        cross_entropy_sum(hidden_states(net, part), net.head(), part["targets"], part["mask"])
        / part["mask"].sum()
      )

    return jax.value_and_grad(loss)(params)

  return run(params)


def relative_difference(ours, theirs):
  """|a - b| / |b| of two gradients, in the Euclidean norm over all of their numbers."""
  norm = lambda tree: np.sqrt(
    sum(float(np.square(leaf, dtype=np.float64).sum()) for leaf in jax.tree.leaves(tree))
  )
  return norm(jax.tree.map(np.subtract, ours, theirs)) / norm(theirs)


@pytest.mark.slow_for("gptj", "gpt2")
def test_packed_loss_and_grads_match_single_rows(decoder):
  examples = stored([5, 9, 3, 11, 24, 2, 7, 8, 13, 4])
  packed, single = (batch(PackedDataset(examples, T, EOS, pack=pack)) for pack in (True, False))
  assert len(packed["ids"]) < len(single["ids"]) and packed["mask"].sum() == single["mask"].sum()
  (loss, gradient), (expected, expected_gradient) = (
    loss_and_gradient(decoder, part) for part in (packed, single)
  )
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  assert relative_difference(gradient, expected_gradient) < 1e-6
  # Each leaf alone: the smallest of them are sums in which most of the digits cancel.
  for ours, theirs in zip(
    jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True
  ):
    assert relative_difference(ours, theirs) < 3e-6


def test_packed_examples_do_not_attend_across(decoder):
  """An example changes only its own logits."""
  graph, params = decoder
  row = batch(PackedDataset(stored([6, 7, 8]), T, EOS, pack=True))
  segments = row["segments"][0]
  net = nnx.merge(graph, params)
  logits = jax.jit(lambda ids: net.logits(hidden_states(net, row | {"ids": ids})))
  before = np.asarray(logits(row["ids"]))
  for segment in set(segments) - {0}:
    changed = np.where(row["segments"] == segment, (row["ids"] + 1) % 97, row["ids"])
    after = np.asarray(logits(changed))
    np.testing.assert_array_equal(before[0, segments != segment], after[0, segments != segment])
    assert (before[0, segments == segment] != after[0, segments == segment]).any()


@pytest.mark.slow_for("gptj", "gpt2")
@pytest.mark.parametrize("pack", [True, False])
def test_padding_content_does_not_change_loss(decoder, pack):
  row = batch(PackedDataset(stored([5, 9, 3]), T, EOS, pack=pack))
  used = row["segments"] > 0 if pack else np.cumsum(row["mask"][:, ::-1], 1)[:, ::-1] > 0
  other = row | {name: np.where(used, row[name], 55) for name in ("ids", "targets")}
  assert (other["ids"] != row["ids"]).any()
  (loss, gradient), (expected, expected_gradient) = (
    loss_and_gradient(decoder, part) for part in (other, row)
  )
  assert loss == expected
  jax.tree.map(np.testing.assert_array_equal, gradient, expected_gradient)


def test_packed_positions_restart_per_segment():
  """Positions restart, and long texts are split into spans."""
  rows = PackedDataset(stored([30, 4, 50]), T, EOS, pack=True)
  assert rows.stats.overlong == 2 and not rows.stats.dropped
  learned, ids = [], []
  for i in range(len(rows)):
    row = rows[i]
    for segment in set(row["segments"]) - {0}:
      here = row["segments"] == segment
      np.testing.assert_array_equal(row["positions"][here], np.arange(here.sum()))
    learned += row["targets"][row["mask"]].tolist()
    ids += row["ids"][row["segments"] > 0].tolist()
  examples = rows.tokens
  expected = [
    t
    for i in range(3)
    for t in examples.ids[examples.starts_N1[i] + examples.prompts_N[i] : examples.starts_N1[i + 1]]
  ]
  assert sorted(learned) == sorted(expected)
