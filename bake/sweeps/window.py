"""The operating window: the strengths whose cost stays within bounds, and the best of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bake.proof.cost import MOST_KL
from bake.sweeps.points import Interval, Point


@dataclass(frozen=True)
class Bounds:
    """What a push may cost: sampled text's perplexity ratio; 95th percentile KL on neutral text, nats."""

    fluency: float = 1.5
    kl: float = MOST_KL


@dataclass(frozen=True)
class Window:
    """The multipliers of one sign whose intervals stay within the bounds, from 0 outwards without a gap.

    largest: the largest |m| measured inside, with its sign; None where even the smallest costs too
    much. best: the m in it with the largest net shift that way, or the largest where no shift was measured;
    None where no net shift inside has an interval above 0. reason: what ends the window.
    """

    sign: int
    largest: float | None
    best: float | None
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "text": self.describe()}

    def describe(self) -> str:
        """Return the window as a sentence."""
        name = "positive" if self.sign > 0 else "negative"
        if self.largest is None:
            return f"no {name} m is within the bounds: {self.reason}"
        best = (
            "no shift that way is distinguishable from none"
            if self.best is None
            else f"best shift at m = {self.best:+g}"
        )
        return f"{name} window: up to m = {self.largest:+g}, {best} ({self.reason})"


def find_windows(curve: Sequence[Point], bounds: Bounds) -> Iterator[Window]:
    """Yield the window of each sign that the curve has. curve: one variant's points and the base."""
    for sign in (-1, 1):
        outwards = sorted(
            (point for point in curve if point.arm.multiplier * sign > 0),
            key=lambda point: abs(point.arm.multiplier),
        )
        if not outwards:
            continue
        inside: list[Point] = []
        reason = "every strength that was measured is within the bounds"
        for point in outwards:
            exceeded = _exceeds(point, bounds)
            if exceeded:
                reason = f"m = {point.arm.multiplier:+g}: {exceeded}"
                break
            inside.append(point)
        best = max(
            (point for point in inside if moves(point)),
            key=lambda p: p.net_shift.value if p.net_shift else abs(p.arm.multiplier),
            default=None,
        )
        yield Window(
            sign,
            inside[-1].arm.multiplier if inside else None,
            best.arm.multiplier if best else None,
            reason,
        )


def moves(point: Point) -> bool:
    """Tell whether a push shifts pairs its way beyond doubt; one whose shift was not measured may."""
    return point.net_shift is None or point.net_shift.low > 0


def _exceeds(point: Point, bounds: Bounds) -> str | None:
    """Say which bound a point breaks, be it with the end of its interval; what is no number breaks it."""
    ratio = point.fluency_ratio
    if ratio is not None and not ratio.high <= bounds.fluency:
        found = f"× {ratio.value:.2f} {_interval(ratio)}"
        return f"sampled text's perplexity is {found} (bound {bounds.fluency:g})"
    kl = point.neutral_kl.get("p95")
    if kl is not None and not kl.high <= bounds.kl:
        found = f"{kl.value:.2f} {_interval(kl)} nats"
        return f"95th percentile KL on neutral text is {found} (bound {bounds.kl:g})"
    return None


def _interval(found: Interval) -> str:
    return f"[{found.low:.2f}, {found.high:.2f}]"
