"""A model with tokens of the user's own: more rows in its tables, and a tokenizer that knows them and what each is for."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.data import tokenize
from jaxft.errors import RequestError
from jaxft.hf import export, load_weights, repo
from jaxft.hf.tokenizer import CONFIG_FILE, SPECIAL_TOKENS, is_special, load_tokenizer
from jaxft.model.compute import ComputeConfig
from jaxft.model.decoder import abstract_model

VOCAB_TABLES = (
  ("embed", "tokens"),
  ("output", "kernel"),
  ("output", "bias"),
)  # those that have a row for each token
ROLES = ("bos", "eos", "pad")
# transformers' other roles, which a model that writes or classifies text has no use for.
UNUSED_ROLES = tuple(
  name.removesuffix("_token") for name in SPECIAL_TOKENS if name.removesuffix("_token") not in ROLES
)


class TokenSpec(NamedTuple):
  """What one value of --add asks for: a new token without a role, or a token, new or not, for a role."""

  token: str
  role: str = ""


def parse_token_spec(value: str) -> TokenSpec:
  """`TOKEN` or `ROLE=TOKEN`; a text with "=" in it is a token, unless a role is before it.

  Raises RequestError for an empty token, and for a role of transformers that has no use here.
  """
  before, sign, token = value.partition("=")
  role = before.removesuffix("_token") if sign else ""
  if role in UNUSED_ROLES:
    raise RequestError(
      f"--add {value!r}: the roles are {', '.join(ROLES)}, and {role!r} has no use in these models; "
      f"give {token!r} alone to add it without a role"
    )
  found = TokenSpec(token, role) if role in ROLES else TokenSpec(value)
  if not found.token:
    raise RequestError(
      f"--add {value!r}: must be a text, or ROLE=TEXT with one of the roles {', '.join(ROLES)}"
    )
  return found


def add_tokens(
  source: repo.HFCheckpoint, values: list[str], out: Path
) -> tuple[Any, dict[str, int], dict[str, Any]]:
  """Writes `source` with new special tokens and roles to `out`.

  As transformers' `resize_token_embeddings` the tables get a row for each new token, which begins
  as the mean of all rows (Hewitt 2021: a random one would first take probability from every other
  token); a table that has room already, as GPT-J's, keeps its size. All other rows, and the dtype
  of every tensor, stay as they are; so do all rows where only a role changes.

  Args:
    values: of --add; see `parse_token_spec`.

  Returns:
    The tokenizer, the id of each token that was named, and the parity report of the export.

  Raises RequestError for a token that cannot be added, or cannot have the role.
  """
  asked = [parse_token_spec(value) for value in values]
  tokenizer = load_tokenizer(source.tokenizer_folder, source.cfg.V)
  new = _new_tokens(asked, tokenizer)
  tokenizer.add_tokens(new, special_tokens=True)
  for it in asked:
    if it.role:
      setattr(tokenizer, f"{it.role}_token", it.token)
  before = tokenize.special_ids_around(tokenizer)[0]
  named_bos = any(it.role == "bos" for it in asked) and tokenizer.bos_token != tokenizer.eos_token
  if named_bos and tokenize.document_bos_id(tokenizer, before) is None:
    raise RequestError(
      f"--add {f'bos={tokenizer.bos_token}'!r}: the tokenizer of {source.tokenizer_folder} itself begins each text with "
      f"{tokenizer.convert_ids_to_tokens(before[0])!r}; take that out of it first (add_bos_token in {CONFIG_FILE}, "
      "post_processor in tokenizer.json)"
    )
  ids = {it.token: tokenizer.convert_tokens_to_ids(it.token) for it in asked}
  V = max(source.cfg.V, *(id + 1 for id in ids.values()))
  _, shapes, _ = abstract_model(source.cfg, ComputeConfig())
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  params = load_weights.load_params(source, shapes, jax.tree.map(lambda _: here, shapes))
  for part, name in VOCAB_TABLES:
    if new and name in params.get(part, {}):
      params[part][name] = _resize_table(params[part][name], [ids[token] for token in new], V)
  larger = source._replace(
    hf_config=source.hf_config | {"vocab_size": V}, cfg=dataclasses.replace(source.cfg, V=V)
  )
  return (
    tokenizer,
    ids,
    export.export_model(out, params, larger, dtype="source", tokenizer=tokenizer),
  )


def _new_tokens(asked: list[TokenSpec], tokenizer: Any) -> list[str]:
  """The tokens that are to be added, in the order in which they were named."""
  known, new, given = tokenizer.get_vocab(), [], {}
  for it in asked:
    flag = f"--add {'='.join(filter(None, (it.role, it.token)))!r}"
    if not it.role and (it.token in known or it.token in new):
      raise RequestError(
        f"{flag}: a token already; name another, or give it a role, {ROLES[0]}=... for one"
      )
    if it.role and given.setdefault(it.role, it.token) != it.token:
      raise RequestError(f"{flag}: {it.role} is {given[it.role]!r} already; name one token for it")
    if it.role and it.token in known and _is_ordinary(tokenizer, known[it.token]):
      raise RequestError(
        f"{flag}: a token that texts are made of, which transformers would leave out of every text; name a new token, "
        f"or a special one ({tokenizer.eos_token!r})"
      )
    if it.token not in known and it.token not in new:
      new.append(it.token)
  return new


def _is_ordinary(tokenizer: Any, id: int) -> bool:
  """Whether an ordinary text is cut into this token."""
  backend = tokenizer.backend_tokenizer
  if is_special(tokenizer, id):
    return False
  return backend.encode(
    backend.decode([id], skip_special_tokens=False), add_special_tokens=False
  ).ids == [id]


def _resize_table(table: jax.Array, ids: list[int], V: int) -> jax.Array:
  mean = table.mean(0)
  table = jnp.concatenate([table, jnp.broadcast_to(mean, (V - len(table), *mean.shape))])
  return table.at[jnp.array(ids)].set(mean)
