"""Chance: random directions of the same norm and coherence, and a direction's shift beside theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from bake.direction import Direction
from bake.dose_response.points import Point

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Specificity:
    """A direction's shift beside that of random directions of the same norm, nats a token.

    The largest of the random shifts grows with the number of seeds; their root mean square does not.
    """

    multiplier: float
    shift: float
    seeds: int
    largest: float
    rms: float

    @property
    def ratio(self) -> float:
        """|shift| over the largest of the random ones."""
        return abs(self.shift) / self.largest

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "ratio": self.ratio, "ratio_rms": abs(self.shift) / self.rms}

    def describe(self) -> str:
        """Return the comparison as a sentence."""
        return (
            f"at m = {self.multiplier:g} the direction shifts {self.ratio:.1f} × the largest of "
            f"{self.seeds} random directions of the same norm ({self.largest:.3f}), and "
            f"{abs(self.shift) / self.rms:.1f} × their root mean square ({self.rms:.3f}), which does "
            f"not grow with the number of seeds"
        )


def compare_with_chance(curve: Sequence[Point], controls: Sequence[Point]) -> Specificity | None:
    """Return what chance does at the multiplier nearest to 1; None where no control was run."""
    own = min(
        (point for point in curve if point.arm.kind == "direction"),
        key=lambda point: abs(point.arm.multiplier - 1),
        default=None,
    )
    if own is None or own.shift is None:
        return None
    size = abs(own.arm.multiplier)
    shifts = [c.shift.value for c in controls if c.shift and c.arm.multiplier == size]
    if not any(shifts):
        return None
    return Specificity(
        own.arm.multiplier,
        own.shift.value,
        len(shifts),
        max(abs(shift) for shift in shifts),
        math.sqrt(math.fsum(shift**2 for shift in shifts) / len(shifts)),
    )


def random_direction(
    like: Direction, layers: Sequence[int], hidden_size: int, seed: int
) -> Direction:
    """Return the direction turned at random: other vectors, the same cosines between layers.

    A push adds up over depth as far as its layers agree, so chance must agree over depth alike. The
    layers' vectors are C·B with orthonormal rows B; B is replaced by random orthonormal rows, drawn
    from what is orthogonal to B: in a narrow model a random vector holds a good part of any other.
    """
    import torch

    stacked = torch.stack([like.layer(layer).double() for layer in layers])
    _, singular, right = torch.linalg.svd(stacked, full_matrices=False)
    kept = int((singular > 1e-9 * singular[0]).sum())
    generator = torch.Generator().manual_seed(seed)
    basis = right[:kept].T
    drawn = torch.randn(hidden_size, kept, generator=generator, dtype=torch.float64)
    drawn = drawn - basis @ (basis.T @ drawn)
    turned = stacked @ basis @ torch.linalg.qr(drawn).Q.T
    vectors: dict[int | None, torch.Tensor] = {
        layer: (row / row.norm()).float() for layer, row in zip(layers, turned, strict=True)
    }
    return replace(like, vectors=vectors)
