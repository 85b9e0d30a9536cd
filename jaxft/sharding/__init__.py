"""The device mesh, and the rules that shard parameters and batches over it."""
