"""How far to push for a given cost: KL on neutral text over the strength, from a few measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

BEYOND = 1e6  # nats, for a divergence that is no number: a push from which nothing comes back


def cost_of(divergences: Sequence[Sequence[float]]) -> float:
    """Return the 95th percentile of KL at every place of every text, nats; always a number."""
    import numpy as np

    values = np.concatenate([np.asarray(text, dtype=float) for text in divergences])
    return float(np.quantile(np.nan_to_num(values, nan=BEYOND, posinf=BEYOND), 0.95))


def cross(costs: Mapping[float, float], target: float) -> float:
    """Return the |m| at which KL reaches the target: on the line through the nearest two, log m and log KL.

    costs: {|m|: KL}. KL grows about as m² for a small push and slower for a large one, so beyond what was
    measured the line is neither flatter nor steeper than such growth.
    """
    goal = math.log(target)
    known = [(math.log(m), math.log(max(cost, 1e-9))) for m, cost in sorted(costs.items())]
    below = [point for point in known if point[1] <= goal]
    above = [point for point in known if point[1] > goal]
    if below and above:
        (low, left), (high, right) = below[-1], above[0]
        return math.exp(low + (goal - left) / (right - left) * (high - low))
    start, cost = below[-1] if below else above[0]
    slope = 2.0
    if len(known) > 1:
        (low, left), (high, right) = known[-2:] if below else known[:2]
        slope = min(max((right - left) / (high - low), 0.5), 4.0)
    return math.exp(start + (goal - cost) / slope)


def shorten(size: float) -> float:
    """Round a positive number down to two digits."""
    unit = 10.0 ** (math.floor(math.log10(size)) - 1)
    return float(f"{math.floor(size / unit + 1e-9) * unit:.2g}")
