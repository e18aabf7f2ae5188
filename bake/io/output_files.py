"""The files that a bake adds to a checkpoint, by name."""

import re

RESULT_FILE, DIRECTION_FILE, CARD_FILE = "bake.json", "direction.safetensors", "README.md"
ORIGINALS_FILE = "originals.safetensors"  # what patched tensors held
REMOVED_FILE = "removed.safetensors"  # directions that were taken out before a push
MEANS_FILE = "means.safetensors"  # of heads or neurons that write them
_DATA = re.compile(r"(direction|removed)(-\d+)?\.safetensors")


def is_data(name: str) -> bool:
    """Tell whether a file is one of bake's that holds tensors and no weights of a model."""
    return name in (ORIGINALS_FILE, MEANS_FILE) or _DATA.fullmatch(name) is not None


def number_file(name: str, index: int) -> str:
    """Return the name of one of several files, counted from 0: NAME.x, NAME-2.x, …"""
    return name if index == 0 else name.replace(".", f"-{index + 1}.")
