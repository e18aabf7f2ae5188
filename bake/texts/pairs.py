"""Contrast pairs: files → pairs of texts → token ids, with the tokens that each completion is made of.

A pair is a shared prompt with two completions, two whole texts, or a conversation with two replies.
Which tokens belong to a completion follows from the tokenizer's offsets, so beginning-of-sequence
tokens, chat templates and merges across the boundary never shift it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bake.errors import DirectionError, PromptError
from bake.io.concepts import name_of
from bake.io.shipped import find_set, shipped_sets
from bake.support.progress import announce
from bake.support.text import did_you_mean, one_line
from bake.texts.rendering import (
    Message,
)
from bake.texts.rows import Row, read_csv, read_rows
from bake.texts.shapes import NATIVE, find_shape

SHOWN, SHOWN_LENGTH = 3, 160  # pairs on a card, and characters of each text
COLUMNS = ("prompt", "positive", "negative", "messages")
# What files say about a pair and no direction is found from.
NOTES = ("id", "topic", "category", "source", "comment", "split")


@dataclass(frozen=True)
class ContrastPair:
    """Two texts that differ in what the direction should mean; `prompt` is the part they share.

    In a conversation `prompt` is empty: `before` holds the messages that go before the positive and
    the negative text, and `role` says who speaks these.
    """

    prompt: str
    positive: str
    negative: str
    before: tuple[tuple[Message, ...], tuple[Message, ...]] | None = None
    role: str = "assistant"

    @property
    def key(self) -> str:
        """What tells the pair from others, whatever its case and white space."""
        sides = (
            self.before or ((), ()),
            (self.prompt + self.positive, self.prompt + self.negative),
        )
        return " ".join(json.dumps([sides, self.role]).lower().split())

    def texts(self) -> tuple[str, str]:
        """Return both texts whole, without what a chat template would add."""
        if self.before is None:
            return self.prompt + self.positive, self.prompt + self.negative
        first, second = ("\n".join(m["content"] for m in messages) for messages in self.before)
        return f"{first}\n{self.positive}", f"{second}\n{self.negative}"


def read_pairs(name: str | Path) -> list[ContrastPair]:
    """Read contrast pairs, JSONL, a JSON array or CSV: "positive" and "negative", and "prompt" where
    they share one.

    With "messages" (a conversation) the two are replies to it; each may also be a list of messages by
    itself. Rows as other tools write them are announced with what is read as what (`bake.texts.shapes`),
    and so are pairs that stand there twice. Raises PromptError for a missing file, an unknown column or a
    malformed line (numbered), DirectionError for identical texts or an empty completion.
    """
    path = find_set(str(name), "pairs")
    if path is None:
        known = shipped_sets("pairs")
        hint = did_you_mean(name, known) or f"; give a file or one of: {', '.join(known)}"
        raise PromptError(f"no pairs file or set {str(name)!r}{hint}")
    pairs = []
    shape = None
    for number, (place, row) in enumerate(_read_rows(path)):
        if not isinstance(row, dict):
            raise PromptError(
                f'{place} is not a JSON object; write {{"positive": …, "negative": …}}'
            )
        if number == 0:
            shape = find_shape(list(row), place, NOTES)
            if shape is not None:
                announce(f"{path.name} is read as pairs: {shape.says}")
        pairs.append(_pair(row if shape is None else shape(row, place), place))
    if not pairs:
        raise PromptError(
            f'{path} holds no pairs; write one a line as {{"positive": …, "negative": …}}'
        )
    repeated = len(pairs) - len({pair.key for pair in pairs})
    if repeated:
        announce(
            f"{path.name}: {repeated} of {len(pairs)} pairs stand there already; they count as often as "
            "they stand there"
        )
    return pairs


def identify_pairs(name: str | Path, pairs: Sequence[ContrastPair]) -> dict[str, str]:
    """Return what tells pairs from others in a direction's metadata, without naming a path.

    pairs_name: the set's or the file's name; pairs_sha256: of the pairs as they were read; pairs_shown:
    the first SHOWN of them as JSON, each text cut to SHOWN_LENGTH characters.
    """
    texts = [pair.texts() for pair in pairs]
    digest = hashlib.sha256("\0".join(pair.key for pair in pairs).encode()).hexdigest()
    shown = [[one_line(text, SHOWN_LENGTH) for text in pair] for pair in texts[:SHOWN]]
    return {
        "pairs_name": one_line(name_of(str(name))),
        "pairs_sha256": digest,
        "pairs_shown": json.dumps(shown, ensure_ascii=False, separators=(",", ":")),
    }


def leave_out_known(
    held_out: Sequence[ContrastPair], pairs: Sequence[ContrastPair], name: str
) -> list[ContrastPair]:
    """Return the held-out pairs that are not among `pairs`, and announce the others.

    name: the held-out file's, for messages. Raises DirectionError where none is left.
    """
    known = {pair.key for pair in pairs}
    fresh = [pair for pair in held_out if pair.key not in known]
    count = len(held_out) - len(fresh)
    if not fresh:
        raise DirectionError(
            f"every pair of {name} is among those that the direction is found from; give others as "
            "held-out pairs"
        )
    if count:
        announce(
            f"{name}: {count} of {len(held_out)} pairs are among those that the direction is found from, "
            "and are left out"
        )
    return fresh


def _read_rows(path: Path) -> Iterable[Row]:
    if path.suffix.lower() != ".csv":
        return read_rows(path)
    header, rows = read_csv(path)
    try:
        find_shape(header, str(path), NOTES)
        complete = not set(NATIVE) & set(header) or set(NATIVE) <= set(header)
    except PromptError:
        complete = False
    if not complete:
        raise PromptError(
            f"{path}: the header row has {', '.join(header) or 'nothing'}; a pairs file has the columns "
            "positive, negative and, where they share one, prompt"
        )
    return rows


def _pair(row: dict[str, Any], place: str) -> ContrastPair:
    unknown = [key for key in row if key not in COLUMNS and key not in NOTES]
    if unknown:
        raise PromptError(
            f"{place}: unknown column {unknown[0]!r}; a pair has {', '.join(COLUMNS)}"
        )
    missing = next((key for key in ("positive", "negative") if key not in row), None)
    if missing:
        raise PromptError(f"{place}: no {missing!r} text; a pair has positive and negative")
    pair = _conversation(row, place) if _is_chat(row) else _plain(row, place)
    if not pair.positive.strip() or not pair.negative.strip():
        raise DirectionError(f"{place}: an empty completion has no token to read; write both texts")
    if pair.positive == pair.negative and (pair.before is None or pair.before[0] == pair.before[1]):
        raise DirectionError(
            f"{place}: the two texts are identical, so their difference is nothing"
        )
    return pair


def _is_chat(row: Mapping[str, Any]) -> bool:
    return "messages" in row or any(isinstance(row.get(k), list) for k in ("positive", "negative"))


def _plain(row: Mapping[str, Any], place: str) -> ContrastPair:
    prompt, positive, negative = (row.get(key, "") for key in ("prompt", "positive", "negative"))
    if not all(isinstance(text, str) for text in (prompt, positive, negative)):
        raise PromptError(f"{place}: prompt, positive and negative must be strings")
    return ContrastPair(prompt, positive, negative)


def _conversation(row: Mapping[str, Any], place: str) -> ContrastPair:
    """Read replies to "messages", or two conversations of which the last messages are compared."""
    if row.get("prompt"):
        raise PromptError(f"{place}: give messages or a prompt, not both")
    common = _messages(row.get("messages", []), place)
    sides = []
    for key in ("positive", "negative"):
        value = row.get(key, "")
        reply = [{"role": "assistant", "content": value}] if isinstance(value, str) else value
        sides.append((*common, *_messages(reply, place)))
    if not all(sides):
        raise DirectionError(f"{place}: an empty completion has no token to read; write both texts")
    last = [messages[-1] for messages in sides]
    if last[0]["role"] != last[1]["role"]:
        raise PromptError(
            f"{place}: the last messages are of {last[0]['role']} and {last[1]['role']}; compare one role"
        )
    before = (sides[0][:-1], sides[1][:-1])
    return ContrastPair("", last[0]["content"], last[1]["content"], before, last[0]["role"])


def _messages(value: Any, place: str) -> tuple[Message, ...]:
    fits = isinstance(value, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in value
    )
    if not fits:
        raise PromptError(
            f'{place}: messages must be a list of {{"role": "user", "content": "…"}}, with text contents'
        )
    return tuple({"role": m["role"], "content": m["content"]} for m in value)
