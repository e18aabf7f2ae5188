"""What was baked into a checkpoint, read out of its weights: `bake detect`."""
