"""Completing a thin bake: which base shards it needs, and the record of the proof once they are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bake.card.render import render_card
from bake.checkpoint.writer import WrittenWeights
from bake.errors import CheckpointError, OutputError
from bake.io.hashing import hash_files
from bake.io.output_files import CARD_FILE, RESULT_FILE
from bake.io.staging import changed_directory
from bake.pipeline.record import encode_result
from bake.proof.equivalence import Equivalence

_SHOWN = 3
_KEY = "thin"


@dataclass(frozen=True)
class NeededShard:
    """A base shard under the name that the output's index gives it; sha256 where the Hub knows it."""

    name: str
    base_file: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Unproven:
    """A proof that has not been made, and why."""

    rounding_allowed: bool
    reason: str = "a thin bake holds none of its base's shards, so there was nothing to load"
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `bake.json`."""
        return {
            "passed": False,
            "verified": False,
            "reason": self.reason,
            "rounding_allowed": self.rounding_allowed,
        }


def find_needs(written: WrittenWeights) -> tuple[NeededShard, ...]:
    """Return the base's shards that were left out of what was written."""
    return tuple(
        NeededShard(file.name, str(file.base_file), file.size, file.known_sha256)
        for file in written.left_out
    )


def describe_needs(needs: Sequence[NeededShard]) -> dict[str, Any]:
    """Return the part of `bake.json` that makes a bake a thin one; nothing for any other."""
    return {_KEY: {"shards": [asdict(shard) for shard in needs]}} if needs else {}


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
    record = {
        key: value for key, value in recorded.items() if key not in (_KEY, "equivalence", "files")
    }
    record["equivalence"] = equivalence.to_dict()
    try:
        with changed_directory(directory) as staging:
            write_record(staging, directory, record, words)
    except OutputError as error:
        raise OutputError(
            f"the bake is proven, but that cannot be recorded: {error}; mend that and verify it again"
        ) from error


def write_record(
    staging: Path,
    directory: Path,
    record: Mapping[str, Any],
    words: Mapping[str, Any],
    *,
    known: Mapping[str, str] | None = None,
) -> None:
    """Write the card and `bake.json`, with each file's hash after the commit, into `staging`.

    staging: what changes in `directory`, see `staging.changed_directory`. record: `bake.json` without
    "files". words: what the card needs besides. known: {file of `directory`: its SHA-256}.
    """
    (staging / CARD_FILE).write_text(render_card({**record, **words}), encoding="utf-8")
    new = hash_files(staging)
    kept = hash_files(directory, known=known, exclude=(RESULT_FILE, *new))
    result = {**record, "files": dict(sorted({**kept, **new}.items()))}
    (staging / RESULT_FILE).write_text(encode_result(result), encoding="utf-8")
