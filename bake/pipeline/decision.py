"""How far each layer is pushed, with what that was decided from: a recipe's law on measured norms."""

from __future__ import annotations

from dataclasses import dataclass

from bake.directions.direction import Direction
from bake.pipeline.given_directions import lengths_of
from bake.pipeline.recipe import Recipe
from bake.plan.destination import Destination
from bake.strength.coefficients import Push, compute_push
from bake.strength.norms import ActivationNorms
from bake.sweeps.auto import MultiplierChoice
from bake.sweeps.evidence import Evidence


@dataclass(frozen=True)
class Decision:
    """A push, the norms and the direction that it follows from, and why it is as strong as it is.

    choice: how a short sweep chose the multiplier; None where the user gave it. evidence: the sweep that
    the card shows, if there is one.
    """

    push: Push
    norms: ActivationNorms
    direction: Direction
    choice: MultiplierChoice | None = None
    evidence: Evidence | None = None


def decide_push(
    recipe: Recipe,
    destination: Destination,
    hidden_size: int,
    direction: Direction,
    norms: ActivationNorms,
    multiplier: float,
) -> Push:
    """Return the push of a recipe at a multiplier: its law, or the coefficients that it gives."""
    return compute_push(
        norms.values(),
        direction.select(destination.layers, hidden_size),
        hidden_size=hidden_size,
        multiplier=multiplier,
        law=recipe.law,
        explicit=destination.coefficients,
        **lengths_of(direction, destination.layers, keep_scale=recipe.keep_scale),
    )
