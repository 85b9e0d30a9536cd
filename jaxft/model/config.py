"""ModelConfig: the sizes and switches of a decoder.

V vocabulary, P positions, D model, F feed-forward, L layers, N heads, H head size
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Facts about an architecture, read from config.json (`hf/model_config.py`), never typed."""

  V: int
  P: int
  D: int
  F: int
  L: int
  N: int
  H: int
  norm_eps: float
  embed_dropout: float
  attention_dropout: float
  residual_dropout: float
  init_std: float
  # What tells the families apart. GPT-2: none of it; GPT-Neo: no query/key/value biases, no scale,
  # windows; GPT-J: rotary positions, parallel blocks, no attention biases, a head of its own.
  attention_scale: float
  divided_by_depth: bool = False  # stanford-crfm's GPT-2s divide attention_scale by 1, 2, 3, ...
  windows: tuple[int, ...] = ()  # per layer, 0 for a layer that sees everything; (): all do
  rotary_dim: int = 0  # leading dimensions of a head that are rotated; 0: learned positions instead
  parallel: bool = False  # attention and feed-forward both read the same norm and are added at once
  qkv_bias: bool = True
  out_bias: bool = True
  tied: bool = True  # the output table is the token embedding
  head_bias: bool = False
  exact_gelu: bool = False  # with the error function (Cerebras-GPT); else approximated with tanh
  classes: int = 0  # above 0: a classification head instead of the language head
  # What a run makes of the model (`hf/trainable_params.py`): its adapters, and what it trains.
  lora_rank: int = 0
  lora_scale: float = 0.0
  lora_dropout: float = 0.0
  lora_targets: tuple[str, ...] = ()  # qkv where they share an adapter, else q, k, v; out, up, down
  # (path, its layers), ... as `training/trainable.py` reads it; (): everything
  trained: tuple[tuple[str, tuple[int, ...]], ...] = ()

  @property
  def distinct_windows(self) -> tuple[int, ...]:
    """The different windows among the layers; 0: none."""
    return tuple(sorted(set(self.windows))) or (0,)

  def with_dropout(self, rate: float) -> "ModelConfig":
    return dataclasses.replace(
      self, embed_dropout=rate, attention_dropout=rate, residual_dropout=rate
    )


# Fields that follow from settings of a run.
RUN_FIELDS = ("lora_rank", "lora_scale", "lora_dropout", "lora_targets", "trained")
