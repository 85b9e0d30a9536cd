"""Adds special tokens to a model: grows its vocabulary tables and its tokenizer."""

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

# The parameters with one row per token.
VOCAB_TABLES = (("embed", "tokens"), ("output", "kernel"), ("output", "bias"))
ROLES = ("bos", "eos", "pad")
# transformers' other roles. Models that generate or classify text do not use them.
ALL_ROLES = tuple(name.removesuffix("_token") for name in SPECIAL_TOKENS)
UNUSED_ROLES = tuple(role for role in ALL_ROLES if role not in ROLES)


class TokenSpec(NamedTuple):
  """A parsed value of --add: a token, new or existing, and its role ("" for none)."""

  token: str
  role: str = ""


def parse_token_spec(value: str) -> TokenSpec:
  """Parse TOKEN or ROLE=TOKEN.

  A value with "=" is a plain token unless the part before "=" is a role.

  Raises:
    RequestError: the token is empty, or the role is one that these models do not use.
  """
  before, sign, token = value.partition("=")
  role = before.removesuffix("_token") if sign else ""
  if role in UNUSED_ROLES:
    raise RequestError(
      f"--add {value!r}: these models do not use the role {role!r}, only {', '.join(ROLES)}; "
      f"give {token!r} alone to add it without a role"
    )
  spec = TokenSpec(token, role) if role in ROLES else TokenSpec(value)
  if not spec.token:
    raise RequestError(
      f"--add {value!r}: must be TOKEN or ROLE=TOKEN, with one of the roles {', '.join(ROLES)}"
    )
  return spec


def add_tokens(
  source: repo.HFCheckpoint, values: list[str], out: Path
) -> tuple["PreTrainedTokenizerFast", dict[str, int], Json]:
  """Write `source` with new special tokens and roles to `out`.

  Like transformers' `resize_token_embeddings`, this adds a row to the tables for each new token.
  The row starts as the mean of all rows. A random row would first take probability from every
  other token (Hewitt 2021). A table with spare rows, as in GPT-J, keeps its size. All other rows
  and the dtype of every tensor stay unchanged. If only a role changes, no row changes.

  Args:
    source: the model to extend.
    values: values of --add; see `parse_token_spec`.
    out: the folder to write.

  Returns:
    The tokenizer, the id of each named token, and the parity report of the export.

  Raises:
    RequestError: a token cannot be added, or cannot have its role.
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
      f"--add {f'bos={tokenizer.bos_token}'!r}: the tokenizer of {source.tokenizer_folder} already "
      f"begins each text with {tokenizer.convert_ids_to_tokens(prefix[0])!r}; remove that "
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
  """Return the tokens that the vocabulary lacks, in the order of `specs`."""
  vocab = tokenizer.get_vocab()
  new_tokens = []
  token_of_role = {}
  for token, role in specs:
    flag = f"--add {'='.join(filter(None, (role, token)))!r}"
    if not role and (token in vocab or token in new_tokens):
      raise RequestError(
        f"{flag}: the tokenizer already has this token; name another, or give it a role, "
        f"such as {ROLES[0]}=..."
      )
    if role and token_of_role.setdefault(role, token) != token:
      raise RequestError(
        f"{flag}: the role {role} is already given to {token_of_role[role]!r}; name one token per "
        "role"
      )
    if role and token in vocab and _is_ordinary(tokenizer, vocab[token]):
      raise RequestError(
        f"{flag}: an ordinary token, which transformers would then drop from every text; "
        f"name a new token, or a special one ({tokenizer.eos_token!r})"
      )
    if token not in vocab and token not in new_tokens:
      new_tokens.append(token)
  return new_tokens


def _is_ordinary(tokenizer: "PreTrainedTokenizerFast", id: int) -> bool:
  """Return whether ordinary text can be tokenized into this token."""
  if is_special(tokenizer, id):
    return False
  backend = tokenizer.backend_tokenizer
  text = backend.decode([id], skip_special_tokens=False)
  return backend.encode(text, add_special_tokens=False).ids == [id]


def _resize_table(table: jax.Array, ids: list[int], V: int) -> jax.Array:
  mean = table.mean(0)
  table = jnp.concatenate([table, jnp.broadcast_to(mean, (V - len(table), *mean.shape))])
  return table.at[jnp.array(ids)].set(mean)
