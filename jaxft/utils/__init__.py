"""What every package may use: files, the console, units, JAX's settings."""
