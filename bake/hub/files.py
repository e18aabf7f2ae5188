"""What the Hub holds at a commit, and how it differs from what was to be there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bake.errors import HubError
from bake.hub.errors import translated
from bake.hub.manifest import OutgoingFile
from bake.io.hashing import is_hidden


def remote_files(
    api: Any, repo_id: str, commit: str, *, repo_type: str = "model"
) -> dict[str, Any]:
    """Return every file that the Hub holds at a commit, by path."""
    with translated(repo_id):
        entries = list(
            api.list_repo_tree(repo_id, recursive=True, revision=commit, repo_type=repo_type)
        )
    return {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}


def difference(local: OutgoingFile, remote: Any | None) -> str | None:
    """Say how the Hub's file differs from the one that was to be there; None where it does not."""
    if remote is None:
        return "is missing there"
    if remote.size != local.size:
        return f"has {remote.size} bytes there and {local.size} here"
    if remote.lfs is not None:
        found, expected = remote.lfs.sha256, local.sha256
    else:
        found, expected = remote.blob_id, local.blob_id()
    return None if found == expected else f"has the hash {found} there and {expected} here"


def differences(local: Mapping[str, OutgoingFile], remote: Mapping[str, Any]) -> list[str]:
    """Return a phrase for every file that is missing, different or too many on the Hub."""
    found = [
        f"{name} {phrase}"
        for name, file in local.items()
        if (phrase := difference(file, remote.get(name)))
    ]
    return found + [
        f"{name} is there too" for name in sorted(remote.keys() - local) if not is_hidden(name)
    ]


def require_arrival(
    local: Mapping[str, OutgoingFile], remote: Mapping[str, Any], repo_id: str, commit: str
) -> None:
    """Raise HubError naming the first difference between what was sent and what is there."""
    if found := differences(local, remote):
        raise HubError(
            f"{repo_id} at {commit[:12]} is not what was sent: {found[0]}; do not use it, "
            "and run the same command again"
        )
