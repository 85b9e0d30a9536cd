"""Command lines: our flags, those of transformers, and DeepSpeed's JSON."""
