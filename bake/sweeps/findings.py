"""What a sweep found: curves, the window, chance, and laws at equal shift."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from bake.sweeps.controls import Specificity, compare_with_chance
from bake.sweeps.design import Design, Variant
from bake.sweeps.judge import Agreement, Judge
from bake.sweeps.points import Point
from bake.sweeps.removals import AblationBeside, compare_ablations
from bake.sweeps.window import Window


@dataclass(frozen=True)
class DoseResponse:
    """What a sweep found. points begin with the base. samples: [{opening, texts: {arm: text}}]."""

    points: tuple[Point, ...]
    windows: tuple[Window, ...]
    norms: Mapping[int, float]
    coefficients: Mapping[int, float]
    design: Design
    samples: tuple[Mapping[str, Any], ...] = ()
    judge: Judge | None = None
    agreement: Agreement | None = None

    def point(self, name: str) -> Point:
        """Return the point of an arm by its name."""
        return next(point for point in self.points if point.arm.name == name)

    def curve(self, variant: Variant | None = None) -> list[Point]:
        """Return the base and one variant's points in the order of their multipliers."""
        label = self.design.label(variant) if variant else ""
        chosen = [
            point
            for point in self.points
            if point.arm.kind == "direction" and point.arm.variant == label
        ]
        return sorted([self.points[0], *chosen], key=lambda point: point.arm.multiplier)

    @property
    def controls(self) -> list[Point]:
        """The random directions' points."""
        return [point for point in self.points if point.arm.kind == "random"]

    @property
    def specificity(self) -> Specificity | None:
        """What chance does at the multiplier nearest to 1; None where no control was run."""
        return compare_with_chance(self.curve(), self.controls)

    @property
    def ablations(self) -> list[AblationBeside]:
        """Each ablation beside chance, and beside the push that costs as much."""
        return list(compare_ablations(self.points, self.curve()))

    def laws_at_equal_shift(self) -> dict[str, float]:
        """Return {law: fluency ratio} at the shift that the first variant has at m nearest 1.

        Only of variants that differ from the first in nothing but their law.
        """
        first = self.design.variants[0]
        own = [point for point in self.curve() if point.arm.multiplier > 0 and point.shift]
        if not own:
            return {}
        nearest = min(own, key=lambda point: abs(point.arm.multiplier - 1))
        assert nearest.shift is not None
        costs = {
            variant.law: _fluency_at(self.curve(variant), nearest.shift.value)
            for variant in self.design.variants
            if replace(variant, law=first.law) == first
        }
        return {law: cost for law, cost in costs.items() if cost is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `report.json` and `--json`."""
        return {
            "version": 1,
            "design": asdict(self.design),
            "activation_norms": {str(layer): value for layer, value in self.norms.items()},
            "coefficients": {str(layer): value for layer, value in self.coefficients.items()},
            "points": [point.to_dict() for point in self.points],
            "windows": [window.to_dict() for window in self.windows],
            "specificity": self.specificity.to_dict() if self.specificity else None,
            "fluency_at_equal_shift": self.laws_at_equal_shift(),
            **(
                {"ablations": [each.to_dict() for each in beside]}
                if (beside := self.ablations)
                else {}
            ),
            "samples": list(self.samples),
            **(
                {"judge": {**self.judge.to_dict(), **self.agreement.to_dict()}}
                if self.judge and self.agreement
                else {}
            ),
        }


def compare_laws(costs: Mapping[str, float]) -> str:
    """Return what each law costs at equal shift, and which the least, as a sentence."""
    listed = ", ".join(f"{law} × {cost:.3f}" for law, cost in costs.items())
    return (
        f"sampled text's perplexity is {listed}; "
        f"{min(costs, key=lambda law: costs[law])} costs the least"
    )


def _fluency_at(curve: Sequence[Point], shift: float) -> float | None:
    """Return the fluency ratio at which a curve reaches a shift; log-linear between points."""
    ordered = [
        (point.shift.value, math.log(point.fluency_ratio.value))
        for point in curve
        if point.arm.multiplier >= 0 and point.shift and point.fluency_ratio
    ]
    for (low, left), (high, right) in pairwise(ordered):
        if min(low, high) <= shift <= max(low, high) and high != low:
            return math.exp(left + (shift - low) / (high - low) * (right - left))
    return None
