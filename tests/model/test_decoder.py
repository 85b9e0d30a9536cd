"""The decoder: equal to transformers' GPT-2, and equal to itself however it is run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft.hf import load_weights, repo
from jaxft.model.compute import ComputeConfig
from jaxft.model.config import ModelConfig
from jaxft.model.decoder import abstract_model, init_model
from jaxft.model.dropout import dropout, per_row_keys
from jaxft.model.kv_cache import KVCache
from jaxft.model.loss import cross_entropy_sum

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion("strict"):
    yield


def load_tiny(folder, compute=None):
  checkpoint = repo.resolve(str(folder))
  graph, shapes, _ = abstract_model(checkpoint.cfg, compute or ComputeConfig())
  shardings = jax.tree.map(lambda _: HERE, shapes)
  return checkpoint.cfg, graph, load_weights.load_params(checkpoint, shapes, shardings)


def random_ids(cfg, B=3, T=None, seed=0):
  return np.random.default_rng(seed).integers(cfg.V, size=(B, T or cfg.P)).astype(np.int32)


def loss_of(graph, ids, **how):
  def loss(params):
    decoder = nnx.merge(graph, params)
    mask = jnp.ones((ids.shape[0], ids.shape[1] - 1), bool)
    return cross_entropy_sum(decoder(ids[:, :-1], **how)[0], decoder.head(), ids[:, 1:], mask)

  return loss


def assert_close(a, b, rtol):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max()), a, b
  )


@pytest.mark.slow
def test_logits_and_gradients_match_transformers(folder):
  torch = pytest.importorskip("torch", reason="parity is measured where torch is installed")
  transformers = pytest.importorskip("transformers")
  theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
  cfg, graph, params = load_tiny(folder)
  ids = random_ids(cfg)
  decoder = nnx.merge(graph, params)
  wanted = theirs(torch.from_numpy(ids).long()).logits
  np.testing.assert_allclose(decoder.logits(decoder(ids)[0]), wanted.detach().numpy(), atol=2e-5)

  targets = torch.from_numpy(ids[:, 1:]).long()
  torch.nn.functional.cross_entropy(
    wanted[:, :-1].reshape(-1, cfg.V), targets.reshape(-1), reduction="sum"
  ).backward()
  # Gradients have the shapes of weights, so the weight table names them too.
  from jaxft.hf.export_tensors import hf_tensors

  ours = jax.grad(loss_of(graph, ids))(params)
  theirs = dict(theirs.named_parameters())
  for tensor in hf_tensors(ours, repo.resolve(str(folder))):
    wanted = theirs.pop(tensor.name).grad.numpy()
    # Relative to the largest entry of the tensor. A key's bias moves no softmax: its own gradient
    # is rounding around zero, but in GPT-2 it is a part of c_attn.bias and measured by the whole.
    np.testing.assert_allclose(
      tensor.to_numpy(), wanted, atol=1e-4 * np.abs(wanted).max(), err_msg=tensor.name
    )
  assert set(theirs) <= {"lm_head.weight"}


def test_attention_is_causal(folder):
  """The gradient of one output: non-zero for positions up to it, exactly zero after it."""
  cfg, graph, params = load_tiny(folder)
  ids, t = random_ids(cfg, B=1), 31

  def one_output(positions):
    changed = params | {"embed": params["embed"] | {"positions": positions}}
    return nnx.merge(graph, changed)(ids)[0][0, t].sum()

  seen = np.abs(jax.grad(one_output)(params["embed"]["positions"])).sum(-1)
  assert (seen[: t + 1] > 0).all() and (seen[t + 1 :] == 0).all()


def test_layer_scan_matches_python_loop(folder):
  cfg, graph, params = load_tiny(folder)
  ids = random_ids(cfg)
  decoder = nnx.merge(graph, params)
  x = params["embed"]["tokens"][ids] + params["embed"]["positions"]
  for layer in range(cfg.L):
    block = jax.tree.map(lambda a, layer=layer: a[layer], decoder.blocks)
    info = decoder.layer_info().at(layer)
    x, _ = block(x, positions_BT=None, segments_BT=None, info=info, keys_B=None)
  # Values are around 1.
  np.testing.assert_allclose(decoder(ids)[0], decoder.norm(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("remat", [pytest.param("dots", marks=pytest.mark.slow), "full"])
def test_remat_does_not_change_gradients(folder, remat):
  cfg, graph, params = load_tiny(folder)
  _, again, _ = load_tiny(folder, ComputeConfig(remat=remat))
  ids, key = random_ids(cfg), jax.random.key(3)
  plain, rematted = (
    jax.value_and_grad(loss_of(g, ids, keys_B=per_row_keys(key, 0, len(ids))))
    for g in (graph, again)
  )
  # One to compute gelu, another to compute it again.
  activations = lambda f: str(jax.make_jaxpr(f)(params)).count("tanh")
  assert activations(rematted) > activations(plain)
  assert_close(jax.jit(rematted)(params), jax.jit(plain)(params), 1e-6)


def test_packed_segments_are_independent(folder):
  """Two texts in a row, each with its own segment and positions, do not see each other."""
  cfg, graph, params = load_tiny(folder)
  a, b = random_ids(cfg, 1, 13), random_ids(cfg, 1, 19, seed=1)
  decoder = jax.jit(nnx.merge(graph, params))
  row, segments = np.concatenate([a, b], 1), np.repeat([[1, 2]], (13, 19), 1).astype(np.int32)
  positions = np.concatenate([np.arange(13), np.arange(19)])[None]
  packed, _ = decoder(row, segments_BT=segments, positions_BT=positions)
  np.testing.assert_allclose(packed[:, 13:], decoder(b)[0], rtol=1e-5, atol=1e-5)
  other, _ = decoder(
    np.concatenate([a + 1, b], 1) % cfg.V, segments_BT=segments, positions_BT=positions
  )
  np.testing.assert_array_equal(other[:, 13:], packed[:, 13:])


def test_kv_cache_matches_full_forward(folder):
  cfg, graph, params = load_tiny(folder)
  ids, decoder = random_ids(cfg, 2, 23), nnx.merge(graph, params)
  cache, parts = KVCache.empty(cfg, 2, 64, jnp.float32), []
  for start, end in ((0, 11), (11, 12), (12, 23)):
    h, cache = decoder(ids[:, start:end], cache)
    parts.append(h)
  np.testing.assert_allclose(jnp.concatenate(parts, 1), decoder(ids)[0], rtol=1e-5, atol=1e-5)


def test_dropout_follows_key_and_keeps_mean(folder):
  cfg, _, params = load_tiny(folder)
  graph, _, _ = abstract_model(cfg.with_dropout(0.3), ComputeConfig())
  decoder, ids = nnx.merge(graph, params), random_ids(cfg)
  one, same, other = (
    decoder(ids, keys_B=per_row_keys(jax.random.key(seed), 0, len(ids)))[0] for seed in (1, 1, 2)
  )
  np.testing.assert_array_equal(one, same)
  assert not np.allclose(one, other) and not np.allclose(one, decoder(ids)[0])
  x = jnp.ones((400, 400))
  dropped = dropout(x, 0.3, per_row_keys(jax.random.key(0), 0, 400))
  assert abs(float(dropped.mean()) - 1) < 0.01 and abs(float((dropped == 0).mean()) - 0.3) < 0.01


def test_bfloat16_logits_are_near_float32(folder):
  cfg, graph, params = load_tiny(folder)
  half, _, _ = abstract_model(cfg, ComputeConfig(jnp.bfloat16))
  ids = random_ids(cfg)
  wide, narrow = nnx.merge(graph, params), nnx.merge(half, params)
  hidden, _ = narrow(ids)
  ours, theirs = narrow.logits(hidden), wide.logits(wide(ids)[0])
  assert hidden.dtype == jnp.bfloat16 and ours.dtype == jnp.float32
  assert float(jnp.abs(ours - theirs).mean()) < 0.05 * float(theirs.std())


def test_initialization_scales_match_gpt2():
  cfg = ModelConfig(
    V=1009,
    P=64,
    D=96,
    F=384,
    L=8,
    N=6,
    H=16,
    norm_eps=1e-5,
    embed_dropout=0,
    attention_dropout=0,
    residual_dropout=0,
    init_std=0.02,
    attention_scale=0.25,
  )
  params = nnx.to_pure_dict(nnx.state(init_model(cfg, ComputeConfig(), seed=1)))
  std = lambda a: float(np.std(a))
  assert std(params["embed"]["tokens"]) == pytest.approx(0.02, rel=0.02)
  assert std(params["blocks"]["mlp"]["up"]["kernel"]) == pytest.approx(0.02, rel=0.02)
  residual_std = 0.02 / 4  # 1 / sqrt(2 L)
  assert std(params["blocks"]["mlp"]["down"]["kernel"]) == pytest.approx(residual_std, rel=0.02)
  layers = params["blocks"]["mlp"]["up"]["kernel"]
  assert not np.allclose(layers[0], layers[1])
