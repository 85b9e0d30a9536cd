"""Compiling for hardware that is not there: what fits, what it costs, what to change."""
