"""Text from a model: a key/value cache, one program that reads the prompts and one that adds a token to each.

B prompts, T columns read at once, S columns of the cache, V vocabulary
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.errors import RequestError
from jaxft.generation import beam_search, layer_views, logits_processors
from jaxft.generation.logits_processors import History
from jaxft.generation.sampling import Sampling
from jaxft.model.config import ModelConfig
from jaxft.model.kv_cache import KVCache

TokenCallback = Callable[[int, list[int]], bool]
StepFn = Callable[
  ..., tuple[jax.Array, KVCache]
]  # (cache, ids, segments, positions) -> logits, cache
PAD_MULTIPLE = 64  # prompts and caches are padded to multiples of this many columns: few shapes, few compilations


class MinLength(NamedTuple):
  """Texts that are too short to end."""

  too_short_B: np.ndarray
  ends_E: np.ndarray  # the tokens that end a text


class Generator:
  """Completes prompts with the decoder of `graph`; compiled programs are kept from call to call."""

  def __init__(self, graph: nnx.GraphDef, cfg: ModelConfig, eos_token_id: int):
    self._cfg, self.eos_token_id = cfg, eos_token_id

    def step(params, layers, cache, ids_BT, segments_BT, positions_BT):
      decoder = nnx.merge(graph, params)
      h_BTD, cache = decoder.forward_cached(cache, ids_BT, segments_BT, positions_BT, layers)
      # Whole on every device: each process looks at them, and each draws the same.
      return decoder.compute.constrain(decoder.logits(h_BTD[:, -1]), (None, None)), cache

    def prefill(params, ids_BT, segments_BT, positions_BT, S, apart):
      decoder = nnx.merge(graph, params)
      cache = KVCache.empty(cfg, ids_BT.shape[0], S, decoder.compute.dtype)
      logits_BV, cache = step(params, None, cache, ids_BT, segments_BT, positions_BT)
      return logits_BV, cache.unstack() if apart else cache

    self._prefill = jax.jit(prefill, static_argnames=("S", "apart"))
    self._step = jax.jit(step, donate_argnums=2)

  def __call__(
    self,
    params: Any,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    stop_ids: frozenset[int] = frozenset(),
    on_token: TokenCallback = lambda text, ids: False,
  ) -> list[list[int]]:
    """The tokens that follow each prompt, up to and without the end token: `num_return_sequences` texts for each, together.

    Text s of prompt i draws with keys from (seed, i, s, position), so neither the others nor their padding change it.
    Raises RequestError for a prompt that fills the model's positions.

    Args:
      stop_ids: tokens that end a text beside the end token.
      on_token: told of each token, with the number of the text and its tokens so far; true ends the text with it. Not with beams.
    """
    sampling.validate()
    if not prompts:
      return []
    each = max(sampling.num_beams, sampling.num_return_sequences)
    rows = [prompt or [self.eos_token_id] for prompt in prompts for _ in range(each)]
    texts, stop_ids = (
      SequenceBuffer.from_prompts(rows, sampling, self._cfg.P, each),
      stop_ids | {self.eos_token_id},
    )
    layers = layer_views.unstack_layers(params["blocks"], self._cfg.L)
    logits_BV, cache = self._prefill(
      params, *texts.prompts(), S=texts.ids_BS.shape[1], apart=layers is not None
    )
    # The stack is no argument of the step then; a layer tells what a block is.
    step = functools.partial(
      self._step, params if layers is None else params | {"blocks": layers[0]}, layers
    )
    if sampling.num_beams > 1:
      return self._likeliest(step, logits_BV, cache, texts, sampling, stop_ids)
    return self._chosen(step, logits_BV, cache, texts, sampling, stop_ids, on_token)

  def _chosen(
    self,
    step: StepFn,
    logits_BV: jax.Array,
    cache: KVCache,
    texts: "SequenceBuffer",
    sampling: Sampling,
    stop_ids: frozenset[int],
    on_token: TokenCallback,
  ) -> list[list[int]]:
    """A token after the other: the likeliest, or drawn."""
    count = len(texts.lengths_B)
    keys_B = sampling_keys(sampling.seed, count, sampling.num_return_sequences)
    completions, open_rows, temperature = (
      [[] for _ in range(count)],
      set(range(count)),
      sampling.temperature or 1,
    )
    for n in range(texts.new):
      next_B = sample_token(
        logits_BV,
        keys_B,
        jnp.int32(n),
        jnp.float32(temperature),
        texts.history(),
        sampling.for_jit(),
        texts.min_length(stop_ids),
      )
      for row, token in enumerate(np.asarray(next_B).tolist()):
        if token in stop_ids:
          open_rows.discard(row)
        if row in open_rows:
          completions[row].append(token)
          if on_token(row, completions[row]) or len(completions[row]) == texts.max_new_B[row]:
            open_rows.discard(row)
      if not open_rows or n == texts.new - 1:
        break
      logits_BV, cache = step(cache, *texts.append(np.asarray(next_B)))
    return completions

  def _likeliest(
    self,
    step: StepFn,
    logits_BV: jax.Array,
    cache: KVCache,
    texts: "SequenceBuffer",
    sampling: Sampling,
    stop_ids: frozenset[int],
  ) -> list[list[int]]:
    """Whole texts by beam search: `num_beams` rows for each prompt."""
    W = sampling.num_beams
    prompts = [
      beam_search.Beams(W, sampling.length_penalty, most) for most in texts.max_new_B[::W].tolist()
    ]
    while True:
      sums = np.array([[text.score for text in prompt.running] for prompt in prompts], np.float32)
      best = beam_candidates(
        logits_BV, sums, texts.history(), sampling.for_jit(), texts.min_length(stop_ids)
      )
      best = map(np.asarray, best)
      sources = [
        prompt.advance(*row, stop_ids) for prompt, *row in zip(prompts, *best, strict=True)
      ]
      if all(prompt.done for prompt in prompts):
        return [
          ids for prompt in prompts for ids in prompt.best(sampling.num_return_sequences, stop_ids)
        ]
      rows = np.concatenate([np.array(of) + W * i for i, of in enumerate(sources)])
      texts.take(rows)
      cache = _reorder_cache(cache, rows)
      last = np.array(
        [(text.ids or [0])[-1] for prompt in prompts for text in prompt.running], np.int32
      )
      logits_BV, cache = step(cache, *texts.append(last))


class SequenceBuffer:
  """Prompts and what follows them, in rows that end in the same column."""

  def __init__(
    self,
    ids_BS: np.ndarray,
    lengths_B: np.ndarray,
    T: int,
    min_new_B: np.ndarray,
    max_new_B: np.ndarray,
    P: int,
  ):
    """`min_new_B`, `max_new_B`: tokens that must, and that may, follow each prompt."""
    self.ids_BS, self.lengths_B, self.new = ids_BS, lengths_B, int(max_new_B.max())
    self.min_new_B, self.max_new_B = min_new_B, max_new_B
    self._T, self._end, self._P = T, T, P

  @classmethod
  def from_prompts(
    cls, rows: list[list[int]], sampling: Sampling, P: int, repeated: int
  ) -> "SequenceBuffer":
    """Rows for prompts, each with as many more tokens as `sampling` allows, up to P positions.

    Raises RequestError for a prompt that leaves no room, or not enough for what must follow it.

    Args:
      repeated: how often each prompt is there.
    """
    lengths_B = np.array([len(row) for row in rows])
    min_new_B, max_new_B = _length_limits(lengths_B, sampling, P, repeated)
    T = _round_up(lengths_B.max())
    ids_BS = np.zeros((len(rows), _round_up(T + max_new_B.max())), np.int32)
    for row, prompt in zip(ids_BS, rows, strict=True):
      row[T - len(prompt) : T] = prompt  # padded on the left
    return cls(ids_BS, lengths_B, T, min_new_B, max_new_B, P)

  def prompts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, segments and positions (B, T) of what is there at first."""
    T, begins_B1 = self._T, (self._T - self.lengths_B)[:, None]
    segments_BT = (np.arange(T) >= begins_B1).astype(np.int32)
    return self.ids_BS[:, :T], segments_BT, np.maximum(np.arange(T) - begins_B1, 0).astype(np.int32)

  def append(self, ids_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Writes a token to each row; its id, segment and position (B, 1)."""
    self.ids_BS[:, self._end], self._end = ids_B, self._end + 1
    positions_B1 = np.minimum(self.lengths_B + self._end - self._T - 1, self._P - 1)[
      :, None
    ].astype(np.int32)
    return ids_B[:, None], np.ones_like(positions_B1), positions_B1

  def min_length(self, stop_ids: frozenset[int]) -> MinLength | None:
    """Which texts may not end with the next token; None where none of them has to be of any length."""
    if not self.min_new_B.any():
      return None  # and the programs are those without this rule
    return MinLength(self._end - self._T < self.min_new_B, np.array(sorted(stop_ids), np.int32))

  def take(self, rows: np.ndarray) -> None:
    """Goes on from these rows."""
    self.ids_BS = self.ids_BS[rows]

  def history(self) -> History:
    columns = np.arange(self.ids_BS.shape[1])
    there_BS = (columns >= (self._T - self.lengths_B)[:, None]) & (columns < self._end)
    # A copy: a CPU's devices read such arrays where they lie, and some may still do so while the next token is written.
    return History(self.ids_BS.copy(), there_BS, np.int32(self._end))


def _length_limits(
  lengths_B: np.ndarray, sampling: Sampling, P: int, repeated: int
) -> tuple[np.ndarray, np.ndarray]:
  """How many tokens must, and how many may, follow prompts of these lengths; see `SequenceBuffer.from_prompts`."""
  longest, length = int(lengths_B.argmax()), int(lengths_B.max())
  about = f"prompt {longest // repeated + 1} has {length} tokens"
  if length >= P:
    raise RequestError(f"{about} and the model {P} positions; shorten it")
  if sampling.max_length and length >= sampling.max_length:
    raise RequestError(
      f"{about}, and --max_length={sampling.max_length} counts them too; give --max_length={length + 1} or more, or "
      "--max_new_tokens, which does not"
    )
  max_new_B = (
    sampling.max_length - lengths_B
    if sampling.max_length
    else np.full_like(lengths_B, sampling.max_new_tokens)
  )
  max_new_B = np.minimum(max_new_B, P - lengths_B)
  least = "min_new_tokens" if sampling.min_new_tokens else "min_length"
  min_new_B = np.maximum(0, sampling.min_length - lengths_B)
  if sampling.min_new_tokens:
    min_new_B = np.full_like(lengths_B, sampling.min_new_tokens)
  if (min_new_B > max_new_B).any():
    row = int((min_new_B - max_new_B).argmax())
    most = "max_length" if sampling.max_length else "max_new_tokens"
    limit = (
      f"--{most}={getattr(sampling, most)}"
      if max_new_B[row] < P - lengths_B[row]
      else f"the model's {P} positions"
    )
    raise RequestError(
      f"prompt {row // repeated + 1} has {lengths_B[row]} tokens: --{least}={getattr(sampling, least)} wants {min_new_B[row]} "
      f"more, and {limit} {'leaves' if limit[0] == '-' else 'leave'} {max_new_B[row]}; lower the one or raise the other"
    )
  return min_new_B, max_new_B


_reorder_cache = jax.jit(KVCache.take_rows, donate_argnums=0)


@functools.partial(jax.jit, static_argnames="sampling")
def beam_candidates(
  logits_BV: jax.Array,
  sums_PW: jax.Array,
  history: History,
  sampling: Sampling,
  early: MinLength | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Of each of P prompts with W beams the 2 W best continuations: sums of log-probabilities, beams and tokens, (P, 2 W) each.

  Twice as many as beams go on, as one of each beam may be its end.
  """
  P, W = sums_PW.shape
  logp_BV = process_logits(jax.nn.log_softmax(logits_BV), history, sampling, early)
  every_PK = (logp_BV.reshape(P, W, -1) + sums_PW[..., None]).reshape(P, -1)
  best_PK, places_PK = jax.lax.top_k(every_PK, 2 * W)
  V = logits_BV.shape[-1]
  return best_PK, places_PK // V, places_PK % V


def process_logits(
  logits_BV: jax.Array, history: History, sampling: Sampling, early: MinLength | None
) -> jax.Array:
  """Logits, or log-probabilities, under the rules about what the text has already."""
  if sampling.repetition_penalty != 1:
    logits_BV = logits_processors.penalize_repeats(logits_BV, history, sampling.repetition_penalty)
  if sampling.no_repeat_ngram_size:
    logits_BV = logits_processors.ban_repeated_ngrams(
      logits_BV, history, sampling.no_repeat_ngram_size
    )
  if early:
    end_V = jnp.isin(jnp.arange(logits_BV.shape[-1]), early.ends_E)
    logits_BV = jnp.where(early.too_short_B[:, None] & end_V, -jnp.inf, logits_BV)
  return logits_BV


@functools.partial(jax.jit, static_argnames="sampling")
def sample_token(
  logits_BV: jax.Array,
  keys_B: jax.Array,
  n: jax.Array,
  temperature: jax.Array,
  history: History,
  sampling: Sampling,
  early: MinLength | None = None,
) -> jax.Array:
  """The next token of each row, (B,) int32: the likeliest, or one drawn, after what `sampling` does to the logits.

  Args:
    n: tokens drawn before.
    temperature: that of `sampling`, apart so that another one needs no other program; of no account where it is 0 there.
    early: texts that may not end yet.
  """
  logits_BV = process_logits(logits_BV, history, sampling, early)
  if not sampling.temperature:
    return jnp.argmax(logits_BV, -1).astype(jnp.int32)
  logits_BV = logits_BV - logits_BV.max(
    -1, keepdims=True
  )  # so that no temperature makes infinities of the likeliest
  logits_BV = logits_processors.filter_logits(
    logits_BV / temperature, sampling.top_k, sampling.top_p, sampling.min_p
  )
  keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, n)
  return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def sampling_keys(seed: int, count: int, each: int) -> jax.Array:
  """A key for each of `count` texts, `each` of which are of one prompt: the first has the key of a prompt that has but one."""
  text_B = jnp.arange(count)
  of_prompt = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), text_B // each)
  if each == 1:
    return of_prompt
  more = jax.vmap(lambda key, s: jax.random.fold_in(key, jnp.uint32(2**31) + s))(
    of_prompt, (text_B % each).astype(jnp.uint32)
  )
  return jax.vmap(jax.lax.select)(text_B % each == 0, of_prompt, more)


def _round_up(columns: int) -> int:
  return -(-int(columns) // PAD_MULTIPLE) * PAD_MULTIPLE
