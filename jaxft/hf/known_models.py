"""The config.json of published checkpoints, where it differs from transformers' defaults."""

from typing import Any

PUBLISHED: dict[str, dict[str, Any]] = {
  "distilgpt2": {
    "model_type": "gpt2",
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 6,
    "n_head": 12,
  },
  "gpt2": {"model_type": "gpt2", "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12},
  "gpt2-medium": {
    "model_type": "gpt2",
    "n_positions": 1024,
    "n_embd": 1024,
    "n_layer": 24,
    "n_head": 16,
  },
  "gpt2-large": {
    "model_type": "gpt2",
    "n_positions": 1024,
    "n_embd": 1280,
    "n_layer": 36,
    "n_head": 20,
  },
  "gpt2-xl": {
    "model_type": "gpt2",
    "n_positions": 1024,
    "n_embd": 1600,
    "n_layer": 48,
    "n_head": 25,
  },
  "EleutherAI/gpt-neo-125m": {
    "model_type": "gpt_neo",
    "max_position_embeddings": 2048,
    "hidden_size": 768,
    "num_layers": 12,
    "num_heads": 12,
    "attention_types": [[["global", "local"], 6]],
    "window_size": 256,
  },
  "EleutherAI/gpt-neo-1.3B": {
    "model_type": "gpt_neo",
    "max_position_embeddings": 2048,
    "hidden_size": 2048,
    "num_layers": 24,
    "num_heads": 16,
    "attention_types": [[["global", "local"], 12]],
    "window_size": 256,
  },
  "EleutherAI/gpt-neo-2.7B": {
    "model_type": "gpt_neo",
    "max_position_embeddings": 2048,
    "hidden_size": 2560,
    "num_layers": 32,
    "num_heads": 20,
    "attention_types": [[["global", "local"], 16]],
    "window_size": 256,
  },
  "EleutherAI/gpt-j-6b": {
    "model_type": "gptj",
    "n_positions": 2048,
    "n_embd": 4096,
    "n_layer": 28,
    "n_head": 16,
    "rotary_dim": 64,
    "tie_word_embeddings": False,
  },
}
for config in PUBLISHED.values():
  config["vocab_size"] = 50400 if config["model_type"] == "gptj" else 50257
