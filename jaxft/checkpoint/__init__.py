"""Checkpoints: saved by Orbax, verified by checksums that jaxft adds."""
