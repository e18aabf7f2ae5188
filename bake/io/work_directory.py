"""Work directories that a dying process cannot leave behind for good.

A work directory `{prefix}{random}/` holds a file `lock`, locked with flock by the run that owns it:
the kernel lets go when the process dies. The next run with the same prefix clears away what dead runs
have left; a living run's lock is held, so it is never touched, whatever its process id, container or
age. Where the file system has no locks nothing is cleared away. What lies in a work directory, and
what has to happen before it is removed, is its user's business.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bake.errors import OutputError

_ATTEMPTS = 10


def make_work_directory(parent: Path, prefix: str, *, mode: int = 0o777) -> tuple[Path, int]:
    """A new work directory in `parent`, and the descriptor that holds its lock.

    Between making the directory and locking it another run may take it for a dead run's and clear
    it away; the loop notices and makes another.
    """
    for _ in range(_ATTEMPTS):
        work = parent / f"{prefix}{secrets.token_hex(4)}"
        work.mkdir(mode=mode)
        lock_path = work / "lock"
        try:
            lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileNotFoundError:
            continue
        if try_lock(lock) is not False and lock_path.exists():
            return work, lock
        os.close(lock)
    raise OutputError(f"{parent} is being cleared by other runs: try again.")


def clear_dead_runs(parent: Path, prefix: str, remove: Callable[[Path], None]) -> None:
    """Call `remove` for every work directory whose run is dead; its lock is held meanwhile."""
    for work in sorted(parent.iterdir()):
        if not work.name.startswith(prefix) or not _is_own_directory(work):
            continue
        try:
            lock = os.open(work / "lock", os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            # No lock yet, or no longer: empty if it is ours at all, and rmdir removes nothing else.
            with suppress(OSError):
                work.rmdir()
            continue
        try:
            if try_lock(lock):
                remove(work)
        finally:
            os.close(lock)


def remove_lock(work: Path) -> None:
    """Remove the lock, and the directory with it: the last step, so an unlocked one is empty."""
    with suppress(OSError):
        work.joinpath("lock").unlink()
        work.rmdir()


@contextmanager
def scratch_directory(beside: Path, prefix: str) -> Iterator[Path]:
    """Yield an empty directory that is removed when the block ends, by the next run if this one dies.

    It lies beside `beside`, so that clones and links of its files cost nothing, or where temporary files
    go (TMPDIR) where nothing can be written there.
    """
    parent = beside.resolve().parent
    if not os.access(parent, os.W_OK):
        parent = Path(tempfile.gettempdir())
    with _scratch(parent, prefix) as folder:
        yield folder


@contextmanager
def temporary_directory(prefix: str) -> Iterator[Path]:
    """Yield an empty directory where temporary files go, removed as `scratch_directory`'s is."""
    with _scratch(Path(tempfile.gettempdir()), prefix) as folder:
        yield folder


@contextmanager
def _scratch(parent: Path, prefix: str) -> Iterator[Path]:
    clear_dead_runs(parent, prefix, remove_scratch)
    work, lock = make_work_directory(parent, prefix, mode=0o700)
    try:
        (work / "model").mkdir()
        yield work / "model"
    finally:
        remove_scratch(work)
        os.close(lock)


def remove_scratch(work: Path) -> None:
    """Remove a work directory that holds nothing but `model/` and the lock, the lock last."""
    shutil.rmtree(work / "model", ignore_errors=True)
    remove_lock(work)


def _is_own_directory(path: Path) -> bool:
    """Whether it is a directory and no link to one, and of this user; others may write in /tmp."""
    try:
        status = path.lstat()
    except OSError:  # It has gone.
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def try_lock(descriptor: int) -> bool | None:
    """True: locked by us. False: another process holds it. None: this file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
