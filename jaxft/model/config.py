"""ModelConfig: the sizes and switches of a decoder.

V vocabulary, P positions, D model, F feed-forward, L layers, N heads, H head size
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The architecture of a model, read from config.json by `hf/model_config.py`."""

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
  # The fields below distinguish the families. GPT-2 has the defaults. GPT-Neo has windows, no
  # query/key/value biases and no attention scale. GPT-J has rotary positions, parallel blocks, no
  # attention biases and an untied head with a bias.
  attention_scale: float
  divided_by_depth: bool = False  # stanford-crfm's GPT-2s divide attention_scale by 1, 2, 3, ...
  windows: tuple[int, ...] = ()  # one per layer, 0 for a layer without; (): no layer has a window
  rotary_dim: int = 0  # leading dimensions of a head that are rotated; 0: learned positions instead
  parallel: bool = False  # attention and MLP read the same norm, and both are added to its input
  qkv_bias: bool = True
  out_bias: bool = True
  tied: bool = True  # the output table is the token embedding
  head_bias: bool = False
  exact_gelu: bool = False  # with the error function (Cerebras-GPT); False: the tanh approximation
  classes: int = 0  # above 0: a classification head instead of the language head
  # Set by a run (`hf/trainable_params.py`): adapters and trainable weights.
  lora_rank: int = 0
  lora_scale: float = 0.0
  lora_dropout: float = 0.0
  lora_targets: tuple[str, ...] = ()  # qkv if they share an adapter, else q, k, v; out, up, down
  # Pairs (path, its layers) for `training/trainable.py`; (): all weights are trained
  trained: tuple[tuple[str, tuple[int, ...]], ...] = ()

  @property
  def distinct_windows(self) -> tuple[int, ...]:
    """The distinct windows of all layers; 0 for no window."""
    return tuple(sorted(set(self.windows))) or (0,)

  def with_dropout(self, rate: float) -> "ModelConfig":
    """Return a copy with this rate for all kinds of dropout, except that of adapters."""
    return dataclasses.replace(
      self, embed_dropout=rate, attention_dropout=rate, residual_dropout=rate
    )


# Fields that depend on the settings of a run.
RUN_FIELDS = ("lora_rank", "lora_scale", "lora_dropout", "lora_targets", "trained")
