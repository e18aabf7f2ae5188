"""What is taken out of a model: a direction for all layers, or one for each layer's writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from bake.directions.direction import Direction
from bake.directions.separation import parse_separation
from bake.errors import DirectionError
from bake.sites import RESIDUAL_SITES
from bake.support.progress import announce
from bake.writes import orthonormalize

if TYPE_CHECKING:
    import torch


def span(
    directions: Sequence[Direction], layers: Sequence[int], hidden_size: int
) -> Mapping[int, torch.Tensor]:
    """Return {layer: orthonormal basis of the directions there}; raise DirectionError as they do."""
    chosen = [direction.select(layers, hidden_size) for direction in directions]
    shared = all(None in direction.vectors for direction in directions)
    if shared:  # One basis for all layers, computed once.
        basis = orthonormalize([vectors[layers[0]].float() for vectors in chosen])
        return dict.fromkeys(layers, basis)
    return {
        layer: orthonormalize([vectors[layer].float() for vectors in chosen]) for layer in layers
    }


def fit_to_scope(
    direction: Direction, scope: str, from_layer: int | None, flag: str = "--from-layer"
) -> Direction:
    """Return one vector for all layers, which a stream needs, or a vector for each layer's writes.

    Of several layers' vectors that of `from_layer` is taken, else the one that separates held-out pairs
    best. flag: the option that says which.

    Raises DirectionError where neither says which, and for a direction of a normalised input.
    """
    if direction.site not in RESIDUAL_SITES:
        raise DirectionError(
            f"the direction was found at {direction.site}, a normalised input; what is taken out of the "
            "residual stream is found there (bake direction --site mlp_out)"
        )
    own = [layer for layer in direction.vectors if layer is not None]
    if not own and from_layer is not None:
        raise DirectionError(
            f"{flag} {from_layer}: the direction has one vector for all layers; leave it out"
        )
    if not own or (scope == "writes" and from_layer is None):
        return direction
    chosen = own[0] if len(own) == 1 and from_layer is None else from_layer
    if chosen is None:
        separation = parse_separation(direction.metadata)
        if separation is None:
            raise DirectionError(
                f"the direction has a vector for each of {len(own)} layers, and one is taken out of the "
                f"whole stream: say which with {flag} L"
            )
        chosen = separation.best.layer
        announce(
            f"layer {chosen}'s direction is taken out everywhere: it separates held-out pairs best "
            f"({flag} for another)"
        )
    return of_layer(direction, chosen)


def of_layer(direction: Direction, layer: int) -> Direction:
    """Return a direction with one layer's vector for all layers."""
    metadata = {**direction.metadata, "layer": str(layer)}
    return replace(direction, vectors={None: direction.layer(layer)}, metadata=metadata, lengths={})
