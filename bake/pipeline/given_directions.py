"""The directions that a recipe names: read, held against the model, and summed where they are several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bake.anatomy.base import Base
from bake.directions.direction import Direction
from bake.directions.formats import fit_direction, read_direction
from bake.directions.sum import combine, parse_reference
from bake.pipeline.recipe import Recipe
from bake.redaction import without_local_paths
from bake.support.progress import announce


def open_direction(recipe: Recipe) -> Direction | None:
    """Read the recipe's direction, if it has one, before anything is fetched for it."""
    if recipe.direction is None:
        return None
    return _join(recipe, [_read_part(recipe, part) for part in _references(recipe)])


def hold_against(base: Base, given: Direction, recipe: Recipe) -> Direction:
    """Hold a given direction against the model, and announce how it was understood."""
    fitted = []
    references = _references(recipe)
    for reference in references:
        direction, notes = fit_direction(
            _read_part(recipe, reference) if recipe.added else given,
            reference[0],
            hidden_size=base.anatomy.hidden_size,
            layer_count=base.anatomy.layer_count,
            layer_offset=recipe.layer_offset,
            site=recipe.direction_site,
        )
        fitted.append(direction)
        for note in notes:
            announce(note)
    return _join(recipe, fitted)


def _references(recipe: Recipe) -> list[tuple[Any, float]]:
    """Return (reference, strength) of the recipe's directions; one alone has no strength but m."""
    if not recipe.added:
        return [(recipe.direction, 1.0)]
    return [parse_reference(str(text)) for text in (recipe.direction, *recipe.added)]


def _read_part(recipe: Recipe, part: tuple[Any, float]) -> Direction:
    return read_direction(part[0], layer_offset=recipe.layer_offset, site=recipe.direction_site)


def _join(recipe: Recipe, directions: Sequence[Direction]) -> Direction:
    """Return the one direction, or the sum of several; a bake tells nobody of paths on this machine."""
    if not recipe.added:
        (given,) = directions
        told = {key: without_local_paths(text) for key, text in given.metadata.items()}
        return replace(given, metadata=told)
    named = [
        (Path(str(reference)).stem, strength, direction)
        for (reference, strength), direction in zip(_references(recipe), directions, strict=True)
    ]
    return combine(named, orthogonalize=recipe.orthogonalize, keep_scale=recipe.keep_scale)
