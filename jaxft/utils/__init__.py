"""Utilities for all packages: files, the console, units, JAX's settings."""
