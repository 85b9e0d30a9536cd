"""What surrounds a run: checkpoints, signals, metrics."""
