"""The files that a bake adds to a checkpoint, by name."""

RESULT_FILE, DIRECTION_FILE, CARD_FILE = "bake.json", "direction.safetensors", "README.md"
