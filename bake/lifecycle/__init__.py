"""What is done with a bake afterwards: verify, undo, rescale, reproduce, diff, and again on the Hub."""
