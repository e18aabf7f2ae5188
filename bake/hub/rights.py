"""Whether a bake may be published: its base's licence and gate, asked before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bake.checkpoint.front_matter import check_front_matter
from bake.checkpoint.licences import find_objections
from bake.errors import BakeError, HubError
from bake.hub.access import model_info, open_api
from bake.hub.manifest import Manifest


def check_rights(
    recorded: Mapping[str, Any],
    repo_id: str,
    *,
    public: bool,
    accepted: bool = False,
    manifest: Manifest | None = None,
) -> None:
    """Raise HubError where the base's licence or gate speaks against publishing as `repo_id`.

    recorded: "base" and "licence" of `bake.json`. accepted: the user says to have the right.
    manifest: the files that go along; without it, before they exist, only the name and the right to
    publish are asked.
    """
    if accepted:
        return
    base = recorded.get("base") or {}
    card = ""
    if manifest is not None:
        card = (manifest.directory / "README.md").read_text(encoding="utf-8")
    objections = find_objections(
        recorded.get("licence") or {},
        repo_id,
        public=public,
        base=str(base.get("id", "the base")),
        base_access=_access(base) if public else "open",
        files=None if manifest is None else manifest.files.keys(),
        card=card,
    )
    if objections:
        raise HubError(
            f"{repo_id} is not published: {'; '.join(objections)}. Put that right, or say with "
            "--accept-licence that you have the right to publish it so"
        )


def check_card(manifest: Manifest) -> None:
    """Raise HubError where the card's metadata is not what the Hub should be told."""
    card = (manifest.directory / "README.md").read_text(encoding="utf-8")
    try:
        check_front_matter(card, manifest.record)
    except BakeError as error:
        raise HubError(f"{manifest.directory}: {error}; run `bake export` again") from None


def _access(base: Mapping[str, Any]) -> str:
    """What the Hub says of a base now: "open", "gated", or "hidden" from the public."""
    if not base.get("revision"):
        return "open"  # A local base: nobody can be asked, and its licence has to do.
    information = model_info(open_api(), str(base["id"]))
    if information is None or information.private:
        return "hidden"
    return "gated" if information.gated else "open"
