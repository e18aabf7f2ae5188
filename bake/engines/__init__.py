"""Where a bake survives, and what a server serves."""
