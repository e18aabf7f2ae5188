"""What an export asks of the Hub: before any work whether it may publish, and at the end to publish."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bake import hub
from bake.anatomy.base import Base
from bake.pipeline.recipe import Recipe
from bake.support.timing import Stopwatch

if TYPE_CHECKING:
    pass


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
            named = {"base": base.to_dict(), "licence": base.licence}
            hub.check_rights(
                named, recipe.push_to_hub, public=recipe.public, accepted=recipe.accept_licence
            )


def publish(output: Path, recipe: Recipe, clock: Stopwatch) -> hub.Publication | None:
    """Publish the finished directory where the recipe says so."""
    if recipe.push_to_hub is None:
        return None
    with clock.stage("publish"):
        return hub.publish(
            output,
            recipe.push_to_hub,
            private=not recipe.public,
            commit_message=recipe.commit_message,
            create_pr=recipe.create_pr,
            accept_licence=recipe.accept_licence,
        )
