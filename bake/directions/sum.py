"""Several directions at once: a weighted sum per layer, and what the sum does along each of them.

Directions that are not at right angles help or hinder each other. The effective strength of direction i
is how far the sum goes along it, e_i = ⟨Σ_j s_j w_j, û_i⟩ / ‖w_i‖ = s_i + Σ_{j≠i} s_j cos(û_i, û_j) for
unit vectors w; s are the strengths that were asked for. Orthogonalised (Gram–Schmidt, in the order
given), the sum goes s_i along what is left of each; e_i is still along the direction as it was given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bake.directions.direction import Direction, Part
from bake.errors import DirectionError
from bake.sites import RESIDUAL_SITES

if TYPE_CHECKING:
    import torch

Key = int | None
_SMALL = 1e-4  # of a unit vector: what is left of one that others contain


def parse_reference(text: str) -> tuple[str, float]:
    """Parse FILE[:STRENGTH] into (FILE, strength); 1 where none is given. A file's own name wins."""
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        strength = float(tail)
    except ValueError:
        return text, 1.0
    if strength == 0 or not math.isfinite(strength):
        raise DirectionError(f"{text}: a strength of {tail} adds nothing; leave that direction out")
    return head, strength


def combine(
    given: Sequence[tuple[str, float, Direction]],
    *,
    orthogonalize: bool = False,
    keep_scale: bool = False,
) -> Direction:
    """Return the sum of (name, strength, direction), with what it does along each of them as `parts`.

    The sum's vectors are unit vectors; `lengths` has ‖Σ s_i w_i‖, by which a law's coefficients are
    multiplied. w are unit vectors, or with keep_scale the vectors as long as they were given. Layers that
    one of the directions lacks are left out. Raises DirectionError for directions of different spaces or
    widths, for a sum that cancels, and for one that others contain wholly when orthogonalised.
    """
    import torch

    _check_alike(given)
    vectors: dict[Key, torch.Tensor] = {}
    lengths: dict[Key, float] = {}
    effective: list[dict[Key, float]] = [{} for _ in given]
    kept: list[dict[Key, float]] = [{} for _ in given]
    for key in _shared_layers(given):
        unit = [_vector(direction, key) for _, _, direction in given]
        added, shares = unit, [1.0] * len(unit)
        if orthogonalize:
            added, shares = _orthogonalize([name for name, _, _ in given], unit, key)
        sizes = [_length(direction, key) if keep_scale else 1.0 for _, _, direction in given]
        weights = [strength * size for (_, strength, _), size in zip(given, sizes, strict=True)]
        total = torch.stack([w * vector for w, vector in zip(weights, added, strict=True)]).sum(0)
        length = float(total.norm())
        if length < _SMALL:
            raise DirectionError(
                f"the directions cancel each other{_at(key)}; change their strengths"
            )
        vectors[key], lengths[key] = (total / length).float(), length
        for index, (vector, size) in enumerate(zip(unit, sizes, strict=True)):
            effective[index][key] = float(total @ vector) / size
            kept[index][key] = shares[index]
    parts = tuple(
        Part(name, strength, effective[index], kept[index])
        for index, (name, strength, _) in enumerate(given)
    )
    names = " + ".join(f"{strength:g} × {name}" for name, strength, _ in given)
    metadata = {"method": "sum", "parts": names}
    if orthogonalize:
        metadata["orthogonalized"] = "in this order"
    absent = {layer for _, _, direction in given for layer in direction.absent}
    site = given[0][2].site
    return Direction(vectors, site, metadata, lengths, parts, tuple(sorted(absent)))


def _check_alike(given: Sequence[tuple[str, float, Direction]]) -> None:
    (first, _, like), *others = given
    for name, _, direction in others:
        alike = direction.site == like.site or {direction.site, like.site} <= set(RESIDUAL_SITES)
        if not alike:
            raise DirectionError(
                f"{first} was found at {like.site} and {name} at {direction.site}, which are different "
                f"spaces; only directions of one space can be added"
            )
        if direction.hidden_size != like.hidden_size:
            raise DirectionError(
                f"{first} is {like.hidden_size} wide and {name} is {direction.hidden_size}; they were "
                f"found on different models"
            )


def _shared_layers(given: Sequence[tuple[str, float, Direction]]) -> list[Key]:
    """Return the layers that all directions have; [None] where each has one vector for all."""
    single = [set(direction.vectors) for _, _, direction in given if None not in direction.vectors]
    if not single:
        return [None]
    shared = set.intersection(*single)
    if not shared:
        names = ", ".join(name for name, _, _ in given)
        raise DirectionError(f"{names} have no layer in common")
    return sorted(shared, key=lambda key: -1 if key is None else key)


def _vector(direction: Direction, key: Key) -> torch.Tensor:
    vector: torch.Tensor = direction.layer(0 if key is None else key).double()
    unit: torch.Tensor = vector / vector.norm()
    return unit


def _length(direction: Direction, key: Key) -> float:
    return direction.lengths.get(key, direction.lengths.get(None, 1.0))


def _orthogonalize(
    names: Sequence[str], vectors: Sequence[torch.Tensor], key: Key
) -> tuple[list[torch.Tensor], list[float]]:
    """Take from each unit vector what the earlier ones hold; return unit vectors and what was left."""
    found: list[torch.Tensor] = []
    shares = []
    for name, vector in zip(names, vectors, strict=True):
        rest = vector
        for earlier in found:
            rest = rest - (rest @ earlier) * earlier
        share = float(rest.norm())
        if share < _SMALL:
            raise DirectionError(
                f"nothing is left of {name}{_at(key)} when it is orthogonalised: the directions before it "
                f"contain it; leave it out"
            )
        found.append(rest / share)
        shares.append(share)
    return found, shares


def _at(key: Key) -> str:
    return "" if key is None else f" in layer {key}"
