"""Which model on the Hub a local base is: said by the user, and proven by its files' hashes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bake.errors import HubError
from bake.hub.errors import translated
from bake.hub.files import difference, remote_files
from bake.hub.manifest import OutgoingFile
from bake.io.hashing import hash_files, list_files
from bake.support.progress import announce, warn

_GIVEN = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def check_id(given: str) -> tuple[str, str | None]:
    """Return (id, revision) of "org/name" or "org/name@revision"; raise HubError for anything else."""
    match = _GIVEN.fullmatch(given)
    if match is None:
        raise HubError(f"--base-id {given} is not org/name or org/name@revision")
    return match["id"], match["revision"]


def identify_base(directory: Path, files: tuple[str, ...], given: str) -> dict[str, Any]:
    """Return the base as `bake.json` names it: {"id", "revision"}, the Hub's where that is proven.

    files: the weights, which are compared with config.json among them. Where the Hub cannot be asked the
    id is kept as the user's word: the revision is None and "claimed" says so. Raises HubError where a file
    is not the one on the Hub, or where the Hub shows no such model.
    """
    from huggingface_hub import HfApi

    repo_id, revision = check_id(given)
    try:
        with translated(repo_id):
            api = HfApi(library_name="bake-steering")
            found = api.model_info(repo_id, revision=revision)
            remote = remote_files(api, repo_id, str(found.sha))
    except HubError as error:
        if not _is_out_of_reach(error):
            raise
        warn(f"whether the base is {given} is not checked, for the Hub cannot be asked: {error}")
        return {"id": repo_id, "revision": None, "claimed": True}
    wanted = ("config.json", *files)
    others = set(list_files(directory)) - set(wanted)
    local = hash_files(directory, exclude=others)
    for name in wanted:
        file = OutgoingFile(directory / name, local[name]["size"], local[name]["sha256"])
        wrong = difference(file, remote.get(name))
        if wrong:
            raise HubError(
                f"the base is not {given}: {name} {wrong}; name the revision that it is "
                "(ID@REVISION), or leave --base-id out"
            )
    announce(
        f"the base is {repo_id} at {str(found.sha)[:12]}: its weight files have the hashes there"
    )
    return {"id": repo_id, "revision": str(found.sha)}


def _is_out_of_reach(error: HubError) -> bool:
    """Tell whether nobody answered, rather than that the Hub said no."""
    from huggingface_hub import errors

    cause = error.__cause__
    return cause is None or not isinstance(cause, errors.HfHubHTTPError)
