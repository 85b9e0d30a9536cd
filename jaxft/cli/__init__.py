"""Command lines: flags of jaxft and of transformers, and DeepSpeed's JSON configs."""
