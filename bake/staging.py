"""A directory that is complete or absent: written under a hidden name, it appears by one rename.

Beside the output lies, while a run works, `.{name}.bake-{random}/` with

    model/      what becomes the output, and then the old output that it has changed places with
    lock        held with flock by the run that owns it: the kernel lets go when the process dies
    replaced/   for a moment, the old output, where the file system cannot exchange two directories
    discarded/  that old output once it is being removed, and is never put back

A run first clears away what dead runs for the same output have left; how a dead run is told from a
living one is `scratch`'s.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bake.copying import exchange
from bake.errors import OutputError
from bake.scratch import clear_dead_runs, make_work_directory, remove_lock

# What goes wrong with the place and not with the program.
_PLACE_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,
    errno.EIO,
    errno.ENAMETOOLONG,
    errno.ENOTEMPTY,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EBUSY,
    errno.ENOENT,  # another run has just put its own output there, or taken ours away
}


def check_output(output: Path, *, overwrite: bool, base_directory: Path | None = None) -> Path:
    """Whether `output` can become a bake's directory; returns it absolute, links resolved.

    Touches nothing, so it can be asked before any work. Raises OutputError where something is
    there already (without `overwrite`, or something that is no checkpoint), where it and the base
    would lie in each other, or where the place cannot be written.
    """
    try:
        return _check(output, output.expanduser().resolve(), overwrite, base_directory)
    except (OSError, RuntimeError) as error:  # no such user's home, a loop of links, a long name
        raise OutputError(
            f"{output} cannot be written: {getattr(error, 'strerror', None) or error}; "
            "give another output path."
        ) from error


@contextmanager
def staged_directory(
    output: Path, *, overwrite: bool = False, base_directory: Path | None = None
) -> Iterator[Path]:
    """Yields an empty directory that becomes `output` when the block ends without an exception.

    With `overwrite` an old output is replaced then, and not before. On any exception everything
    written is removed, `output` is as it was, and parents made for it are gone again. Raises
    OutputError, also for a full or read-only disk inside the block.
    """
    resolved = check_output(output, overwrite=overwrite, base_directory=base_directory)
    with _place_errors_named(output, resolved), _parents_made(resolved):
        clear_dead_runs(
            resolved.parent, _work_prefix(resolved), lambda work: _remove(work, resolved)
        )
        if resolved.exists():  # clearing may have put an old output back
            _check_replaceable(output, resolved, overwrite)
        with _work_directory(resolved) as work:
            staging = work / "model"
            staging.mkdir()
            yield staging
            _commit(staging, resolved, output, overwrite)


@contextmanager
def _place_errors_named(output: Path, resolved: Path) -> Iterator[None]:
    """Turns the system's errors about the output's place into one line that names the output."""
    try:
        yield
    except OSError as error:
        if not _is_about_the_place(error, resolved):
            raise
        raise OutputError(
            f"{output} cannot be written: {error.strerror or error}; nothing was left behind. "
            "Make room or give another output path."
        ) from error


@contextmanager
def _parents_made(resolved: Path) -> Iterator[None]:
    """Makes the directories above the output, and removes them again after an exception."""
    missing = [parent for parent in resolved.parents if not parent.exists()]
    try:
        resolved.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in missing:  # innermost first; one that somebody else uses by now stays
            with suppress(OSError):
                parent.rmdir()
        raise


def _work_prefix(resolved: Path) -> str:
    return f".{resolved.name}.bake-"


@contextmanager
def _work_directory(resolved: Path) -> Iterator[Path]:
    """A locked work directory beside the output, removed when the block ends."""
    work, lock = make_work_directory(resolved.parent, _work_prefix(resolved))
    try:
        yield work
    finally:
        try:
            _remove(work, resolved)
        finally:
            os.close(lock)


def _check(output: Path, resolved: Path, overwrite: bool, base_directory: Path | None) -> Path:
    if base_directory is not None:
        base = base_directory.resolve()
        if resolved == base or base in resolved.parents or resolved in base.parents:
            raise OutputError(
                f"{output} lies in the base {base_directory}, or around it: give another path."
            )
    if resolved.exists():
        _check_replaceable(output, resolved, overwrite)
    ancestor = next(parent for parent in resolved.parents if parent.exists())
    if not ancestor.is_dir():
        raise OutputError(
            f"{output} cannot be written: {ancestor} is a file; give another output path."
        )
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise OutputError(
            f"{output} cannot be written: {ancestor} is not writable; give another output path."
        )
    return resolved


def _check_replaceable(output: Path, resolved: Path, overwrite: bool) -> None:
    if not resolved.is_dir():
        raise OutputError(f"{output} is a file: give a directory that does not exist yet.")
    if not overwrite:
        raise OutputError(
            f"{output} exists already: give another output path, or overwrite it with --overwrite."
        )
    if any(resolved.iterdir()) and not _is_checkpoint(resolved):
        raise OutputError(
            f"{output} is neither a bake's output nor a checkpoint (config.json and safetensors "
            "weights) and is not overwritten: give another output path."
        )


def _is_checkpoint(directory: Path) -> bool:
    """Whether a directory is one that bake or save_pretrained wrote, and not somebody's project."""
    return (directory / "config.json").is_file() and (
        (directory / "bake.json").is_file() or any(directory.glob("*.safetensors"))
    )


def _commit(staging: Path, resolved: Path, output: Path, overwrite: bool) -> None:
    """Put the finished directory in its place, in one step where the file system can exchange two."""
    if not resolved.exists():
        staging.rename(resolved)
        return
    _check_replaceable(output, resolved, overwrite)  # it may have appeared while we worked
    if exchange(staging, resolved):
        return
    replaced = staging.parent / "replaced"
    resolved.rename(replaced)
    staging.rename(resolved)  # should this fail, `_remove` puts the old one back


def _remove(work: Path, resolved: Path) -> None:
    """Remove a work directory whose lock we hold, the lock last: without it the directory is empty.

    An old output that stands in it for a run that died between its two renames goes back first;
    where that fails, everything stays.
    """
    replaced, discarded = work / "replaced", work / "discarded"
    if replaced.exists():
        # Its files go one by one: should this run die meanwhile, the rest must not be taken for whole.
        replaced.rename(discarded if resolved.exists() else resolved)
    for directory in (work / "model", discarded):
        shutil.rmtree(directory, ignore_errors=True)
    remove_lock(work)


def _is_about_the_place(error: OSError, resolved: Path) -> bool:
    """Whether an error comes from writing the output, not from reading elsewhere."""
    if error.errno not in _PLACE_ERRORS:
        return False
    if not isinstance(error.filename, str):
        return True  # a write names no file; readers of the base raise CheckpointError
    path = Path(error.filename)
    return (
        path == resolved
        or path in resolved.parents
        or any(part.startswith(_work_prefix(resolved)) for part in path.parts)
    )
