"""Colour on a terminal that shows it, and nowhere else: NO_COLOR and TERM=dumb are honoured."""

from __future__ import annotations

import os
from typing import TextIO

BOLD, DIM, RED, YELLOW = "1", "2", "31", "33"


def paint(text: str, style: str, stream: TextIO) -> str:
    """Return `text` in a style where `stream` is a terminal that shows it, else as it is.

    NO_COLOR (https://no-color.org), where it is set to anything, switches colour off.
    """
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    return text if plain or not stream.isatty() else f"\x1b[{style}m{text}\x1b[0m"
