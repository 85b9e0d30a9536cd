"""Generate text with a KV cache.

One compiled program prefills the cache from the prompts; another adds a token to each text. Top-k,
top-p and penalties are in `logits_processors.py`, beams in `beam_search.py`.

Shapes: B rows, J prompts, W beams and K candidates of a prompt, E stop tokens, T columns of an
input, S columns of the cache, P positions, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.errors import RequestError
from jaxft.generation import beam_search, layer_views, logits_processors
from jaxft.generation.logits_processors import History
from jaxft.generation.sampling_config import Sampling
from jaxft.model.config import ModelConfig
from jaxft.model.decoder import Decoder
from jaxft.model.kv_cache import KVCache
from jaxft.sharding.rules import constrain
from jaxft.utils.types import Params

TokenCallback = Callable[[int, list[int]], bool]
DecodeFn = Callable[..., tuple[jax.Array, KVCache]]  # (cache, ids, segments, positions)
PAD_MULTIPLE = 64  # columns; padding to a multiple keeps the number of shapes and compilations low


class MinLength(NamedTuple):
  """The texts that are too short to stop, and the tokens that would stop them."""

  too_short_B: np.ndarray
  stop_ids_E: np.ndarray


class Generator:
  """Complete prompts with a decoder. Compiled programs are reused by all calls."""

  def __init__(self, graphdef: nnx.GraphDef[Decoder], cfg: ModelConfig, eos_token_id: int):
    self._cfg = cfg
    self.eos_token_id = eos_token_id

    def decode(params, layers, cache, ids_BT, segments_BT, positions_BT):
      decoder = nnx.merge(graphdef, params)
      h_BTD, cache = decoder(
        ids_BT, cache, segments_BT=segments_BT, positions_BT=positions_BT, layers=layers
      )
      assert cache is not None  # because the input has one
      # Replicated, because each process reads the logits and samples the same tokens.
      logits_BV = constrain(decoder.logits(h_BTD[:, -1]), (None, None), decoder.compute.mesh)
      return logits_BV, cache

    def prefill(params, ids_BT, segments_BT, positions_BT, S, unstack):
      decoder = nnx.merge(graphdef, params)
      cache = KVCache.empty(cfg, ids_BT.shape[0], S, decoder.compute.dtype)
      logits_BV, cache = decode(params, None, cache, ids_BT, segments_BT, positions_BT)
      return logits_BV, cache.unstack() if unstack else cache

    self._prefill = jax.jit(prefill, static_argnames=("S", "unstack"))
    self._decode = jax.jit(decode, donate_argnums=2)

  def __call__(
    self,
    params: Params,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    stop_ids: frozenset[int] = frozenset(),
    on_token: TokenCallback = lambda index, ids: False,
  ) -> list[list[int]]:
    """Complete each prompt `num_return_sequences` times.

    The random keys of text s of prompt i depend only on (seed, i, s, position). So other prompts
    and padding do not change a text.

    Args:
      params: weights of the decoder.
      prompts: token ids of each prompt; an empty one begins with the end token.
      sampling: temperature, limits, beams and other settings.
      stop_ids: tokens that end a text, in addition to the end token.
      on_token: called after each token with the index of the text and its new tokens; if it returns
        true, the text ends. Not called in beam search.

    Returns:
      The new tokens of each text without the stop token, all texts of the first prompt first.

    Raises:
      RequestError: a prompt fills the model's positions, or a setting is invalid.
    """
    sampling.validate()
    if not prompts:
      return []
    # One row for each beam or returned text; the rows of a prompt are adjacent.
    repeats = max(sampling.num_beams, sampling.num_return_sequences)
    rows = [prompt or [self.eos_token_id] for prompt in prompts for _ in range(repeats)]
    buffer = SequenceBuffer.from_prompts(rows, sampling, self._cfg.P, repeats)
    layers = layer_views.unstack_layers(params["blocks"], self._cfg.L)
    logits_BV, cache = self._prefill(
      params, *buffer.prompts(), S=buffer.ids_BS.shape[1], unstack=layers is not None
    )
    if layers is not None:
      # Decoding reads the views, not the stack. One layer still gives the structure of a block.
      params = params | {"blocks": layers[0]}
    decode = functools.partial(self._decode, params, layers)
    stop_ids = stop_ids | {self.eos_token_id}
    if sampling.num_beams > 1:
      return self._beam_search(decode, logits_BV, cache, buffer, sampling, stop_ids)
    return self._sample(decode, logits_BV, cache, buffer, sampling, stop_ids, on_token)

  def _sample(
    self,
    decode: DecodeFn,
    logits_BV: jax.Array,
    cache: KVCache,
    buffer: "SequenceBuffer",
    sampling: Sampling,
    stop_ids: frozenset[int],
    on_token: TokenCallback,
  ) -> list[list[int]]:
    """Sample tokens one at a time, or take the likeliest at temperature 0."""
    num_rows = len(buffer.lengths_B)
    keys_B = sampling_keys(sampling.seed, num_rows, sampling.num_return_sequences)
    temperature = jnp.float32(sampling.temperature or 1)
    completions = [[] for _ in range(num_rows)]
    open_rows = set(range(num_rows))
    for n in range(buffer.max_new):
      rules = (buffer.history(), sampling.for_jit(), buffer.min_length(stop_ids))
      next_B = np.asarray(sample_token(logits_BV, keys_B, jnp.int32(n), temperature, *rules))
      for row, token in enumerate(next_B.tolist()):
        ids = completions[row]
        if token in stop_ids:
          open_rows.discard(row)
        if row in open_rows:
          ids.append(token)
          if on_token(row, ids) or len(ids) == buffer.max_new_B[row]:
            open_rows.discard(row)
      if not open_rows or n == buffer.max_new - 1:
        break
      logits_BV, cache = decode(cache, *buffer.append(next_B))
    return completions

  def _beam_search(
    self,
    decode: DecodeFn,
    logits_BV: jax.Array,
    cache: KVCache,
    buffer: "SequenceBuffer",
    sampling: Sampling,
    stop_ids: frozenset[int],
  ) -> list[list[int]]:
    """Search for the likeliest texts, with `num_beams` rows for each prompt."""
    W = sampling.num_beams
    max_new_J = buffer.max_new_B[::W].tolist()
    prompts = [beam_search.Beams(W, sampling.length_penalty, max_new) for max_new in max_new_J]
    while True:
      scores_JW = np.array([[beam.score for beam in p.running] for p in prompts], np.float32)
      rules = (buffer.history(), sampling.for_jit(), buffer.min_length(stop_ids))
      candidates = map(np.asarray, beam_candidates(logits_BV, scores_JW, *rules))
      by_prompt = zip(prompts, *candidates, strict=True)
      sources = [prompt.advance(*arrays, stop_ids) for prompt, *arrays in by_prompt]
      if all(prompt.done for prompt in prompts):
        num = sampling.num_return_sequences
        return [ids for prompt in prompts for ids in prompt.best(num, stop_ids)]
      rows = np.concatenate([np.array(beams) + W * i for i, beams in enumerate(sources)])
      # Each new beam takes over the tokens and the cache of the beam that it extends.
      buffer.take_rows(rows)
      cache = _reorder_cache(cache, rows)
      last = [(beam.ids or [0])[-1] for prompt in prompts for beam in prompt.running]
      logits_BV, cache = decode(cache, *buffer.append(np.array(last, np.int32)))


class SequenceBuffer:
  """Token ids of prompts and new tokens, one text per row.

  Prompts are padded on the left, so that all rows end in the same column.
  """

  def __init__(
    self,
    ids_BS: np.ndarray,
    lengths_B: np.ndarray,
    T: int,
    min_new_B: np.ndarray,
    max_new_B: np.ndarray,
    P: int,
  ):
    """Initialize the rows.

    Args:
      ids_BS: the prompts in the first T columns, padded on the left; zeros after them.
      lengths_B: tokens of each prompt.
      T: columns of the prompts.
      min_new_B: fewest new tokens of each prompt.
      max_new_B: most new tokens of each prompt.
      P: positions of the model.
    """
    self.ids_BS = ids_BS
    self.lengths_B = lengths_B
    self.min_new_B = min_new_B
    self.max_new_B = max_new_B
    self.max_new = int(max_new_B.max())
    self._T = T
    self._end = T
    self._P = P

  @classmethod
  def from_prompts(
    cls, prompts: list[list[int]], sampling: Sampling, P: int, repeats: int
  ) -> "SequenceBuffer":
    """Make rows with room for the prompts and all new tokens.

    Args:
      prompts: token ids; none may be empty.
      sampling: limits of the number of new tokens.
      P: positions of the model, the limit of prompt and new tokens together.
      repeats: how often each prompt is repeated in `prompts`, in adjacent rows.

    Raises:
      RequestError: a prompt leaves no room for new tokens, or too little for the minimum.
    """
    lengths_B = np.array([len(prompt) for prompt in prompts])
    min_new_B, max_new_B = _length_limits(lengths_B, sampling, P, repeats)
    T = _round_up(lengths_B.max())
    ids_BS = np.zeros((len(prompts), _round_up(T + max_new_B.max())), np.int32)
    for row, prompt in zip(ids_BS, prompts, strict=True):
      row[T - len(prompt) : T] = prompt  # padded on the left
    return cls(
      ids_BS=ids_BS, lengths_B=lengths_B, T=T, min_new_B=min_new_B, max_new_B=max_new_B, P=P
    )

  def prompts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids, segments and positions of the prompts, (B, T) each."""
    positions_BT = np.arange(self._T) - (self._T - self.lengths_B)[:, None]
    segments_BT = (positions_BT >= 0).astype(np.int32)
    return self.ids_BS[:, : self._T], segments_BT, np.maximum(positions_BT, 0).astype(np.int32)

  def append(self, ids_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Write a token to each row; return its id, segment and position, (B, 1) each."""
    # A finished row continues with the others, at most at the last position. Its output is unused.
    positions_B = np.minimum(self.lengths_B + self._end - self._T, self._P - 1)
    positions_B1 = positions_B[:, None].astype(np.int32)
    self.ids_BS[:, self._end] = ids_B
    self._end += 1
    return ids_B[:, None], np.ones_like(positions_B1), positions_B1

  def min_length(self, stop_ids: frozenset[int]) -> MinLength | None:
    """Return which texts are still too short to stop; None without a minimum."""
    if not self.min_new_B.any():
      return None  # then the compiled programs do not contain this rule
    return MinLength(self._end - self._T < self.min_new_B, np.array(sorted(stop_ids), np.int32))

  def take_rows(self, rows: np.ndarray) -> None:
    """Replace the rows by those with these indices, for beam search."""
    self.ids_BS = self.ids_BS[rows]

  def history(self) -> History:
    """Return the tokens so far, as logits processors read them."""
    columns = np.arange(self.ids_BS.shape[1])
    valid_BS = (columns >= (self._T - self.lengths_B)[:, None]) & (columns < self._end)
    # Copied: a CPU device may alias the array, and read it while the next token is written.
    return History(self.ids_BS.copy(), valid_BS, np.int32(self._end))


def _length_limits(
  lengths_B: np.ndarray, sampling: Sampling, P: int, repeats: int
) -> tuple[np.ndarray, np.ndarray]:
  """Return the fewest and the most new tokens of each prompt.

  See `SequenceBuffer.from_prompts` for arguments and errors.
  """
  longest = int(lengths_B.argmax())
  length = int(lengths_B.max())
  prompt = f"prompt {longest // repeats + 1} has {length} tokens"
  if length >= P:
    raise RequestError(f"{prompt}, but the model has only {P} positions; shorten it")
  if sampling.max_length and length >= sampling.max_length:
    raise RequestError(
      f"{prompt}, and --max_length={sampling.max_length} includes them; set "
      f"--max_length={length + 1} or more, or --max_new_tokens, which excludes them"
    )
  maximum, minimum = "max_new_tokens", "min_length"
  max_new_B = np.full_like(lengths_B, sampling.max_new_tokens)
  min_new_B = np.maximum(0, sampling.min_length - lengths_B)
  if sampling.max_length:
    maximum = "max_length"
    max_new_B = sampling.max_length - lengths_B
  if sampling.min_new_tokens:
    minimum = "min_new_tokens"
    min_new_B = np.full_like(lengths_B, sampling.min_new_tokens)
  max_new_B = np.minimum(max_new_B, P - lengths_B)
  if (min_new_B > max_new_B).any():
    row = int((min_new_B - max_new_B).argmax())
    length = lengths_B[row]
    fewest, most = min_new_B[row], max_new_B[row]
    leaves = f"the model's {P} positions allow"
    if most < P - length:
      leaves = f"--{maximum}={getattr(sampling, maximum)} allows"
    raise RequestError(
      f"prompt {row // repeats + 1} has {length} tokens: --{minimum}={getattr(sampling, minimum)} "
      f"needs {fewest} new ones, but {leaves} only {most}; lower the minimum or raise the maximum"
    )
  return min_new_B, max_new_B


_reorder_cache = jax.jit(KVCache.take_rows, donate_argnums=0)


@functools.partial(jax.jit, static_argnames="sampling")
def beam_candidates(
  logits_BV: jax.Array,
  scores_JW: jax.Array,
  history: History,
  sampling: Sampling,
  min_length: MinLength | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return the 2 W best continuations of each prompt.

  2 W candidates still fill W beams if one continuation of each beam is a stop token.

  Args:
    logits_BV: logits of the next token, W rows for each prompt.
    scores_JW: sum of log-probabilities of each beam.
    history: the tokens so far.
    sampling: settings that are compiled in, from `Sampling.for_jit`.
    min_length: which texts are too short to stop.

  Returns:
    Scores, beams and tokens, (J, 2 W) each, best first.
  """
  J, W = scores_JW.shape
  V = logits_BV.shape[-1]
  logp_BV = process_logits(jax.nn.log_softmax(logits_BV), history, sampling, min_length)
  scores_JWV = logp_BV.reshape(J, W, -1) + scores_JW[..., None]
  best_JK, index_JK = jax.lax.top_k(scores_JWV.reshape(J, -1), 2 * W)
  return best_JK, index_JK // V, index_JK % V


def process_logits(
  logits_BV: jax.Array, history: History, sampling: Sampling, min_length: MinLength | None
) -> jax.Array:
  """Apply the rules that depend on the tokens so far.

  Accepts logits or log-probabilities.
  """
  if sampling.repetition_penalty != 1:
    logits_BV = logits_processors.penalize_repeats(logits_BV, history, sampling.repetition_penalty)
  if sampling.no_repeat_ngram_size:
    n = sampling.no_repeat_ngram_size
    logits_BV = logits_processors.ban_repeated_ngrams(logits_BV, history, n)
  if min_length:
    is_stop_V = jnp.isin(jnp.arange(logits_BV.shape[-1]), min_length.stop_ids_E)
    logits_BV = jnp.where(min_length.too_short_B[:, None] & is_stop_V, -jnp.inf, logits_BV)
  return logits_BV


@functools.partial(jax.jit, static_argnames="sampling")
def sample_token(
  logits_BV: jax.Array,
  keys_B: jax.Array,
  n: jax.Array,
  temperature: jax.Array,
  history: History,
  sampling: Sampling,
  min_length: MinLength | None = None,
) -> jax.Array:
  """Sample the next token of each row, or take the likeliest at temperature 0.

  Args:
    logits_BV: logits of the next token.
    keys_B: random key of each row, from `sampling_keys`.
    n: new tokens so far.
    temperature: a scalar array, separate from `sampling`, so that a change does not recompile.
    history: the tokens so far.
    sampling: settings that are compiled in, from `Sampling.for_jit`.
    min_length: which texts are too short to stop.

  Returns:
    The next tokens, (B,) int32.
  """
  logits_BV = process_logits(logits_BV, history, sampling, min_length)
  if not sampling.temperature:
    return jnp.argmax(logits_BV, -1).astype(jnp.int32)
  # Shifted so that the largest logit is 0, which no small temperature can turn into infinity.
  logits_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / temperature
  logits_BV = logits_processors.filter_logits(
    logits_BV, sampling.top_k, sampling.top_p, sampling.min_p
  )
  keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, n)
  return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def sampling_keys(seed: int, num_rows: int, repeats: int) -> jax.Array:
  """Return a random key for each row; every `repeats` rows belong to one prompt.

  The first row of a prompt has the same key for any number of repeats.
  """
  index_B = jnp.arange(num_rows)
  prompt_keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), index_B // repeats)
  if repeats == 1:
    return prompt_keys_B
  # Numbers from 2^31 on, because `sample_token` folds token counts into the first key of a prompt.
  data_B = jnp.uint32(2**31) + (index_B % repeats).astype(jnp.uint32)
  keys_B = jax.vmap(jax.random.fold_in)(prompt_keys_B, data_B)
  return jax.vmap(jax.lax.select)(index_B % repeats == 0, prompt_keys_B, keys_B)


def _round_up(columns: np.integer | int) -> int:
  return -(-int(columns) // PAD_MULTIPLE) * PAD_MULTIPLE
