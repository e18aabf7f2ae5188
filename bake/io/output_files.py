"""The files that a bake adds to a checkpoint, by name."""

RESULT_FILE, DIRECTION_FILE, CARD_FILE = "bake.json", "direction.safetensors", "README.md"


def number_file(name: str, index: int) -> str:
    """Return the name of one of several files, counted from 0: NAME.x, NAME-2.x, …"""
    return name if index == 0 else name.replace(".", f"-{index + 1}.")
