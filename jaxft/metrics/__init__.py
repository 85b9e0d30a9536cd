"""Metrics of a run: collection, metrics.jsonl, the console, and trackers."""
