"""A directory that is complete or absent: written under a hidden name, it appears by one rename.

`staged_directory` is for a new one, `changed_directory` for files that change together in one that is
there: what does not change is linked into the new directory, and the two change places. Nothing is ever
written into a directory that others can see.

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

from bake.errors import OutputError
from bake.io.atomic import check_above
from bake.io.copy import copy_file, exchange, sync
from bake.io.foreign_paths import check_writable_name, expand_user
from bake.io.work_directory import clear_dead_runs, make_work_directory, remove_lock, try_lock
from bake.support.progress import announce

# What earlier versions left behind where they died; it is never acted on.
_OLD_JOURNALS = {".bake-journal", ".bake-journal.partial"}

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
    errno.EXDEV,  # a directory of an image's lower layer, say, which cannot be renamed
    errno.ENOENT,  # another run has just put its own output there, or taken ours away
}


def check_output(output: Path, *, overwrite: bool, base_directory: Path | None = None) -> Path:
    """Whether `output` can become a bake's directory; returns it absolute, links resolved.

    Touches nothing, so it can be asked before any work. Raises OutputError where something is
    there already (without `overwrite`, or something that is no checkpoint), where it and the base
    would lie in each other, or where the place cannot be written.
    """
    try:
        return _check(output, _resolve(output), overwrite, base_directory)
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
def changed_directory(directory: Path) -> Iterator[Path]:
    """Yields an empty directory; what is written there is changed or new in `directory` afterwards.

    Everything else in `directory`, hidden and foreign files too, comes along by hard link (a copy where
    links cannot be made), and links as they are; then the two directories change places. No file is
    written in place, so one that other directories share stays theirs. On any exception `directory` is as
    it was. A link to the directory is followed. Raises OutputError where there is none, where another
    run is changing it, or where it cannot be written.
    """
    resolved = _resolve(directory)
    remedy = "it is as it was. Make room, or copy the directory to where you may write."
    with _place_errors_named(directory, resolved, remedy):
        if resolved.parent.is_dir() and os.access(resolved.parent, os.W_OK):
            clear_dead_runs(
                resolved.parent, _work_prefix(resolved), lambda work: _remove(work, resolved)
            )
        if not resolved.is_dir():
            raise OutputError(f"no directory {directory}; give one that bake export wrote")
        if not os.access(resolved, os.W_OK | os.X_OK):
            raise OutputError(f"{directory} cannot be written: it is read-only; copy it elsewhere")
        with _alone_in(directory, resolved) as descriptor, _work_directory(resolved) as work:
            staging = work / "model"
            staging.mkdir()
            yield staging
            for path in staging.rglob("*"):
                if path.is_file():
                    sync(path)
            _bring_along(resolved, staging)
            _take_over(resolved, staging)
            os.utime(staging)
            if not _is_same(descriptor, resolved):
                raise OutputError(f"{directory} was replaced meanwhile by another run: try again")
            _exchange(staging, resolved)


@contextmanager
def _alone_in(directory: Path, resolved: Path) -> Iterator[int]:
    """Holds the lock of a directory, flock's on itself; yields its descriptor."""
    while True:
        descriptor = os.open(resolved, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if try_lock(descriptor) is False:
                raise OutputError(f"{directory} is being changed by another run: wait for it")
            if _is_same(descriptor, resolved):  # Else another run put a new one there meanwhile.
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _is_same(descriptor: int, resolved: Path) -> bool:
    return os.path.samestat(os.fstat(descriptor), resolved.stat())


def _bring_along(old: Path, new: Path) -> None:
    """Link into `new` what lies in `old` and has no successor there, folder by folder."""
    for entry in sorted(os.scandir(old), key=lambda entry: entry.name):
        if entry.name in _OLD_JOURNALS:
            continue
        source, target = Path(entry.path), new / entry.name
        if entry.is_dir(follow_symlinks=False):
            if target.exists() and not target.is_dir():
                continue
            target.mkdir(exist_ok=True)
            _bring_along(source, target)
            _take_over(source, target)
        elif not os.path.lexists(target):
            _link(source, target)
        elif entry.is_file(follow_symlinks=False) and target.is_file():
            _take_over(source, target)


def _link(source: Path, target: Path) -> None:
    if source.is_symlink():
        target.symlink_to(source.readlink())
        return
    try:
        os.link(source, target)
    except OSError:  # another file system, one without links, or another user's file
        copy_file(source, target)
        _take_over(source, target)


def _take_over(old: Path, new: Path) -> None:
    """Give `new` the permissions of what it takes the place of, and its owner where that is allowed."""
    status = old.stat()
    with suppress(OSError):
        os.chown(new, status.st_uid, status.st_gid)
    shutil.copystat(old, new) if new.is_dir() else shutil.copymode(old, new)


@contextmanager
def _place_errors_named(
    output: Path,
    resolved: Path,
    remedy: str = "nothing was left behind. Make room or give another output path.",
) -> Iterator[None]:
    """Turns the system's errors about the output's place into one line that names the output."""
    try:
        yield
    except OSError as error:
        if not _is_about_the_place(error, resolved):
            raise
        raise OutputError(
            f"{output} cannot be written: {error.strerror or error}; {remedy}"
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


def _resolve(output: Path) -> Path:
    path = expand_user(output)
    check_writable_name(path, error=OutputError)
    return path.resolve()


def _check(output: Path, resolved: Path, overwrite: bool, base_directory: Path | None) -> Path:
    if base_directory is not None:
        base = base_directory.resolve()
        if resolved == base or base in resolved.parents or resolved in base.parents:
            raise OutputError(
                f"{output} lies in the base {base_directory}, or around it: give another path."
            )
    if resolved.exists():
        _check_replaceable(output, resolved, overwrite)
    check_above(resolved)
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
    _exchange(staging, resolved)


def _exchange(staging: Path, resolved: Path) -> None:
    """Have the finished directory and the old one change places."""
    stands_in_it = _working_directory_in(resolved)
    if not exchange(staging, resolved):
        replaced = staging.parent / "replaced"
        resolved.rename(replaced)
        staging.rename(resolved)  # should this fail, `_remove` puts the old one back
    if stands_in_it is not None:
        with suppress(OSError):
            os.chdir(stands_in_it)
        announce(f"{resolved} is a new directory now: a shell that stands in it needs cd .")


def _working_directory_in(resolved: Path) -> Path | None:
    """The working directory, where it is the directory or lies in it."""
    try:
        here = Path.cwd()
    except OSError:  # it was removed
        return None
    return here if here.is_relative_to(resolved) else None


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
        or resolved in path.parents
        or any(part.startswith(_work_prefix(resolved)) for part in path.parts)
    )
