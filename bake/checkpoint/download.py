"""A Hub id becomes a directory: the files of a checkpoint that bake needs, through the Hub's cache.

Only what a bake uses is fetched: the config, the companions, and the weights that transformers would
load, never other copies of them; pickled weights only where there are no safetensors. `HF_TOKEN`,
`HF_HOME`, `HF_HUB_OFFLINE` and `HF_ENDPOINT` are huggingface_hub's business. What the files hold is
`checkpoint`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bake.checkpoint.carried_files import CHAT_TEMPLATES, NOT_CARRIED
from bake.checkpoint.hub_cache import COMMIT_SHA
from bake.checkpoint.index import (
    INDEX_FILE,
    PICKLED_FILE,
    PICKLED_INDEX,
    SINGLE_FILE,
    named_weights,
)
from bake.checkpoint.left_out import MTP_FILES
from bake.errors import CheckpointError
from bake.io.foreign_json import read_json
from bake.support.text import explain_briefly


def download_checkpoint(model_id: str, revision: str | None = None) -> tuple[Path, str | None]:
    """Fetch `model_id` into the Hub's cache; returns (snapshot directory, commit sha).

    What is in the cache already is not fetched again. Raises CheckpointError, one line with the
    remedy, when the id, the revision or the Hub cannot be reached.
    """
    directory, sha = _fetch_companions(model_id, revision)
    pinned = sha or revision  # nobody can push between this request and the next
    _fetch(model_id, pinned, allow_patterns=[INDEX_FILE, f"{CHAT_TEMPLATES}/*", *MTP_FILES])
    named = named_weights(_read_json(directory / "config.json"))
    for weights in (named,) if named else (SINGLE_FILE, INDEX_FILE, PICKLED_FILE, PICKLED_INDEX):
        if not (directory / weights).exists():
            _fetch(model_id, pinned, allow_patterns=[weights])
        if (directory / weights).exists():
            _fetch_listed(model_id, pinned, directory, weights)
            break
    return directory, sha


def download_bake(model_id: str, revision: str | None = None) -> Path:
    """Fetch a published bake whole, its own files and the card too; returns the snapshot directory.

    Raises CheckpointError as `download_checkpoint`.
    """
    return _fetch(model_id, revision)


def download_record(model_id: str, revision: str | None = None, *more: str) -> Path:
    """Fetch a published bake's bake.json, and `more` of its small files; returns the snapshot directory.

    Raises as above.
    """
    return _fetch(model_id, revision, allow_patterns=["bake.json", *more])


def download_config(model_id: str, revision: str | None = None) -> Path:
    """Fetch a model's config.json alone; returns the snapshot directory. Raises as above."""
    return _fetch(model_id, revision, allow_patterns=["config.json", "adapter_config.json"])


def list_repository(model_id: str, revision: str | None = None) -> tuple[str, ...]:
    """Return the names of all files of a repository on the Hub; none without a connection."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return ()
    try:
        with hub_errors_named(model_id, revision):
            return tuple(HfApi().list_repo_files(model_id, revision=revision))
    except CheckpointError:  # What the cache holds is enough to bake.
        return ()


@dataclass(frozen=True)
class RemoteFile:
    """What the Hub says of a file: its size in bytes and, of a large one, its SHA-256."""

    size: int | None
    sha256: str | None


@dataclass(frozen=True)
class Description:
    """A checkpoint on the Hub without its weights: what is in `directory`, and all `files`."""

    directory: Path
    revision: str | None
    files: Mapping[str, RemoteFile]

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a file, here or on the Hub."""
        return name in self.files or (self.directory / name).is_file()


def download_description(model_id: str, revision: str | None = None) -> Description:
    """Fetch `model_id` without its weights: config, companions, index, and the list of files.

    Without a connection only what the cache holds is listed. Raises as `download_checkpoint`.
    """
    from huggingface_hub import HfApi, constants

    directory, sha = _fetch_companions(model_id, revision)
    pinned = sha or revision
    indexes = [INDEX_FILE]
    named = named_weights(_read_json(directory / "config.json"))
    if named and named.endswith(".index.json"):
        indexes.append(named)
    _fetch(model_id, pinned, allow_patterns=[*indexes, f"{CHAT_TEMPLATES}/*"])
    if constants.HF_HUB_OFFLINE:
        return Description(directory, sha, {})
    with hub_errors_named(model_id, revision):
        siblings = HfApi().model_info(model_id, revision=pinned, files_metadata=True).siblings
    return Description(
        directory,
        sha,
        {
            entry.rfilename: RemoteFile(entry.size, entry.lfs.sha256 if entry.lfs else None)
            for entry in siblings or []
        },
    )


def _fetch_companions(model_id: str, revision: str | None) -> tuple[Path, str | None]:
    """Fetch config.json, what is carried over, and the card, which names the licence.

    Returns (snapshot directory, commit sha).
    """
    needed = ("config.json", "README*")
    unwanted = [pattern for pattern in NOT_CARRIED if pattern not in needed]
    # Of an adapter its config alone, by which it is known for one.
    unwanted = [*(p for p in unwanted if p != "adapter_*"), "adapter_model*"]
    directory = _fetch(model_id, revision, ignore_patterns=[*unwanted, "*/*"])
    return directory, directory.name if COMMIT_SHA.fullmatch(directory.name) else None


def _fetch_listed(model_id: str, revision: str | None, directory: Path, weights: str) -> None:
    """Fetch the shards that an index lists; nothing for a file that is no index."""
    if not weights.endswith(".index.json"):
        return
    weight_map = _read_json(directory / weights).get("weight_map")
    listed = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    shards = sorted(name for name in listed if isinstance(name, str))
    if shards:
        _fetch(model_id, revision, allow_patterns=shards)


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object at `path`, or {}: `checkpoint` says what is wrong with the file."""
    try:
        values: dict[str, Any] = read_json(path)
    except CheckpointError:
        return {}
    return values


def _fetch(
    model_id: str,
    revision: str | None,
    allow_patterns: Sequence[str] | None = None,
    ignore_patterns: Sequence[str] | None = None,
) -> Path:
    """One snapshot_download."""
    from huggingface_hub import snapshot_download

    with hub_errors_named(model_id, revision):
        path = snapshot_download(
            model_id,
            revision=revision,
            allow_patterns=None if allow_patterns is None else list(allow_patterns),
            ignore_patterns=None if ignore_patterns is None else list(ignore_patterns),
        )
    return Path(path)


@contextmanager
def hub_errors_named(model_id: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line that names the model and the remedy."""
    from huggingface_hub import errors as hub_errors

    # The HTTP library has changed under huggingface_hub before; the base class of its own error is
    # the one place that always knows which one it is.
    http_error = hub_errors.HfHubHTTPError.__mro__[1]
    try:
        yield
    except (hub_errors.HFValidationError, http_error, OSError) as error:
        problem = _explain(error, model_id, revision)
        raise CheckpointError(f"{model_id} cannot be opened: {problem}.") from error


def _explain(error: Exception, model_id: str, revision: str | None) -> str:
    """What an error of the Hub means to somebody who wanted to open a model, and the remedy."""
    from huggingface_hub import errors as hub_errors

    login = "log in with `hf auth login` or HF_TOKEN"
    match error:
        case hub_errors.HFValidationError():
            return "it is neither a directory nor a well-formed Hub id (organisation/name)"
        case hub_errors.GatedRepoError():  # before its parent, the next one
            return f"it is gated: accept its terms at https://huggingface.co/{model_id} and {login}"
        case hub_errors.RepositoryNotFoundError():
            return (
                "it is no directory here, and the Hub shows no such model: check the spelling, or "
                f"{login} if it is private"
            )
        case hub_errors.RevisionNotFoundError():
            return f"it has no revision {revision}: give a branch, tag or commit that exists"
        case hub_errors.LocalEntryNotFoundError():
            return (
                "it is no directory here and not, or not completely, in the Hub's cache, and the "
                "Hub cannot be reached: go online, unset HF_HUB_OFFLINE, or give a local directory"
            )
        case hub_errors.HfHubHTTPError() if error.response.status_code == 401:
            return f"the Hub does not accept the Hugging Face token: {login}"
    return f"the download failed ({explain_briefly(error)}): try again, what has arrived is kept"
