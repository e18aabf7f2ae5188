"""The Hub: one directory that bake wrote becomes one commit, read back and compared.

`check_access` asks before any work starts whether the commit will be possible. `publish` sends what
was verified and nothing else: every file's hash must be the one in bake.json. `verify_arrival`
compares what the Hub says it holds with what is on disk. Whether a base may be published at all is
decided elsewhere. Endpoint, cache and token are huggingface_hub's own settings (HF_ENDPOINT,
HF_HOME, HF_TOKEN): a token is never a parameter here, and no message holds one.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bake.errors import HubError

REQUIRED_FILES = ("config.json", "bake.json", "README.md")
# What a repository may hold and still count as empty: the Hub's own first commit, or a stub card.
STUB_FILES = frozenset({"README.md"})
REACH_TIMEOUT = 10.0  # seconds; whoami itself has no timeout, so a dead address is found before it
LOG_IN = "run `hf auth login`, or set HF_TOKEN to a write token from https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Destination:
    """Where a publish will go: `private` is what the repository is, or what it will be made."""

    repo_id: str
    exists: bool
    private: bool
    user: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Publication:
    """What is on the Hub now: `files` and `bytes` count the whole directory, not what was sent.

    `already_there` says that the Hub held exactly these files before, so no commit was made and
    `commit` is the one that was found.
    """

    repo_id: str
    url: str
    commit: str
    files: tuple[str, ...]
    private: bool
    bytes: int
    already_there: bool

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "files": list(self.files)}


@dataclass(frozen=True)
class _LocalFile:
    path: Path
    size: int
    sha256: str

    def blob_id(self) -> str:
        """The id that git gives the content; asked only of what the Hub keeps in git itself."""
        content = self.path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def check_access(repo_id: str, *, private: bool = True, revision: str | None = None) -> Destination:
    """Ask the Hub whether a publish to `repo_id` will be accepted; changes nothing there.

    A bare name gets the user's own namespace. A fine-grained token is taken at its word where it
    names the namespace: only the commit shows whether it may write to this repository.

    Raises:
        HubError: the id is malformed; HF_HUB_OFFLINE is set; there is no token, or the Hub does not
            know it, or it may not write there; the Hub cannot be reached; the repository is public
            though `private` was asked; or it holds files that bake did not write.
    """
    _require_valid_id(repo_id)
    api = _api()
    _require_reachable(api)
    with _translated(repo_id):
        identity = api.whoami()
    if "/" not in repo_id:
        repo_id = f"{identity['name']}/{repo_id}"
    _require_writer(identity, repo_id)
    information = _model_info(api, repo_id)
    if information is None:
        return Destination(repo_id, exists=False, private=private, user=identity["name"])
    _require_private(information, repo_id, private)
    head = (_model_info(api, repo_id, revision) if revision else None) or information
    _require_ours(repo_id, [sibling.rfilename for sibling in head.siblings or []])
    return Destination(repo_id, exists=True, private=information.private, user=identity["name"])


def publish(
    directory: Path,
    repo_id: str,
    *,
    private: bool = True,
    commit_message: str | None = None,
    revision: str | None = None,
) -> Publication:
    """Send a baked directory to the Hub in one commit, and compare what arrived.

    The repository is made if there is none (private unless asked), and so is the branch `revision`.
    Files of an earlier bake that are not in the directory any more are deleted in the same commit;
    dotfiles are neither sent nor deleted. Where the Hub already holds exactly these files, there is
    no new commit.

    Raises:
        HubError: as `check_access`; the directory is not what bake wrote and verified; somebody
            else committed at the same time; the Hub refuses; or what arrived differs.
    """
    local = _verified_files(directory)
    destination = check_access(repo_id, private=private, revision=revision)
    repo_id = destination.repo_id
    api = _api()
    if not destination.exists:
        with _translated(repo_id):
            api.create_repo(repo_id, private=private)
    head = _branch_head(api, repo_id, revision)
    _require_private(head, repo_id, private)
    remote = _remote_files(api, repo_id, head.sha)
    _require_ours(repo_id, remote)
    operations, commit = _operations(local, remote), head.sha
    if operations:
        with _translated(repo_id):
            commit = api.create_commit(
                repo_id,
                operations,
                commit_message=commit_message or "Publish the baked model",
                revision=revision,
                parent_commit=head.sha,
            ).oid
    _require_arrival(local, _remote_files(api, repo_id, commit), repo_id, commit)
    return Publication(
        repo_id=repo_id,
        url=f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else ""),
        commit=commit,
        files=tuple(local),
        private=head.private,
        bytes=sum(file.size for file in local.values()),
        already_there=not operations,
    )


def verify_arrival(directory: Path, repo_id: str, commit: str) -> None:
    """Compare every file of a directory with what the Hub holds at a commit: names, sizes, hashes.

    Raises:
        HubError: naming the first difference; or the Hub cannot be asked.
    """
    local = _measured(directory, _file_names(directory))
    _require_arrival(local, _remote_files(_api(), repo_id, commit), repo_id, commit)


# What is on disk.


def _file_names(directory: Path) -> list[str]:
    """Every file below the directory, as a sorted repository path; dotfiles are left out."""
    if not directory.is_dir():
        raise HubError(
            f"{directory} is not a directory: give the directory that `bake export` wrote"
        )
    names = [
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
    ]
    return sorted(name for name in names if not _is_hidden(name))


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _measured(directory: Path, names: list[str]) -> dict[str, _LocalFile]:
    """Size and sha256 of each file. hashlib lets go of the interpreter lock, so threads help."""

    def measure(name: str) -> _LocalFile:
        path = directory / name
        with path.open("rb") as file:
            return _LocalFile(
                path, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
            )

    with ThreadPoolExecutor() as threads:
        return dict(zip(names, threads.map(measure, names), strict=True))


def _verified_files(directory: Path) -> dict[str, _LocalFile]:
    """The directory's files, after checking that they are the ones whose equivalence was shown."""
    names = _file_names(directory)
    for name in REQUIRED_FILES:
        if name not in names:
            raise HubError(
                f"{directory} has no {name}, so it is not a finished bake: run `bake export` again"
            )
    remedy = f"run `bake verify {directory}`, or `bake export` again"
    try:
        record = json.loads((directory / "bake.json").read_text(encoding="utf-8"))
        recorded = {name: (file["size"], file["sha256"]) for name, file in record["files"].items()}
        passed = record["equivalence"]["passed"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(
            f"{directory}/bake.json does not record files and equivalence as a finished bake does "
            f"({type(error).__name__}: {_one_line(error)}): {remedy}"
        ) from error
    if passed is not True:
        raise HubError(f"{directory}/bake.json records no passed equivalence check: {remedy}")
    if unmatched := sorted(recorded.keys() ^ (set(names) - {"bake.json"})):
        state = "is missing" if unmatched[0] in recorded else "was added after the bake"
        raise HubError(f"{directory}/{unmatched[0]} {state}: {remedy}")
    local = _measured(directory, names)
    for name, expected in recorded.items():
        if (local[name].size, local[name].sha256) != expected:
            raise HubError(f"{directory}/{name} was changed after the bake: {remedy}")
    return local


# What is on the Hub. Hub objects are huggingface_hub's own, which are not typed here.


def _api() -> Any:
    """A client with the token that huggingface_hub finds, once it is clear that it can be used."""
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise HubError(
            "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, so nothing can be published: unset it"
        )
    token = get_token()
    if token is None:
        raise HubError(f"there is no Hugging Face token: {LOG_IN}")
    # HTTP headers cannot carry such a token, and the HTTP library's own message would quote it.
    if not token.isascii() or not token.isprintable() or " " in token:
        raise HubError(f"the Hugging Face token holds characters that no token has: {LOG_IN}")
    return HfApi(token=token, library_name="bake-steering")


def _require_valid_id(repo_id: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(
            f"{repo_id!r} is not a repository id such as your-name/your-model: {_one_line(error)}"
        ) from error


def _require_reachable(api: Any) -> None:
    from huggingface_hub.utils import get_session

    with _translated("the Hub"):
        get_session().head(api.endpoint, timeout=REACH_TIMEOUT)


def _require_writer(identity: Mapping[str, Any], repo_id: str) -> None:
    """Refuse a token that cannot write to the namespace, as far as whoami tells."""
    namespace, user = repo_id.split("/")[0], identity["name"]
    token = (identity.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise HubError(f"the Hugging Face token of {user} can only read: {LOG_IN}")
    roles = {user: "admin"}
    for organisation in identity.get("orgs") or []:
        roles[organisation["name"]] = organisation.get("roleInOrg") or "write"
    for scope in (token.get("fineGrained") or {}).get("scoped") or []:
        roles.setdefault((scope.get("entity") or {}).get("name", ""), "write")
    if roles.get(namespace, "read") in ("read", "no_access"):
        writable = ", ".join(
            sorted(name for name, role in roles.items() if name and role != "read")
        )
        raise HubError(
            f"{user} may not write to {namespace} on the Hub: publish under {writable}, or ask an "
            f"administrator of {namespace} for the write role"
        )


def _model_info(api: Any, repo_id: str, revision: str | None = None) -> Any:
    """The repository at a revision; None where there is no such repository or revision."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    with _translated(repo_id):
        try:
            return api.model_info(repo_id, revision=revision)
        except GatedRepoError:
            raise
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None


def _branch_head(api: Any, repo_id: str, revision: str | None) -> Any:
    """The commit that ours will follow; a branch that does not exist is made from the main one."""
    information = _model_info(api, repo_id, revision)
    if information is None and revision is not None:
        with _translated(repo_id):
            api.create_branch(repo_id, branch=revision)
        information = _model_info(api, repo_id, revision)
    if information is None or information.sha is None:
        raise HubError(f"{repo_id} cannot be read though it was just made: run the command again")
    return information


def _require_private(information: Any, repo_id: str, private: bool) -> None:
    """Refuse to publish into the open what nobody asked to be public. The other way is harmless."""
    if private and not information.private:
        raise HubError(
            f"{repo_id} exists and is public, but a publish is private unless asked otherwise: "
            "use --public, another name, or make the repository private on the Hub"
        )


def _remote_files(api: Any, repo_id: str, commit: str) -> dict[str, Any]:
    """Every file that the Hub holds at a commit, by path."""
    with _translated(repo_id):
        entries = list(api.list_repo_tree(repo_id, recursive=True, revision=commit))
    return {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}


def _require_ours(repo_id: str, names: Any) -> None:
    """Refuse a repository that holds somebody's files and no bake.json: two models would mix."""
    visible = {name for name in names if not _is_hidden(name)}
    if "bake.json" not in visible and (foreign := sorted(visible - STUB_FILES)):
        raise HubError(
            f"{repo_id} is not a bake's repository, for it holds {', '.join(foreign[:3])} and no "
            "bake.json: publish under another name, or empty it first"
        )


def _difference(local: _LocalFile, remote: Any | None) -> str | None:
    """How the Hub's file differs from the one on disk, or None."""
    if remote is None:
        return "is missing there"
    if remote.size != local.size:
        return f"has {remote.size} bytes there and {local.size} here"
    if remote.lfs is not None:
        found, expected = remote.lfs.sha256, local.sha256
    else:
        found, expected = remote.blob_id, local.blob_id()
    return None if found == expected else f"has the hash {found} there and {expected} here"


def _operations(local: Mapping[str, _LocalFile], remote: Mapping[str, Any]) -> list[Any]:
    """The additions and deletions that turn what the Hub holds into the directory."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    # The sha256 is left to huggingface_hub to compute while it uploads: what the Hub is told then
    # comes from the bytes that were sent, so a file that changed meanwhile is found on arrival.
    operations: list[Any] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=file.path)
        for name, file in local.items()
        if _difference(file, remote.get(name))
    ]
    gone = sorted(name for name in remote if name not in local and not _is_hidden(name))
    return operations + [CommitOperationDelete(name, is_folder=False) for name in gone]


def _require_arrival(
    local: Mapping[str, _LocalFile], remote: Mapping[str, Any], repo_id: str, commit: str
) -> None:
    differences = [
        f"{name} {difference}"
        for name, file in local.items()
        if (difference := _difference(file, remote.get(name)))
    ]
    differences += [
        f"{name} is there too" for name in sorted(remote.keys() - local) if not _is_hidden(name)
    ]
    if differences:
        raise HubError(
            f"{repo_id} at {commit[:12]} is not what was sent: {differences[0]}; do not use it, "
            "and run the same command again"
        )


# What went wrong.


@contextmanager
def _translated(name: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line that names the thing and the remedy."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        raise HubError(_explained(error, name)) from error
    except errors.HTTPError as error:  # the HTTP library's own base class, whichever it is
        raise HubError(
            f"the Hub at {constants.ENDPOINT} cannot be reached ({type(error).__name__}): check "
            "the connection, and HF_ENDPOINT if it is set"
        ) from error
    except ValueError as error:  # card metadata that the Hub refuses, or an answer that is no JSON
        raise HubError(f"the Hub cannot take {name}: {_one_line(error)}") from error
    except (RuntimeError, OSError) as error:  # one file's upload, around what happened to it
        cause = error.__cause__
        refused = isinstance(cause, errors.HfHubHTTPError)
        why = _explained(cause, name) if refused else "run the same command again"
        raise HubError(f"{_one_line(error).rstrip('.')}: {why}") from error


def _explained(error: Any, name: str) -> str:
    """The line for an answer that refuses."""
    from huggingface_hub import errors

    status = error.response.status_code
    said = _one_line(error.server_message or error)
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated and this token may not see it ({said}): ask for access on its page"
    if isinstance(error, errors.DisabledRepoError):
        return f"{name} is disabled on the Hub ({said}): publish under another name"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{name} is not on the Hub, or this token may not see it: check the name, or {LOG_IN}"
        )
    if status == 401:
        return f"the Hub does not accept the Hugging Face token ({said}): {LOG_IN}"
    if status == 403:
        return f"this token may not write to {name} ({said}): {LOG_IN}"
    if status in (409, 412):
        return f"{name} changed on the Hub at the same time ({said}): run the same command again"
    if status == 429:
        return f"the Hub is limiting requests ({said}): wait and run the same command again"
    if status >= 500:
        return f"the Hub failed with status {status} ({said}): run the same command again later"
    return f"the Hub refuses {name} with status {status}: {said}"


def _one_line(message: object) -> str:
    """A message of other software on one line, short, and without the token should it hold one."""
    from huggingface_hub import get_token

    text = " ".join(str(message).split())[:300]
    token = get_token()
    return text.replace(token, "(the token)") if token else text
