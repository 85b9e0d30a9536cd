"""Loads, converts and exports Hugging Face checkpoints."""
