"""Which well-known models have a hidden size: only to say, of a vector that does not fit, whose it is.

The table beside this module is for people, not for decisions: nothing else in bake reads it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("hidden_sizes.json")


@cache
def models_by_width() -> dict[int, tuple[str, ...]]:
    """Return {hidden size: names of well-known models that have it}."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    return {int(width): tuple(names) for width, names in table.items()}


def describe_width(width: int) -> str:
    """Return what a vector of this width was found on, as far as its width tells."""
    names = models_by_width().get(width)
    return f"another model, such as {', '.join(names)}" if names else "another model"
