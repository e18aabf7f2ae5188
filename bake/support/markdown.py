"""Markdown that bake writes around the texts of others.

One rule, kept by the type: what is `Markdown` is bake's own, anything else is escaped where it is
rendered, joined or formatted in. A place that shows a text in another way (as code, as a link) calls
one of the functions here, which return `Markdown` and do what that place needs.
"""

from __future__ import annotations

import json
import re
from typing import Any, Self
from urllib.parse import quote, urlsplit

from markupsafe import Markup

from bake.redaction import without_secrets
from bake.support.text import escape_markdown, one_line, steers

MAX_TEXT = 2000  # characters of one value on a card

_BACKTICKS = re.compile(r"`+")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEPT_IN_ADDRESSES = ":/?#@!&+,;=%-._~"  # Not brackets, quotes or stars, which end or mark a link.


class Markdown(Markup):
    """Markdown of bake's own; what is added to it or formatted into it with `%` is escaped."""

    __slots__ = ()

    @classmethod
    def escape(cls, s: Any, /) -> Self:
        """Return a value as Markdown that shows it as it is: one line, of at most MAX_TEXT characters."""
        return s if isinstance(s, cls) else cls(escape_markdown(s, MAX_TEXT))


def finalize(value: Any) -> Any:
    """Return what a template puts out: numbers as they are, Markdown as it is, all else escaped."""
    return value if value is None or isinstance(value, int | float) else Markdown.escape(value)


def format_values(form: str, *values: Any) -> Markdown:
    """Return a template's own format string with values in it, each escaped."""
    return Markdown(form) % values


def code(value: object) -> Markdown:
    """Return a text as a code span, between more backticks than stand in it."""
    text = one_line(value, MAX_TEXT)
    if not text:
        return Markdown("")
    fence = "`" * (max(map(len, _BACKTICKS.findall(text)), default=0) + 1)
    space = " " * ("`" in (text[0], text[-1]))
    return Markdown(f"{fence}{space}{text}{space}{fence}")


def quoted(text: object) -> str:
    """Return a text in double quotes, as JSON and Python read it; what nobody would see is escaped."""
    written = json.dumps(str(text), ensure_ascii=False)
    return "".join(json.dumps(letter)[1:-1] if steers(letter) else letter for letter in written)


def literal(text: object) -> Markdown:
    """Return a text as a string of Python or JSON, for a block of code."""
    return Markdown(quoted(text))


def identifier(text: object) -> Markdown:
    """Return a name for a block of Python. Raises ValueError for what is no name but more code."""
    if not _IDENTIFIER.fullmatch(str(text)):
        raise ValueError(f"{one_line(quoted(text))} is no name of a Python class")
    return Markdown(text)


def cell(text: object) -> Markdown:
    """Return a text as one cell of a table: in quotes, on one line."""
    return Markdown.escape(quoted(text))


def sentence(text: object) -> Markdown:
    """Return a text with its first letter made large."""
    words = one_line(text, MAX_TEXT)
    return Markdown.escape(words[:1].upper() + words[1:])


def link(text: object, address: object) -> Markdown:
    """Return a text as a link where `address` is one of the web, else the text alone."""
    shown = Markdown.escape(text)
    where = without_secrets(str(address).strip())
    try:
        parts = urlsplit(where)
    except ValueError:
        return shown
    usable = parts.scheme in ("http", "https") and parts.netloc and not any(map(steers, where))
    if not usable or len(where) > MAX_TEXT:
        return shown
    return Markdown(f"[{shown}]({quote(where, safe=_KEPT_IN_ADDRESSES)})")
