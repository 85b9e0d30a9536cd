"""The published sizes, and two tiny models with which a command can be tried on a CPU."""

from jaxft.hf import known_models

TINY = {
  "tiny-gpt2": {"model_type": "gpt2", "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4},
  "tiny-gpt-neo": {
    "model_type": "gpt_neo",
    "max_position_embeddings": 128,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 16,
  },
}
PUBLISHED = known_models.PUBLISHED | TINY
