"""What a bake is, for the reader of its card: a name, a description, a concept; all of it words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bake.directions.direction import Direction
from bake.io.concepts import name_of
from bake.io.shipped import DEMO_NAME
from bake.pipeline.recipe import Recipe
from bake.support.text import one_line

MAX_NAME, MAX_DESCRIPTION = 120, 1000


@dataclass(frozen=True)
class About:
    """name and description: the user's own words, None where there are none.

    concept: the name of the pairs that the direction was found from, or of its file; None for a sum.
    """

    name: str | None = None
    description: str | None = None
    concept: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `bake.json`, without what is not known."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def describe_about(recipe: Recipe, direction: Direction | None) -> About:
    """Return what the card says the model is. direction: None where heads are silent and no push is."""
    return About(
        recipe.name and one_line(recipe.name, MAX_NAME),
        recipe.description and one_line(recipe.description, MAX_DESCRIPTION),
        None if direction is None else _concept(recipe, direction),
    )


def _concept(recipe: Recipe, direction: Direction) -> str | None:
    if direction.parts:
        return None
    if recipe.direction == DEMO_NAME:
        return DEMO_NAME
    found = direction.metadata.get("pairs_name")
    if found is None and recipe.direction is not None:
        found = name_of(recipe.direction)
    return None if found is None else one_line(found, MAX_NAME)
