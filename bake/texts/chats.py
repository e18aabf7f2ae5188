"""Texts as a chat model meets them: openings are what a user asks, neutral text what is answered.

A chat model is used through its template, and what a push does there is not what it does to raw text.
"""

from __future__ import annotations

from collections.abc import Sequence

from bake.texts.prompts import encode
from bake.texts.protocols import Tokenizer
from bake.texts.rendering import Conversation, render

Tokens = tuple[int, ...]
# What neutral text answers; it asks for nothing that a direction could be about.
NEUTRAL_REQUEST = "Write a few plain sentences."


def encode_requests(
    tokenizer: Tokenizer, requests: Sequence[str], prefix: str = ""
) -> list[Tokens]:
    """Return each request as a user's message, up to where the reply begins. prefix: put before each."""
    opened = render(tokenizer, [_ask(prefix + text) for text in requests]).texts
    return [text.ids for text in encode(tokenizer, opened, None, special_tokens=False)]


def encode_replies(
    tokenizer: Tokenizer, texts: Sequence[str], most: int | None
) -> list[tuple[Tokens, int]]:
    """Return each text as a reply to NEUTRAL_REQUEST: all ids, and where the reply begins.

    most: tokens kept of each.
    """
    if not texts:
        return []
    (opened,) = render(tokenizer, [_ask(NEUTRAL_REQUEST)]).texts
    (before,) = encode(tokenizer, [opened], None, special_tokens=False)
    whole = encode(tokenizer, [opened + text for text in texts], most, special_tokens=False)
    return [(text.ids, _common(before.ids, text.ids)) for text in whole]


def _ask(text: str) -> Conversation:
    return Conversation(({"role": "user", "content": text},), True, f"the request {text[:40]!r}")


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))
