"""A Space: one folder becomes one commit of a Space repository, and what arrived is compared."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bake.errors import HubError
from bake.hub.access import open_api, require_valid_id
from bake.hub.errors import translated
from bake.hub.files import difference, differences, remote_files, require_arrival
from bake.hub.manifest import measure
from bake.io.hashing import is_hidden
from bake.redaction import without_secrets

MARK = "space.yaml"  # A Space that has it is one that bake wrote.
DEFAULT_MESSAGE = "Publish the Space"


@dataclass(frozen=True)
class PublishedSpace:
    """A Space on the Hub. already_there: it held exactly these files before, and there is no new commit."""

    repo_id: str
    url: str
    commit: str
    private: bool
    already_there: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return asdict(self)


def publish(
    folder: Path, repo_id: str, *, private: bool = True, commit_message: str | None = None
) -> PublishedSpace:
    """Send a folder as a Space in one commit, and compare what arrived.

    The Space is made if there is none. Files of an earlier one that are not in the folder any more go in
    the same commit. Raises HubError where the Hub refuses, where the Space is not one that bake wrote, or
    is public though `private` was asked, and where what arrived differs.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    require_valid_id(repo_id)
    api = open_api()
    with translated(repo_id):
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        api.create_repo(
            repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True
        )
        head = api.space_info(repo_id)
    if private and not head.private:
        raise HubError(f"the Space {repo_id} is public: give --public, or another id")
    remote = remote_files(api, repo_id, head.sha, repo_type="space")
    local = measure(folder)
    theirs = [name for name in remote if not is_hidden(name) and name != "README.md"]
    if theirs and MARK not in remote:
        raise HubError(
            f"the Space {repo_id} holds {theirs[0]}, which bake did not write, and is left alone: give "
            "another id"
        )
    commit, already = head.sha, not differences(local, remote)
    if not already:
        operations: list[Any] = [
            CommitOperationAdd(name, str(file.path))
            for name, file in local.items()
            if difference(file, remote.get(name))
        ]
        operations += [
            CommitOperationDelete(name, is_folder=False)
            for name in sorted(remote)
            if name not in local and not is_hidden(name)
        ]
        with translated(repo_id):
            made = api.create_commit(
                repo_id,
                operations,
                commit_message=commit_message or DEFAULT_MESSAGE,
                repo_type="space",
                parent_commit=head.sha,
            )
        commit = made.oid
    arrived = remote_files(api, repo_id, commit, repo_type="space")
    require_arrival(local, arrived, repo_id, commit)
    url = without_secrets(f"{api.endpoint}/spaces/{repo_id}")
    return PublishedSpace(repo_id, url, commit, head.private, already)
