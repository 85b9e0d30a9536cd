"""Maps Hugging Face tensors to jaxft's parameters and back.

Each family has one table of rules, used in both directions. A layout such as "(N H) D -> D Q N H"
reads "Hugging Face -> jaxft". Each letter is an axis (see model/config.py; Q is query, key and
value). Parentheses are axes that Hugging Face merges into one. A letter on the right side only is
the stacking axis: jaxft stacks several tensors along it. Conversions only reshape, transpose and
stack, so they are exact.
"""

import math
import re
from typing import NamedTuple

import numpy as np


class Rule(NamedTuple):
  """One parameter and the Hugging Face tensors that it consists of.

  For example, `h.{}.attn.c_attn.weight` of all L layers of GPT-2, each (D, 3 N H), is the parameter
  `blocks.attention.qkv.kernel` (L, D, Q, N, H).
  """

  hf: str | tuple[str, ...]  # names in the checkpoint; {} is the layer, axis 0 of the parameter
  param: str  # path of the parameter
  layout: str  # of one layer

  @property
  def names(self) -> tuple[str, ...]:
    """Names in the checkpoint, in the order of the stacking axis."""
    return (self.hf,) if isinstance(self.hf, str) else self.hf

  @property
  def by_layer(self) -> bool:
    """Whether every layer has its own tensors."""
    return "{}" in self.names[0]


class Family(NamedTuple):
  """Names of a model family: tensors, ignored tensors and transformers' classes."""

  rules: tuple[Rule, ...]
  buffers: tuple[str, ...]  # patterns of tensors that are not weights (causal masks, rotary tables)
  architecture: str  # transformers' class of a language model
  classifier: str  # transformers' class of a classifier


# Prefix of every name except the head's. It is optional on reading: the oldest checkpoints lack it.
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
  Rule(LM_HEAD, "output.kernel", "V D -> V D"),  # only of an untied head
  Rule(SCORE, "output.score", "C D -> C D"),  # only of a classifier; C classes
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

# The families differ in their linear layers. GPT-2 uses Conv1D, which stores (inputs, outputs), and
# one matrix for q, k and v. GPT-Neo and GPT-J use torch's Linear, which stores (outputs, inputs),
# and three matrices for q, k and v.
GPT2 = (
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
GPT_NEO = (
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
  """Return the name that transformers writes: with the prefix."""
  return name if name in HEADS else PREFIX + name


def short_name(name: str) -> str:
  """Return the name in the tables above: without the prefix."""
  return name.removeprefix(PREFIX)


def layer_shape(rule: Rule, shape: tuple[int, ...], V: int) -> tuple[int, ...]:
  """Return the shape of one layer of a parameter, without vocabulary padding."""
  _, ours = _parse_layout(rule.layout)
  sizes = zip(ours, shape[1:] if rule.by_layer else shape, strict=True)
  return tuple(V if group == ["V"] else size for group, size in sizes)


def hf_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Return the shape of a Hugging Face tensor, given that of a parameter's layer."""
  hf, ours = _parse_layout(layout)
  size = dict(zip(_letters(ours), shape, strict=True))
  return tuple(math.prod(size[letter] for letter in group) for group in hf)


def from_hf(layout: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """View a contiguous Hugging Face tensor in jaxft's layout.

  The view has no stacking axis.

  Args:
    layout: of the parameter.
    tensor: the Hugging Face tensor.
    shape: shape of one layer of the parameter.
  """
  hf, ours = map(_letters, _parse_layout(layout))
  size = dict(zip(ours, shape, strict=True))
  split = tensor.reshape([size[letter] for letter in hf])
  return split.transpose([hf.index(letter) for letter in ours if letter in hf])


def to_hf(layout: str, param: np.ndarray, index: int) -> np.ndarray:
  """Invert `from_hf`, for the tensor at `index` of the stacking axis.

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
  """Return the parameter's axis that no Hugging Face tensor has, or None."""
  hf, ours = map(_letters, _parse_layout(layout))
  return next((axis for axis, letter in enumerate(ours) if letter not in hf), None)


def _letters(side: list[list[str]]) -> list[str]:
  return [letter for group in side for letter in group]


def _parse_layout(layout: str) -> list[list[list[str]]]:
  """Parse a layout: "D (N H) -> D N H" -> [[[D], [N, H]], [[D], [N], [H]]]."""
  return [
    [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w", side)]
    for side in layout.split("->")
  ]
