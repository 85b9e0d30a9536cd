"""config.json -> ModelConfig. An option that changes the maths is honoured or refused by name, never ignored."""

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
  "tie_word_embeddings": True,
}


def gpt2(config: dict[str, Any]) -> ModelConfig:
  for key, value in GPT2_FIXED.items():
    if config.get(key, value) != value:
      raise RequestError(f"config.json: {key}={config[key]!r} is not supported, only {value!r}")
  D, N = config["n_embd"], config["n_head"]
  if D % N:
    raise RequestError(f"config.json: n_embd={D} is not divisible by n_head={N}")
  return ModelConfig(
    V=config["vocab_size"],
    P=config["n_positions"],
    D=D,
    F=config.get("n_inner") or 4 * D,
    L=config["n_layer"],
    N=N,
    H=D // N,
    norm_eps=config.get("layer_norm_epsilon", 1e-5),
    embed_dropout=config.get("embd_pdrop", 0.1),
    attention_dropout=config.get("attn_pdrop", 0.1),
    residual_dropout=config.get("resid_pdrop", 0.1),
    init_std=config.get("initializer_range", 0.02),
  )


FAMILIES = {"gpt2": gpt2}


def model_config(config: dict[str, Any]) -> ModelConfig:
  """The facts of a parsed config.json; raises RequestError naming the key that is missing, wrong or not supported."""
  family = config.get("model_type")
  if family not in FAMILIES:
    raise RequestError(f"config.json: model_type={family!r} is not supported, only {', '.join(FAMILIES)}")
  try:
    cfg = FAMILIES[family](config)
  except KeyError as error:
    raise RequestError(f"config.json: {error.args[0]} is missing") from error
  except TypeError as error:
    raise RequestError(f"config.json: a size has the wrong type ({error})") from error
  for key, size in (("vocab_size", cfg.V), ("n_positions", cfg.P), ("n_embd", cfg.D), ("n_layer", cfg.L)):
    if not isinstance(size, int) or not 0 < size < 2**24:
      raise RequestError(f"config.json: {key}={size!r} is no size of a model")
  return cfg
