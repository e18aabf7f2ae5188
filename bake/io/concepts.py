"""What a direction means, in words: a shipped set's own, else the name of the pairs or the file.

The words are for people, on a card and in a directory's name; nothing is computed from them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from bake.io.shipped import DEMO_NAME, shipped

# Names of files that say nothing of what is in them.
_GENERIC = {"direction", "directions", "pairs", "vector", "vectors", "control-vector", "steering"}
_LONGEST = 40
_SUFFIXES = {
    *(".jsonl", ".json", ".csv", ".safetensors", ".gguf", ".npy", ".npz", ".pt", ".pth", ".bin"),
    *(".yaml", ".yml", ".txt"),
}
# What stands behind a file's name: an autoencoder's row, a position, a strength.
_PART = re.compile(r"(\.\w{2,11})[:\[].*")


@cache
def shipped_concepts() -> Mapping[str, tuple[str, str]]:
    """Return {set: (what its direction makes of a model, what the reverse does)}."""
    described = json.loads((shipped("calibration") / "descriptions.json").read_text("utf-8"))
    return {name: (toward, away) for name, (toward, away) in described["concepts"].items()}


def name_of(reference: str) -> str:
    """Return what a file of pairs or a direction is called, without folders and suffixes.

    FILE:TENSOR[INDEX] is called FILE.
    """
    path = Path(_PART.sub(r"\1", reference))
    return path.stem if path.suffix.lower() in _SUFFIXES else path.name


def describe_concept(name: str | None, multiplier: float) -> str:
    """Return what a push by a direction of that name makes of a model, such as "more formal".

    A name that ships has its own words for either sign; another is quoted as it is.
    """
    known = shipped_concepts().get(name or "")
    if known:
        return known[multiplier < 0]
    if name is None or name.lower() in _GENERIC:
        return "steered" if multiplier > 0 else "steered in reverse"
    return f"steered {'by' if multiplier > 0 else 'against'} {name}"


def slug_of(text: str) -> str:
    """Return a text as a part of a file name or a tag: letters, digits and dashes, 40 at most."""
    short = re.sub(r"^(more( in the)?|steered( by)?) ", "", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", short).strip("-")[:_LONGEST].strip("-") or "steered"


def default_output(model: str, references: Sequence[str], multiplier: float) -> str:
    """Return the directory that a bake goes into where the user names none: ./MODEL-CONCEPT.

    references: the pairs, or the directions.
    """
    path = Path(model)
    base = path.resolve().name if path.exists() else model.rstrip("/").rpartition("/")[2]
    names = [DEMO_NAME if entry == DEMO_NAME else name_of(entry) for entry in references]
    words = [slug_of(describe_concept(name, multiplier)) for name in names]
    return "-".join([base or "model", *words])
