"""Publishing: what was verified becomes one commit, or none, and what arrived is compared.

A run that was broken off is taken up by running it again: the Hub keeps what was uploaded, and a commit
whose answer was lost is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bake.errors import HubError
from bake.hub.access import (
    Destination,
    check_access,
    model_info,
    open_api,
    require_ours,
    require_private,
)
from bake.hub.copies import Origin, find_origins, require_on_disk
from bake.hub.errors import one_line, translated
from bake.hub.files import difference, differences, remote_files, require_arrival
from bake.hub.manifest import Manifest, measure, read_manifest
from bake.hub.rights import check_card, check_rights
from bake.io.hashing import is_hidden
from bake.io.work_directory import temporary_directory
from bake.redaction import without_secrets
from bake.support.progress import announce

DEFAULT_MESSAGE = "Publish the baked model"
# (bake.json, the id, the branch or None) → {file: its content}.
Rewrite = Callable[[Mapping[str, Any], str, str | None], Mapping[str, bytes]]


@dataclass(frozen=True)
class Publication:
    """What is on the Hub now: `files` and `bytes` count the whole directory, not what was sent.

    copied: files that the Hub copied from the base's repository. uploaded: bytes of those that were
    sent, or would have been had the Hub not held them. pull_request: its address, where one was asked
    for. proven: whether the equivalence was shown; a thin bake's is not. `already_there` says that the
    Hub held exactly these files before, so no commit was made and `commit` is the one that was found.
    """

    repo_id: str
    url: str
    commit: str
    files: tuple[str, ...]
    private: bool
    bytes: int
    already_there: bool
    copied: tuple[str, ...] = ()
    uploaded: int = 0
    pull_request: str | None = None
    proven: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return {**asdict(self), "files": list(self.files), "copied": list(self.copied)}

    def describe(self) -> str:
        """Return what a person reads."""
        what = "there already, file for file" if self.already_there else "published"
        lines = [f"{what}: {self.url}"]
        if self.copied:
            lines.append(
                f"{len(self.copied)} of {len(self.files)} files were copied on the Hub, and "
                f"{self.uploaded / 1e6:.1f} of {self.bytes / 1e6:.1f} MB sent"
            )
        if not self.proven:
            lines.append(f"not verified, and its card says so: bake verify {self.repo_id}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Target:
    """What a commit goes to: a branch of a repository, or a pull request against it."""

    repo_id: str
    revision: str | None
    head: str
    create_pr: bool
    message: str


@dataclass(frozen=True)
class _Committed:
    commit: str
    copied: tuple[str, ...] = ()
    uploaded: int = 0
    pull_request: str | None = None
    already_there: bool = False


def publish(
    directory: Path,
    repo_id: str,
    *,
    private: bool = True,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    accept_licence: bool = False,
    unproven_allowed: bool = False,
    rewrite: Rewrite | None = None,
) -> Publication:
    """Send a baked directory to the Hub in one commit, and compare what arrived.

    The repository is made if there is none (private unless asked), and so is the branch `revision`; with
    `create_pr` the commit becomes a pull request against it. Shards that are the base's, byte for byte,
    are copied on the Hub. Files of an earlier bake that are not in the directory any more are deleted in
    the same commit; dotfiles are neither sent nor deleted. Where the Hub already holds exactly these
    files, there is no new commit.

    rewrite: returns the content of files that have to name where they lie, from `bake.json`, the id and the
    branch; they are sent instead of those in the directory, which stays as it is.

    Raises:
        HubError: as `check_access`; the directory is not what bake wrote and verified; its base's
            licence or gate speaks against it (unless `accept_licence`); somebody
            else committed at the same time; the Hub refuses; or what arrived differs.
    """
    manifest = read_manifest(directory, unproven_allowed=unproven_allowed)
    check_card(manifest)
    destination = check_access(repo_id, private=private, revision=revision, create_pr=create_pr)
    repo_id = destination.repo_id
    public = not private and not (destination.exists and destination.private)
    check_rights(
        manifest.record, repo_id, public=public, accepted=accept_licence, manifest=manifest
    )
    with temporary_directory("bake-publish-") as folder:
        if rewrite is not None:
            manifest = manifest.with_content(rewrite(manifest.record, repo_id, revision), folder)
        return _publish(
            manifest,
            destination,
            commit_message or DEFAULT_MESSAGE,
            private=private,
            revision=revision,
            create_pr=create_pr,
        )


def _publish(
    manifest: Manifest,
    destination: Destination,
    message: str,
    *,
    private: bool,
    revision: str | None,
    create_pr: bool,
) -> Publication:
    """Make the repository and the branch where there are none, send the files, and compare them."""
    repo_id, api = destination.repo_id, open_api()
    if not destination.exists:
        with translated(repo_id):
            api.create_repo(repo_id, private=private)
    head = _branch_head(api, repo_id, revision, may_be_made=not create_pr)
    require_private(head, repo_id, private)
    remote = remote_files(api, repo_id, head.sha)
    require_ours(repo_id, remote)
    target = _Target(repo_id, revision, head.sha, create_pr, message)
    if not differences(manifest.files, remote):
        done = _Committed(head.sha, already_there=True)
    else:
        done = _find_pull_request(api, manifest, target) or _commit(api, manifest, target, remote)
    require_arrival(manifest.files, remote_files(api, repo_id, done.commit), repo_id, done.commit)
    at = f"/tree/{revision}" if revision else ""
    return Publication(
        repo_id=repo_id,
        url=without_secrets(done.pull_request or f"{api.endpoint}/{repo_id}{at}"),
        commit=done.commit,
        files=tuple(manifest.files),
        private=head.private,
        bytes=manifest.size,
        already_there=done.already_there,
        copied=done.copied,
        uploaded=done.uploaded,
        pull_request=done.pull_request and without_secrets(done.pull_request),
        proven=manifest.proven,
    )


def verify_arrival(directory: Path, repo_id: str, commit: str) -> None:
    """Compare every file of a directory with what the Hub holds at a commit: names, sizes, hashes.

    Raises:
        HubError: naming the first difference; or the Hub cannot be asked.
    """
    local = measure(directory)
    require_arrival(local, remote_files(open_api(), repo_id, commit), repo_id, commit)


def _branch_head(api: Any, repo_id: str, revision: str | None, *, may_be_made: bool) -> Any:
    """The commit that ours will follow; a branch that does not exist is made from the main one."""
    information = model_info(api, repo_id, revision)
    if information is None and revision is not None:
        if not may_be_made:
            raise HubError(
                f"{repo_id} has no branch {revision} to open a pull request against: give one that "
                "exists, or leave --create-pr out"
            )
        with translated(repo_id):
            # A branch that a lost answer has made already is the one that was wanted.
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        information = model_info(api, repo_id, revision)
    if information is None or information.sha is None:
        raise HubError(f"{repo_id} cannot be read though it was just made: run the command again")
    return information


def _find_pull_request(api: Any, manifest: Manifest, target: _Target) -> _Committed | None:
    """An open pull request that holds exactly these files: an earlier run's, whose answer was lost."""
    if not target.create_pr:
        return None
    with translated(target.repo_id):
        found = list(
            api.get_repo_discussions(
                target.repo_id, discussion_type="pull_request", discussion_status="open"
            )
        )
    for request in found:
        head = model_info(api, target.repo_id, request.git_reference)
        if head and not differences(manifest.files, remote_files(api, target.repo_id, head.sha)):
            return _Committed(head.sha, pull_request=request.url, already_there=True)
    return None


def _commit(api: Any, manifest: Manifest, target: _Target, remote: Mapping[str, Any]) -> _Committed:
    """Send what differs in one commit; where the Hub cannot copy after all, send that too."""
    changed = [name for name, file in manifest.files.items() if difference(file, remote.get(name))]
    origins = find_origins(api, manifest, changed)
    additions: dict[str, Any] = {}  # What a first try has uploaded is not sent again by a second.
    try:
        return _send(api, manifest, target, remote, changed, origins, additions)
    except _CannotCopyError as error:
        require_on_disk(manifest, origins, str(error))
        announce(
            f"{len(origins)} files of the base are sent, for the Hub cannot copy them: {error}"
        )
        return _send(api, manifest, target, remote, changed, {}, additions)


class _CannotCopyError(Exception):
    """The Hub refused to copy between repositories."""


def _send(
    api: Any,
    manifest: Manifest,
    target: _Target,
    remote: Mapping[str, Any],
    changed: list[str],
    origins: Mapping[str, Origin],
    additions: dict[str, Any],
) -> _Committed:
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    require_on_disk(manifest, [name for name in changed if name not in origins], "not found there")
    for name in changed:
        if name not in origins and name not in additions:
            # The sha256 is left to huggingface_hub to compute while it uploads: what the Hub is told
            # then comes from the bytes that were sent, so a file that changed meanwhile is found on
            # arrival.
            additions[name] = CommitOperationAdd(name, str(manifest.files[name].path))
    copies = [
        CommitOperationCopy(
            origin.path,
            name,
            src_revision=origin.revision,
            src_repo_id=origin.repo_id,
            src_repo_type="model",
        )
        for name, origin in origins.items()
    ]
    gone = sorted(name for name in remote if name not in manifest.files and not is_hidden(name))
    deletions = [CommitOperationDelete(name, is_folder=False) for name in gone]
    uploaded = sum(manifest.files[name].size for name in additions)
    _announce_plan(manifest, additions, origins)
    try:
        with translated(target.repo_id), _copying_told_apart(bool(copies)):
            made = api.create_commit(
                target.repo_id,
                [*additions.values(), *copies, *deletions],
                commit_message=target.message,
                revision=target.revision,
                create_pr=target.create_pr,
                parent_commit=target.head,
            )
    except HubError:
        found = _lost_answer(api, manifest, target)
        if found is None:
            raise
        return _Committed(found.commit, tuple(origins), uploaded, found.pull_request)
    return _Committed(made.oid, tuple(origins), uploaded, made.pr_url)


def _announce_plan(
    manifest: Manifest, additions: Mapping[str, Any], origins: Mapping[str, Origin]
) -> None:
    """Say what is about to be sent, before huggingface_hub's own progress bars."""
    sent = sum(manifest.files[name].size for name in additions)
    line = f"sending {len(additions)} files ({sent / 1e6:.1f} MB)"
    if origins:
        copied = sum(manifest.files[name].size for name in origins)
        base = next(iter(origins.values())).repo_id
        line += f"; the Hub copies {len(origins)} ({copied / 1e6:.1f} MB) from {base}"
    announce(line)


@contextmanager
def _copying_told_apart(copying: bool) -> Iterator[None]:
    """Raise _CannotCopyError for what huggingface_hub raises where the Hub cannot copy."""
    from huggingface_hub import errors

    try:
        yield
    except errors.FileDuplicationError as error:
        raise _CannotCopyError(one_line(error)) from error
    except errors.HfHubHTTPError as error:
        path, status = error.response.request.url.path, error.response.status_code
        if not path.endswith("/lfs-files/duplicate") or status >= 500 or status == 429:
            raise
        raise _CannotCopyError(one_line(error.server_message or error)) from error
    except ValueError as error:
        if not copying or "xet hash" not in str(error):
            raise
        raise _CannotCopyError(one_line(error)) from error


def _lost_answer(api: Any, manifest: Manifest, target: _Target) -> _Committed | None:
    """The commit that was made after all, where only the Hub's answer to it was lost."""
    try:
        if target.create_pr:
            return _find_pull_request(api, manifest, target)
        head = model_info(api, target.repo_id, target.revision)
        if head is None or differences(manifest.files, remote_files(api, target.repo_id, head.sha)):
            return None
        return _Committed(head.sha)
    except HubError:  # Then the first error stands; a later run looks again.
        return None
