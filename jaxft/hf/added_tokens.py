"""A model with tokens of the user's own: more rows in its tables, and a tokenizer that knows them."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxft import model
from jaxft.errors import RequestError
from jaxft.hf import load, repo, save
from jaxft.hf import tokenizer as tokenizers

TABLES = (("embed", "tokens"), ("output", "kernel"), ("output", "bias"))  # those that have a row for each token


def write(source: repo.Checkpoint, names: list[str], out: Path) -> tuple[dict[str, int], dict[str, Any]]:
  """Writes `source` with new special tokens to `out`, and returns their ids and the parity report of the export.

  As transformers' `resize_token_embeddings` the tables get a row for each, which begins as the mean of all rows (Hewitt 2021:
  a random one would first take probability from every other token); a table that has room already, as GPT-J's, keeps its size.
  All other rows, and the dtype of every tensor, stay as they are.

  Raises RequestError for a name that is a token already, or empty.
  """
  tokenizer = tokenizers.load(source.tokenizer_folder, source.cfg.V)
  known = tokenizer.get_vocab()
  for i, name in enumerate(names):
    if not name or name in known or name in names[:i]:
      raise RequestError(f"--add {name!r}: {'a token already' if name else 'must be a text'}; name another")
  tokenizer.add_tokens(names, special_tokens=True)
  ids = {name: tokenizer.convert_tokens_to_ids(name) for name in names}
  V = max(source.cfg.V, *(id + 1 for id in ids.values()))
  _, shapes, _ = model.abstract(source.cfg, model.Compute())
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  params = load.load(source, shapes, jax.tree.map(lambda _: here, shapes))
  for part, name in TABLES:
    if name in params.get(part, {}):
      params[part][name] = _with_rows(params[part][name], list(ids.values()), V)
  larger = source._replace(hf_config=source.hf_config | {"vocab_size": V}, cfg=dataclasses.replace(source.cfg, V=V))
  return ids, save.export(out, params, larger, dtype="source", tokenizer=tokenizer)


def _with_rows(table: jax.Array, ids: list[int], V: int) -> jax.Array:
  mean = table.mean(0)
  table = jnp.concatenate([table, jnp.broadcast_to(mean, (V - len(table), *mean.shape))])
  return table.at[jnp.array(ids)].set(mean)
