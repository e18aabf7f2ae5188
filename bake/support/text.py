"""Text for people: lists of layers, and what others wrote made harmless where it is shown.

Names, metadata and answers belong to strangers. On a terminal a control character could move the cursor
or fake a line; in a card a line break or a mark could become a heading, a link or HTML.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches

from bake.redaction import without_secrets

MAX_SHOWN = 200
MAX_MESSAGE = 1400

# Joiners of letters and of emoji: they are Cf as the marks that turn the writing are, and turn nothing.
_JOINERS = "\u200c\u200d"
_INLINE = re.compile(
    r"[\\`*\[\]|~$]"
    r"|(?<![^\W_])_|_(?![^\W_])"  # Inside a word an underscore marks nothing.
    r"|(?P<html><|&(?=[#\w]))"
)
_AT_START = re.compile(r"(?P<mark>[#>=:]|[-+](?!\d))|(?P<number>\d{1,9})(?P<dot>[.)])(?=\s|$)")
_ENTITIES = {"<": "&lt;", "&": "&amp;"}


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


def steers(letter: str) -> bool:
    """Tell whether a character steers a terminal or hides what stands beside it.

    Control characters (with them ESC), the marks that turn the direction of writing and those that
    nobody sees, separators of lines and halves of surrogate pairs; line feeds and tabs too.
    """
    return letter not in _JOINERS and unicodedata.category(letter) in ("Cc", "Cs", "Cf", "Zl", "Zp")


def without_controls(text: str) -> str:
    """Return `text` with question marks for what `steers`; line feeds and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join("?" if letter not in "\n\t" and steers(letter) else letter for letter in text)


def one_line(text: object, limit: int = MAX_SHOWN) -> str:
    """Return what somebody wrote as one line of at most `limit` characters, without controls."""
    line = without_controls(" ".join(str(text).split()))
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def one_message(text: str, limit: int = MAX_MESSAGE) -> str:
    """Return a message of bake's as one line, without controls and secrets.

    One that quotes too much is cut in its middle: what is wrong stands first, the remedy last.
    """
    line = without_controls(" ".join(without_secrets(text).splitlines()))
    if len(line) <= limit:
        return line
    end = limit // 3
    return f"{line[: limit - end - 3]} … {line[-end:]}"


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Return "; did you mean NAME?" for the known name nearest to `word`, "" where none is near."""
    near = get_close_matches(str(word), list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def explain(error: object, limit: int = MAX_SHOWN) -> str:
    """Return what other software says of an error, without secrets; its type if nothing.

    A KeyError says no more than the key, so that its type goes before it.
    """
    said = f"KeyError: {error}" if isinstance(error, KeyError) else str(error)
    return one_line(without_secrets(said), limit) or type(error).__name__


def explain_briefly(error: object) -> str:
    """Return the first line of what other software says of an error, as `explain` does."""
    lines = str(error).strip().splitlines()
    said = error if isinstance(error, KeyError) or not lines else lines[0].rstrip(".")
    return explain(said)


def escape_markdown(text: object, limit: int = MAX_SHOWN) -> str:
    """Return what somebody wrote as one line that Markdown and HTML show as it is.

    A space at either end stays, so that it can stand beside other text.
    """
    written = str(text)
    line = _INLINE.sub(_escape_mark, one_line(written, limit))
    line = _AT_START.sub(_escape_start, line, count=1) if _AT_START.match(line) else line
    before, after = (" " * edge.isspace() for edge in (written[:1], written[-1:]))
    return f"{before}{line}{after}" if line else before


def _escape_mark(found: re.Match[str]) -> str:
    return _ENTITIES[found[0]] if found["html"] else f"\\{found[0]}"


def _escape_start(found: re.Match[str]) -> str:
    return f"\\{found['mark']}" if found["mark"] else f"{found['number']}\\{found['dot']}"
