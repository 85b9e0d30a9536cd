"""Parses a config.json.

An option that changes the maths is applied or refused, never ignored.
"""

import dataclasses
import re

from jaxft.errors import RequestError
from jaxft.model.config import ModelConfig
from jaxft.utils import environment
from jaxft.utils.types import Json

# config.json key -> the only supported value. In transformers a missing key means this value too.
# reorder_and_upcast_attn is not listed: jaxft always computes attention scores in float32.
GPT2_REQUIRED = {"add_cross_attention": False}
REQUIRED = {"quantization_config": None}
# transformers' names of GELU's tanh approximation, and of exact GELU (with the error function).
TANH_GELU = ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh")
EXACT_GELU = ("gelu", "gelu_python")


def gpt2(config: Json) -> ModelConfig:
  """Parse a GPT-2 config that transformers has completed with its defaults."""
  _check_required(config, GPT2_REQUIRED)
  cfg = _parse_gpt(config)
  return dataclasses.replace(
    cfg,
    attention_scale=cfg.attention_scale if config["scale_attn_weights"] else 1.0,
    divided_by_depth=bool(config["scale_attn_by_inverse_layer_idx"]),
  )


def gptj(config: Json) -> ModelConfig:
  """Parse a GPT-J config that transformers has completed with its defaults."""
  cfg = _parse_gpt(config)
  rotary_dim = config["rotary_dim"]
  if not isinstance(rotary_dim, int) or rotary_dim % 2 or not 0 < rotary_dim <= cfg.H:
    raise RequestError(
      f"config.json: rotary_dim={rotary_dim!r} must be even, above 0 and at most the head size "
      f"{cfg.H}"
    )
  return dataclasses.replace(
    cfg, rotary_dim=rotary_dim, parallel=True, qkv_bias=False, out_bias=False, head_bias=True
  )


def _parse_gpt(config: Json) -> ModelConfig:
  """Parse the keys that GPT-2 and GPT-J share."""
  D, N = _get_size(config, "n_embd"), _get_size(config, "n_head")
  H = _get_head_size("n_embd", D, "n_head", N)
  return ModelConfig(
    V=_get_size(config, "vocab_size"),
    P=_get_size(config, "n_positions"),
    D=D,
    F=_get_size(config, "n_inner", 4 * D),
    L=_get_size(config, "n_layer", at_most=2**16),
    N=N,
    H=H,
    norm_eps=_get_eps(config),
    embed_dropout=_get_rate(config, "embd_pdrop"),
    attention_dropout=_get_rate(config, "attn_pdrop"),
    residual_dropout=_get_rate(config, "resid_pdrop"),
    init_std=config["initializer_range"],
    attention_scale=H**-0.5,
    exact_gelu=_exact_gelu(config),
    tied=config["tie_word_embeddings"],
  )


def gpt_neo(config: Json) -> ModelConfig:
  """Parse a GPT-Neo config that transformers has completed with its defaults."""
  D, N = _get_size(config, "hidden_size"), _get_size(config, "num_heads")
  L = _get_size(config, "num_layers", at_most=2**16)
  window = _get_size(config, "window_size", at_most=2**30)
  kinds = config["attention_layers"]
  if len(kinds) != L or set(kinds) - {"global", "local"}:
    raise RequestError(
      f"config.json: attention_types must name global or local for each layer; it has "
      f"{len(kinds)} layers, and num_layers is {L}"
    )
  return ModelConfig(
    V=_get_size(config, "vocab_size"),
    P=_get_size(config, "max_position_embeddings"),
    D=D,
    F=_get_size(config, "intermediate_size", 4 * D),
    L=L,
    N=N,
    H=_get_head_size("hidden_size", D, "num_heads", N),
    norm_eps=_get_eps(config),
    embed_dropout=_get_rate(config, "embed_dropout"),
    attention_dropout=_get_rate(config, "attention_dropout"),
    residual_dropout=_get_rate(config, "resid_dropout"),
    init_std=config["initializer_range"],
    attention_scale=1.0,  # the published models were trained without 1 / sqrt(H)
    windows=tuple(window if kind == "local" else 0 for kind in kinds),
    qkv_bias=False,
    exact_gelu=_exact_gelu(config),
    tied=config["tie_word_embeddings"],
  )


FAMILIES = {"gpt2": gpt2, "gpt_neo": gpt_neo, "gptj": gptj}


def from_hf_config(config: Json) -> ModelConfig:
  """Return the `ModelConfig` of a parsed config.json.

  transformers' config class reads it first, so that defaults, types and aliases (`hidden_size` for
  `n_embd`) are those of transformers.

  Raises:
    RequestError: a value is wrong or not supported; the message names its key.
  """
  family = config.get("model_type")
  if not isinstance(family, str) or family not in FAMILIES:
    raise RequestError(
      f"config.json: model_type={family!r} is not supported; supported are {', '.join(FAMILIES)}"
    )
  _check_required(config, REQUIRED)
  _check_num_layers(config.get("attention_types"))
  environment.quiet_transformers()
  import transformers  # takes half a second, so only when needed

  try:
    parsed = transformers.CONFIG_MAPPING[family].from_dict(dict(config)).to_dict()
  except Exception as error:  # its checks raise many classes, e.g. if a list is not a list
    raise RequestError(f"config.json: {' '.join(str(error).split())}") from error
  # Only config.json decides whether the head is tied. Without the key, all but GPT-J are tied.
  parsed["tie_word_embeddings"] = config.get("tie_word_embeddings", family != "gptj")
  return dataclasses.replace(FAMILIES[family](parsed), classes=_num_labels(config))


def _check_num_layers(attention_types: object) -> None:
  """Refuse [[["global"], 10**9]].

  transformers' config class would expand it into a list of 10**9 items.
  """
  text = str(attention_types)
  if len(text) > 2**16 or any(int(number) > 2**16 for number in re.findall(r"\d+", text)):
    raise RequestError("config.json: attention_types has too many layers (over 65536)")


def _num_labels(config: Json) -> int:
  """Return a classifier's number of classes; 0 for a language model."""
  architectures = config.get("architectures")
  names = map(str, architectures) if isinstance(architectures, list) else ()
  if not any(name.endswith("ForSequenceClassification") for name in names):
    return 0
  classes = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
  if not isinstance(classes, int) or not 0 < classes < 2**16:
    raise RequestError(f"config.json: num_labels={classes!r} must be an integer from 1 to 65535")
  return classes


def _check_required(config: Json, required: Json) -> None:
  for key, value in required.items():
    if config.get(key, value) != value:
      raise RequestError(f"config.json: {key}={config[key]!r} is not supported; only {value!r} is")


def _exact_gelu(config: Json) -> bool:
  name = config["activation_function"]
  known = TANH_GELU + EXACT_GELU
  if name not in known:
    raise RequestError(
      f"config.json: activation_function={name!r} is not supported; supported are "
      f"{', '.join(known)}"
    )
  return name in EXACT_GELU


def _get_size(config: Json, key: str, default: int = 0, at_most: int = 2**24) -> int:
  size = config[key] or default
  if not isinstance(size, int) or not 0 < size <= at_most:
    raise RequestError(f"config.json: {key}={size!r} must be an integer from 1 to {at_most}")
  return size


def _get_rate(config: Json, key: str) -> float:
  if not isinstance(config[key], int | float) or not 0 <= config[key] < 1:
    raise RequestError(f"config.json: {key}={config[key]!r} must be at least 0 and below 1")
  return float(config[key])


def _get_eps(config: Json) -> float:
  eps = config["layer_norm_epsilon"]
  if not isinstance(eps, int | float) or not 0 < eps < 1:
    raise RequestError(f"config.json: layer_norm_epsilon={eps!r} must be above 0 and below 1")
  return float(eps)


def _get_head_size(width_key: str, D: int, heads_key: str, N: int) -> int:
  if D % N:
    raise RequestError(f"config.json: {width_key}={D} is not divisible by {heads_key}={N}")
  return D // N
