"""Changing a few keys of a JSON text and leaving every other character as it was.

A config goes through many hands and versions; reserialising it would reformat numbers, expand
lists and make a diff against the base unreadable. So the new values are spliced into the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bake.checkpoint.edits import REMOVED
from bake.errors import CheckpointError

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class _Member:
    """One `"key": value` of an object, as character positions in the text."""

    key: str
    start: int
    value_start: int
    end: int


def edit_json(text: str, changes: Mapping[str, Any]) -> str:
    """`text`, a JSON object, with `changes` made in place and new keys appended in their order.

    A key with dots ("text_config.mlp_bias") leads into nested objects, unless the object has a
    key of that very name. The value REMOVED takes the key out. Raises CheckpointError where a
    dotted key leads nowhere.
    """
    for key, value in changes.items():
        literal = any(member.key == key for member in _members(text, text.index("{")))
        text = _set(text, [key] if literal else key.split("."), value)
    return text


def _set(text: str, path: Sequence[str], value: Any) -> str:
    start = text.index("{")
    unit = _indentation(text, _members(text, start))
    for depth, key in enumerate(path[:-1]):
        member = _find(_members(text, start), key)
        if member is None or text[member.value_start] != "{":
            raise CheckpointError(
                f"config.json has no object {'.'.join(path[: depth + 1])}, so "
                f"{'.'.join(path)} cannot be set."
            )
        start = member.value_start
    members = _members(text, start)
    member = _find(members, path[-1])
    if value is REMOVED:
        return text if member is None else _cut(text, members, member)
    indentation = _indentation(text, members)
    dumped = json.dumps(value, indent=unit, ensure_ascii=False)
    dumped = dumped.replace("\n", _newline(text) + (indentation or ""))
    if member is not None:
        return text[: member.value_start] + dumped + text[member.end :]
    added = f"{json.dumps(path[-1], ensure_ascii=False)}: {dumped}"
    if not members:
        return text[: start + 1] + added + text[start + 1 :]
    separator = ", " if indentation is None else f",{_newline(text)}{indentation}"
    end = members[-1].end
    return text[:end] + separator + added + text[end:]


def _cut(text: str, members: Sequence[_Member], member: _Member) -> str:
    """`text` without `member` and the comma that went with it."""
    position = members.index(member)
    if position + 1 < len(members):
        return text[: member.start] + text[members[position + 1].start :]
    start = members[position - 1].end if position else member.start
    return text[:start] + text[member.end :]


def _members(text: str, start: int) -> list[_Member]:
    """The members of the object that begins at `start`; `text` is known to be sound JSON."""
    members = []
    position = _skip(text, start + 1)
    while text[position] != "}":
        key, after_key = _DECODER.raw_decode(text, position)
        value_start = _skip(text, text.index(":", after_key) + 1)
        _, end = _DECODER.raw_decode(text, value_start)
        members.append(_Member(key, position, value_start, end))
        position = _skip(text, end)
        if text[position] == ",":
            position = _skip(text, position + 1)
    return members


def _find(members: Sequence[_Member], key: str) -> _Member | None:
    """The member `key`; of two, the last, which is the one that JSON readers keep."""
    return next((member for member in reversed(members) if member.key == key), None)


def _indentation(text: str, members: Sequence[_Member]) -> str | None:
    """The white space before the members of an object, or None where it is written on one line."""
    if not members:
        return None
    line = text[text.rfind("\n", 0, members[0].start) + 1 : members[0].start]
    return line if line.isspace() else None


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position
