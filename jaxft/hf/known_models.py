"""The config.json of published checkpoints.

Only values that differ from transformers' defaults are listed.
"""

from jaxft.utils.types import Json


def _gpt2(D: int, L: int, N: int) -> Json:
  sizes = {"n_positions": 1024, "n_embd": D, "n_layer": L, "n_head": N, "vocab_size": 50257}
  return {"model_type": "gpt2", **sizes}


def _gpt_neo(D: int, L: int, N: int) -> Json:
  return {
    "model_type": "gpt_neo",
    "max_position_embeddings": 2048,
    "hidden_size": D,
    "num_layers": L,
    "num_heads": N,
    "attention_types": [[["global", "local"], L // 2]],
    "window_size": 256,
    "vocab_size": 50257,
  }


PUBLISHED: dict[str, Json] = {
  "distilgpt2": _gpt2(D=768, L=6, N=12),
  "gpt2": _gpt2(D=768, L=12, N=12),
  "gpt2-medium": _gpt2(D=1024, L=24, N=16),
  "gpt2-large": _gpt2(D=1280, L=36, N=20),
  "gpt2-xl": _gpt2(D=1600, L=48, N=25),
  "EleutherAI/gpt-neo-125m": _gpt_neo(D=768, L=12, N=12),
  "EleutherAI/gpt-neo-1.3B": _gpt_neo(D=2048, L=24, N=16),
  "EleutherAI/gpt-neo-2.7B": _gpt_neo(D=2560, L=32, N=20),
  "EleutherAI/gpt-j-6b": {
    "model_type": "gptj",
    "n_positions": 2048,
    "n_embd": 4096,
    "n_layer": 28,
    "n_head": 16,
    "rotary_dim": 64,
    "tie_word_embeddings": False,
    "vocab_size": 50400,
  },
}
