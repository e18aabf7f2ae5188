"""Rows as other tools write them → bake's own: CAA, preference data (DPO), ShareGPT, IBM's, prompts.

What a row means is told by its keys, and the keys of a file's first row decide for all of it. What can be
understood in one way only is, and that is said; the rest is refused with the keys that were found.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bake.errors import PromptError
from bake.support.text import one_line
from bake.texts.rows import Row

NATIVE = ("positive", "negative")
# Keys of the two sides, the one that a direction should lead to first.
_SIDES = (
    ("answer_matching_behavior", "answer_not_matching_behavior"),  # CAA
    ("chosen", "rejected"),  # preference data
    ("pos", "neg"),
    ("harmful", "harmless"),  # IBM's conditions
    ("non_compliant_responses", "compliant_responses"),  # IBM's refusals
    ("non_compliant", "compliant"),
)
_ASKED = ("prompt", "question", "instruction", "messages", "conversations")
_TEXTS = ("text", "prompt", "content", "messages", "conversations", "question", "instruction")
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"} | {
    "system": "system",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True)
class Shape:
    """Which keys of a file's rows are the two sides and what they answer; `says` names it for people."""

    positive: str
    negative: str
    asked: str | None
    ignored: tuple[str, ...]

    @property
    def says(self) -> str:
        """Say what is read as what."""
        words = [f"positive = {self.positive}", f"negative = {self.negative}"]
        if self.asked is not None:
            words.insert(0, f"prompt = {self.asked}")
        left = f"; left out: {', '.join(self.ignored)}" if self.ignored else ""
        return ", ".join(words) + left

    def __call__(self, row: Mapping[str, Any], place: str) -> dict[str, Any]:
        """Return a row as bake's own columns; raise PromptError where a side is missing."""
        for key in (self.positive, self.negative):
            if key not in row:
                raise PromptError(f"{place}: no {key!r}, which the rows before have; mend the row")
        positive, negative = (_side(row[key]) for key in (self.positive, self.negative))
        asked = row.get(self.asked) if self.asked is not None else None
        if asked is None or asked == "":
            return {"positive": positive, "negative": negative}
        if isinstance(positive, str) and isinstance(negative, str) and isinstance(asked, str):
            gap = "" if asked[-1].isspace() or positive[:1].isspace() else " "
            return {"prompt": asked + gap, "positive": positive, "negative": negative}
        if isinstance(positive, list) and len(positive) > 1:
            return {"positive": positive, "negative": negative}  # Both have the prompt within.
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else _side(asked)
        return {"messages": messages, "positive": positive, "negative": negative}


def find_shape(keys: Sequence[str], place: str, notes: Collection[str]) -> Shape | None:
    """Return how rows with these keys are read; None where they are bake's own.

    notes: keys that say something about a pair and are left out without a word. Raises PromptError,
    naming the keys, where a pair cannot be told from them, or could be in two ways.
    """
    if set(NATIVE) & set(keys):
        return None
    sides = [pair for pair in _SIDES if set(pair) <= set(keys)]
    asked = [key for key in _ASKED if key in keys]
    if len(sides) != 1:
        found = ", ".join(one_line(key, 40) for key in keys) or "none"
        hint = (
            "; a conversation has one reply, and a pair needs two"
            if not sides and ("conversations" in keys or "messages" in keys)
            else ""
        )
        raise PromptError(
            f"{place}: no 'positive' text: its keys are {found}{hint}; a pair has positive and negative "
            "and, where they share one, prompt (or chosen and rejected, or "
            "answer_matching_behavior and answer_not_matching_behavior)"
        )
    if len(asked) > 1:
        raise PromptError(
            f"{place}: {' and '.join(asked)} could each be what the two sides answer; leave one of them"
        )
    used = {*sides[0], *asked}
    ignored = tuple(one_line(key, 40) for key in keys if key not in used and key not in notes)
    return Shape(*sides[0], asked[0] if asked else None, ignored)


def find_prompt_key(row: Any, place: str) -> str | None:
    """Return the key under which the rows of a prompt file have their texts; None where they are texts."""
    if isinstance(row, str):
        return None
    if isinstance(row, dict):
        found = [key for key in _TEXTS if key in row]
        if "text" in found or len(found) == 1:
            return found[0]
        if found:
            raise PromptError(
                f"{place} has {' and '.join(found)}, so that its text could be either; call it 'text'"
            )
        keys = ", ".join(one_line(key, 40) for key in row) or "none"
        raise PromptError(
            f"{place} has no 'text' string: its keys are {keys}; call the text 'text'"
        )
    raise PromptError(f'{place} is a {type(row).__name__}, no text; write "…" or {{"text": "…"}}')


def read_prompt_rows(rows: Sequence[Row], say: Callable[[str], None]) -> list[str]:
    """Return the texts of a prompt file's rows; raise PromptError for a row that has none."""
    texts: list[str] = []
    key: str | None = None
    for number, (place, row) in enumerate(rows):
        if number == 0:
            key = find_prompt_key(row, place)
            if key not in (None, "text"):
                say(
                    f"{place.rpartition(',')[0] or place.rpartition(':')[0]}: the texts are its {key!r}"
                )
        value = row if key is None else row.get(key) if isinstance(row, dict) else None
        if isinstance(value, list) and key in ("messages", "conversations"):
            value = _contents(value)
        if not isinstance(value, str):
            wanted = "is no text" if key is None else f"has no {key!r} string"
            raise PromptError(f"{place} {wanted}; mend the row")
        if not value.strip():
            raise PromptError(f"{place} is an empty text; leave the row out")
        texts.append(value)
    return texts


def _side(value: Any) -> Any:
    """Return a reply or a conversation as bake has them: ShareGPT's speakers become roles."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return [_message(entry) for entry in value]
    return value


def _message(entry: Any) -> Any:
    if isinstance(entry, dict) and {"from", "value"} <= entry.keys():
        speaker = entry["from"]
        role = _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
        return {"role": role, "content": entry["value"]}
    return entry


def _contents(messages: list[Any]) -> str | None:
    """Return the contents of messages, one below the other; None where they are none."""
    found = [_message(entry) for entry in messages]
    contents = [entry.get("content") if isinstance(entry, dict) else None for entry in found]
    if not all(isinstance(content, str) for content in contents):
        return None
    return "\n".join(map(str, contents))
