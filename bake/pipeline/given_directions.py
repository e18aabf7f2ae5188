"""The directions that a recipe names: read once, fitted to the model, and summed where they are several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bake.anatomy.base import AnyBase
from bake.directions.direction import Direction
from bake.directions.first_look import look_first
from bake.directions.formats import fit_direction, read_direction
from bake.directions.sum import combine, parse_reference
from bake.errors import DirectionError
from bake.pipeline.recipe import Recipe
from bake.redaction import without_local_paths
from bake.support.progress import announce


@dataclass(frozen=True)
class GivenDirection:
    """A direction that was read, what the user called it, and its strength in a sum."""

    reference: Any
    strength: float
    direction: Direction


def _references(recipe: Recipe) -> list[tuple[str, float]]:
    if recipe.direction is None:
        return []
    if not recipe.added:
        return [(recipe.direction, 1.0)]  # One alone has no strength but m.
    return [parse_reference(str(text)) for text in (recipe.direction, *recipe.added)]


def look_at(recipe: Recipe) -> None:
    """Raise a BakeError for layers and directions that do not fit, before anything heavy is imported."""
    named = [reference for reference, _ in _references(recipe)]
    look_first(
        recipe.model,
        recipe.revision,
        directions=named,
        layers=[recipe.place.chosen_layers],
    )


def read_directions(recipe: Recipe) -> tuple[GivenDirection, ...]:
    """Read every direction that a recipe names, before anything is fetched for it; () for none.

    Raises DirectionError for one that cannot be read, and for several that cannot be summed.
    """
    references = _references(recipe)
    if not references:
        return ()
    given = tuple(
        GivenDirection(
            reference,
            strength,
            read_direction(reference, layer_offset=recipe.layer_offset, site=recipe.direction_site),
        )
        for reference, strength in references
    )
    join(given, recipe)
    return given


def fit_directions(
    base: AnyBase, given: Sequence[GivenDirection], recipe: Recipe
) -> Direction | None:
    """Return the direction, or the sum of several, as it fits the model; None where none is given."""
    return join(fit_each(base, given, recipe), recipe) if given else None


def fit_each(
    base: AnyBase, given: Sequence[GivenDirection], recipe: Recipe
) -> tuple[GivenDirection, ...]:
    """Return the directions as they fit the model, one by one.

    How each file was understood is announced. Raises DirectionError for one that does not fit.
    """
    fitted = []
    for entry in given:
        direction, notes = fit_direction(
            entry.direction,
            entry.reference,
            hidden_size=base.anatomy.hidden_size,
            layer_count=base.anatomy.layer_count,
            layer_offset=recipe.layer_offset,
            site=recipe.direction_site,
        )
        fitted.append(replace(entry, direction=direction))
        for note in notes:
            announce(note)
    return tuple(fitted)


def join(given: Sequence[GivenDirection], recipe: Recipe) -> Direction:
    """Return the one direction, or the sum of several; a bake tells nobody of paths on this machine."""
    if len(given) == 1:
        (entry,) = given
        told = {key: without_local_paths(text) for key, text in entry.direction.metadata.items()}
        return replace(entry.direction, metadata=told)
    named = [(Path(str(entry.reference)).stem, entry.strength, entry.direction) for entry in given]
    return combine(named, orthogonalize=recipe.orthogonalize, keep_scale=recipe.keep_scale)


def check_strengths(given: Sequence[GivenDirection]) -> None:
    """Raise DirectionError for a direction that has a strength, where all of them are taken out alike."""
    for entry in given:
        if entry.strength != 1:
            raise DirectionError(
                f"{entry.reference} has a strength of its own, {entry.strength:g}; all directions of a "
                "subspace are taken out alike: --strength with --scope writes"
            )
