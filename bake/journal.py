"""Several files of one directory changed together: a run that dies changes none, or the next ends it.

What will change is written aside first, into `.bake-journal/` in the directory itself:

    files/{name}             a file that will take the place of the one of that name
    patches/{name}/{start}   bytes that will be written into that file from byte `start` on

One rename says that the journal is complete. Only then is anything put in its place, `bake.json` last, and
that can be begun again as often as it is broken off. A program that reads the directory in between finds
some files new and some old; every command of bake ends what it finds begun. The lock, flock's on the
directory, goes with the process that held it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bake.copying import sync, write_all
from bake.errors import OutputError

JOURNAL = ".bake-journal"
_LAST = "bake.json"  # Until it is there, it speaks of files with other hashes.


class Journal:
    """The changes to a directory, while they are gathered: files are written below `files`."""

    def __init__(self, folder: Path) -> None:
        self.files, self._patches = folder / "files", folder / "patches"
        self.files.mkdir(parents=True)

    def write(self, name: str, data: bytes) -> None:
        """Have `data` take the place of the file `name`."""
        _write(self.files / name, data)

    def patch(self, name: str, start: int, data: bytes) -> None:
        """Have `data` written into the file `name` from byte `start` on."""
        _write(self._patches / name / str(start), data)


@contextmanager
def changing(directory: Path) -> Iterator[Journal]:
    """Yield a journal whose changes are made when the block ends without an exception.

    Otherwise the directory stays as it was. Raises OutputError where it is none, where another run is
    changing it, or where it cannot be written.
    """
    with _locked(directory):
        _finish(directory)
        partial = directory / f"{JOURNAL}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            yield Journal(partial)
            for path in partial.rglob("*"):
                if path.is_file():
                    sync(path)
            partial.rename(directory / JOURNAL)
        except OSError as error:
            raise OutputError(
                f"{directory} cannot be written: {error.strerror or error}; it is as it was"
            ) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _finish(directory)


def finish_changes(directory: Path) -> None:
    """End the changes that a dead run has begun. Raises OutputError where they cannot be made."""
    if (directory / JOURNAL).is_dir():
        with _locked(directory):
            _finish(directory)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise OutputError(
            f"{directory} cannot be opened ({error.strerror}): give a directory that bake export wrote"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OutputError(f"{directory} is being changed by another run: wait for it") from None
    except OSError:  # This file system has no locks.
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def _finish(directory: Path) -> None:
    """Put in its place what a complete journal holds, and remove it."""
    journal = directory / JOURNAL
    if not journal.is_dir():
        return
    files, patches = journal / "files", journal / "patches"
    try:
        for path in (path for path in patches.rglob("*") if path.is_file()):
            _patch(directory / path.parent.relative_to(patches), int(path.name), path.read_bytes())
        written = [path.relative_to(files) for path in files.rglob("*") if path.is_file()]
        for name in sorted(written, key=lambda name: (name.name == _LAST, name)):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (files / name).replace(directory / name)
        shutil.rmtree(journal)
    except OSError as error:
        raise OutputError(
            f"{directory} cannot be written: {error.strerror or error}; its change is half made, and the "
            f"next command on it goes on"
        ) from None


def _patch(path: Path, start: int, data: bytes) -> None:
    with path.open("r+b", buffering=0) as stream:
        stream.seek(start)
        write_all(stream, memoryview(data))
        os.fsync(stream.fileno())


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
