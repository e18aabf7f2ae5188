"""Ablations beside random ones, and beside the push that costs as much."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from bake.sweeps.points import Interval, Point


@dataclass(frozen=True)
class AblationBeside:
    """What taking a direction out does, beside chance and beside a push of the same cost.

    shift: of held-out pairs, nats a token. kl: 95th percentile on neutral text, nats; None: not measured.
    random_largest, random_kl: the largest |shift| and the mean KL of as many random directions, taken out
    alike. push: (multiplier, shift) of the push away from the positive side that costs as much, between
    the strengths that were swept; None where none of them costs so much.
    """

    name: str
    shift: Interval
    kl: float | None
    seeds: int
    random_largest: float
    random_kl: float | None
    push: tuple[float, float] | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "shift": self.shift.to_dict(), "text": self.describe()}

    def describe(self) -> str:
        """Return the comparison as a sentence."""
        found, cost = self.shift, "" if self.kl is None else f" at KL {self.kl:.2g} on neutral text"
        text = (
            f"{self.name}: shifts the pairs by {found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
            f"{cost}"
        )
        if self.seeds:
            cost = "" if self.random_kl is None else f" (KL {self.random_kl:.2g})"
            text += f"; {self.seeds} random directions by {self.random_largest:.3f} at most{cost}"
        if self.push is not None:
            text += (
                f"; a push of m = {self.push[0]:+.2g} costs as much and shifts {self.push[1]:+.3f}"
            )
        return text


def compare_ablations(points: Sequence[Point], curve: Sequence[Point]) -> Iterator[AblationBeside]:
    """Yield each ablation's comparison. curve: the base and the pushes of one variant."""
    for point in points:
        if point.arm.kind != "ablation" or point.shift is None:
            continue
        controls = [
            other
            for other in points
            if other.arm.kind == "random ablation" and other.arm.variant == point.arm.name
        ]
        kl = cost_of(point)
        costs = [cost for control in controls if (cost := cost_of(control)) is not None]
        yield AblationBeside(
            point.arm.name,
            point.shift,
            kl,
            len(controls),
            max((abs(c.shift.value) for c in controls if c.shift), default=0.0),
            math.fsum(costs) / len(costs) if costs else None,
            None if kl is None else _push_at(curve, kl, -1 if point.arm.multiplier < 0 else 1),
        )


def cost_of(point: Point) -> float | None:
    """Return the 95th percentile of KL on neutral text, nats; 0 for the base."""
    if point.arm.kind == "base":
        return 0.0
    found = point.neutral_kl.get("p95")
    return None if found is None else found.value


def _push_at(curve: Sequence[Point], kl: float, sign: int) -> tuple[float, float] | None:
    """Return (multiplier, shift) where the pushes of a sign reach a cost, linear between strengths.

    The base itself, which costs nothing, is the first of them.
    """
    outwards = sorted(
        (point for point in curve if point.arm.multiplier * sign >= 0),
        key=lambda point: abs(point.arm.multiplier),
    )
    for low, high in pairwise(outwards):
        left, right = cost_of(low), cost_of(high)
        if left is None or right is None or not min(left, right) <= kl <= max(left, right):
            continue
        part = (kl - left) / (right - left) if right != left else 0.0
        shifts = [point.shift.value if point.shift else 0.0 for point in (low, high)]
        sizes = [point.arm.multiplier for point in (low, high)]
        return sizes[0] + part * (sizes[1] - sizes[0]), shifts[0] + part * (shifts[1] - shifts[0])
    return None
