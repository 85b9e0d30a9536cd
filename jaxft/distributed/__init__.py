"""Distributed runs: rendezvous, agreement on facts, and detection of lost processes."""
