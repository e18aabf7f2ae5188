"""The sets that ship in `calibration/`: which there are, what each is for, and what is in it.

What a file means is decided where it is used, in `prompts` and `pairs`; this module only
lists and shows. A set's name works wherever a file of its kind does: `--prompts code`,
`--pairs formal-casual`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from bake.errors import PromptError
from bake.io.shipped import shipped, shipped_sets
from bake.support.text import did_you_mean
from bake.texts.pairs import read_pairs
from bake.texts.prompts import read_prompts, read_words

KINDS = ("prompts", "pairs", "words")


@dataclass(frozen=True)
class PromptSet:
    """A shipped set: `kind` is "prompts", "pairs" or "words", `count` how many of them it holds."""

    name: str
    kind: str
    count: int
    description: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class ShownSet:
    """A set and its first entries: (text,) each, or (positive, negative) with their shared prompt."""

    about: PromptSet
    entries: tuple[tuple[str, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: the set's, and `entries` as strings or {positive, negative}."""
        paired = self.about.kind == "pairs"
        entries = [
            {"positive": entry[0], "negative": entry[1]} if paired else entry[0]
            for entry in self.entries
        ]
        return {**self.about.to_dict(), "entries": entries}


def list_sets() -> list[PromptSet]:
    """Return every shipped set: prompts, pairs and lists of words, each kind by name."""
    return [_describe(name, kind)[0] for kind in KINDS for name in sorted(shipped_sets(kind))]


def show_set(name: str, limit: int | None = None) -> ShownSet:
    """Return the shipped set NAME with its first `limit` entries, or with all of them.

    Raises PromptError for an unknown name, naming the known ones, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise PromptError(f"a limit of {limit} shows nothing; give a number from 1")
    for kind in KINDS:
        if name in shipped_sets(kind):
            about, entries = _describe(name, kind)
            return ShownSet(about, tuple(entries[:limit]))
    known = [name for kind in KINDS for name in sorted(shipped_sets(kind))]
    hint = did_you_mean(name, known) or f"; the shipped sets are {', '.join(known)}"
    raise PromptError(f"no prompt set {name!r}{hint}")


def _describe(name: str, kind: str) -> tuple[PromptSet, list[tuple[str, ...]]]:
    entries = _read_entries(name, kind)
    descriptions = json.loads((shipped("calibration") / "descriptions.json").read_text("utf-8"))
    return PromptSet(name, kind, len(entries), descriptions[kind].get(name, "")), entries


def _read_entries(name: str, kind: str) -> list[tuple[str, ...]]:
    # By path: in a folder that has a file of this name, the name would mean that file.
    path = shipped_sets(kind)[name]
    if kind == "pairs":
        return [
            (pair.prompt + pair.positive, pair.prompt + pair.negative) for pair in read_pairs(path)
        ]
    read = read_words if kind == "words" else read_prompts
    return [(text,) for text in read(path)]
