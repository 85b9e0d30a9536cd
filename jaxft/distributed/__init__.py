"""Runs of several processes: how they meet, agree, and notice that one is gone."""
