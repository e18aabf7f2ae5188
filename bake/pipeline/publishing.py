"""What an export asks of the Hub: before any work whether it may publish, and at the end to publish."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bake import hub
from bake.anatomy.base import Base
from bake.card.render import render_record
from bake.io.output_files import CARD_FILE, RESULT_FILE
from bake.pipeline.recipe import Recipe
from bake.pipeline.record import encode_result
from bake.support.timing import Stopwatch


def check_access(recipe: Recipe, clock: Stopwatch) -> None:
    """Raise HubError where the bake is to be published and this user may not, before any work."""
    if recipe.push_to_hub:
        with clock.stage("hub"):
            hub.check_access(
                recipe.push_to_hub, private=not recipe.public, create_pr=recipe.create_pr
            )


def check_rights(base: Base, recipe: Recipe, clock: Stopwatch) -> None:
    """Raise HubError where the bake is to be published and the base's licence asks for more."""
    if recipe.push_to_hub:
        with clock.stage("hub"):
            named = {"base": base.named(), "licence": base.licence}
            hub.check_rights(
                named, recipe.push_to_hub, public=recipe.public, accepted=recipe.accept_licence
            )


def publish(output: Path, recipe: Recipe, clock: Stopwatch) -> hub.Publication | None:
    """Publish the finished directory where the recipe says so."""
    if recipe.push_to_hub is None:
        return None
    with clock.stage("publish"):
        return publish_directory(
            output,
            recipe.push_to_hub,
            private=not recipe.public,
            commit_message=recipe.commit_message,
            create_pr=recipe.create_pr,
            accept_licence=recipe.accept_licence,
        )


def publish_directory(directory: Path, repo_id: str, **options: Any) -> hub.Publication:
    """Publish a baked directory; its card and `bake.json` say there under which id and branch it lies.

    options: as `hub.publish` takes them, and it raises the same.
    """
    return hub.publish(directory, repo_id, rewrite=address, **options)


_OF_A_PLACE = ("files", "repo_id", "revision")


def address(record: Mapping[str, Any], repo_id: str, revision: str | None) -> dict[str, bytes]:
    """Return the card and `bake.json` of a bake that lies under an id on the Hub, on a branch."""
    branch = {"revision": revision} if revision else {}
    told = {key: value for key, value in record.items() if key not in _OF_A_PLACE}
    told |= {"repo_id": repo_id, **branch}
    card = render_record(told).encode()
    entry = {"sha256": hashlib.sha256(card).hexdigest(), "size": len(card)}
    result = encode_result({**told, "files": {**record["files"], CARD_FILE: entry}})
    return {CARD_FILE: card, RESULT_FILE: result.encode()}
