"""Generation: transformers' tokens, and no prompt is changed by its neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import pretrained, sample
from jaxft.errors import RequestError
from jaxft.sample import Sampling

PROMPTS = ["Once upon a time", "The", "a cat and a dog ran to the big red house with small blue", "x"]


@pytest.fixture(scope="module")
def ready(folder):
  return pretrained.load(folder)


def test_greedy_tokens_equal_transformers(ready, folder):
  torch = pytest.importorskip("torch", reason="parity is measured where torch is installed")
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
  for completion in ready.generate(PROMPTS, temperature=0, max_new_tokens=40):
    ids = torch.tensor([ready.tokenizer(completion.prompt)["input_ids"]])
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40, pad_token_id=0)
    wanted = out[0, ids.shape[1] :].tolist()
    assert completion.token_ids == (wanted[: wanted.index(0)] if 0 in wanted else wanted)


@pytest.mark.parametrize("sampling", [dict(temperature=0), dict(temperature=0.9, top_k=20, top_p=0.9, seed=5)])
def test_a_ragged_batch_equals_one_by_one(ready, sampling):
  together = ready.generate(PROMPTS, max_new_tokens=20, **sampling)
  alone = ready.generate([PROMPTS[0]], max_new_tokens=20, **sampling)
  assert together[0] == alone[0]
  padded = ready.generate([PROMPTS[0], "The house " * 5], max_new_tokens=5, **sampling)
  assert padded[0].token_ids == alone[0].token_ids[:5]


def test_a_temperature_near_zero_is_greedy(ready):
  cold = ready.generate(PROMPTS, max_new_tokens=5, temperature=1e-45, top_k=0)
  assert cold == ready.generate(PROMPTS, max_new_tokens=5, temperature=0)


def test_prompts_that_are_no_list_of_texts_are_refused(ready):
  with pytest.raises(RequestError, match="give a list of texts"):
    ready.generate("abc")
  with pytest.raises(RequestError, match=r"prompt '\\udcff': not valid text"):
    ready.generate(["\udcff"])


def test_the_seed_decides(ready):
  texts = [ready.generate(PROMPTS, seed=seed, max_new_tokens=20) for seed in (1, 1, 2)]
  assert texts[0] == texts[1] != texts[2]
  assert len({tuple(completion.token_ids) for completion in ready.generate(["The"] * 4, max_new_tokens=20)}) == 4


def test_prompts_of_a_bucket_share_their_programs(ready):
  ready.generate(["a"], max_new_tokens=3)
  before = ready._generator._prefill._cache_size(), ready._generator._step._cache_size()
  for prompt in ("cat", "the dog", "a small blue door"):
    ready.generate([prompt], max_new_tokens=9)
  assert (ready._generator._prefill._cache_size(), ready._generator._step._cache_size()) == before


def test_it_ends_at_the_end_token_and_at_the_last_position(ready):
  completion = ready.generate(["The"], max_new_tokens=500, top_k=0, temperature=2.0)[0]
  assert 0 not in completion.token_ids
  length = len(ready.tokenizer("The")["input_ids"])
  assert length + len(completion.token_ids) <= ready.source.cfg.P
  always_end = sample.Generator(
    ready.graph, ready.source.cfg, eos_token_id=ready.generate(["The"], temperature=0)[0].token_ids[0]
  )
  assert always_end(ready.params, [ready.tokenizer("The")["input_ids"]], Sampling(temperature=0)) == [[]]


def test_filters_keep_transformers_tokens():
  pytest.importorskip("torch", reason="transformers' processors are torch")
  import torch
  from transformers import TopKLogitsWarper, TopPLogitsWarper

  logits = np.random.default_rng(0).standard_normal((200, 97)).astype(np.float32) * 3
  for top_k, top_p in ((5, 1.0), (0, 0.7), (20, 0.5), (1, 0.3), (96, 0.999)):
    wanted = torch.from_numpy(logits)
    if top_k:
      wanted = TopKLogitsWarper(top_k)(None, wanted)
    if top_p < 1:
      wanted = TopPLogitsWarper(top_p)(None, wanted)
    kept = np.isfinite(sample.filter_logits(jnp.asarray(logits), top_k, top_p))
    np.testing.assert_array_equal(kept, np.isfinite(wanted.numpy()))


def test_samples_follow_their_probabilities():
  logits = jnp.log(jnp.tile(jnp.array([0.5, 0.3, 0.2, 0.0]), (20000, 1)))
  keys = jax.random.split(jax.random.key(0), 20000)
  drawn = np.bincount(sample.choose(logits, keys, jnp.int32(0), jnp.float32(1), False, 0, 1.0), minlength=4) / 20000
  np.testing.assert_allclose(drawn, [0.5, 0.3, 0.2, 0], atol=0.015)


@pytest.mark.parametrize(
  "wrong",
  [
    dict(temperature=-1),
    dict(top_p=0),
    dict(top_p=1.5),
    dict(top_k=-2),
    dict(max_new_tokens=0),
    dict(seed=-1),
    dict(temperature=float("nan")),
  ],
)
def test_sampling_that_means_nothing_is_refused(ready, wrong):
  with pytest.raises(RequestError, match=f"--{next(iter(wrong))}="):
    ready.generate(["a"], **wrong)


def test_a_prompt_that_fills_the_model_is_refused(ready):
  with pytest.raises(RequestError, match=r"prompt 2 has \d+ tokens and the model 71 positions"):
    ready.generate(["a", "cat dog " * 60])
