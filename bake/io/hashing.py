"""The SHA-256 and size of every file of a directory, for `bake.json`.

Its own stage because hashing costs several times what copying does. hashlib releases the
interpreter's lock, so threads share the work file by file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

from bake.errors import CheckpointError
from bake.io.copy import Progress

_BUFFER = 4 * 1024 * 1024


class FileHash(TypedDict):
    """One entry of `files` in bake.json."""

    sha256: str
    size: int


def hash_files(
    directory: Path,
    *,
    known: Mapping[str, str] | None = None,
    exclude: Collection[str] = (),
    progress: Progress | None = None,
) -> dict[str, FileHash]:
    """{name: {"sha256", "size"}} of all files under `directory`, sorted, with forward slashes.

    Hidden files are no part of a bake. `known` gives hashes that need no work (name → hex digest),
    `exclude` names to leave out. `progress` is called from several threads. Raises CheckpointError for
    a file that cannot be read.
    """
    known = known or {}
    names = [name for name in list_files(directory) if name not in exclude]

    def digest_of(name: str) -> str:
        return known.get(name) or _hash(directory / name, progress)

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        digests = pool.map(digest_of, names)
        return {
            name: {"sha256": digest, "size": (directory / name).stat().st_size}
            for name, digest in zip(names, digests, strict=True)
        }


def list_files(directory: Path) -> list[str]:
    """Return every file below a directory by its path in it, sorted; hidden ones are left out."""
    names = [
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
    ]
    return sorted(name for name in names if not is_hidden(name))


def is_hidden(name: str) -> bool:
    """Tell whether a path is, or lies in, something whose name begins with a dot."""
    return any(part.startswith(".") for part in name.split("/"))


def _hash(path: Path, progress: Progress | None) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_BUFFER))
    try:
        with path.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                digest.update(buffer[:count])
                if progress is not None:
                    progress(count)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    return digest.hexdigest()
