"""What a baked directory sends: its files, after checking that they are the ones in its bake.json.

A thin bake that says so sends its base's shards too, though they are not on this machine: the Hub copies
them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bake.errors import HubError
from bake.hub.errors import one_line
from bake.io.foreign_json import read_json
from bake.io.hashing import hash_files, list_files

REQUIRED_FILES = ("config.json", "bake.json", "README.md")


@dataclass(frozen=True)
class OutgoingFile:
    """A file as it will be on the Hub; `path` is None for a shard that only the base's repo has."""

    path: Path | None
    size: int
    sha256: str

    def blob_id(self) -> str:
        """Return the id that git gives the content; asked only of what the Hub keeps in git itself."""
        if self.path is None:
            return ""
        content = self.path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """A directory that may be published: what bake.json records, and every file with its hash."""

    directory: Path
    record: Mapping[str, Any]
    files: Mapping[str, OutgoingFile]

    @property
    def proven(self) -> bool:
        """Whether the equivalence was shown; a thin or rescaled bake says that it was not."""
        return self.record["equivalence"]["passed"] is True

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def with_content(self, content: Mapping[str, bytes], folder: Path) -> Manifest:
        """Return the same manifest with other content of some of its files, which is put into `folder`."""
        changed = {}
        for name, data in content.items():
            (folder / name).write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            changed[name] = OutgoingFile(folder / name, len(data), digest)
        return replace(self, files={**self.files, **changed})


def read_manifest(directory: Path, *, unproven_allowed: bool = False) -> Manifest:
    """Return what a directory sends, after checking that it is what bake wrote and verified.

    A thin bake is accepted unproven, for its card says so; another only with `unproven_allowed`, and
    only where it says so itself. Raises HubError naming what is not as it should be.
    """
    names = file_names(directory)
    for name in REQUIRED_FILES:
        if name not in names:
            raise HubError(
                f"{directory} has no {name}, so it is not a finished bake: run `bake export` again"
            )
    remedy = f"run `bake verify {directory}`, or `bake export` again"
    try:
        record = read_json(directory / "bake.json", error=HubError, remedy=remedy)
        recorded = {name: (file["size"], file["sha256"]) for name, file in record["files"].items()}
        passed = record["equivalence"]["passed"]
        honest = record["equivalence"].get("verified") is False
        away = {} if passed is True else _shards_of_base(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(
            f"{directory}/bake.json does not record files and equivalence as a finished bake does "
            f"({type(error).__name__}: {one_line(error)}): {remedy}"
        ) from error
    if passed is not True and not (honest and (away or unproven_allowed)):
        raise HubError(f"{directory}/bake.json records no passed equivalence check: {remedy}")
    recorded |= {name: (file.size, file.sha256) for name, file in away.items()}
    if unmatched := sorted((recorded.keys() - away.keys()) ^ (set(names) - {"bake.json", *away})):
        state = "is missing" if unmatched[0] in recorded else "was added after the bake"
        raise HubError(f"{directory}/{unmatched[0]} {state}: {remedy}")
    here = measure(directory)
    for name, expected in recorded.items():
        if name in here and (here[name].size, here[name].sha256) != expected:
            raise HubError(f"{directory}/{name} was changed after the bake: {remedy}")
    return Manifest(directory, record, dict(sorted({**away, **here}.items())))


def _shards_of_base(record: Mapping[str, Any]) -> dict[str, OutgoingFile]:
    """The shards that a thin bake leaves to its base, where the Hub told their hashes."""
    found = {}
    for shard in record.get("thin", {}).get("shards", ()):
        if shard["sha256"] is None or not record["base"]["revision"]:
            raise HubError(
                f"a thin bake can be published where its base lies on the Hub, which copies the shards; "
                f"{record['base']['id']} does not: put {shard['base_file']} beside it as "
                f"{shard['name']} and run `bake verify`"
            )
        found[shard["name"]] = OutgoingFile(None, shard["size"], shard["sha256"])
    return found


def file_names(directory: Path) -> list[str]:
    """Return every file below the directory, as a sorted repository path; dotfiles are left out."""
    if not directory.is_dir():
        raise HubError(
            f"{directory} is not a directory: give the directory that `bake export` wrote"
        )
    return list_files(directory)


def measure(directory: Path) -> dict[str, OutgoingFile]:
    """Return every file of a directory with its size and SHA-256."""
    return {
        name: OutgoingFile(directory / name, file["size"], file["sha256"])
        for name, file in hash_files(directory).items()
    }
