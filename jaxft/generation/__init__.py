"""Generate text with a KV cache, by sampling or beam search."""
