"""Text from a model: a key/value cache, one program that reads the prompts and one that adds a token to each.

B prompts, T columns read at once, S columns of the cache, V vocabulary
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft import filters
from jaxft.errors import RequestError
from jaxft.filters import History
from jaxft.model import Cache, ModelConfig

BUCKET = 64  # prompts and caches are padded to multiples of this many columns: few shapes, few compilations


class Sampling(NamedTuple):
  """How the next token is chosen; names, meanings and defaults are transformers' own, and temperature 0 is greedy."""

  max_new_tokens: int = 100
  temperature: float = 1.0
  top_k: int = 50  # 0: all
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  no_repeat_ngram_size: int = 0  # 0: runs of tokens may be repeated
  seed: int = 0

  def check(self) -> None:
    """Raises RequestError on a value that means nothing."""
    for name, fine, wanted in (
      ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
      ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
      ("top_k", self.top_k >= 0, "0 (all) or more"),
      ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
      ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
      ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0; 1 changes nothing"),
      ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 (no such rule) or more"),
      ("seed", 0 <= self.seed < 2**32, "from 0 to 4294967295"),
    ):
      if not fine:
        raise RequestError(f"--{name}={getattr(self, name)}: must be {wanted}")


class Generator:
  """Completes prompts with the decoder of `graph`; compiled programs are kept from call to call."""

  def __init__(self, graph: nnx.GraphDef, cfg: ModelConfig, eos_token_id: int):
    self._cfg, self.eos_token_id = cfg, eos_token_id

    def step(params, cache, ids_BT, segments_BT, positions_BT):
      decoder = nnx.merge(graph, params)
      h_BTD, cache = decoder.extend(cache, ids_BT, segments_BT, positions_BT)
      # Whole on every device: each process looks at them, and each draws the same.
      return decoder.compute.constrain(decoder.logits(h_BTD[:, -1]), (None, None)), cache

    def prefill(params, ids_BT, segments_BT, positions_BT, S):
      decoder = nnx.merge(graph, params)
      cache = Cache.empty(cfg, ids_BT.shape[0], S, decoder.compute.dtype)
      return step(params, cache, ids_BT, segments_BT, positions_BT)

    self._prefill = jax.jit(prefill, static_argnames="S")
    self._step = jax.jit(step, donate_argnums=1)

  def __call__(self, params: Any, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    """The tokens that follow each prompt, up to and without the end token.

    Prompt i draws with keys from (seed, i, position), so neither the other prompts nor their padding change its text.
    Raises RequestError for a prompt that fills the model's positions.
    """
    sampling.check()
    if not prompts:
      return []
    prompts = [prompt or [self.eos_token_id] for prompt in prompts]
    lengths_B = np.array([len(prompt) for prompt in prompts])
    if lengths_B.max() >= self._cfg.P:
      raise RequestError(
        f"prompt {lengths_B.argmax() + 1} has {lengths_B.max()} tokens and the model {self._cfg.P} positions; "
        "shorten it"
      )
    new = min(sampling.max_new_tokens, self._cfg.P - lengths_B.max())
    T = _bucket(lengths_B.max())
    ids_BT, columns = np.zeros((len(prompts), T), np.int32), np.arange(T)
    for row, prompt in zip(ids_BT, prompts, strict=True):
      row[T - len(prompt) :] = prompt  # padded on the left, so that all rows end in the same column
    segments_BT = (columns >= (T - lengths_B)[:, None]).astype(np.int32)
    positions_BT = np.maximum(columns - (T - lengths_B)[:, None], 0).astype(np.int32)

    S = _bucket(T + new)
    logits_BV, cache = self._prefill(params, ids_BT, segments_BT, positions_BT, S=S)
    text_BS, there_BS = (np.pad(x, [(0, 0), (0, S - T)]) for x in (ids_BT, segments_BT > 0))
    how = sampling._replace(
      temperature=float(sampling.temperature > 0), seed=0, max_new_tokens=1
    )  # what programs differ by
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(sampling.seed), jnp.arange(len(prompts)))
    completions, open_rows = [[] for _ in prompts], set(range(len(prompts)))
    for n in range(new):
      # Copies: a CPU's devices read such arrays where they lie, and some may still do so while the next token is written.
      history = History(text_BS.copy(), there_BS.copy(), np.int32(T + n))
      next_B = choose(logits_BV, keys_B, jnp.int32(n), jnp.float32(sampling.temperature or 1), history, how)
      text_BS[:, T + n], there_BS[:, T + n] = next_B, True
      for row, token in enumerate(np.asarray(next_B).tolist()):
        if token == self.eos_token_id:
          open_rows.discard(row)
        if row in open_rows:
          completions[row].append(token)
      if not open_rows or n == new - 1:
        break
      logits_BV, cache = self._step(
        params, cache, next_B[:, None], np.ones((len(prompts), 1), np.int32), (lengths_B[:, None] + n).astype(np.int32)
      )
    return completions


@functools.partial(jax.jit, static_argnames="sampling")
def choose(
  logits_BV: jax.Array, keys_B: jax.Array, n: jax.Array, temperature: jax.Array, history: History, sampling: Sampling
) -> jax.Array:
  """The next token of each row, (B,) int32: the likeliest, or one drawn, after what `sampling` does to the logits.

  Args:
    n: tokens drawn before.
    temperature: that of `sampling`, apart so that another one needs no other program; of no account where it is 0 there.
  """
  if sampling.repetition_penalty != 1:
    logits_BV = filters.penalise(logits_BV, history, sampling.repetition_penalty)
  if sampling.no_repeat_ngram_size:
    logits_BV = filters.ban_repeats(logits_BV, history, sampling.no_repeat_ngram_size)
  if not sampling.temperature:
    return jnp.argmax(logits_BV, -1).astype(jnp.int32)
  logits_BV = logits_BV - logits_BV.max(-1, keepdims=True)  # so that no temperature makes infinities of the likeliest
  logits_BV = filters.keep_likely(logits_BV / temperature, sampling.top_k, sampling.top_p, sampling.min_p)
  keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, n)
  return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def _bucket(columns: int) -> int:
  return -(-int(columns) // BUCKET) * BUCKET
