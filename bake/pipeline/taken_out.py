"""What an export takes out of the residual stream before it pushes: x ← x − (x·û)û + αv.

With v = û that is the affine edit of Marshall et al. ("Refusal in LLMs is an affine function", arXiv
2411.09003), with another direction an ablation and a push at once; either way one checkpoint, one proof.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bake.anatomy.base import Base
from bake.directions.direction import Direction
from bake.directions.direction_file import direction_bytes, load_direction
from bake.directions.subspace import fit_to_scope, span
from bake.errors import CheckpointError
from bake.io.output_files import REMOVED_FILE, number_file
from bake.pipeline.given_directions import (
    GivenDirection,
    check_strengths,
    fit_each,
    read_directions,
)
from bake.pipeline.recipe import Recipe
from bake.plan.ablation import AblationPlan, plan_ablation
from bake.support.progress import announce
from bake.writes import Ablation


def read_taken_out(recipe: Recipe) -> tuple[GivenDirection, ...]:
    """Read the directions that a recipe takes out; () for none. Raises DirectionError as for a push's."""
    if not recipe.ablate:
        return ()
    first, *others = recipe.ablate
    taken = replace(recipe, direction=first, added=tuple(others))
    given = read_directions(replace(taken, orthogonalize=False, keep_scale=False))
    check_strengths(given)
    return given


def plan_taken_out(
    base: Base, given: Sequence[GivenDirection], recipe: Recipe
) -> tuple[tuple[Direction, ...], AblationPlan | None]:
    """Return the directions as they are taken out, and the plan of that; nothing where none is given."""
    if not given:
        return (), None
    directions = [
        fit_to_scope(entry.direction, "stream", recipe.ablate_layer, "--ablate-layer")
        for entry in fit_each(base, given, recipe)
    ]
    plan = _plan(base, directions, recipe.dtype)
    announce(plan.describe())
    if (untied := plan.untied()) is not None:
        announce(untied)
    return tuple(directions), plan


def _plan(base: Base, directions: Sequence[Direction], dtype: str | None) -> AblationPlan:
    anatomy = base.anatomy
    basis = span(directions, range(anatomy.layer_count), anatomy.hidden_size)
    return plan_ablation(base.checkpoint, anatomy, Ablation(basis), dtype=dtype)


def describe_taken_out(
    plan: AblationPlan | None, directions: Sequence[Direction]
) -> dict[str, Any]:
    """Return the part of `bake.json` that says what was taken out; nothing where nothing was."""
    if plan is None:
        return {}
    return {
        "ablation": plan.ablation.to_dict(),
        "removed": [
            {**direction.to_dict(), "file": number_file(REMOVED_FILE, index)}
            for index, direction in enumerate(directions)
        ],
    }


def write_taken_out(directions: Sequence[Direction], folder: Path) -> None:
    """Write the directions that were taken out beside the weights."""
    for index, direction in enumerate(directions):
        (folder / number_file(REMOVED_FILE, index)).write_bytes(direction_bytes(direction))


def rebuild_taken_out(
    recorded: Mapping[str, Any], opened: Base, directory: Path, dtype: str | None
) -> AblationPlan | None:
    """Return the plan of what a bake took out before its push, from its record; None where it took nothing.

    Raises CheckpointError for a record that says what bake does not write.
    """
    if "ablation" not in recorded:
        return None
    names = [entry["file"] for entry in recorded.get("removed", ())]
    if not names or names != [number_file(REMOVED_FILE, index) for index in range(len(names))]:
        raise CheckpointError(f"bake.json in {directory} names other direction files than bake's")
    plan = _plan(opened, [load_direction(directory / name) for name in names], dtype)
    if plan.ablation.to_dict() != recorded["ablation"]:
        raise CheckpointError(
            f"bake.json in {directory} is damaged: what it says was taken out is not what is in "
            f"{', '.join(names)}"
        )
    return plan
