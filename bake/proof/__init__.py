"""Hooked equals baked: what is run, how it is judged."""
