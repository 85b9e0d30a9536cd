"""Adds tokens and their roles to a model: more rows in its tables, and a tokenizer with them."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.data import tokenize
from jaxft.errors import RequestError
from jaxft.hf import export, load_weights, repo
from jaxft.hf.tokenizer import CONFIG_FILE, SPECIAL_TOKENS, is_special, load_tokenizer
from jaxft.model.compute import ComputeConfig
from jaxft.model.decoder import abstract_model
from jaxft.utils.types import Json

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

# The parameters that have a row for each token.
VOCAB_TABLES = (("embed", "tokens"), ("output", "kernel"), ("output", "bias"))
ROLES = ("bos", "eos", "pad")
# transformers' other roles, which a model that writes or classifies text has no use for.
ALL_ROLES = tuple(name.removesuffix("_token") for name in SPECIAL_TOKENS)
UNUSED_ROLES = tuple(role for role in ALL_ROLES if role not in ROLES)


class TokenSpec(NamedTuple):
  """A value of --add: a new token without a role, or a token, new or not, for a role."""

  token: str
  role: str = ""


def parse_token_spec(value: str) -> TokenSpec:
  """Parses TOKEN or ROLE=TOKEN; a text with "=" is a token, unless a role is before it.

  Raises RequestError for an empty token, and for a role of transformers that has no use here.
  """
  before, sign, token = value.partition("=")
  role = before.removesuffix("_token") if sign else ""
  if role in UNUSED_ROLES:
    raise RequestError(
      f"--add {value!r}: the roles are {', '.join(ROLES)}, and {role!r} has no use in these "
      f"models; give {token!r} alone to add it without a role"
    )
  spec = TokenSpec(token, role) if role in ROLES else TokenSpec(value)
  if not spec.token:
    raise RequestError(
      f"--add {value!r}: must be a text, or ROLE=TEXT with one of the roles {', '.join(ROLES)}"
    )
  return spec


def add_tokens(
  source: repo.HFCheckpoint, values: list[str], out: Path
) -> tuple["PreTrainedTokenizerFast", dict[str, int], Json]:
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
  specs = [parse_token_spec(value) for value in values]
  tokenizer = load_tokenizer(source.tokenizer_folder, source.cfg.V)
  new_tokens = _new_tokens(specs, tokenizer)
  tokenizer.add_tokens(new_tokens, special_tokens=True)
  for spec in specs:
    if spec.role:
      setattr(tokenizer, f"{spec.role}_token", spec.token)
  prefix = tokenize.special_ids_around(tokenizer)[0]
  own_bos = tokenizer.bos_token != tokenizer.eos_token
  bos_named = own_bos and any(spec.role == "bos" for spec in specs)
  if bos_named and tokenize.document_bos_id(tokenizer, prefix) is None:
    raise RequestError(
      f"--add {f'bos={tokenizer.bos_token}'!r}: the tokenizer of {source.tokenizer_folder} itself "
      f"begins each text with {tokenizer.convert_ids_to_tokens(prefix[0])!r}; take that out of it "
      f"first (add_bos_token in {CONFIG_FILE}, post_processor in tokenizer.json)"
    )
  vocab = tokenizer.get_vocab()
  ids = {spec.token: vocab[spec.token] for spec in specs}
  V = max(source.cfg.V, *(id + 1 for id in ids.values()))
  _, shapes, _ = abstract_model(source.cfg, ComputeConfig())
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  params = load_weights.load_params(source, shapes, device)
  new_ids = [ids[token] for token in new_tokens]
  for module, name in VOCAB_TABLES:
    if new_ids and name in params.get(module, {}):
      params[module][name] = _resize_table(params[module][name], new_ids, V)
  cfg = dataclasses.replace(source.cfg, V=V)
  resized = source._replace(hf_config=source.hf_config | {"vocab_size": V}, cfg=cfg)
  parity = export.export_model(out, params, resized, dtype="source", tokenizer=tokenizer)
  return tokenizer, ids, parity


def _new_tokens(specs: list[TokenSpec], tokenizer: "PreTrainedTokenizerFast") -> list[str]:
  """Returns the tokens to be added, in the order in which they were named."""
  vocab = tokenizer.get_vocab()
  new_tokens = []
  token_of_role = {}
  for token, role in specs:
    flag = f"--add {'='.join(filter(None, (role, token)))!r}"
    if not role and (token in vocab or token in new_tokens):
      raise RequestError(
        f"{flag}: a token already; name another, or give it a role, {ROLES[0]}=... for one"
      )
    if role and token_of_role.setdefault(role, token) != token:
      raise RequestError(
        f"{flag}: {role} is {token_of_role[role]!r} already; name one token for it"
      )
    if role and token in vocab and _is_ordinary(tokenizer, vocab[token]):
      raise RequestError(
        f"{flag}: a token that texts are made of, which transformers would leave out of every "
        f"text; name a new token, or a special one ({tokenizer.eos_token!r})"
      )
    if token not in vocab and token not in new_tokens:
      new_tokens.append(token)
  return new_tokens


def _is_ordinary(tokenizer: "PreTrainedTokenizerFast", id: int) -> bool:
  """Whether an ordinary text is cut into this token."""
  if is_special(tokenizer, id):
    return False
  backend = tokenizer.backend_tokenizer
  text = backend.decode([id], skip_special_tokens=False)
  return backend.encode(text, add_special_tokens=False).ids == [id]


def _resize_table(table: jax.Array, ids: list[int], V: int) -> jax.Array:
  mean = table.mean(0)
  table = jnp.concatenate([table, jnp.broadcast_to(mean, (V - len(table), *mean.shape))])
  return table.at[jnp.array(ids)].set(mean)
