"""Copying files and byte ranges as cheaply as the file system allows.

A copy-on-write clone costs no bytes where the file system has it (btrfs, XFS, …); a copy inside the
kernel saves the trip through this process; plain reads and writes always work. All three give the
same bytes. Links cost none anywhere, but make two directories share one file, so they are made only
where somebody asked for them, and never of a file that will be written to.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from bake.errors import CheckpointError, OutputError

SHARDS = ("copy", "hardlink", "symlink")  # how shards without a change get into the output

Progress = Callable[[int], None]  # told the number of bytes since the last call

_FICLONE = 0x40049409  # Linux's ioctl: share all blocks of another file
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100  # of Linux's renameat2
_CHUNK = 64 * 1024 * 1024  # bytes between two reports of progress

# What the kernel answers when a way of copying is not available between two files. Anything else,
# a full disk above all, is an error and not a reason to try another way.
_NOT_AVAILABLE = {
    errno.EOPNOTSUPP,
    errno.ENOTTY,
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EBADF,
    errno.EPERM,
    errno.ETXTBSY,
}


def open_source(path: Path) -> BinaryIO:
    """Open a file of the base; what is wrong with it is the base's fault, not the output's."""
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def copy_file(source: Path, target: Path, progress: Progress | None = None) -> None:
    """Copy the content of `source`, through symbolic links, to the new file `target`."""
    with open_source(source) as reading, target.open("xb", buffering=0) as writing:
        size = os.fstat(reading.fileno()).st_size
        if _clone(reading.fileno(), writing.fileno()):
            if progress is not None:
                progress(size)
        else:
            copy_range(reading, 0, size, writing, progress)


def link_file(source: Path, target: Path, kind: str) -> None:
    """Make `target` a "hardlink" or "symlink" to the file behind `source`, links followed.

    A symbolic link is absolute, so that the output's directory may move. Raises OutputError where
    the file system has no such links, or the two lie on different ones.
    """
    file = source.resolve()
    try:
        if kind == "symlink":
            target.symlink_to(file)
        else:
            target.hardlink_to(file)
    except OSError as error:
        if error.errno not in _NOT_AVAILABLE | {errno.EMLINK}:
            raise
        reason = (
            "the base and the output lie on different file systems"
            if error.errno == errno.EXDEV
            else error.strerror
        )
        raise OutputError(
            f"{target.name} cannot be a {kind} to the base's {source.name} ({reason}): "
            "use --shards symlink or copy, or an output on the base's file system."
        ) from error


def can_clone(source: Path, directory: Path) -> bool:
    """Whether files like `source` can be cloned into `directory`, found out by doing it."""
    probe = directory / ".clone-probe"
    try:
        with open_source(source) as reading, probe.open("xb", buffering=0) as writing:
            return _clone(reading.fileno(), writing.fileno())
    finally:
        probe.unlink(missing_ok=True)


def copy_range(
    source: BinaryIO, start: int, size: int, target: BinaryIO, progress: Progress | None = None
) -> None:
    """Append `size` bytes of `source`, from byte `start` on, to the unbuffered `target`.

    Raises CheckpointError where `source` ends too early.
    """
    done = 0
    in_kernel = hasattr(os, "copy_file_range")
    while done < size:
        count = min(_CHUNK, size - done)
        copied = 0
        if in_kernel:
            copied = _copy_in_kernel(source.fileno(), start + done, count, target.fileno())
            # Some file systems answer 0 for a file that is not at its end: read it instead.
            in_kernel = copied > 0
        if not in_kernel:
            data = os.pread(source.fileno(), count, start + done)
            if not data:
                raise CheckpointError(
                    f"{source.name} ended while it was copied: is it being changed?"
                )
            write_all(target, memoryview(data))
            copied = len(data)
        done += copied
        if progress is not None:
            progress(copied)


def write_all(target: BinaryIO, data: memoryview) -> None:
    """Write all of `data` to the unbuffered `target`; one write takes at most 2 GiB."""
    while data:
        data = data[target.write(data) :]


def sync(path: Path) -> None:
    """Have the file's bytes on the disk before anything that relies on them."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def exchange(first: Path, second: Path) -> bool:
    """Have two directories change places in one step, so that neither name is ever without one.

    Returns False, and does nothing, where the system or the file system has no such step.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    paths = (os.fsencode(first), os.fsencode(second))
    if rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_AVAILABLE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def free_bytes(directory: Path) -> int:
    """Bytes that may still be written to the file system of `directory`."""
    return shutil.disk_usage(directory).free


def _clone(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in _NOT_AVAILABLE:
            return False
        raise
    return True


def _copy_in_kernel(source: int, start: int, count: int, target: int) -> int:
    try:
        return os.copy_file_range(source, target, count, offset_src=start)
    except OSError as error:
        if error.errno in _NOT_AVAILABLE:
            return 0
        raise
