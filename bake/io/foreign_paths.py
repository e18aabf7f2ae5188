"""The one way from a name in a file that others wrote to a path: inside the directory, and no link.

`resolve_name` is for every name that bake.json, an index, a config or a report gives. `check_links` is for
what lies in a directory: a link that leads out of it is not followed, because what it points to belongs
to somebody else; the Hub's cache, whose snapshots are links to `../../blobs/`, is the exception.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath

from bake.errors import BakeError, CheckpointError

MAX_NAME = 255  # What file systems take for one component.
MAX_FOLDERS = 8
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # A git blob's id, or a large file's SHA-256.


def check_name(
    name: object,
    source: str | Path,
    *,
    suffixes: str | tuple[str, ...] = "",
    error: type[BakeError] = CheckpointError,
) -> str:
    """Return a file's name, relative with forward slashes, as a file of others gives it.

    source: the file that gives it, for the message. suffixes: the endings that are expected. Raises
    `error` where the name is empty, absolute, too long, has a dot-name (`..` and `.hidden` alike), a
    backslash or a control character in it, or ends in something else.
    """

    def refuse(problem: str) -> BakeError:
        return error(f"{source} names the file {_shorten(name)}, {problem}: do not trust it")

    if not isinstance(name, str) or not name:
        raise refuse("which is no name")
    if not name.isprintable() or "\\" in name:
        raise refuse("which has a backslash or an unprintable character")
    parts = name.split("/")
    if PurePosixPath(name).is_absolute() or ".." in parts or re.match(r"[A-Za-z]:", name):
        raise refuse("which leads out of its directory")
    if any(not part or part.startswith(".") for part in parts):
        raise refuse("which is hidden or has an empty part")
    if len(parts) > MAX_FOLDERS or any(len(part.encode()) > MAX_NAME for part in parts):
        raise refuse("which is too long")
    if suffixes and not name.endswith(suffixes):
        wanted = " or ".join((suffixes,) if isinstance(suffixes, str) else suffixes)
        raise refuse(f"which does not end in {wanted}")
    return name


def check_names(
    names: Iterable[object],
    source: str | Path,
    *,
    suffixes: str | tuple[str, ...] = "",
    error: type[BakeError] = CheckpointError,
) -> list[str]:
    """Return several names as `check_name` does; raise `error` also where two are the same file.

    Names that differ in case only count as the same, as they are on some file systems.
    """
    checked = [check_name(name, source, suffixes=suffixes, error=error) for name in names]
    seen: set[str] = set()
    for name in checked:
        if name.casefold() in seen:
            raise error(f"{source} names the file {_shorten(name)} twice: do not trust it")
        seen.add(name.casefold())
    return checked


def resolve_name(
    directory: Path,
    name: object,
    source: str | Path,
    *,
    suffixes: str | tuple[str, ...] = "",
    error: type[BakeError] = CheckpointError,
) -> Path:
    """Return the path in `directory` that a name from a file means, see `check_name`.

    Raises `error` also where a link lies on the way: a folder or the file itself. What is only read,
    and may be a Hub cache's link, goes through `check_links` instead.
    """
    checked = check_name(name, source, suffixes=suffixes, error=error)
    path = directory
    for part in checked.split("/"):
        path = path / part
        if path.is_symlink():
            raise error(
                f"{path} is a link, and {source} names it for a file of its own directory: "
                f"put the file itself there"
            )
    return path


def leads_out(directory: Path, name: str, allowed: Collection[Path] = ()) -> bool:
    """Tell whether the file `name` of a directory is reached through a link that leads out of it.

    False for links within the directory, for a Hub cache's links to its blobs, and for links to files
    of the `allowed` directories, which the user named.
    """
    path = directory / name
    if not any((directory / step).is_symlink() for step in _steps(name)):
        return False
    try:
        target, home = path.resolve(), directory.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return True
    if target.is_relative_to(home) or any(target.is_relative_to(root) for root in allowed):
        return False
    return not _is_blob_of(target, home)


def expand_user(path: str | Path) -> Path:
    """Return a path with its `~` written out; as it is where nobody of that name has a home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def check_writable_name(path: Path, *, error: type[BakeError]) -> None:
    """Raise `error` for a path that no file can have, or that other programs could not open."""
    text = str(path)
    remedy = "give another output path"
    if text.startswith("~"):
        raise error(f"{path} names the home of a user that is not known here: {remedy}")
    if "\0" in text:
        raise error(f"{path} is no file's name (it holds a NUL character): {remedy}")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise error(
            f"{path} is not UTF-8, so that tokenizers could not be loaded from there: {remedy}"
        )


def check_links(
    directory: Path,
    names: Iterable[str],
    *,
    allowed: Collection[Path] = (),
    error: type[BakeError] = CheckpointError,
) -> None:
    """Raise `error` at the first of the files that a link takes out of the directory, see `leads_out`."""
    for name in names:
        if leads_out(directory, name, allowed):
            raise error(
                f"{directory / name} is a link out of its directory, which bake does not follow: "
                f"put a copy of the file there if it belongs to the model"
            )


def _steps(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[: stop + 1]) for stop in range(len(parts))]


def _is_blob_of(target: Path, home: Path) -> bool:
    """Whether `home` is `…/models--x/snapshots/<sha>` and the target `…/models--x/blobs/<hash>`."""
    repository = next(
        (above.parent for above in (home, *home.parents) if above.name == "snapshots"), None
    )
    return (
        repository is not None
        and repository.name.startswith(("models--", "datasets--", "spaces--"))
        and target.parent == repository / "blobs"
        and _BLOB.fullmatch(target.name) is not None
    )


def _shorten(name: object) -> str:
    text = repr(name)
    return text if len(text) <= 120 else f"{text[:117]}..."
