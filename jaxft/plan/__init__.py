"""Compiles for hardware that need not exist: does a run fit, how fast is it, what to change."""

"""Compiles for hardware that need not exist: does a run fit, how fast is it, what to change."""
