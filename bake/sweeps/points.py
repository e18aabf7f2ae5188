"""What a sweep says of one arm: figures with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bake.sweeps.arms import Arm


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """Return plain values; None for what is no number, which JSON cannot hold."""
        values = {"value": self.value, "low": self.low, "high": self.high}
        return {key: value if math.isfinite(value) else None for key, value in values.items()}


def in_short(interval: Interval | None) -> float | None:
    """Return an interval's figure, four digits of it; None for none, and for what is no number."""
    value = interval.to_dict()["value"] if interval else None
    return None if value is None else float(f"{value:.4g}")


@dataclass(frozen=True)
class Point:
    """What one arm does. Ratios are to the unsteered base; nats are per token; None: not measured.

    shift: mean over pairs of (log p(positive) − log p(negative)) per token, less the base's. gain: what the
    completions that the push is towards (the negative ones for m < 0) gain in log p per token. net_shift:
    the shift that way, less what those completions lose; it falls where text comes apart, while the
    difference between two completions that both become unlikely still grows. accuracy:
    share of pairs whose positive completion is the likelier. target_share: of the words of sampled
    text; target_ratio is None where the base never writes one. fluency: perplexity of sampled text
    under the base. repetition: share of 3-grams that occurred before in their text. on_axis, opposite,
    neutral: perplexity of those texts under the arm. neutral_kl, rollout_kl: {mean, p95, p99}.
    score: a scorer's mean, judged: a judge's, from 0 to 10.
    """

    arm: Arm
    shift: Interval | None = None
    gain: Interval | None = None
    net_shift: Interval | None = None
    accuracy: Interval | None = None
    on_axis_ratio: Interval | None = None
    opposite_ratio: Interval | None = None
    neutral_ratio: Interval | None = None
    neutral_kl: Mapping[str, Interval] = field(default_factory=dict)
    target_share: Interval | None = None
    target_ratio: Interval | None = None
    fluency: Interval | None = None
    fluency_ratio: Interval | None = None
    repetition: Interval | None = None
    rollout_kl: Mapping[str, Interval] = field(default_factory=dict)
    score: Interval | None = None
    judged: Interval | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `report.json`."""
        values: dict[str, Any] = self.arm.to_dict()
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, Interval):
                values[name] = value.to_dict()
            elif isinstance(value, Mapping):
                values[name] = {key: entry.to_dict() for key, entry in value.items()}
        return values


ROW = ("arm", "shift [95 %]", "pairs", "words", "text's ppl", "neutral ppl", "KL p95", "repeats")


def row_of(point: Point) -> tuple[str, ...]:
    """Return a point as the cells of a table with the columns ROW; "-" for what was not measured."""

    def ratio(value: Interval | None) -> str:
        return f"× {value.value:.3g}" if value else "-"

    shift, accuracy, share = point.shift, point.accuracy, point.target_share
    words = f"{share.value:.1%}" if share else "-"  # Where the base writes none, there is no ratio.
    return (
        point.arm.name,
        f"{shift.value:+.3f} [{shift.low:+.3f}, {shift.high:+.3f}]" if shift else "-",
        f"{accuracy.value:.0%}" if accuracy else "-",
        ratio(point.target_ratio) if point.target_ratio else words,
        ratio(point.fluency_ratio),
        ratio(point.neutral_ratio),
        f"{point.neutral_kl['p95'].value:.3f}" if point.neutral_kl else "-",
        f"{point.repetition.value:.1%}" if point.repetition else "-",
    )
