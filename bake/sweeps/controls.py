"""Chance: random directions of the same norm and coherence, and a direction's shift beside theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from bake.directions.direction import Direction
from bake.sweeps.points import Point

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Specificity:
    """A direction's shift beside that of random directions of the same norm, nats a token.

    The largest of the random shifts grows with the number of seeds. Their root mean square does not, but
    of few seeds it is known roughly: `rms_interval` holds it in 95 % of draws, if shifts are normal.
    fluency: perplexity of sampled text, × base, of the direction and (median) of the random ones; None
    where nothing was sampled.
    """

    multiplier: float
    shift: float
    seeds: int
    largest: float
    rms: float
    fluency: tuple[float, float] | None = None

    @property
    def rms_interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the root mean square that many seeds would have."""
        import numpy as np

        # The sum of squares of n normal shifts is χ² with n degrees of freedom, times their variance.
        drawn = np.random.default_rng(0).chisquare(self.seeds, 100_000)
        high, low = (float(value) for value in np.quantile(drawn, [0.975, 0.025]))
        return self.rms * math.sqrt(self.seeds / high), self.rms * math.sqrt(self.seeds / low)

    @property
    def ratio(self) -> float:
        """|shift| over the largest of the random ones."""
        return abs(self.shift) / self.largest

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            **asdict(self),
            "rms_interval": list(self.rms_interval),
            "ratio": self.ratio,
            "ratio_rms": abs(self.shift) / self.rms,
            "text": self.describe(),
        }

    def describe(self) -> str:
        """Return the comparison as a sentence."""
        sampled = (
            "; their own text's perplexity is × {1:.2f} (median), the direction's × {0:.2f}".format(
                *self.fluency
            )
            if self.fluency
            else ""
        )
        return (
            f"at m = {self.multiplier:g} the direction shifts {self.ratio:.1f} × the largest of "
            f"{self.seeds} random directions of the same norm and coherence, at right angles to it "
            f"({self.largest:.3f}; more seeds reach further), and {abs(self.shift) / self.rms:.1f} × their "
            f"root mean square ({self.rms:.3f}, 95 % interval {{:.3f}} to {{:.3f}})".format(
                *self.rms_interval
            )
            + sampled
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
    beside = [control for control in controls if control.arm.multiplier == size]
    shifts = [control.shift.value for control in beside if control.shift]
    if not any(shifts):
        return None
    sampled = [control.fluency_ratio.value for control in beside if control.fluency_ratio]
    return Specificity(
        own.arm.multiplier,
        own.shift.value,
        len(shifts),
        max(abs(shift) for shift in shifts),
        math.sqrt(math.fsum(shift**2 for shift in shifts) / len(shifts)),
        (own.fluency_ratio.value, median(sampled)) if own.fluency_ratio and sampled else None,
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
