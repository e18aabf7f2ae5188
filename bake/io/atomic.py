"""A small file that is complete or absent: what `bake direction` and `bake calibrate` write."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from bake.errors import OutputError
from bake.io.foreign_paths import check_writable_name


def check_file(path: Path) -> None:
    """Raise OutputError where no file can be written at `path`, before the work for it is done."""
    check_writable_name(path, error=OutputError)
    if path.is_dir():
        raise OutputError(f"{path} is a directory; give the path of a file")
    check_above(path)


def check_above(path: Path) -> None:
    """Raise OutputError where nothing can be made at `path`, because of what is above it.

    A file without a name is made there and is gone at once: some places take none whatever their
    permissions say.
    """
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise OutputError(f"{path} cannot be written: {above} is a file; give another output path")
    try:
        writable = os.access(above, os.W_OK | os.X_OK)
        if writable:
            tempfile.TemporaryFile(dir=above).close()
    except OSError:
        writable = False
    if not writable:
        raise OutputError(
            f"{path} cannot be written: {above} is not writable; give another output path"
        )


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; raise OutputError where it cannot be written."""
    check_file(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # Whoever made it, it may be a link.
        with partial.open("xb") as file:
            file.write(data)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None
