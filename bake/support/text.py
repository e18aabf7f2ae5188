"""Text for people: lists of layers, and what others wrote made harmless where it is shown.

Names, metadata and answers belong to strangers. On a terminal a control character could move the cursor
or fake a line; in a card a line break or a mark could become a heading, a link or HTML.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

MAX_SHOWN = 200
_MARKS = re.compile(r"([\\`*_{}\[\]()<>#+!|~$&])")


def list_numbers(numbers: Iterable[int]) -> str:
    """Return ascending numbers as text, runs of three and more as a range: "0-5, 7, 9"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(
        f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs
    )


def without_controls(text: str) -> str:
    """Return `text` without what steers a terminal; line feeds and tabs stay.

    Control characters (category Cc, with them ESC), the marks that turn the direction of writing, and
    halves of surrogate pairs become question marks.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        letter
        if letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cs", "Cf", "Zl", "Zp")
        else "?"
        for letter in text
    )


def one_line(text: object, limit: int = MAX_SHOWN) -> str:
    """Return what somebody wrote as one line of at most `limit` characters, without controls."""
    line = " ".join(without_controls(str(text)).split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def escape_markdown(text: object, limit: int = MAX_SHOWN) -> str:
    """Return what somebody wrote as one line that Markdown and HTML show as it is."""
    line = _MARKS.sub(r"\\\1", one_line(text, limit).replace("&", "&amp;").replace("<", "&lt;"))
    return re.sub(r"^([-=:]|\d+[.)])", r"\\\1", line)
