"""GPT-2, GPT-Neo and GPT-J against transformers: logits, gradients, training, bytes, text."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxft.config
import jaxft.model.decoder
from jaxft.generation.sampler import Generator
from jaxft.generation.sampling_config import Sampling
from jaxft.hf import export, export_tensors, load_weights, model_config, repo, verify
from jaxft.hf.known_models import PUBLISHED
from jaxft.model.compute import ComputeConfig
from jaxft.model.loss import cross_entropy_sum
from jaxft.sharding.mesh import make_mesh
from jaxft.training.build import build_train_program
from jaxft.training.train_state import TrainState

torch = pytest.importorskip("torch", reason="parity is measured where torch is installed")
transformers = pytest.importorskip("transformers")
HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
NO_DROPOUT = {
  name: 0.0
  for name in (
    "embd_pdrop",
    "attn_pdrop",
    "resid_pdrop",
    "embed_dropout",
    "attention_dropout",
    "resid_dropout",
  )
}

# Three odd shapes a family: widths and lengths that distinguish axes, windows shorter than the
# text, few rotated dimensions.
GPT2 = [
  dict(vocab_size=97, n_positions=607, n_embd=42, n_head=3, n_inner=53, n_layer=3),
  dict(
    vocab_size=53,
    n_positions=613,
    n_embd=26,
    n_head=2,
    n_inner=None,
    n_layer=2,
    layer_norm_epsilon=1e-4,
  ),
  dict(vocab_size=131, n_positions=601, n_embd=35, n_head=5, n_inner=17, n_layer=5),
]
GPT_NEO = [
  dict(
    vocab_size=97,
    max_position_embeddings=607,
    hidden_size=42,
    num_heads=3,
    intermediate_size=53,
    num_layers=4,
    attention_types=[[["global", "local"], 2]],
    window_size=256,
  ),
  dict(
    vocab_size=53,
    max_position_embeddings=613,
    hidden_size=26,
    num_heads=2,
    intermediate_size=None,
    num_layers=3,
    attention_types=[[["local", "global", "local"], 1]],
    window_size=17,
  ),
  dict(
    vocab_size=131,
    max_position_embeddings=601,
    hidden_size=35,
    num_heads=5,
    intermediate_size=19,
    num_layers=2,
    attention_types=[[["global"], 2]],
    window_size=5,
  ),
]
GPTJ = [
  dict(vocab_size=97, n_positions=607, n_embd=44, n_head=2, n_inner=53, n_layer=3, rotary_dim=6),
  dict(vocab_size=53, n_positions=613, n_embd=26, n_head=1, n_inner=None, n_layer=2, rotary_dim=26),
  dict(vocab_size=131, n_positions=601, n_embd=42, n_head=3, n_inner=17, n_layer=4, rotary_dim=2),
]
CLASSES = {
  "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
  "gpt_neo": (transformers.GPTNeoConfig, transformers.GPTNeoForCausalLM),
  "gptj": (transformers.GPTJConfig, transformers.GPTJForCausalLM),
}
PUBLISHED_TIED = {"gpt2": True, "gpt_neo": True, "gptj": False}
CASES = [
  pytest.param(
    (family, sizes, tied),
    id=f"{family}-{i}-{'tied' if tied else 'untied'}",
    marks=[pytest.mark.wide] * (i > 0) + [pytest.mark.slow] * (tied != PUBLISHED_TIED[family]),
  )
  for family, all_sizes in (("gpt2", GPT2), ("gpt_neo", GPT_NEO), ("gptj", GPTJ))
  for i, sizes in enumerate(all_sizes)
  for tied in (True, False)
]


@pytest.fixture(params=CASES, scope="module")
def family_case(request, tmp_path_factory):
  """Their model, its folder, our checkpoint and weights: all random, biases and norms too."""
  family, sizes, tied = request.param
  config_class, model_class = CLASSES[family]
  known = config_class().to_dict().keys()
  config = config_class(
    **sizes,
    tie_word_embeddings=tied,
    bos_token_id=0,
    eos_token_id=0,
    **{name: 0.0 for name in NO_DROPOUT.keys() & known},
  )
  torch.manual_seed(0)
  theirs = model_class._from_config(config, attn_implementation="eager").eval()
  for name, parameter in theirs.named_parameters():
    torch.nn.init.normal_(parameter, mean=float("ln_" in name and name.endswith("weight")), std=0.2)
  theirs.tie_weights()
  folder = tmp_path_factory.mktemp("models") / "m"
  theirs.save_pretrained(folder)
  checkpoint = repo.resolve(str(folder))
  graph, shapes, _ = jaxft.model.decoder.abstract_model(checkpoint.cfg, ComputeConfig())
  return (
    theirs,
    folder,
    checkpoint,
    graph,
    load_weights.load_params(checkpoint, shapes, jax.tree.map(lambda _: HERE, shapes)),
  )


def ids_for(checkpoint, B, T, seed=0):
  return np.random.default_rng(seed).integers(checkpoint.cfg.V, size=(B, T)).astype(np.int32)


def relative_error(ours, theirs):
  return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("T", [1, 37, 600])
def test_logits_match_transformers(family_case, T):
  theirs, _, checkpoint, graph, params = family_case
  ids = ids_for(checkpoint, 2, T)
  with torch.no_grad():
    expected = theirs(torch.from_numpy(ids).long()).logits.numpy()
  assert relative_error(verify.compute_logits(graph, params, ids), expected) < 1e-5


def test_logits_match_with_left_and_right_padding(family_case):
  theirs, _, checkpoint, graph, params = family_case
  ids, real = ids_for(checkpoint, 2, 41), np.ones((2, 41), np.int32)
  real[0, :13], real[1, 29:] = 0, 0
  positions = np.maximum(real.cumsum(1) - 1, 0).astype(np.int32)
  with torch.no_grad():
    expected = theirs(
      torch.from_numpy(ids).long(),
      attention_mask=torch.from_numpy(real),
      position_ids=torch.from_numpy(positions).long(),
    ).logits.numpy()
  decoder = nnx.merge(graph, params)
  ours = np.asarray(decoder.logits(decoder(ids, segments_BT=real, positions_BT=positions)[0]))
  assert relative_error(ours[real == 1], expected[real == 1]) < 1e-5


def grads_by_name(grads, checkpoint):
  return {tensor.name: tensor.to_numpy() for tensor in export_tensors.hf_tensors(grads, checkpoint)}


def test_loss_and_all_gradients_match_torch(family_case):
  theirs, _, checkpoint, graph, params = family_case
  ids = ids_for(checkpoint, 2, 300)
  theirs.zero_grad()
  expected = theirs(torch.from_numpy(ids).long(), labels=torch.from_numpy(ids).long()).loss
  expected.backward()

  def loss(params):
    decoder, mask = nnx.merge(graph, params), jnp.ones((2, 299), bool)
    hidden, _ = decoder(ids[:, :-1])
    return cross_entropy_sum(hidden, decoder.head(), ids[:, 1:], mask) / mask.sum()

  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  assert abs(value - expected.item()) < 1e-5 * expected.item()
  ours, named = grads_by_name(grads, checkpoint), dict(theirs.named_parameters())
  assert ours.keys() == named.keys()
  largest = max(p.grad.abs().max().item() for p in named.values())
  for name, grad in ours.items():
    # A key's bias moves no softmax: its gradient is zero but for rounding. In GPT-2 it is a part of
    # c_attn.bias, so no tensor is all rounding; zero is compared with 1e-6 of the largest gradient
    # all the same.
    assert np.abs(grad - named[name].grad.numpy()).max() < max(
      1e-4 * named[name].grad.abs().max().item(), 1e-6 * largest
    ), name


@pytest.mark.slow
@pytest.mark.wide_for("untied")
def test_ten_adamw_steps_match_torch(family_case):
  theirs, folder, checkpoint, graph, params = family_case
  theirs = type(theirs).from_pretrained(folder, attn_implementation="eager").train()
  config = jaxft.config.default()
  config.optim.update(learning_rate=1e-3, weight_decay=0.1, eps=1e-6)
  config.train.batch_size, config.mesh.fsdp = 2, 1
  row = {
    "ids": np.zeros(63, np.int32),
    "targets": np.zeros(63, np.int32),
    "mask": np.zeros(63, bool),
  }
  run = build_train_program(config, checkpoint.cfg, make_mesh(config.mesh), 10, row)
  params = load_weights.load_params(
    checkpoint, run.state.params, jax.tree.map(lambda leaf: leaf.sharding, run.state.params)
  )
  state = TrainState(step=jnp.int32(0), params=params, opt_state=run.tx.init(params))
  step = run.train_step
  # jaxft decays matrices and embeddings. In torch those are the parameters with two axes.
  groups = [
    {"params": [p for p in theirs.parameters() if p.ndim == 2], "weight_decay": 0.1},
    {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
  ]
  adamw = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-6)
  linear = transformers.get_linear_schedule_with_warmup(adamw, 0, 10)
  for i in range(10):
    ids = ids_for(checkpoint, 2, 64, seed=i)
    state, _ = step(
      state,
      {"ids": ids[None, :, :-1], "targets": ids[None, :, 1:], "mask": np.ones((1, 2, 63), bool)},
    )
    adamw.zero_grad()
    theirs(torch.from_numpy(ids).long(), labels=torch.from_numpy(ids).long()).loss.backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    adamw.step()
    linear.step()
  named = dict(theirs.named_parameters())
  for name, ours in grads_by_name(state.params, checkpoint).items():
    expected = named[name].detach().numpy()
    # less the keys' part: Adam divides its rounding by its own size
    if name.endswith("c_attn.bias"):
      D = checkpoint.cfg.D
      ours, expected = np.delete(ours, np.s_[D : 2 * D]), np.delete(expected, np.s_[D : 2 * D])
    assert np.abs(ours - expected).max() < 1e-4 * max(np.abs(expected).max(), 1), name


def test_export_round_trip_is_byte_identical(family_case, tmp_path):
  """transformers misses no weight in the export."""
  _, folder, checkpoint, _, params = family_case
  export.export_model(tmp_path / "out", params, checkpoint)
  before, after = (
    load_file(folder / "model.safetensors"),
    load_file(tmp_path / "out" / "model.safetensors"),
  )
  assert before.keys() == after.keys()
  assert all(before[name].tobytes() == after[name].tobytes() for name in before)
  again, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", output_loading_info=True
  )
  assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  assert again.config.tie_word_embeddings == checkpoint.cfg.tied


def test_export_preserves_dtype_per_tensor(family_case, tmp_path):
  _, folder, _, _, _ = family_case
  kinds = [np.dtype("float32"), np.dtype("float16"), load_weights.DTYPES["BF16"]]
  tensors = {
    name: t.astype(kinds[i % 3])
    for i, (name, t) in enumerate(load_file(folder / "model.safetensors").items())
  }
  source = shutil.copytree(folder, tmp_path / "in")
  save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
  checkpoint = repo.resolve(str(source))
  _, shapes, _ = jaxft.model.decoder.abstract_model(checkpoint.cfg, ComputeConfig())
  export.export_model(
    tmp_path / "out",
    load_weights.load_params(checkpoint, shapes, jax.tree.map(lambda _: HERE, shapes)),
    checkpoint,
    dtype="source",
  )
  after = load_weights.list_tensors(tmp_path / "out")
  for name, tensor in tensors.items():
    assert after[name].dtype == tensor.dtype and after[name].view().tobytes() == tensor.tobytes()


@pytest.mark.slow_for("float16", "20KB")
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_load_narrow_dtypes_single_and_sharded(family_case, tmp_path, dtype, shard_size):
  theirs, folder, *_ = family_case
  narrow = type(theirs).from_pretrained(folder, dtype=getattr(torch, dtype))
  narrow.save_pretrained(tmp_path / "in", max_shard_size=shard_size)
  checkpoint = repo.resolve(str(tmp_path / "in"))
  graph, shapes, _ = jaxft.model.decoder.abstract_model(checkpoint.cfg, ComputeConfig())
  params = load_weights.load_params(checkpoint, shapes, jax.tree.map(lambda _: HERE, shapes))
  wide = (
    type(theirs)
    .from_pretrained(tmp_path / "in", dtype=torch.float32, attn_implementation="eager")
    .eval()
  )
  ids = ids_for(checkpoint, 2, 300)
  with torch.no_grad():
    expected = wide(torch.from_numpy(ids).long()).logits.numpy()
  assert relative_error(verify.compute_logits(graph, params, ids), expected) < 1e-5
  export.export_model(
    tmp_path / "out", params, checkpoint, dtype="source", max_shard_size=shard_size
  )
  before, after = (
    load_weights.list_tensors(tmp_path / "in"),
    load_weights.list_tensors(tmp_path / "out"),
  )
  assert before.keys() == after.keys() and len(repo.weight_files(tmp_path / "in")) > (
    shard_size != "5GB"
  )
  for name in before:
    assert before[name].dtype == after[name].dtype == dtype
    assert before[name].view().tobytes() == after[name].view().tobytes()
  assert type(theirs).from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)


def test_config_json_round_trip(family_case, tmp_path):
  theirs, folder, checkpoint, _, params = family_case
  export.export_model(tmp_path / "out", params, checkpoint)
  before, after = (
    type(theirs.config).from_pretrained(path).to_dict() for path in (folder, tmp_path / "out")
  )
  # for llama.cpp's converter; transformers does not read it
  assert after.pop("n_ctx", None) in (None, checkpoint.cfg.P)
  assert before == after


@pytest.mark.slow_for("gpt2")
def test_greedy_decoding_matches_transformers(family_case):
  """64 tokens."""
  theirs, _, checkpoint, graph, params = family_case
  prompts = [ids_for(checkpoint, 1, n, seed=n)[0].tolist() for n in (5, 23, 1)]
  ours = Generator(graph, checkpoint.cfg, eos_token_id=-1)(
    params, prompts, Sampling(64, temperature=0)
  )
  for prompt, new in zip(prompts, ours):
    ids = torch.tensor([prompt])
    out = theirs.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      do_sample=False,
      max_new_tokens=64,
      pad_token_id=0,
      eos_token_id=-1,
    )
    assert new == out[0, len(prompt) :].tolist()


def test_local_attention_sees_exactly_its_window(family_case):
  theirs, _, checkpoint, graph, params = family_case
  if not any(checkpoint.cfg.windows):
    assert checkpoint.hf_config["model_type"] != "gpt_neo" or set(checkpoint.cfg.windows) == {0}
    return
  window = max(checkpoint.cfg.windows)
  q, k, v = np.random.default_rng(0).standard_normal((3, 1, 300, 2, 8), np.float32)
  from jaxft.model.attention import attention

  seen = jax.grad(lambda v: attention(q, k, v, scale=1.0, window=window)[0, -1].sum())(v)[0].any(
    (1, 2)
  )
  assert seen[-window:].all() and not seen[:-window].any()


# Parameter counts of the published models.
COUNTS = {
  "distilgpt2": 81_912_576,
  "gpt2": 124_439_808,
  "gpt2-medium": 354_823_168,
  "gpt2-large": 774_030_080,
  "gpt2-xl": 1_557_611_200,
  "EleutherAI/gpt-neo-125m": 125_198_592,
  "EleutherAI/gpt-neo-1.3B": 1_315_575_808,
  "EleutherAI/gpt-neo-2.7B": 2_651_307_520,
  "EleutherAI/gpt-j-6b": 6_050_882_784,
}


@pytest.mark.parametrize("size", COUNTS)
def test_published_sizes_have_exact_param_counts(size):
  """And the tensor names of the published checkpoints."""
  config_class, model_class = CLASSES[PUBLISHED[size]["model_type"]]
  checkpoint = repo.HFCheckpoint(
    None, PUBLISHED[size], model_config.from_hf_config(PUBLISHED[size])
  )
  _, shapes, _ = jaxft.model.decoder.abstract_model(checkpoint.cfg, ComputeConfig())
  with torch.device("meta"):
    theirs = model_class(config_class(**PUBLISHED[size]))
  assert (
    jaxft.model.decoder.parameter_count(checkpoint.cfg)
    == COUNTS[size]
    == sum(p.numel() for p in theirs.parameters())
  )
  ours = {tensor.name: tensor.shape for tensor in export_tensors.hf_tensors(shapes, checkpoint)}
  assert ours == {name: tuple(p.shape) for name, p in theirs.named_parameters()}
