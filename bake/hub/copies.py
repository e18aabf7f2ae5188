"""What need not be sent: base shards that the Hub copies from the base's repository into ours.

A file counts as the base's where the Hub says that the base's file at the pinned revision has the same
SHA-256. Between repositories the Hub copies only what lies in its Xet storage and in one region; where
it cannot, the file is uploaded, and that is said.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from bake.errors import HubError
from bake.hub.errors import is_refusal, translated
from bake.hub.manifest import Manifest
from bake.support.progress import announce


@dataclass(frozen=True)
class Origin:
    """A file of the base's repository at its pinned commit."""

    repo_id: str
    revision: str
    path: str


def find_origins(api: Any, manifest: Manifest, wanted: Collection[str]) -> dict[str, Origin]:
    """Return where the Hub can copy files from, {name: origin}, for those of `wanted` that it can.

    Raises HubError where a shard is neither on this machine nor to be copied, or the Hub fails.
    """
    base, sources = manifest.record.get("base") or {}, _sources(manifest.record)
    candidates = {name: sources[name] for name in sorted(wanted) if name in sources}
    if not candidates or not base.get("revision"):
        return {}
    repo_id, revision = str(base["id"]), str(base["revision"])
    try:
        with translated(repo_id):
            paths = sorted(set(candidates.values()))
            entries = api.get_paths_info(repo_id, paths, revision=revision)
    except HubError as error:
        if not is_refusal(error):  # Not for one bad answer is a whole base sent.
            raise
        require_on_disk(manifest, candidates, str(error))
        announce(f"the base's files cannot be copied on the Hub, so they are sent: {error}")
        return {}
    held = {entry.path: entry for entry in entries if getattr(entry, "lfs", None) is not None}
    same = {
        name: held[path]
        for name, path in candidates.items()
        if path in held and held[path].lfs.sha256 == manifest.files[name].sha256
    }
    require_on_disk(manifest, candidates.keys() - same.keys(), "it is not there any more")
    without = [name for name, entry in same.items() if not entry.xet_hash]
    if without:
        reason = f"{repo_id} keeps {same[without[0]].path} outside Xet storage"
        require_on_disk(manifest, without, reason)
        announce(f"{len(without)} files of the base are sent, not copied: {reason}")
    return {
        name: Origin(repo_id, revision, entry.path)
        for name, entry in same.items()
        if name not in without
    }


def require_on_disk(manifest: Manifest, names: Collection[str], reason: str) -> None:
    """Raise HubError where a file that the Hub cannot copy is not here to be sent either."""
    for name in sorted(names):
        if manifest.files[name].path is None:
            raise HubError(
                f"{name} of this thin bake cannot be copied from {manifest.record['base']['id']} on the "
                f"Hub ({reason}): put the base's shards beside it and run `bake verify`"
            )


def _sources(record: Mapping[str, Any]) -> dict[str, str]:
    """{file of the bake: file of the base} of shards that may be the base's."""
    found = dict((record.get("undo") or {}).get("files") or {})
    found |= {
        entry["name"]: entry["base_file"] for entry in record.get("thin", {}).get("shards", ())
    }
    return found
