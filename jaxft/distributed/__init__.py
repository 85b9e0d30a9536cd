"""Distributed runs: rendezvous, checks for equality, detection of lost processes."""
