"""Whether a commit to a repository will be accepted: token, namespace, visibility, what it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bake.errors import HubError
from bake.hub.errors import LOG_IN, one_line, translated
from bake.io.hashing import is_hidden

# What a repository may hold and still count as empty: the Hub's own first commit, or a stub card.
STUB_FILES = frozenset({"README.md"})
REACH_TIMEOUT = 10.0  # seconds; whoami itself has no timeout, so a dead address is found before it


@dataclass(frozen=True)
class Destination:
    """Where a publish will go: `private` is what the repository is, or what it will be made."""

    repo_id: str
    exists: bool
    private: bool
    user: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return asdict(self)


def check_access(
    repo_id: str, *, private: bool = True, revision: str | None = None, create_pr: bool = False
) -> Destination:
    """Ask the Hub whether a publish to `repo_id` will be accepted; changes nothing there.

    A bare name gets the user's own namespace. A fine-grained token is taken at its word where it
    names the namespace: only the commit shows whether it may write to this repository. A pull request
    needs no right to write, and a repository that exists.

    Raises:
        HubError: the id is malformed; HF_HUB_OFFLINE is set; there is no token, or the Hub does not
            know it, or it may not write there; the Hub cannot be reached; the repository is public
            though `private` was asked; or it holds files that bake did not write.
    """
    require_valid_id(repo_id)
    api = open_api()
    _require_reachable(api)
    with translated(repo_id):
        identity = api.whoami()
    if "/" not in repo_id:
        repo_id = f"{identity['name']}/{repo_id}"
    if not create_pr:
        _require_writer(identity, repo_id)
    information = model_info(api, repo_id)
    if information is None and create_pr:
        raise HubError(
            f"{repo_id} is not on the Hub, or this token may not see it, so there is nothing to open "
            "a pull request against: check the name, or leave --create-pr out"
        )
    if information is None:
        return Destination(repo_id, exists=False, private=private, user=identity["name"])
    require_private(information, repo_id, private)
    head = (model_info(api, repo_id, revision) if revision else None) or information
    require_ours(repo_id, [sibling.rfilename for sibling in head.siblings or []])
    return Destination(repo_id, exists=True, private=information.private, user=identity["name"])


def open_api() -> Any:
    """Return a client with the token that huggingface_hub finds, once it is clear that it can be used."""
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


def require_valid_id(repo_id: str) -> None:
    """Raise HubError for what cannot be a repository's id."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(
            f"{repo_id!r} is not a repository id such as your-name/your-model: {one_line(error)}"
        ) from error


def _require_reachable(api: Any) -> None:
    from huggingface_hub.utils import get_session

    with translated("the Hub"):
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


def model_info(api: Any, repo_id: str, revision: str | None = None) -> Any:
    """Return the repository at a revision; None where there is no such repository or revision."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    with translated(repo_id):
        try:
            return api.model_info(repo_id, revision=revision)
        except GatedRepoError:
            raise
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None


def require_private(information: Any, repo_id: str, private: bool) -> None:
    """Refuse to publish into the open what nobody asked to be public. The other way is harmless."""
    if private and not information.private:
        raise HubError(
            f"{repo_id} exists and is public, but a publish is private unless asked otherwise: "
            "use --public, another name, or make the repository private on the Hub"
        )


def require_ours(repo_id: str, names: Iterable[str]) -> None:
    """Refuse a repository that holds somebody's files and no bake.json: two models would mix."""
    visible = {name for name in names if not is_hidden(name)}
    if "bake.json" not in visible and (foreign := sorted(visible - STUB_FILES)):
        raise HubError(
            f"{repo_id} is not a bake's repository, for it holds {', '.join(foreign[:3])} and no "
            "bake.json: publish under another name, or empty it first"
        )
