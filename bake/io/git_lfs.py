"""Pointers of Git LFS: the three lines of text that stand for a large file until `git lfs pull`.

A repository cloned without LFS has them in place of weights, tokenizers and vectors
(https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md).
"""

from __future__ import annotations

from pathlib import Path

from bake.errors import BakeError, CheckpointError

_FIRST_LINE = b"version https://git-lfs.github.com/spec/"


def is_pointer(data: bytes) -> bool:
    """Tell whether the first bytes of a file, 8 or more, are those of a pointer."""
    return len(data) >= 8 and data.startswith(_FIRST_LINE[: len(data)])


def check_pointer(path: Path, error: type[BakeError] = CheckpointError) -> None:
    """Raise `error` where the file at `path` is a pointer; one that cannot be read is left to others."""
    try:
        if not path.is_file():  # A pipe would wait for ever.
            return
        with path.open("rb") as stream:
            data = stream.read(len(_FIRST_LINE))
    except OSError:
        return
    check_data(data, path, error)


def check_data(data: bytes, name: str | Path, error: type[BakeError] = CheckpointError) -> None:
    """Raise `error` where `data`, the beginning of the file that messages call `name`, is a pointer."""
    if is_pointer(data):
        raise error(
            f"{name} is a Git LFS pointer, not the file itself: run git lfs pull in its repository, "
            f"or download the file"
        )
