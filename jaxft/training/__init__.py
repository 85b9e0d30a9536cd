"""The train step and what surrounds it: optimizer, offload, resuming, preemption."""
