"""Weights in memory, run."""
