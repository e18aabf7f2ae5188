"""Completing a thin bake: which base shards it needs, and the record of the proof once they are there.

The record is one rename: the card is replaced first and bake.json last, so that a run that dies in
between leaves a directory that still says "not verified".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bake.card import render_card
from bake.checkpoint import Checkpoint
from bake.copying import sync
from bake.equivalence import Equivalence
from bake.errors import CheckpointError, OutputError
from bake.hashing import hash_files
from bake.layout import PlannedFile
from bake.record import CARD_FILE, RESULT_FILE, encode_result

_SHOWN = 3
_KEY = "thin"


@dataclass(frozen=True)
class NeededShard:
    """A base shard under the name that the output's index gives it; sha256 where the Hub knows it."""

    name: str
    base_file: str
    size: int
    sha256: str | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, file: PlannedFile) -> NeededShard:
        """Describe a file that a thin bake leaves out."""
        base_file = str(file.base_file)
        return cls(file.name, base_file, file.size, checkpoint.known_sha256(base_file))


def unproven(*, rounding_allowed: bool) -> dict[str, Any]:
    """Return what `bake.json` says of a proof that has not been made."""
    return {
        "passed": False,
        "verified": False,
        "reason": "a thin bake holds none of its base's shards, so there was nothing to load",
        "rounding_allowed": rounding_allowed,
    }


def describe_needs(needs: Sequence[NeededShard]) -> dict[str, Any]:
    """Return the part of `bake.json` that makes a bake a thin one."""
    return {_KEY: {"shards": [asdict(shard) for shard in needs]}}


def is_thin(recorded: Mapping[str, Any]) -> bool:
    """Tell whether a bake is thin and not proven yet, from its `bake.json`."""
    return _KEY in recorded


def is_unproven(recorded: Mapping[str, Any]) -> bool:
    """Tell whether a bake says of itself that it was not verified: a thin or a rescaled one."""
    return recorded["equivalence"].get("verified") is False


def check_shards(directory: Path, recorded: Mapping[str, Any]) -> None:
    """Raise CheckpointError naming the base shards that a thin bake still lacks, and their base."""
    if not is_thin(recorded):
        return
    try:
        needs = [NeededShard(**shard) for shard in recorded[_KEY]["shards"]]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"bake.json in {directory} is damaged: {error!r}") from None
    for shard in needs:
        path = directory / shard.name
        if path.is_file() and path.stat().st_size != shard.size:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes and the base's {shard.base_file} has "
                f"{shard.size}: copy or link it again"
            )
    missing = [shard for shard in needs if not (directory / shard.name).is_file()]
    if not missing:
        return
    base = recorded["base"]
    where = f"{base['id']}" + (f" at revision {base['revision']}" if base.get("revision") else "")
    names = ", ".join(f"{shard.base_file} as {shard.name}" for shard in missing[:_SHOWN])
    more = f" and {len(missing) - _SHOWN} more (listed in bake.json)" * (len(missing) > _SHOWN)
    raise CheckpointError(
        f"{directory} is a thin bake and lacks {len(missing)} of {len(needs)} shards of {where}: "
        f"copy or link {names}{more} into it, then run bake verify {directory} --base MODEL"
    )


def record_proof(
    directory: Path,
    recorded: Mapping[str, Any],
    equivalence: Equivalence,
    words: Mapping[str, Any],
) -> None:
    """Replace an unproven bake's card and `bake.json` by those of a proven one.

    words: what the card needs beside `bake.json` (see `card.card_words`). The result is what a
    whole export would have written. Raises OutputError where the directory cannot be written.
    """
    story = {
        key: value for key, value in recorded.items() if key not in (_KEY, "equivalence", "files")
    }
    proof = equivalence.to_dict()
    try:
        card = render_card({**story, "equivalence": proof, **words})
        _replace(directory / CARD_FILE, card)
        files = hash_files(directory, exclude=(RESULT_FILE,))
        result = {**story, "equivalence": proof, "files": files}
        _replace(directory / RESULT_FILE, encode_result(result))
    except OSError as error:
        raise OutputError(
            f"{directory} is proven, but that cannot be recorded: {error.strerror or error}; make it "
            "writable and verify it again"
        ) from error


def _partial(name: str) -> str:
    return f".{name}.partial"


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(_partial(path.name))
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
