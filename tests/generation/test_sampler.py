"""Generation: transformers' tokens, and no prompt is changed by its neighbours."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import generate, pretrained
from jaxft.errors import RequestError
from jaxft.generation import generation_config, layer_views, logits_processors, sampler
from jaxft.generation.sampling_config import Sampling
from jaxft.model.compute import ComputeConfig
from jaxft.model.decoder import abstract_model
from jaxft.sharding.mesh import make_mesh
from jaxft.sharding.rules import VOCAB_MULTIPLE

PROMPTS = [
  "Once upon a time",
  "The",
  "a cat and a dog ran to the big red house with small blue",
  "x",
]


@pytest.fixture(scope="module")
def ready(folder):
  return pretrained.load(folder)


@pytest.mark.slow
def test_greedy_decoding_matches_transformers(ready, folder):
  torch = pytest.importorskip("torch", reason="parity is measured where torch is installed")
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
  for completion in ready.generate(PROMPTS, temperature=0, max_new_tokens=40):
    ids = torch.tensor([ready.tokenizer(completion.prompt)["input_ids"]])
    out = theirs.generate(
      ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40, pad_token_id=0
    )
    wanted = out[0, ids.shape[1] :].tolist()
    assert completion.token_ids == (wanted[: wanted.index(0)] if 0 in wanted else wanted)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.wide)])
def test_inverse_layer_scaling_matches_transformers(devices, folder, tmp_path, monkeypatch):
  """Attention logits that are divided by the layer's index, on one device and on eight."""
  shutil.copytree(folder, tmp_path / "m")
  config = json.loads((tmp_path / "m" / "config.json").read_text()) | {
    "scale_attn_by_inverse_layer_idx": True
  }
  (tmp_path / "m" / "config.json").write_text(json.dumps(config))
  mesh_of = lambda sizes: make_mesh(sizes, jax.devices()[:devices])
  monkeypatch.setattr(pretrained, "make_mesh", mesh_of)
  model = pretrained.load(tmp_path / "m")
  assert model.mesh.size == devices
  test_greedy_decoding_matches_transformers(model, tmp_path / "m")


@pytest.mark.slow_for("sampling0")
@pytest.mark.parametrize(
  "sampling", [dict(temperature=0), dict(temperature=0.9, top_k=20, top_p=0.9, seed=5)]
)
def test_ragged_batch_matches_single_prompts(ready, sampling):
  together = ready.generate(PROMPTS, max_new_tokens=20, **sampling)
  alone = ready.generate([PROMPTS[0]], max_new_tokens=20, **sampling)
  assert together[0] == alone[0]
  padded = ready.generate([PROMPTS[0], "The house " * 5], max_new_tokens=5, **sampling)
  assert padded[0].token_ids == alone[0].token_ids[:5]


@pytest.mark.parametrize(
  "sampling",
  [
    pytest.param(dict(temperature=0), marks=pytest.mark.slow),
    dict(seed=5, top_k=0),
    dict(temperature=0, num_beams=3),
  ],
)
@pytest.mark.slow_for("sampling2")
def test_long_neighbour_does_not_limit_a_text(ready, sampling):
  """Of 71 positions a prompt of 60 tokens leaves room for 11 more, one of a few for all 40."""
  long = "the cat and " * 20
  while len(ready.tokenizer(long)["input_ids"]) > 60:
    long = long[:-1]
  together = ready.generate([PROMPTS[0], long], max_new_tokens=40, **sampling)
  assert together == [*ready.generate([PROMPTS[0]], max_new_tokens=40, **sampling), together[1]]
  if "seed" not in sampling:  # the second prompt draws with other keys than a first one
    assert together[1] == ready.generate([long], max_new_tokens=40, **sampling)[0]
  assert len(together[1].token_ids) <= 71 - len(ready.tokenizer(long)["input_ids"]) < 20


@pytest.mark.slow
def test_layer_views_match_sharded_generation(ready):
  """One device, which reads layers through views, writes what eight write."""
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  params = jax.device_put(ready.params, device)
  assert layer_views.unstack_layers(params["blocks"], ready.source.cfg.L)
  assert not layer_views.unstack_layers(ready.params["blocks"], 1)
  compute = ComputeConfig(vocab_multiple=VOCAB_MULTIPLE)
  graph, *_ = abstract_model(ready.source.cfg, compute)
  alone = sampler.Generator(graph, ready.source.cfg, ready.tokenizer.eos_token_id)
  prompts = [ready.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
  for sampling in (
    Sampling(20, temperature=0),
    Sampling(20, top_k=0, seed=3, num_return_sequences=2),
    Sampling(20, temperature=0, repetition_penalty=1.5, no_repeat_ngram_size=2),
    Sampling(20, temperature=0, num_beams=4, num_return_sequences=2),
  ):
    assert alone(params, prompts, sampling) == ready._generator(ready.params, prompts, sampling)
  assert alone._decode._cache_size() == 3  # rows of a prompt each, of two, of four


def test_temperature_near_zero_is_greedy(ready):
  cold = ready.generate(PROMPTS, max_new_tokens=5, temperature=1e-45, top_k=0)
  assert cold == ready.generate(PROMPTS, max_new_tokens=5, temperature=0)


def test_prompts_must_be_a_list_of_text(ready):
  with pytest.raises(RequestError, match="must be a list of texts"):
    ready.generate("abc")
  with pytest.raises(RequestError, match=r"prompt '\\udcff': not valid UTF-8 text"):
    ready.generate(["\udcff"])


def test_seed_determines_samples(ready):
  texts = [ready.generate(PROMPTS, seed=seed, max_new_tokens=20) for seed in (1, 1, 2)]
  assert texts[0] == texts[1] != texts[2]
  samples = ready.generate(["The"] * 4, max_new_tokens=20)
  assert len({tuple(completion.token_ids) for completion in samples}) == 4


def test_padded_prompts_share_compiled_programs(ready):
  ready.generate(["a"], max_new_tokens=3)
  before = ready._generator._prefill._cache_size(), ready._generator._decode._cache_size()
  for prompt in ("cat", "the dog", "a small blue door"):
    ready.generate([prompt], max_new_tokens=9)
  assert (ready._generator._prefill._cache_size(), ready._generator._decode._cache_size()) == before


def test_stops_at_end_token_and_last_position(ready):
  completion = ready.generate(["The"], max_new_tokens=500, top_k=0, temperature=2.0)[0]
  assert 0 not in completion.token_ids
  length = len(ready.tokenizer("The")["input_ids"])
  assert length + len(completion.token_ids) <= ready.source.cfg.P
  first = ready.generate(["The"], temperature=0)[0].token_ids[0]
  always_end = sampler.Generator(ready.graph, ready.source.cfg, eos_token_id=first)
  ids = ready.tokenizer("The")["input_ids"]
  assert always_end(ready.params, [ids], Sampling(temperature=0)) == [[]]


def test_top_k_top_p_min_p_match_transformers():
  torch = pytest.importorskip("torch", reason="transformers' processors are torch")
  from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

  logits = np.random.default_rng(0).standard_normal((1000, 97)).astype(np.float32) * 3
  cases = (
    (5, 1.0, 0.0),
    (0, 0.7, 0.0),
    (20, 0.5, 0.0),
    (1, 0.3, 0.0),
    (96, 0.999, 0.0),
    (0, 1.0, 0.1),
    (30, 0.9, 0.05),
  )
  for top_k, top_p, min_p in cases:
    wanted = torch.from_numpy(logits)
    if top_k:
      wanted = TopKLogitsWarper(top_k)(None, wanted)
    if top_p < 1:
      wanted = TopPLogitsWarper(top_p)(None, wanted)
    if min_p:
      wanted = MinPLogitsWarper(min_p)(None, wanted)
    ours = logits_processors.filter_logits(jnp.asarray(logits), top_k, top_p, min_p)
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(wanted.numpy()))


def test_repetition_processors_match_transformers():
  """1,000 left-padded rows of few different tokens, each against transformers on it alone."""
  torch = pytest.importorskip("torch", reason="transformers' processors are torch")
  from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

  B, S, V = 1000, 23, 11
  rng = np.random.default_rng(0)
  logits = rng.standard_normal((B, V)).astype(np.float32)
  ids = rng.integers(V, size=(B, S))
  lengths = rng.integers(1, S, B)
  end = S - 2
  valid = (np.arange(S) >= end - lengths[:, None]) & (np.arange(S) < end)
  history = logits_processors.History(jnp.asarray(ids), jnp.asarray(valid), jnp.int32(end))
  for n in (1, 2, 3, 4):
    ours = np.asarray(logits_processors.ban_repeated_ngrams(jnp.asarray(logits), history, n))
    for row in range(B):
      theirs = torch.from_numpy(ids[row : row + 1, max(0, end - lengths[row]) : end].copy())
      wanted = NoRepeatNGramLogitsProcessor(n)(theirs, torch.from_numpy(logits[row : row + 1]))
      np.testing.assert_array_equal(ours[row], wanted[0].numpy())
  for penalty in (0.7, 1.3):
    ours = np.asarray(logits_processors.penalize_repeats(jnp.asarray(logits), history, penalty))
    for row in range(B):
      theirs = torch.from_numpy(ids[row : row + 1, max(0, end - lengths[row]) : end].copy())
      wanted = RepetitionPenaltyLogitsProcessor(penalty)(
        theirs, torch.from_numpy(logits[row : row + 1].copy())
      )
      np.testing.assert_allclose(ours[row], wanted[0].numpy(), rtol=1e-6)


RULES = [
  dict(repetition_penalty=1.5),
  dict(no_repeat_ngram_size=2),
  dict(repetition_penalty=1.2, no_repeat_ngram_size=3),
]


@pytest.mark.slow_for("rules0", "rules1")
@pytest.mark.parametrize("rules", RULES)
def test_repetition_generation_matches_transformers(ready, folder, rules):
  """Alone and in a ragged batch."""
  torch = pytest.importorskip("torch", reason="parity is measured where torch is installed")
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
  together = ready.generate(PROMPTS, temperature=0, max_new_tokens=30, **rules)
  for completion in together:
    assert ready.generate([completion.prompt], temperature=0, max_new_tokens=30, **rules) == [
      completion
    ]
    ids = torch.tensor([ready.tokenizer(completion.prompt)["input_ids"]])
    how = dict(
      attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30, pad_token_id=0
    )
    wanted = theirs.generate(ids, **how, **rules)[0, ids.shape[1] :].tolist()
    assert completion.token_ids == (wanted[: wanted.index(0)] if 0 in wanted else wanted)


@pytest.mark.parametrize(
  "rules",
  [
    dict(max_length=40, min_length=25),
    dict(max_new_tokens=25, min_new_tokens=9),
    dict(max_new_tokens=25, min_new_tokens=1, min_length=25),  # which is of no account then
    dict(max_length=40, min_length=23, num_beams=3),
    dict(max_new_tokens=20, min_new_tokens=20, num_beams=2, repetition_penalty=1.3),
  ],
)
@pytest.mark.parametrize("end", [287, 68])  # both come early in some of the texts
@pytest.mark.slow_for("68", "rules2", "rules3", "rules4")
def test_length_limits_match_transformers(ready, folder, end, rules, monkeypatch):
  """Alone and in a ragged batch."""
  torch = pytest.importorskip("torch", reason="parity is measured where torch is installed")
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
  monkeypatch.setattr(
    ready, "_generator", sampler.Generator(ready.graph, ready.source.cfg, eos_token_id=end)
  )
  together, longer = ready.generate(PROMPTS, temperature=0, **rules), 0
  free = {name: value for name, value in rules.items() if not name.startswith("min_")}
  for found, without in zip(together, ready.generate(PROMPTS, temperature=0, **free), strict=True):
    assert ready.generate([found.prompt], temperature=0, **rules) == [found]
    ids = torch.tensor([ready.tokenizer(found.prompt)["input_ids"]])
    how = dict(
      attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, eos_token_id=end
    )
    wanted = theirs.generate(ids, **how, **rules)[0, ids.shape[1] :].tolist()
    assert found.token_ids == (wanted[: wanted.index(end)] if end in wanted else wanted)
    longer += len(found.token_ids) > len(without.token_ids)
  assert longer or rules.get("min_new_tokens") == 1


@pytest.mark.parametrize(
  "says, given",
  [
    (dict(max_length=20), {}),  # what was transformers' default is a limit where a file has it
    (dict(max_length=20, max_new_tokens=7), {}),
    (dict(max_length=20, min_length=12, min_new_tokens=2), dict(max_new_tokens=30)),
    (dict(min_length=12, max_length=40), dict(max_length=30, min_new_tokens=5)),
  ],
)
def test_generation_config_limits_match_transformers(
  ready, folder, says, given, monkeypatch, tmp_path
):
  torch = pytest.importorskip("torch", reason="parity is measured where torch is installed")
  transformers = pytest.importorskip("transformers")
  theirs, end = transformers.AutoModelForCausalLM.from_pretrained(folder), 287
  theirs.generation_config.update(**says)
  (tmp_path / generation_config.FILE_NAME).write_text(json.dumps(says))
  monkeypatch.setattr(ready, "source", ready.source._replace(folder=tmp_path))
  monkeypatch.setattr(
    ready, "_generator", sampler.Generator(ready.graph, ready.source.cfg, eos_token_id=end)
  )
  for prompt in PROMPTS[:2]:
    ids = torch.tensor([ready.tokenizer(prompt)["input_ids"]])
    how = dict(
      attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, eos_token_id=end
    )
    wanted = theirs.generate(ids, **how, **given)[0, ids.shape[1] :].tolist()
    (found,) = ready.generate([prompt], do_sample=False, **given)
    assert found.token_ids == (wanted[: wanted.index(end)] if end in wanted else wanted)


@pytest.mark.parametrize(
  "says, given, wanted, warnings",
  [
    (
      {},
      dict(max_length=30, max_new_tokens=5),
      dict(max_length=0, max_new_tokens=5),
      ["--max_length=30: ignored"],
    ),
    (
      {},
      dict(min_length=3, min_new_tokens=0),
      dict(min_length=0),
      ["--min_length=3: ignored, because --min_new_t"],
    ),
    (
      dict(max_length=20),
      dict(max_new_tokens=5),
      dict(max_length=0),
      ["max_length=20: ignored, because --max_new"],
    ),
    (
      dict(max_new_tokens=50),
      dict(max_length=20),
      dict(max_length=20),
      ["max_new_tokens=50: ignored, because --ma"],
    ),
    (
      dict(max_length=9, max_new_tokens=50),
      {},
      dict(max_length=0),
      ["max_length=9: ignored, because the file sets max_new_tokens"],
    ),
    (dict(max_length=20), dict(max_length=0), dict(max_length=0, max_new_tokens=100), []),
    (dict(max_new_tokens=7), dict(max_length=0), dict(max_new_tokens=7), []),
    (
      dict(min_length=0, max_length=20),
      dict(min_new_tokens=2),
      dict(min_new_tokens=2, max_length=20),
      [],
    ),
    (
      dict(do_sample=True),
      dict(do_sample=False, temperature=0.5),
      dict(temperature=0.0),
      ["--temperature=0.5: ignored"],
    ),
    (dict(do_sample=False, temperature=0.5), dict(do_sample=True), dict(temperature=0.5), []),
  ],
)
def test_overridden_limits_are_reported(tmp_path, says, given, wanted, warnings):
  """Of two settings for one limit one counts, and the other gets a warning."""
  (tmp_path / generation_config.FILE_NAME).write_text(json.dumps(says))
  found = generation_config.load(tmp_path, given)
  assert {name: getattr(found.sampling, name) for name in wanted} == wanted
  pairs = list(zip(warnings, found.warnings, strict=True))
  assert all(text in line for text, line in pairs)


@pytest.mark.parametrize(
  "says, given, message",
  [
    (
      {},
      dict(max_length=4),
      r"prompt 2 has \d+ tokens, and --max_length=4 includes them; set --max_length=\d+ or more",
    ),
    (
      dict(max_length=4),
      {},
      r"prompt 2 .*--max_length=4 .*generation_config.json has max_length=4\)",
    ),
    ({}, dict(min_length=9, max_length=8), "--min_length=9: more than --max_length=8 allows"),
    (dict(max_length=8), dict(min_length=9), "--min_length=9: .*has max_length=8"),
    ({}, dict(min_new_tokens=101), "--min_new_tokens=101: more than --max_new_tokens=100 allows"),
    (
      {},
      dict(min_length=70, max_new_tokens=9),
      r"prompt 1 has 1 tokens: --min_length=70 needs 69 new ones, .*=9 allows only 9;",
    ),
    (
      {},
      dict(min_new_tokens=29, max_length=30),
      r"prompt 2 has \d+ tokens: --min_new_tokens=29 .*--max_length=30 allows",
    ),
    (
      {},
      dict(min_new_tokens=71),
      r"prompt 2 .*--min_new_tokens=71 needs 71 new ones, but the model's 71 positions allow",
    ),
    ({}, dict(do_sample=True, temperature=0), "--do_sample=True: --temperature=0"),
    (
      dict(temperature=0),
      dict(do_sample=True),
      r"--do_sample=True: --temperature=0.0 .*has temperature=0.0\)",
    ),
    ({}, dict(do_sample=True, num_beams=2), "--do_sample=True: --num_beams=2 is deterministic"),
    ({}, dict(max_length=-1), "--max_length=-1: must be 0"),
  ],
)
def test_impossible_length_limits_are_refused(ready, monkeypatch, tmp_path, says, given, message):
  (tmp_path / generation_config.FILE_NAME).write_text(json.dumps(says))
  monkeypatch.setattr(ready, "source", ready.source._replace(folder=tmp_path))
  with pytest.raises(RequestError, match=message):
    ready.generate(["a", "the cat and the dog"], **given)


@pytest.mark.parametrize("beams", [dict(num_beams=4), dict(num_beams=1)])
def test_min_length_delays_the_end_token(ready, monkeypatch, beams):
  generator = sampler.Generator(ready.graph, ready.source.cfg, eos_token_id=68)
  monkeypatch.setattr(ready, "_generator", generator)
  how = dict(temperature=0, max_new_tokens=12) | beams
  own = len(ready.tokenizer("The")["input_ids"])
  (free,) = ready.generate(["The"], **how)
  assert len(free.token_ids) < 6
  limits = (
    dict(min_new_tokens=6),
    dict(min_length=6 + own),
    dict(min_new_tokens=6, min_length=12 + own),
  )
  found = [ready.generate(["The"], **how, **limit)[0].token_ids for limit in limits]
  assert found[0] == found[1] == found[2] and len(found[0]) >= 6 and 68 not in found[0][:6]
  (found,) = ready.generate(["The"], **beams, temperature=0, min_length=6 + own, max_length=6 + own)
  assert len(found.token_ids) == 6


def test_min_length_rule_of_each_row():
  for sampling in (Sampling(9, min_length=5), Sampling(max_length=9, min_length=5)):
    prompts = [[1, 2, 3], [1], [1] * 6]
    buffer = sampler.SequenceBuffer.from_prompts(prompts, sampling, 71, 1)
    too_short = []
    for _ in range(5):
      too_short.append(buffer.min_length(frozenset({7})).too_short_B.tolist())
      buffer.append(np.zeros(3, np.int32))
    assert [sum(row) for row in zip(*too_short, strict=True)] == [2, 4, 0]
  assert buffer.max_new_B.tolist() == [6, 8, 3]


def test_only_min_length_recompiles(ready):
  count = sampler.sample_token._cache_size
  made = []
  for how in (
    dict(max_new_tokens=3),
    dict(max_length=9),
    dict(min_length=4, max_length=9),
    dict(min_new_tokens=5, max_new_tokens=9),
  ):
    ready.generate(["a cat"], **how)
    made.append(count())
  assert made[1] == made[0] and made[2] == made[0] + 1 and made[3] == made[2]


@pytest.mark.parametrize(
  "end, rules",  # 19 is the first token of one of them, 146 comes early, 0 late
  [
    (0, dict(num_beams=4)),
    (19, dict(num_beams=4, length_penalty=2.0)),
    (146, dict(num_beams=3, length_penalty=-1.0)),
    (19, dict(num_beams=2, no_repeat_ngram_size=2, repetition_penalty=1.3)),
  ],
)
@pytest.mark.slow_for("rules0", "rules2", "rules3")
def test_beam_search_matches_transformers(ready, folder, end, rules):
  """Alone and in a ragged batch."""
  torch = pytest.importorskip("torch", reason="parity is measured where torch is installed")
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
  generator = sampler.Generator(ready.graph, ready.source.cfg, eos_token_id=end)
  sampling = Sampling(max_new_tokens=20, temperature=0, **rules)
  prompts = [ready.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
  together = generator(ready.params, prompts, sampling)
  for prompt, found in zip(prompts, together, strict=True):
    assert generator(ready.params, [prompt], sampling) == [found]
    ids = torch.tensor([prompt])
    how = dict(
      attention_mask=torch.ones_like(ids),
      do_sample=False,
      max_new_tokens=20,
      pad_token_id=0,
      eos_token_id=end,
    )
    wanted = theirs.generate(ids, **how, **rules)[0, len(prompt) :].tolist()
    assert found == (wanted[: wanted.index(end)] if end in wanted else wanted)


def test_samples_follow_probabilities():
  logits = jnp.log(jnp.tile(jnp.array([0.5, 0.3, 0.2, 0.0]), (20000, 1)))
  keys = jax.random.split(jax.random.key(0), 20000)
  nothing = logits_processors.History(
    jnp.zeros((20000, 1), jnp.int32), jnp.zeros((20000, 1), bool), jnp.int32(0)
  )
  drawn = sampler.sample_token(
    logits, keys, jnp.int32(0), jnp.float32(1), nothing, Sampling(top_k=0)
  )
  drawn = np.bincount(drawn, minlength=4) / 20000
  np.testing.assert_allclose(drawn, [0.5, 0.3, 0.2, 0], atol=0.015)


@pytest.mark.parametrize(
  "wrong",
  [
    dict(temperature=-1),
    dict(top_p=0),
    dict(top_p=1.5),
    dict(top_k=-2),
    dict(min_p=1.5),
    dict(num_beams=0),
    dict(num_beams=2, temperature=1.0),
    dict(length_penalty=float("inf")),
    dict(repetition_penalty=0.0),
    dict(no_repeat_ngram_size=-1),
    dict(max_new_tokens=0),
    dict(seed=-1),
    dict(temperature=float("nan")),
  ],
)
def test_invalid_sampling_is_refused(ready, wrong):
  with pytest.raises(RequestError, match=f"--{next(iter(wrong))}="):
    ready.generate(["a"], **wrong)


def test_prompt_without_room_is_refused(ready):
  with pytest.raises(
    RequestError, match=r"prompt 2 has \d+ tokens, but the model has only 71 positions"
  ):
    ready.generate(["a", "cat dog " * 60])


@pytest.mark.slow
def test_num_return_sequences_are_independent(ready):
  """The first text of a prompt is that of one that has only one."""
  how = dict(max_new_tokens=12, seed=3)
  alone = ready.generate(PROMPTS, **how)
  three = ready.generate(PROMPTS, num_return_sequences=3, **how)
  assert [it.prompt for it in three] == [prompt for prompt in PROMPTS for _ in range(3)]
  assert [it.token_ids for it in three[::3]] == [it.token_ids for it in alone]
  assert len({tuple(it.token_ids) for it in three}) == len(three)
  assert three[:3] == ready.generate(PROMPTS[:1], num_return_sequences=3, **how)


def test_beam_search_return_sequences_match(ready, folder):
  torch = pytest.importorskip("torch", reason="parity is measured where torch is installed")
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
  found = ready.generate(
    PROMPTS[:2], temperature=0, num_beams=4, num_return_sequences=3, max_new_tokens=10
  )
  for i, prompt in enumerate(PROMPTS[:2]):
    ids = torch.tensor([ready.tokenizer(prompt)["input_ids"]])
    how = dict(
      do_sample=False, num_beams=4, num_return_sequences=3, max_new_tokens=10, pad_token_id=292
    )
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **how)
    rows = out[:, ids.shape[1] :].tolist()
    wanted = [[token for token in row if token not in (0, 292)] for row in rows]
    assert [it.token_ids for it in found[3 * i : 3 * i + 3]] == wanted


def test_stop_strings_and_streaming(ready):
  (whole,) = ready.generate(["Once upon"], temperature=0, max_new_tokens=30)
  stop = whole.text[len(whole.text) // 2 :][:3]
  streamed = {}
  on_text = lambda text, added: streamed.update({text: streamed.get(text, "") + added})
  found = ready.generate(
    ["Once upon", "The"],
    temperature=0,
    max_new_tokens=30,
    stop_strings=[stop, "@@"],
    on_text=on_text,
  )
  assert stop in found[0].text and whole.text.startswith(found[0].text)
  assert stop not in ready.tokenizer.decode(found[0].token_ids[:-1])
  assert [streamed[0], streamed[1]] == [it.text for it in found]


@pytest.mark.slow
def test_generation_config_json_is_respected(folder, tmp_path):
  model = shutil.copytree(folder, tmp_path / "model")

  def says(**what):
    (model / "generation_config.json").write_text(json.dumps(what))
    return pretrained.load(model)

  plain = pretrained.load(folder)
  greedy = plain.generate(PROMPTS, temperature=0, max_new_tokens=9)
  assert says(do_sample=False, max_new_tokens=9).generate(PROMPTS) == greedy
  # An argument overrides the file.
  assert says(do_sample=False, max_new_tokens=30).generate(PROMPTS, max_new_tokens=9) == greedy
  drawn = plain.generate(PROMPTS, temperature=0.5, top_k=7, max_new_tokens=9)
  assert says(temperature=0.5, top_k=7).generate(PROMPTS, max_new_tokens=9) == drawn
  beams = plain.generate(PROMPTS, temperature=0, num_beams=3, max_new_tokens=9)
  assert says(num_beams=3, max_new_tokens=9).generate(PROMPTS) == beams
  # As in transformers, which draws only with do_sample.
  assert plain.generate(PROMPTS, num_beams=3, max_new_tokens=9) == beams
  says(early_stopping=True, min_length=0, max_length=20, typical_p=0.9)
  assert generation_config.load(model, {}).ignored == ("early_stopping", "typical_p")
  ends = {it.token_ids[4] for it in greedy}
  for ours, whole in zip(
    says(do_sample=False, eos_token_id=[0, *ends], max_new_tokens=9).generate(PROMPTS), greedy
  ):
    at = next(i for i, token in enumerate(whole.token_ids) if token in ends)
    assert ours.token_ids == whole.token_ids[:at]
  for wrong, message in (
    (dict(top_k="x"), "top_k='x': must be a number"),
    (dict(top_p=3.0), "--top_p=3.0.*has top_p=3.0"),
  ):
    with pytest.raises(RequestError, match=message):
      says(**wrong).generate(PROMPTS)
  (model / "generation_config.json").write_text("[")
  with pytest.raises(RequestError, match="cannot be read as JSON"):
    pretrained.load(model).generate(PROMPTS)


def test_prompt_file_has_one_prompt_a_line(tmp_path):
  """A line ends at its end alone, not at a form feed or U+2028; a byte order mark is no text."""
  (tmp_path / "f").write_bytes(
    "\ufeffthe cat\r\n\r\n  \nthe dog\fran\u2028far\x85\x1caway\n café\n\n".encode()
  )
  assert generate._read_prompt_file(tmp_path / "f") == [
    "the cat",
    "the dog\fran\u2028far\x85\x1caway",
    " café",
  ]
  (tmp_path / "f").write_bytes(b"caf\xe9")
  with pytest.raises(RequestError, match="--prompt_file='.*f': is not UTF-8"):
    generate._read_prompt_file(tmp_path / "f")
