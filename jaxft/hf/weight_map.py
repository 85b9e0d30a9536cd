"""Weight names and layouts as data, one table for each family, used in both directions.

A layout reads Hugging Face -> ours. Letters are the axes (see model/config.py; Q is query, key and
value), brackets are axes that Hugging Face has merged; a letter that only ours has is the stacking
axis, along which several tensors become one. There is no arithmetic: reshape, transpose, stack.
"""

import math
import re
from typing import NamedTuple

import numpy as np


class Rule(NamedTuple):
  hf: str | tuple[str, ...]  # names in the checkpoint; {} is the layer, which is axis 0 of ours
  param: str  # path of the parameter
  layout: str

  @property
  def names(self) -> tuple[str, ...]:
    return (self.hf,) if isinstance(self.hf, str) else self.hf

  @property
  def by_layer(self) -> bool:
    return "{}" in self.names[0]


class Family(NamedTuple):
  rules: tuple[Rule, ...]
  buffers: tuple[str, ...]  # patterns of tensors that hold no weights (causal masks, rotary tables)
  architecture: str  # transformers' classes: of a language model
  classifier: str  # and of one that classifies


# Written before every name but the head's, stripped when read: the oldest checkpoints have none.
PREFIX = "transformer."
EMBEDDING = "wte.weight"
LM_HEAD = "lm_head.weight"
LM_HEAD_BIAS = "lm_head.bias"
SCORE = "score.weight"
HEADS = (LM_HEAD, LM_HEAD_BIAS, SCORE)

COMMON = (
  Rule(EMBEDDING, "embed.tokens", "V D -> V D"),
  Rule("ln_f.weight", "norm.scale", "D -> D"),
  Rule("ln_f.bias", "norm.bias", "D -> D"),
  Rule("h.{}.ln_1.weight", "blocks.norm1.scale", "D -> D"),
  Rule("h.{}.ln_1.bias", "blocks.norm1.bias", "D -> D"),
  Rule(LM_HEAD, "output.kernel", "V D -> V D"),  # not read and not written where the head is tied
  Rule(SCORE, "output.score", "C D -> C D"),  # C classes, where there are some
)
LEARNED_POSITIONS = (Rule("wpe.weight", "embed.positions", "P D -> P D"),)
SEQUENTIAL = (
  Rule("h.{}.ln_2.weight", "blocks.norm2.scale", "D -> D"),
  Rule("h.{}.ln_2.bias", "blocks.norm2.bias", "D -> D"),
)
MLP_BIASES = (
  Rule("h.{}.mlp.c_fc.bias", "blocks.mlp.up.bias", "F -> F"),
  Rule("h.{}.mlp.c_proj.bias", "blocks.mlp.down.bias", "D -> D"),
)

GPT2 = (  # Conv1D: inputs first
  *COMMON,
  *LEARNED_POSITIONS,
  *SEQUENTIAL,
  *MLP_BIASES,
  Rule("h.{}.attn.c_attn.weight", "blocks.attention.qkv.kernel", "D (Q N H) -> D Q N H"),
  Rule("h.{}.attn.c_attn.bias", "blocks.attention.qkv.bias", "(Q N H) -> Q N H"),
  Rule("h.{}.attn.c_proj.weight", "blocks.attention.out.kernel", "(N H) D -> N H D"),
  Rule("h.{}.attn.c_proj.bias", "blocks.attention.out.bias", "D -> D"),
  Rule("h.{}.mlp.c_fc.weight", "blocks.mlp.up.kernel", "D F -> D F"),
  Rule("h.{}.mlp.c_proj.weight", "blocks.mlp.down.kernel", "F D -> F D"),
)
GPT_NEO = (  # Linear: outputs first
  *COMMON,
  *LEARNED_POSITIONS,
  *SEQUENTIAL,
  *MLP_BIASES,
  Rule(
    tuple(f"h.{{}}.attn.attention.{x}_proj.weight" for x in "qkv"),
    "blocks.attention.qkv.kernel",
    "(N H) D -> D Q N H",
  ),
  Rule("h.{}.attn.attention.out_proj.weight", "blocks.attention.out.kernel", "D (N H) -> N H D"),
  Rule("h.{}.attn.attention.out_proj.bias", "blocks.attention.out.bias", "D -> D"),
  Rule("h.{}.mlp.c_fc.weight", "blocks.mlp.up.kernel", "F D -> D F"),
  Rule("h.{}.mlp.c_proj.weight", "blocks.mlp.down.kernel", "D F -> F D"),
)
GPTJ = (
  *COMMON,
  Rule(LM_HEAD_BIAS, "output.bias", "V -> V"),
  Rule(
    tuple(f"h.{{}}.attn.{x}_proj.weight" for x in "qkv"),
    "blocks.attention.qkv.kernel",
    "(N H) D -> D Q N H",
  ),
  Rule("h.{}.attn.out_proj.weight", "blocks.attention.out.kernel", "D (N H) -> N H D"),
  Rule("h.{}.mlp.fc_in.weight", "blocks.mlp.up.kernel", "F D -> D F"),
  Rule("h.{}.mlp.fc_in.bias", "blocks.mlp.up.bias", "F -> F"),
  Rule("h.{}.mlp.fc_out.weight", "blocks.mlp.down.kernel", "D F -> F D"),
  Rule("h.{}.mlp.fc_out.bias", "blocks.mlp.down.bias", "D -> D"),
)

FAMILIES = {
  "gpt2": Family(
    rules=GPT2,
    buffers=(r"h\.\d+\.attn\.(masked_)?bias",),
    architecture="GPT2LMHeadModel",
    classifier="GPT2ForSequenceClassification",
  ),
  "gpt_neo": Family(
    rules=GPT_NEO,
    buffers=(r"h\.\d+\.attn\.attention\.(masked_)?bias",),
    architecture="GPTNeoForCausalLM",
    classifier="GPTNeoForSequenceClassification",
  ),
  "gptj": Family(
    rules=GPTJ,
    buffers=(r"h\.\d+\.attn\.((masked_)?bias|embed_positions)",),
    architecture="GPTJForCausalLM",
    classifier="GPTJForSequenceClassification",
  ),
}


def full_name(name: str) -> str:
  """The name as transformers writes it."""
  return name if name in HEADS else PREFIX + name


def short_name(name: str) -> str:
  """The name as the tables have it."""
  return name.removeprefix(PREFIX)


def layer_shape(rule: Rule, shape: tuple[int, ...], V: int) -> tuple[int, ...]:
  """The shape of one layer of a parameter, without the rows that pad a vocabulary."""
  _, ours = _parse_layout(rule.layout)
  sizes = zip(ours, shape[1:] if rule.by_layer else shape, strict=True)
  return tuple(V if group == ["V"] else size for group, size in sizes)


def hf_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape of one Hugging Face tensor for a parameter (one layer of it) of `shape`."""
  hf, ours = _parse_layout(layout)
  size = dict(zip(_letters(ours), shape, strict=True))
  return tuple(math.prod(size[letter] for letter in group) for group in hf)


def from_hf(layout: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Views a contiguous `tensor` in our layout, without the stacking axis."""
  hf, ours = map(_letters, _parse_layout(layout))
  size = dict(zip(ours, shape, strict=True))
  split = tensor.reshape([size[letter] for letter in hf])
  return split.transpose([hf.index(letter) for letter in ours if letter in hf])


def to_hf(layout: str, param: np.ndarray, index: int) -> np.ndarray:
  """Inverts `from_hf`, for tensor number `index` of the stacked ones.

  The result is contiguous: safetensors 0.8 writes wrong bytes for other arrays (safetensors#825).
  """
  hf, ours = map(_letters, _parse_layout(layout))
  shape = hf_shape(layout, param.shape)
  axis = stacking_axis(layout)
  if axis is not None:
    param = param.take(index, axis)
    ours = [letter for letter in ours if letter in hf]
  return np.ascontiguousarray(param.transpose([ours.index(letter) for letter in hf]).reshape(shape))


def stacking_axis(layout: str) -> int | None:
  """The axis of ours that no Hugging Face tensor has."""
  hf, ours = map(_letters, _parse_layout(layout))
  return next((axis for axis, letter in enumerate(ours) if letter not in hf), None)


def _letters(side: list[list[str]]) -> list[str]:
  return [letter for group in side for letter in group]


def _parse_layout(layout: str) -> list[list[list[str]]]:
  """ "D (N H) -> D N H" -> [[[D], [N, H]], [[D], [N], [H]]]"""
  return [
    [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w", side)]
    for side in layout.split("->")
  ]
