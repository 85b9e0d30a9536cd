"""config.json -> ModelConfig. An option that changes the maths is honoured or refused by name, never ignored."""

import dataclasses
from typing import Any

from jaxft.errors import RequestError
from jaxft.model import ModelConfig

# config.json key -> the only value whose maths is built; a missing key has this value in transformers too.
GPT2_FIXED = {
  "activation_function": "gelu_new",
  "scale_attn_weights": True,
  "scale_attn_by_inverse_layer_idx": False,
  "reorder_and_upcast_attn": False,
  "add_cross_attention": False,
}
GPT_NEO_FIXED = {"activation_function": "gelu_new"}
GPTJ_FIXED = {"activation_function": "gelu_new"}


def gpt2(config: dict[str, Any]) -> ModelConfig:
  _refuse_others(config, GPT2_FIXED)
  D, N = config["n_embd"], config["n_head"]
  H = _head_size("n_embd", D, "n_head", N)
  return ModelConfig(
    V=config["vocab_size"],
    P=config["n_positions"],
    D=D,
    F=config.get("n_inner") or 4 * D,
    L=config["n_layer"],
    N=N,
    H=H,
    norm_eps=config.get("layer_norm_epsilon", 1e-5),
    embed_dropout=config.get("embd_pdrop", 0.1),
    attention_dropout=config.get("attn_pdrop", 0.1),
    residual_dropout=config.get("resid_pdrop", 0.1),
    init_std=config.get("initializer_range", 0.02),
    attention_scale=H**-0.5,
    tied=config.get("tie_word_embeddings", True),
  )


def gpt_neo(config: dict[str, Any]) -> ModelConfig:
  _refuse_others(config, GPT_NEO_FIXED)
  D, N, L = config["hidden_size"], config["num_heads"], config["num_layers"]
  kinds = _attention_kinds(config, L)
  return ModelConfig(
    V=config["vocab_size"],
    P=config["max_position_embeddings"],
    D=D,
    F=config.get("intermediate_size") or 4 * D,
    L=L,
    N=N,
    H=_head_size("hidden_size", D, "num_heads", N),
    norm_eps=config.get("layer_norm_epsilon", 1e-5),
    embed_dropout=config.get("embed_dropout", 0.0),
    attention_dropout=config.get("attention_dropout", 0.0),
    residual_dropout=config.get("resid_dropout", 0.0),
    init_std=config.get("initializer_range", 0.02),
    attention_scale=1.0,  # the published models were trained without one
    windows=tuple(config.get("window_size", 256) if kind == "local" else 0 for kind in kinds),
    qkv_bias=False,
    tied=config.get("tie_word_embeddings", True),
  )


def gptj(config: dict[str, Any]) -> ModelConfig:
  _refuse_others(config, GPTJ_FIXED)
  D, N, rotary_dim = config["n_embd"], config["n_head"], config.get("rotary_dim", 64)
  H = _head_size("n_embd", D, "n_head", N)
  if not isinstance(rotary_dim, int) or rotary_dim % 2 or not 0 < rotary_dim <= H:
    raise RequestError(f"config.json: rotary_dim={rotary_dim!r} must be even, above 0 and at most the head size {H}")
  return ModelConfig(
    V=config["vocab_size"],
    P=config["n_positions"],
    D=D,
    F=config.get("n_inner") or 4 * D,
    L=config["n_layer"],
    N=N,
    H=H,
    norm_eps=config.get("layer_norm_epsilon", 1e-5),
    embed_dropout=config.get("embd_pdrop", 0.0),
    attention_dropout=config.get("attn_pdrop", 0.0),
    residual_dropout=config.get("resid_pdrop", 0.0),
    init_std=config.get("initializer_range", 0.02),
    attention_scale=H**-0.5,
    rotary_dim=rotary_dim,
    parallel=True,
    qkv_bias=False,
    out_bias=False,
    tied=config.get("tie_word_embeddings", False),
    head_bias=True,
  )


FAMILIES = {"gpt2": gpt2, "gpt_neo": gpt_neo, "gptj": gptj}


def model_config(config: dict[str, Any]) -> ModelConfig:
  """The facts of a parsed config.json; raises RequestError naming the key that is missing, wrong or not supported."""
  family = config.get("model_type")
  if family not in FAMILIES:
    raise RequestError(f"config.json: model_type={family!r} is not supported, only {', '.join(FAMILIES)}")
  try:
    cfg = dataclasses.replace(FAMILIES[family](config), classes=_classes(config))
  except KeyError as error:
    raise RequestError(f"config.json: {error.args[0]} is missing") from error
  except TypeError as error:
    raise RequestError(f"config.json: a size has the wrong type ({error})") from error
  sizes = {"vocabulary": cfg.V, "positions": cfg.P, "width": cfg.D, "feed-forward width": cfg.F, "layers": cfg.L}
  for what, size in sizes.items():
    if not isinstance(size, int) or not 0 < size < (2**16 if what == "layers" else 2**24):
      raise RequestError(f"config.json: {what}: {size!r} is no size of a model")
  return cfg


def _classes(config: dict[str, Any]) -> int:
  """How many classes a model tells apart; 0 for one that writes text."""
  architectures = config.get("architectures") or []
  if not any(str(name).endswith("ForSequenceClassification") for name in architectures):
    return 0
  classes = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
  if not isinstance(classes, int) or not 0 < classes < 2**16:
    raise RequestError(f"config.json: num_labels={classes!r} is no number of classes")
  return classes


def _refuse_others(config: dict[str, Any], fixed: dict[str, Any]) -> None:
  for key, value in fixed.items():
    if config.get(key, value) != value:
      raise RequestError(f"config.json: {key}={config[key]!r} is not supported, only {value!r}")


def _head_size(width_key: str, D: int, heads_key: str, N: int) -> int:
  if N < 1 or D % N:
    raise RequestError(f"config.json: {width_key}={D} is not divisible by {heads_key}={N}")
  return D // N


def _attention_kinds(config: dict[str, Any], L: int) -> list[str]:
  """ "global" or "local" for each layer, from [[["global", "local"], 12]] (or the expanded list beside it)."""
  kinds = [
    kind for pattern, times in config.get("attention_types", []) for _ in range(min(times, L)) for kind in pattern
  ]
  if len(kinds) != L or set(kinds) - {"global", "local"}:
    raise RequestError(
      f"config.json: attention_types={config.get('attention_types')!r} does not name global or local for "
      f"each of num_layers={L}"
    )
  return kinds
