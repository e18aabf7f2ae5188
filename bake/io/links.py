"""Links in a directory that others made: none that leads out is followed, and which it was is said.

Two things make an exception: directories that the user named in the same command, and a weight file
whose content is what `bake.json` says by its SHA-256, so that nothing comes in that its author did not
have (`--shards symlink`, and thin bakes whose base's shards were linked).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from bake.errors import BakeError, CheckpointError
from bake.io.foreign_json import read_json
from bake.io.foreign_paths import leads_out
from bake.io.output_files import RESULT_FILE

_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB_FOLDERS = ("models--", "datasets--", "spaces--")


def check_directory(
    directory: Path,
    *,
    allowed: Collection[Path] = (),
    error: type[BakeError] = CheckpointError,
) -> None:
    """Raise `error` where a file or folder of a directory is a link that leads out of it.

    transformers reads more of a directory than bake copies, so all of it is looked at, but for what is
    hidden. allowed: directories that the user named too, which links may lead into.
    """
    outside = [name for name in _find_links(directory) if leads_out(directory, name, allowed)]
    recorded = _read_recorded(directory) if outside else {}
    for name in outside:
        if _is_recorded(directory / name, recorded.get(name)):
            continue
        remedy = "put a copy of the file there if it belongs to the model"
        if recorded and name.endswith(".safetensors"):
            remedy = (
                "its content is not what bake.json tells by a SHA-256. Put a copy of the shard there, or "
                "name its base with bake verify --base"
            )
        raise error(
            f"{directory / name} is a link out of its directory, which bake does not follow: {remedy}"
        )


def _find_links(directory: Path) -> Iterator[str]:
    """Yield the links below a directory, of files and of folders; hidden names are left out."""
    for folder, folders, files in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in (*folders, *sorted(files)):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_symlink():
                yield path.relative_to(directory).as_posix()


def _read_recorded(directory: Path) -> dict[str, Any]:
    """Return {file: {"sha256", "size"}} as `bake.json` tells; {} where there is none that can be read."""
    path = directory / RESULT_FILE
    if not path.is_file() or path.is_symlink() or leads_out(directory, RESULT_FILE):
        return {}
    try:
        values = read_json(path)
    except BakeError:
        return {}
    files, thin = values.get("files"), values.get("thin")
    found = dict(files) if isinstance(files, dict) else {}
    for shard in (thin.get("shards") if isinstance(thin, dict) else None) or ():
        if isinstance(shard, dict) and isinstance(shard.get("name"), str):
            found[shard["name"]] = shard
    return found


def _is_recorded(path: Path, entry: Any) -> bool:
    """Whether a link leads to a regular file with the recorded size and SHA-256."""
    if not isinstance(entry, Mapping) or path.suffix != ".safetensors":
        return False
    try:
        target = path.resolve()
        status = target.stat()
        if not target.is_file() or status.st_size != entry.get("size"):
            return False
        # The Hub's cache names a large file by its hash, and nobody waits for it to be read twice.
        if _is_hub_blob(target):
            return bool(target.name == entry.get("sha256"))
        return _hash(target, status.st_size, status.st_mtime_ns) == entry.get("sha256")
    except OSError:
        return False


def _is_hub_blob(target: Path) -> bool:
    return (
        _SHA256.fullmatch(target.name) is not None
        and target.parent.name == "blobs"
        and target.parent.parent.name.startswith(_HUB_FOLDERS)
    )


@lru_cache(maxsize=4096)
def _hash(target: Path, size: int, changed: int) -> str:
    """Return a file's SHA-256; a command that opens a directory several times reads it once."""
    with target.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
