"""Checkpoints: saved by Orbax, verified by checksums of our own."""
