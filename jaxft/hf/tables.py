"""Weight names and layouts as data, one table a family, used in both directions. No arithmetic: reshape and transpose only.

A layout reads Hugging Face -> ours. Letters are the axes (see model.py), brackets are axes that Hugging Face has merged.
"""

import math
import re
from typing import NamedTuple

import numpy as np


class Rule(NamedTuple):
  hf: str  # name in the checkpoint; {} is the layer, which is axis 0 of ours
  ours: str  # path of the parameter
  layout: str

  @property
  def stacked(self) -> bool:
    return "{}" in self.hf


GPT2 = (
  Rule("wte.weight", "embed.tokens", "V D -> V D"),
  Rule("wpe.weight", "embed.positions", "P D -> P D"),
  Rule("h.{}.ln_1.weight", "blocks.norm1.scale", "D -> D"),
  Rule("h.{}.ln_1.bias", "blocks.norm1.bias", "D -> D"),
  Rule("h.{}.attn.c_attn.weight", "blocks.attention.qkv.kernel", "D (Q N H) -> D Q N H"),  # Conv1D: inputs first
  Rule("h.{}.attn.c_attn.bias", "blocks.attention.qkv.bias", "(Q N H) -> Q N H"),
  Rule("h.{}.attn.c_proj.weight", "blocks.attention.out.kernel", "(N H) D -> N H D"),
  Rule("h.{}.attn.c_proj.bias", "blocks.attention.out.bias", "D -> D"),
  Rule("h.{}.ln_2.weight", "blocks.norm2.scale", "D -> D"),
  Rule("h.{}.ln_2.bias", "blocks.norm2.bias", "D -> D"),
  Rule("h.{}.mlp.c_fc.weight", "blocks.mlp.up.kernel", "D F -> D F"),
  Rule("h.{}.mlp.c_fc.bias", "blocks.mlp.up.bias", "F -> F"),
  Rule("h.{}.mlp.c_proj.weight", "blocks.mlp.down.kernel", "F D -> F D"),
  Rule("h.{}.mlp.c_proj.bias", "blocks.mlp.down.bias", "D -> D"),
  Rule("ln_f.weight", "norm.scale", "D -> D"),
  Rule("ln_f.bias", "norm.bias", "D -> D"),
)


class Family(NamedTuple):
  rules: tuple[Rule, ...]
  prefix: str  # always written, stripped when read: the oldest checkpoints have none
  buffers: tuple[str, ...]  # patterns of tensors that hold no weights (causal masks)
  head: str  # output table, tied to `tied_to`: compared when read, then dropped; not written
  tied_to: str
  architecture: str  # transformers' class


FAMILIES = {
  "gpt2": Family(
    GPT2, "transformer.", (r"h\.\d+\.attn\.(masked_)?bias",), "lm_head.weight", "wte.weight", "GPT2LMHeadModel"
  ),
}


def hf_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape of the Hugging Face tensor for a parameter (one layer of it) of `shape`."""
  left, right = _sides(layout)
  size = dict(zip((letter for group in right for letter in group), shape, strict=True))
  return tuple(math.prod(size[letter] for letter in group) for group in left)


def to_ours(layout: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """A view of `tensor` in our layout: nothing is copied as long as `tensor` is contiguous."""
  left, right = _sides(layout)
  order = [group[0] for group in right]
  size = dict(zip(order, shape, strict=True))
  letters = [letter for group in left for letter in group]
  return tensor.reshape([size[letter] for letter in letters]).transpose([letters.index(letter) for letter in order])


def to_hf(layout: str, ours: np.ndarray) -> np.ndarray:
  """The inverse of `to_ours`, contiguous: safetensors 0.8 writes wrong bytes for other arrays (safetensors#825)."""
  left, right = _sides(layout)
  order = [group[0] for group in right]
  letters = [letter for group in left for letter in group]
  split = ours.transpose([order.index(letter) for letter in letters])
  return np.ascontiguousarray(split.reshape(hf_shape(layout, ours.shape)))


def _sides(layout: str) -> list[list[list[str]]]:
  """ "D (N H) -> D N H" -> [[[D], [N, H]], [[D], [N], [H]]]"""
  return [[group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w", side)] for side in layout.split("->")]
