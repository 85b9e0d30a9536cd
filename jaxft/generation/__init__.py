"""Text from a model: sampling, beam search, the KV cache in use."""
